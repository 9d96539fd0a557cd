"""Exit codes of commands: errors and signals become a code and a sentence each."""

import functools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import click

from raycifar.errors import RequestError, StorageError, WorkError, in_a_line
from raycifar.redaction import shown
from raycifar.storage.remote import telling
from raycifar.terminal import PlainLine

UNTIL_EXIT = ExitStack()  # holds the connection to Ray, which `leave` closes


class WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM."""


def command(work: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function a command that exits with 0 (done), 1 (failed), 2 (wrong request) or 130 (interrupted)."""

    @click.option("--debug", is_flag=True, help="Show tracebacks and Ray's log.")
    @functools.wraps(work)
    def with_endings(debug: bool, **options: Any) -> None:
        def interrupt(number: int, frame: Any) -> None:
            raise Interrupted

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        if debug:
            handler = logging.StreamHandler()
            handler.setFormatter(WithoutSecrets())
            logging.getLogger("raycifar").addHandler(handler)
            logging.getLogger("raycifar").setLevel(logging.DEBUG)
        line = PlainLine(lambda text: click.echo(text, err=True))
        try:
            with telling(lambda text: line.show("Waiting for the storage", None, text)):
                work(debug=debug, **options)
            leave(0)
        except Interrupted:
            leave(130, "Interrupted.", quiet=not debug)
        except Exception as error:
            if debug:
                click.echo(shown("".join(traceback.format_exception(error))), err=True)
            leave(*ending(error))

    return with_endings


def ending(error: Exception) -> tuple[int, str]:
    """Return the exit code and the sentence of a command that raised `error`."""
    match error:
        case click.ClickException():
            return error.exit_code, shown(f"Error: {error.format_message()}")
        case RequestError():
            return 2, f"Error: {error}"
        case WorkError():
            return 1, f"Error: {error}"
        case StorageError():
            return 1, f"Error: {error}."
    if reason := reason_outside(error):
        return 1, shown(f"Error: {reason}. --debug shows where.")
    return 1, shown(f"Error: {type(error).__name__}: {error}. This is a bug; --debug shows the traceback.")


def reason_outside(error: Exception) -> str | None:
    """Return, of an error that the program's surroundings cause, what is wrong; None of any other, which is a bug."""
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


def leave(code: int, sentence: str | None = None, *, quiet: bool = False) -> None:
    """Print a sentence, and exit this process and its Ray without waiting for training threads.

    Args:
        quiet: suppress Ray's messages about interrupted work.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends what still goes on here at once
    if sentence:
        click.echo(sentence, err=True)
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Ray's C++ core writes to the descriptor
    ray = sys.modules.get("ray")  # perhaps half imported by another thread
    if ray and getattr(ray, "is_initialized", bool)():
        from raycifar.cluster import ray_internals

        ray_internals.forbid_auto_init()  # a running thread would otherwise start Ray again
        ray.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
