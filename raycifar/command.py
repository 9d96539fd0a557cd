"""How a command ends: what its work raises, and the signals it is sent, become exit codes and a sentence each."""

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

from raycifar.errors import RequestError, StorageError, WorkError

UNTIL_EXIT = ExitStack()  # holds the connection to Ray, which `leave` ends


class Interrupted(BaseException):
    """Ctrl-C, or a job that is stopped."""


def command(work: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command its endings: 0 done, 1 failed, 2 wrong request, 130 interrupted; one sentence for each."""

    @click.option("--debug", is_flag=True, help="Show tracebacks, and all that Ray says.")
    @functools.wraps(work)
    def with_endings(debug: bool, **options: Any) -> None:
        def interrupt(number: int, frame: Any) -> None:
            raise Interrupted

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        if debug:
            logging.getLogger("raycifar").addHandler(logging.StreamHandler())
            logging.getLogger("raycifar").setLevel(logging.DEBUG)
        try:
            work(debug=debug, **options)
            leave(0)
        except Interrupted:
            leave(130, "Interrupted.", quiet=not debug)
        except Exception as error:
            if debug:
                traceback.print_exception(error)
            leave(*ending(error))

    return with_endings


def ending(error: Exception) -> tuple[int, str]:
    """Return the exit code and the sentence of a command that raised `error`."""
    match error:
        case click.ClickException():
            return error.exit_code, f"Error: {error.format_message()}"
        case RequestError():
            return 2, f"Error: {error}"
        case WorkError():
            return 1, f"Error: {error}"
        case StorageError():
            return 1, f"Error: {error}."
    return 1, f"Error: {type(error).__name__}: {error}. This is a defect; --debug shows where it arose."


def leave(code: int, sentence: str | None = None, *, quiet: bool = False) -> None:
    """Say how it ended, and end this process and what Ray has started for it, without waiting for a training thread.

    Args:
        quiet: without what Ray says of all that it could not finish.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sentence:
        click.echo(sentence, err=True)
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Ray's own core writes to the descriptor
    ray = sys.modules.get("ray")  # half imported, maybe, by another thread
    if ray and getattr(ray, "is_initialized", bool)():
        from raycifar.cluster import ray_internals

        ray_internals.forbid_auto_init()  # else a thread that still works starts Ray anew
        ray.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
