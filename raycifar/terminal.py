"""Progress output: a live display in a terminal, plain lines elsewhere."""

import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from raycifar.cluster.status import Phase, StatusStore, StepStatus, WorkerStatus
from raycifar.errors import printable
from raycifar.redaction import shown
from raycifar.storage.records import EpochRecord
from raycifar.storage.remote import telling
from raycifar.workflows.trial import Trial, TrialStatus

POLL_SECONDS = 0.25
LINE_SECONDS = 30  # between two plain lines about the same step


class PlainConsole(Console):
    """Shows all text as it is: no markup, no emoji codes, no control characters are obeyed; without secrets.

    Raises:
        BrokenPipeError: nobody reads the output any more.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, force_jupyter=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(shown(text)), **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise


def replace_unencodable() -> None:
    """Have standard output and error write a question mark for what their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


class Screen:
    """Writes to standard output: live in a terminal, plain lines elsewhere, as in a notebook.

    Args:
        quiet: write nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        replace_unencodable()
        self.console = PlainConsole(quiet=quiet)
        self.console.soft_wrap = not self.console.is_terminal

    def say(self, text: str = "") -> None:
        self.console.print(text)

    def lines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.say(line)

    def facts(self, title: str, pairs: dict[str, str]) -> None:
        width = max(map(len, pairs))
        self.console.print(title, style="bold")
        self.lines(f"  {name:<{width}}  {value}" for name, value in pairs.items())

    @contextmanager
    def waiting(self, for_what: str) -> Iterator[None]:
        """Show what the program waits for, and how far it has come with what it reads from elsewhere."""
        if self.console.is_terminal:
            with (
                self.console.status(self.console.render_str(f"{for_what} …")) as status,
                telling(lambda text: status.update(self.console.render_str(f"{for_what}: {text} …"))),
            ):
                yield
            return
        line = PlainLine(self.say)
        line.show(for_what, None)
        with telling(lambda text: line.show(for_what, None, text)):
            yield

    @contextmanager
    def progress(self, doing: str) -> Iterator[Callable[[float], None]]:
        """Show work of a known length; yield a function that takes the fraction that is done."""
        if not self.console.is_terminal:
            self.say(f"{doing} …")
            yield lambda _: None
            return
        with Progress(TextColumn("{task.description}"), BarColumn(24), TimeRemainingColumn(), transient=True) as bar:
            task = bar.add_task(doing, total=1)
            yield lambda fraction: bar.update(task, completed=fraction)

    def follow(
        self,
        status_store: StatusStore,
        running: Callable[[], bool],
        epochs: int,
        waiting: Callable[[], str | None],
        refresh: Callable[[], None],
    ) -> None:
        """Show the run on `status_store` until it is no longer `running`.

        Args:
            waiting: returns what workers that haven't started wait for.
            refresh: called after each epoch.
        """
        failures, epoch, attempt, notices, model = 0, 0, None, 0, None
        with self.line() as line:
            while True:
                alive = running()  # before the status is read, so that the last one is shown
                told, status = status_store.failures(), status_store.worker() or WorkerStatus()
                self.lines(map(str, told[failures:]))
                failures = len(told)
                if status.model and status.model != model:
                    model = status.model
                    self.say(f"{model.parameters:,} parameters, {model.precision} on {model.device}")
                if status.attempt != attempt:
                    attempt, notices = status.attempt, 0
                self.lines(status.notices[notices:])
                notices = len(status.notices)
                for record in status_store.history():
                    if record.epoch > epoch:
                        epoch = record.epoch
                        self.say(epoch_line(record, epochs))
                        refresh()
                starting = alive and status.phase == Phase.STARTING
                line.show((waiting() if starting else None) or status.doing, status.step)
                if not alive:
                    return
                time.sleep(POLL_SECONDS)

    def follow_phase(
        self, status_store: StatusStore, running: Callable[[], bool], waiting: Callable[[], str | None]
    ) -> None:
        """Show the phase on `status_store` until the work is no longer `running`."""
        with self.line() as line:
            while running():
                status = status_store.worker() or WorkerStatus()
                line.show((waiting() if status.phase == Phase.STARTING else None) or status.doing, None)
                time.sleep(POLL_SECONDS)

    @contextmanager
    def line(self) -> Iterator["LiveLine | PlainLine"]:
        """Yield a progress display: a live bar in a terminal, plain lines elsewhere."""
        if not self.console.is_terminal:
            yield PlainLine(self.say)
            return
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self.console,
        )
        with Live(bar, console=self.console, transient=True, refresh_per_second=4):
            yield LiveLine(bar)

    def follow_trials(
        self, trials: Callable[[], Sequence[Trial]], running: Callable[[], bool], refresh: Callable[[], None]
    ) -> None:
        """Show the trials of a comparison until it is no longer `running`; call `refresh` at each update."""
        if self.console.is_terminal:
            with Live(console=self.console, transient=True, refresh_per_second=4) as live:
                while running():
                    live.update(trial_table(trials()))
                    refresh()
                    time.sleep(POLL_SECONDS)
            self.console.print(trial_table(trials()))
            return
        said: dict[str, list[str]] = {trial.name: [] for trial in trials() if trial.over}
        ended = set(said)  # before this command
        while True:
            alive = running()
            for trial in trials():
                known = said.setdefault(trial.name, [])
                for line in trial_lines(trial) if trial.name not in ended else ():
                    if line not in known:
                        known.append(line)
                        self.say(f"{trial.name}: {line}")
                if trial.over:
                    ended.add(trial.name)
            if not alive:
                return
            refresh()
            time.sleep(POLL_SECONDS)


class LiveLine:
    """A progress bar for the current epoch or phase."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task = bar.add_task("", metrics="", total=None)
        self.epoch = 0

    def show(self, doing: str, step: StepStatus | None) -> None:
        if step is None:
            self.bar.update(self.task, description=printable(shown(doing)), total=None, completed=0, metrics="")
            self.epoch = 0
            return
        if step.epoch != self.epoch:
            self.bar.reset(self.task, total=step.steps)
            self.epoch = step.epoch
        description = f"epoch {step.epoch}"
        self.bar.update(
            self.task, description=description, total=step.steps, completed=step.step, metrics=step_metrics(step)
        )


class PlainLine:
    """A line for each new phase, and every half minute while it lasts."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.doing, self.began, self.spoke = "", 0.0, 0.0

    def show(self, doing: str, step: StepStatus | None, so_far: str = "") -> None:
        now = time.monotonic()
        if doing != self.doing:
            self.doing, self.began, self.spoke = doing, now, now
            self.say(f"{doing} …")
        elif now - self.spoke >= LINE_SECONDS:
            self.spoke = now
            if step is None:
                self.say(f"{doing}: {so_far or f'{now - self.began:.0f} s so far'} …")
            else:
                left = seconds_left(step, step.epoch)
                self.say(f"epoch {step.epoch}, step {step.step}/{step.steps}: {step_metrics(step)}, {left:.0f} s left")


def trial_lines(trial: Trial) -> list[str]:
    """Return the messages about a trial so far, the oldest first."""
    if trial.status == TrialStatus.WAITING:
        return []
    store = trial.status_store
    lines = [f"running {trial.setting}".rstrip()]
    lines += [waiting] if (waiting := store.waiting()) else []
    lines += map(str, store.failures())
    lines += (store.worker() or WorkerStatus()).notices
    lines += [epoch_line(record, trial.recipe.epochs) for record in store.history()]
    if trial.over:
        lines.append(trial.status + (f": {trial.reason}" if trial.reason else ""))
    return lines


def trial_table(trials: Sequence[Trial]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("trial", "status", "epoch", "loss", "val top-1", "images/s", "time left"):
        table.add_column(heading, justify="left" if heading in ("trial", "status") else "right")
    for trial in trials:
        table.add_row(trial.name, *trial_cells(trial))
    return table


def trial_cells(trial: Trial) -> list[str]:
    """Return a trial's status, epoch, loss, validation top-1, images per second and time left."""
    if trial.status == TrialStatus.WAITING:
        return [trial.status]
    store, epochs = trial.status_store, trial.recipe.epochs
    status, history = store.worker(), store.history()
    if status is None:  # also for a trial that ended before this command
        return [trial.status if trial.over else store.waiting() or "starting"]
    step, newest = status.step, history[-1] if history else None
    loss = step.loss if step else newest and newest.train_loss
    speed = step.images_per_second if step else newest and newest.images_per_second
    return [
        trial.status if trial.over else status.doing,
        f"{step.epoch if step else len(history)}/{epochs}",
        "" if loss is None else f"{loss:.3f}",
        "" if newest is None or newest.val_top1 is None else f"{newest.val_top1:.4f}",
        f"{speed:,.0f}" if speed else "",
        "" if trial.over or step is None else str(timedelta(seconds=round(seconds_left(step, epochs)))),
    ]


def seconds_left(step: StepStatus, epochs: int) -> float:
    """Return the training time left to the end of `epochs`, without validation, at the current speed."""
    steps = (epochs - step.epoch + 1) * step.steps - step.step
    return steps * step.images_per_step / step.images_per_second


def step_metrics(step: StepStatus) -> str:
    return f"loss {step.loss:.3f}  top-1 {step.top1:.3f}  {step.images_per_second:,.0f} images/s"


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """Return the line of a finished epoch."""
    number = f"{record.epoch:>{len(str(epochs))}}/{epochs}"
    parts = [f"epoch {number}  loss {digits(record.train_loss)}  top-1 {digits(record.train_top1)}"]
    if record.val_top1 is not None:
        parts.append(
            f"validation loss {digits(record.val_loss)}  top-1 {digits(record.val_top1)}  "
            f"top-5 {digits(record.val_top5)}"
        )
    parts.append(f"lr {record.lr:.2g}  {record.images_per_second:,.0f} images/s  {record.seconds:.0f} s")
    return "  |  ".join(parts)


def digits(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
