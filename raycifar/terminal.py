"""Progress output: a live display in a terminal, plain lines elsewhere."""

import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from raycifar.cluster.status import PartStatus, Phase, StatusStore, StepStatus, WorkerStatus
from raycifar.errors import printable
from raycifar.redaction import redact
from raycifar.storage.remote import telling
from raycifar.storage.schemas import EpochRecord
from raycifar.words import duration, time_of_day
from raycifar.workflows.trial import Trial, TrialStatus

POLL_SECONDS = 0.25
LINE_SECONDS = 30  # between two plain lines about the same work
MEASURED_SECONDS = 3  # of training, before its total time is predicted
LONG_SECONDS = 60  # left of a run; below, no time is predicted
STATUS_WIDTH = 27  # of the column in the table of trials
AROUND_TABLE = 7  # lines of a terminal beside the rows of trials
UNLIMITED = 100_000  # columns: in a file or a pipe, no line of a table is wrapped


class PlainConsole(Console):
    """Shows each text as it is, in a line: no markup, emoji code or control character is obeyed; without secrets.

    Raises:
        BrokenPipeError: nobody reads the output any more.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, force_jupyter=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(redact(text)).replace("\n", r"\n"), **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise


class PlainColumn(TextColumn):
    """A column of a progress bar, whose text is shown as `PlainConsole` shows it."""

    def __init__(self, text: str) -> None:
        super().__init__(text, markup=False)

    def render(self, task: Task) -> Text:
        return Text(printable(redact(super().render(task).plain)))


def replace_unencodable() -> None:
    """Make standard output and error write a question mark for characters that their encoding lacks."""
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
        if self.console.soft_wrap:
            self.console.width = UNLIMITED

    def say(self, text: str = "") -> None:
        self.console.print(text)

    def lines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.say(line)

    def facts(self, title: str, pairs: dict[str, str]) -> None:
        """Show values under a title; a value longer than a terminal's line is wrapped below its start."""
        self.console.print(title, style="bold")
        width = max(map(len, pairs))
        if not self.console.is_terminal:
            self.lines(f"  {name:<{width}}  {value}" for name, value in pairs.items())
            return
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, value in pairs.items():
            table.add_row(f"  {name:<{width}}", value)
        self.console.print(table)

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
        columns = (PlainColumn("{task.description}"), BarColumn(24), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
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
        failures, epoch, attempt, notices, model, ahead = 0, 0, None, 0, None, Ahead()
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
                    attempt, notices, ahead = status.attempt, 0, Ahead()
                self.lines(status.notices[notices:])
                notices = len(status.notices)
                for record in status_store.history():
                    if record.epoch > epoch:
                        epoch = record.epoch
                        self.say(epoch_line(record, epochs))
                        refresh()
                self.lines(ahead.say(status.step))
                starting = alive and status.phase == Phase.STARTING
                # The last epoch is told once its checkpoint is stored, while the test set is scored already.
                if status.phase != Phase.SCORING_TEST or epoch == epochs:
                    line.show((waiting() if starting else None) or status.doing, status.part or status.step)
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
                line.show((waiting() if status.phase == Phase.STARTING else None) or status.doing, status.part)
                time.sleep(POLL_SECONDS)

    @contextmanager
    def line(self) -> Iterator["LiveLine | PlainLine"]:
        """Yield a progress display: a live bar in a terminal, plain lines elsewhere."""
        if not self.console.is_terminal:
            yield PlainLine(self.say)
            return
        columns = (PlainColumn("{task.description}"), BarColumn(20), PlainColumn("{task.fields[metrics]}"))
        bar = Progress(*columns, console=self.console)
        with Live(bar, console=self.console, transient=True, refresh_per_second=4):
            yield LiveLine(bar)

    def follow_trials(
        self,
        trials: Callable[[], Sequence[Trial]],
        running: Callable[[], bool],
        refresh: Callable[[], None],
        seconds_left: Callable[[], float | None],
    ) -> None:
        """Show the trials of a comparison until it is no longer `running`.

        Args:
            refresh: called at each update.
            seconds_left: returns about how long all trials will take; None if that isn't known yet.
        """
        if self.console.is_terminal:
            with Live(console=self.console, transient=True, refresh_per_second=4) as live:
                while running():
                    shown_now = most_telling(trials(), self.console.height - AROUND_TABLE)
                    live.update(Group(trial_table(shown_now), study_line(trials(), seconds_left())))
                    refresh()
                    time.sleep(POLL_SECONDS)
            self.console.print(trial_table(trials()))
            return
        ended = {trial.name for trial in trials() if trial.over}  # before this command
        said: set[tuple[str, str]] = set()
        told = -1  # trials that were over when the time left was said
        while True:
            alive = running()
            for trial in [trial for trial in trials() if trial.name not in ended]:
                for line in trial_lines(trial):
                    if (trial.name, line) not in said:
                        said.add((trial.name, line))
                        self.say(f"{trial.name}: {line}")
                if trial.over:
                    ended.add(trial.name)
            if not alive:
                return
            left = seconds_left()
            if left is not None and left > LONG_SECONDS and told != len(ended):
                told = len(ended)
                self.say(study_line(trials(), left))
            refresh()
            time.sleep(POLL_SECONDS)


class Ahead:
    """Says once, after the first steps of an attempt, how long a run takes."""

    def __init__(self) -> None:
        self.first: tuple[float, StepStatus] | None = None
        self.told = False

    def say(self, step: StepStatus | None) -> list[str]:
        now = time.monotonic()
        if step is None or self.told:
            return []
        self.first = self.first or (now, step)
        if now - self.first[0] < MEASURED_SECONDS or step == self.first[1]:
            return []
        self.told = True
        if step.seconds_left < LONG_SECONDS:
            return []
        return [
            f"An epoch takes about {duration(step.seconds_of_epoch)}, scoring included; the run ends at about "
            f"{time_of_day(step.seconds_left)}, in {duration(step.seconds_left)}."
        ]


class LiveLine:
    """A progress bar for the current epoch or phase."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task = bar.add_task("", metrics="", total=None)

    def show(self, doing: str, at: StepStatus | PartStatus | None) -> None:
        show: dict[str, Any]
        match at:
            case StepStatus():
                show = {"description": step_name(at), "completed": at.step, "total": at.steps}
                show["metrics"] = f"{step_metrics(at)}  ends {time_of_day(at.seconds_left)}"
            case PartStatus():
                show = {"description": str(at), "completed": at.done, "total": at.total, "metrics": ""}
            case None:
                show = {"description": doing, "completed": 0, "total": None, "metrics": ""}
        self.bar.update(self.task, **show)


class PlainLine:
    """A line for each new phase, and every half minute while it lasts."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.doing, self.began, self.spoke = "", 0.0, 0.0

    def show(self, doing: str, at: StepStatus | PartStatus | None, so_far: str = "") -> None:
        now = time.monotonic()
        if doing != self.doing:
            self.doing, self.began, self.spoke = doing, now, now
            self.say(f"{doing} …")
        elif now - self.spoke >= LINE_SECONDS:
            self.spoke = now
            match at:
                case StepStatus():
                    self.say(f"{step_name(at)}: {step_metrics(at)}, ends {time_of_day(at.seconds_left)}")
                case PartStatus():
                    self.say(f"{at} …")
                case None:
                    self.say(f"{doing}: {so_far or f'{now - self.began:.0f} s so far'} …")


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


def most_telling(trials: Sequence[Trial], count: int) -> list[Trial]:
    """Return the trials that there is room for, in their order: running ones first, then those that are over."""
    rank = {TrialStatus.RUNNING: 0, TrialStatus.WAITING: 2}
    names = [trial.name for trial in sorted(trials, key=lambda trial: rank.get(trial.status, 1))][: max(1, count)]
    return [trial for trial in trials if trial.name in names]


def study_line(trials: Sequence[Trial], seconds_left: float | None) -> str:
    """Return how many trials are over, and when all will be."""
    counts = [sum(trial.status == status for trial in trials) for status in (TrialStatus.RUNNING, TrialStatus.WAITING)]
    over = f"{len(trials) - sum(counts)} of {len(trials)} trials are over, {counts[0]} running, {counts[1]} waiting"
    if seconds_left is None:
        return f"{over}."
    return f"{over}; all end at about {time_of_day(seconds_left)}, in {duration(seconds_left)}."


def trial_table(trials: Sequence[Trial]) -> Table:
    """Return where each trial stands; no column's width changes while they run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial", min_width=max((len(trial.name) for trial in trials), default=0))
    table.add_column("status", width=STATUS_WIDTH, no_wrap=True)
    for heading, width in (("epoch", 7), ("loss", 6), ("val top-1", 9), ("images/s", 8), ("time left", 11)):
        table.add_column(heading, justify="right", width=width, no_wrap=True)
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
    doing = store.waiting() if status.phase == Phase.STARTING else None
    step, newest = status.step, history[-1] if history else None
    loss = step.loss if step else newest and newest.train_loss
    speed = step.images_per_second if step else newest and newest.images_per_second
    return [
        trial.status if trial.over else status.part.what if status.part else doing or status.doing,
        f"{step.epoch if step else len(history)}/{epochs}",
        "" if loss is None else f"{loss:.3f}",
        "" if newest is None or newest.val_top1 is None else f"{newest.val_top1:.4f}",
        f"{speed:,.0f}" if speed else "",
        "" if trial.over or step is None else duration(step.seconds_left),
    ]


def step_name(step: StepStatus) -> str:
    return f"epoch {step.epoch}, step {step.step:,} of {step.steps:,}"


def step_metrics(step: StepStatus) -> str:
    return f"loss {step.loss:.3f}  top-1 {step.top1:.3f}  {step.images_per_second:,.0f} images/s"


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """Return the line of a finished epoch, which fits 100 columns."""
    number = f"{record.epoch:>{len(str(epochs))}}/{epochs}"
    parts = [f"epoch {number}  loss {digits(record.train_loss)}  top-1 {digits(record.train_top1)}"]
    if record.val_top1 is not None:
        parts.append(f"val loss {digits(record.val_loss)}  top-1 {digits(record.val_top1)}")
    parts.append(f"{record.images_per_second:,.0f} images/s  {record.seconds:,.0f} s")
    return " | ".join(parts)


def digits(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"
