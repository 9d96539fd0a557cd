"""What the doors share: their options, and the way they end."""

import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from raycifar.errors import RequestError, StorageError, WorkError

MOST_ELASTIC = 64  # workers; the images are cut wherever a shard of any of the numbers begins


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options, besides the recipe's, that `train` and `compare` share."""
    for option in reversed(
        (
            click.option("--data", envvar="RAYCIFAR_DATA", default="cifar100", help="cifar100, synthetic, path, URI."),
            click.option("--val-size", type=int, default=5000, help="Training images held out, as many of each class."),
            click.option("--limit", type=int, help="Use only so many training images, as many of each class."),
            click.option("--device", type=click.Choice(["auto", "gpu", "cpu"]), default="auto"),
            click.option(
                "--cpus-per-worker", type=click.FloatRange(min=0, min_open=True), help="CPUs, so threads.  [fair share]"
            ),
            click.option(
                "--storage",
                envvar="RAYCIFAR_STORAGE",
                default="results",
                help="Where runs are kept: a folder or a URI.",
            ),
            click.option("--max-failures", type=click.IntRange(min=0), default=3, help="Restarts after a worker died."),
            click.option(
                "--wait", type=click.FloatRange(min=0), default=1800, help="Seconds for nodes to come or to be free."
            ),
            click.option("--report/--no-report", default=True, help="Draw and explain the curves, also while it runs."),
            click.option("--compile", is_flag=True, help="Compile the model with torch.compile."),
        )
    ):
        command = option(command)
    return command


WorkerCount = int | tuple[int, int] | None


class WorkersOption(click.ParamType):
    """A number of workers, or from how many to how many."""

    name = "N|MIN:MAX"

    def convert(self, value: Any, param: Any, ctx: Any) -> WorkerCount:
        least, colon, most = str(value).partition(":")
        try:
            counts = (int(least), int(most)) if colon else (int(least), int(least))
        except ValueError:
            self.fail(f"{value!r} is neither a number of workers, such as 4, nor a range, such as 1:4.", param, ctx)
        if counts[0] < bool(colon) or counts[1] < counts[0]:
            self.fail(f"{value!r}: take 0 or more, or a range that begins at 1 or more and doesn't fall.", param, ctx)
        if colon and counts[1] > MOST_ELASTIC:
            self.fail(f"{value!r}: an elastic run takes at most {MOST_ELASTIC} workers.", param, ctx)
        return counts if counts[0] < counts[1] else counts[0]


def check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise RequestError(f"--name {name!r} is no folder's name: use letters, digits, '-', '_' and '.'.")


class Interrupted(BaseException):
    """Ctrl-C, or a job that is stopped."""


def command(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command its endings: 0 done, 1 failed, 2 wrong request, 130 interrupted; one sentence for each."""

    @click.option("--debug", is_flag=True, help="Show tracebacks, and all that Ray says.")
    @functools.wraps(command)
    def with_endings(debug: bool, **options: Any) -> None:
        def interrupt(number: int, frame: Any) -> None:
            raise Interrupted

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        try:
            command(debug=debug, **options)
            leave(0)
        except Interrupted:
            leave(130, "Interrupted.", quiet=not debug)
        except Exception as error:
            failure = error
        if debug:
            traceback.print_exception(failure)
        if isinstance(failure, click.ClickException):
            leave(failure.exit_code, f"Error: {failure.format_message()}")
        if isinstance(failure, RequestError | WorkError):
            leave(2 if isinstance(failure, RequestError) else 1, f"Error: {failure}")
        if isinstance(failure, StorageError):
            leave(1, f"Error: {failure}.")
        leave(1, f"Error: {type(failure).__name__}: {failure}. This is a defect; --debug shows where it arose.")

    return with_endings


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
        ray._private.auto_init_hook.enable_auto_connect = False  # else a thread that still works starts Ray anew
        ray.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
