"""Exit codes of commands: errors and signals become a code and a sentence each."""

import logging
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Thread
from typing import Any

import click
from click.core import ParameterSource

from raycifar.errors import RayDiedError, RequestError, ResumableError, StorageError, WorkError, in_a_line, printable
from raycifar.redaction import redact
from raycifar.storage.remote import telling
from raycifar.terminal import PlainLine, replace_unencodable

CLOSED_OUTPUT = 128 + 13  # as of a program that SIGPIPE ends
UNTIL_EXIT = ExitStack()  # holds the connection to Ray; never closed, for `leave` ends Ray and the process
SIGNALS = (signal.SIGINT, signal.SIGTERM)
MAY_BE_EMPTY = ("progressive",)  # then all steps have images of one size
APART_SECONDS = 0.5  # between two signals of the user: `timeout` and `uv run` pass each on twice

replace_unencodable()


class WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; its notes are printed after the sentence."""


@contextmanager
def resumable(name: str) -> Iterator[None]:
    """Say how to continue after Ctrl-C, SIGTERM, a closed pipe or a failure that may be gone the next time."""
    how = f"To continue, give the same command with --name {name}"
    try:
        yield
    except BrokenPipeError as error:
        raise Interrupted(f"Interrupted: nobody reads the output. {how}") from error
    except Interrupted as interrupted:
        interrupted.add_note(how)
        raise
    except ResumableError as error:
        error.args = (f"{error} {how}.",)
        raise


def run_to_the_end(work: Callable[[], Any], context: click.Context) -> None:
    """Do a command's work, and exit with 0 (done), 1 (failed), 2 (wrong request) or 130 (interrupted)."""

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted("Interrupted.")

    for number in SIGNALS:
        signal.signal(number, interrupt)
    end_at_second_signal()
    if debug := context.params["debug"]:
        handler = logging.StreamHandler()
        handler.setFormatter(WithoutSecrets())
        logging.getLogger("raycifar").addHandler(handler)
        logging.getLogger("raycifar").setLevel(logging.DEBUG)
    line = PlainLine(lambda text: click.echo(printable(text), err=True))
    try:
        refuse_empty(context)
        with telling(lambda text: line.show("Waiting for the storage", None, text)):
            work()
        leave(0)
    except Interrupted as interrupted:
        leave(130, str(interrupted), getattr(interrupted, "__notes__", []), quiet=not debug)
    except BrokenPipeError:
        leave(CLOSED_OUTPUT)
    except Exception as error:
        if debug:
            click.echo(printable(redact("".join(traceback.format_exception(error)))), err=True)
        leave(*ending(error), quiet=isinstance(error, RayDiedError) and not debug)


def refuse_empty(context: click.Context) -> None:
    """Raise RequestError if an option or argument is given and empty, as a shell's unset variable is."""
    for parameter in context.command.params:
        values, given = context.params.get(parameter.name or ""), context.get_parameter_source(parameter.name or "")
        if parameter.name in MAY_BE_EMPTY or given is not ParameterSource.COMMANDLINE:
            continue
        if "" in (values if isinstance(values, tuple) else (values,)):
            is_option = isinstance(parameter, click.Option)
            name = parameter.opts[0] if is_option else parameter.make_metavar(context).strip("[.]")
            raise RequestError(f"{name} is empty: give a value, or leave it out.")


def end_at_second_signal() -> None:
    """Exit with 130 at the second Ctrl-C or SIGTERM, also while the main thread is inside a library call.

    Python's handlers wait for the main thread to come back; this file descriptor is written to at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        first = math.inf
        while number := os.read(reader, 1):
            if number[0] in SIGNALS:
                first = min(first, time.monotonic())
                if time.monotonic() - first > APART_SECONDS:
                    os._exit(130)

    Thread(target=watch, daemon=True).start()


def ending(error: Exception) -> tuple[int, str]:
    """Return the exit code and the sentence of a command that raised `error`."""
    match error:
        case click.ClickException():
            return error.exit_code, redact(f"Error: {error.format_message()}")
        case RequestError():
            return 2, f"Error: {error}"
        case WorkError():
            return 1, f"Error: {error}"
        case StorageError():
            return 1, f"Error: {error}."
    if reason := reason_outside(error):
        return 1, redact(f"Error: {reason}. --debug shows where.")
    return 1, redact(f"Error: {type(error).__name__}: {error}. This is a bug; --debug shows the traceback.")


def reason_outside(error: Exception) -> str | None:
    """Return what is wrong if the program's surroundings caused the error; None for any other error, which is a bug."""
    match error:
        case OSError():
            return f"{error.filename}: {in_a_line(error)}" if error.filename else in_a_line(error)
        case ImportError():  # also `importlib.metadata.PackageNotFoundError`
            return f"a package is missing or damaged: {in_a_line(error)}"
        case UnicodeError():
            return f"a text isn't in the encoding that is expected here: {in_a_line(error)}"
        case MemoryError():
            return "memory ran out: ask for fewer images at once, or give the program more"
    if "home directory" in str(error):  # a RuntimeError of pathlib
        return f"{in_a_line(error)}: set HOME"
    return None


def leave(code: int, sentence: str | None = None, more: Iterable[str] = (), *, quiet: bool = False) -> None:
    """Print a sentence, and exit this process and its Ray without waiting for training threads.

    Args:
        more: lines to print to the output.
        quiet: suppress Ray's messages about interrupted work.
    """
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: None)  # and not SIG_IGN: the second one still ends it
    with suppress(BrokenPipeError):
        if sentence:
            click.echo(printable(sentence), err=True)
        for line in more:
            click.echo(printable(line))
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Ray's C++ core writes to the descriptor
    ray = sys.modules.get("ray")  # perhaps half imported by another thread
    if ray and getattr(ray, "is_initialized", bool)():
        from raycifar.cluster import ray_internals

        ray_internals.forbid_auto_init()  # a running thread would otherwise start Ray again
        ray.shutdown()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)
