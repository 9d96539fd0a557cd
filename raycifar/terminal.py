"""What a run says: a calm screen at a terminal, plain lines anywhere else."""

import os
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

from raycifar.cluster.status import STARTING, StatusStore
from raycifar.workflows.trial import Trial

POLL_SECONDS = 0.25
LINE_SECONDS = 30  # between two lines about the same thing, where there is no terminal

Row = dict[str, Any]


class Screen:
    """Writes to standard output; lines are never wrapped where it is no terminal.

    Args:
        quiet: writes nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(highlight=False, soft_wrap=not os.isatty(1), quiet=quiet, force_jupyter=False)

    def say(self, text: str = "") -> None:
        self.console.print(text, markup=False)

    def lines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.say(line)

    def facts(self, title: str, pairs: dict[str, str]) -> None:
        width = max(map(len, pairs))
        self.console.print(title, style="bold", markup=False)
        self.lines(f"  {name:<{width}}  {value}" for name, value in pairs.items())

    @contextmanager
    def waiting(self, for_what: str) -> Iterator[None]:
        """Say what is being waited for, while it is."""
        if self.console.is_terminal:
            with self.console.status(f"{for_what} …"):
                yield
        else:
            self.say(f"{for_what} …")
            yield

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
            waiting: says what workers that have yet to start wait for.
            refresh: called when an epoch is over.
        """
        attempt, notices, failures, shown, described = None, 0, 0, 0, None
        with self.line() as line:
            while True:
                alive = running()  # asked first: what the status store holds after the end is still shown
                content = status_store.get("worker") or {"attempt": None, "phase": STARTING}
                told = status_store.get("failures") or []
                for failure in told[failures:]:
                    self.say(failure)
                failures = len(told)
                if content["attempt"] != attempt:
                    attempt, notices = content["attempt"], 0
                if (about := content.get("about")) and about != described:
                    self.say(f"{about['parameters']:,} parameters, {about['precision']} on {about['device']}")
                    described = about
                for notice in content.get("notices", [])[notices:]:
                    self.say(notice)
                notices = len(content.get("notices", []))
                for row in content.get("history", []):
                    if row["epoch"] > shown:
                        self.say(epoch_line(row, epochs))
                        shown = row["epoch"]
                        refresh()
                phase = content["phase"]
                if alive and phase == STARTING:
                    phase = waiting() or phase
                line.show(phase, content.get("step"))
                if not alive:
                    return
                time.sleep(POLL_SECONDS)

    def follow_phase(
        self, status_store: StatusStore, running: Callable[[], bool], waiting: Callable[[], str | None]
    ) -> None:
        """Say what is being done, by the status store, until it is no longer `running`."""
        with self.line() as line:
            while running():
                phase = (status_store.get("worker") or {"phase": STARTING})["phase"]
                line.show((waiting() if phase == STARTING else None) or phase, None)
                time.sleep(POLL_SECONDS)

    @contextmanager
    def line(self) -> Iterator["LiveLine | PlainLine"]:
        """Give a line for what is under way: one that changes at a terminal, else one after the other."""
        if not self.console.is_terminal:
            yield PlainLine(self.say)
            return
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
        )
        with Live(bar, console=self.console, transient=True, refresh_per_second=4):
            yield LiveLine(bar)

    def follow_trials(
        self, tasks: Callable[[], Sequence[Trial]], running: Callable[[], bool], refresh: Callable[[], None]
    ) -> None:
        """Show the trials of a comparison until it is no longer `running`; call `refresh` at every look."""
        if self.console.is_terminal:
            with Live(console=self.console, transient=True, refresh_per_second=4) as live:
                while running():
                    live.update(trial_table(tasks()))
                    refresh()
                    time.sleep(POLL_SECONDS)
            self.console.print(trial_table(tasks()))
            return
        said: dict[str, list[str]] = {task.name: [] for task in tasks() if task.over}
        ended = set(said)  # before this command began
        while True:
            alive = running()
            for task in tasks():
                known = said.setdefault(task.name, [])
                for line in trial_lines(task) if task.name not in ended else ():
                    if line not in known:
                        known.append(line)
                        self.say(f"{task.name}: {line}")
                if task.over:
                    ended.add(task.name)
            if not alive:
                return
            refresh()
            time.sleep(POLL_SECONDS)


class LiveLine:
    """A progress bar for the epoch under way, or what is waited for."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task = bar.add_task("", figures="", total=None)
        self.epoch = 0

    def show(self, phase: str, step: Row | None) -> None:
        if step is None:
            self.bar.update(self.task, description=phase, total=None, completed=0, figures="")
            self.epoch = 0
            return
        if step["epoch"] != self.epoch:
            self.bar.reset(self.task, total=step["steps"])
            self.epoch = step["epoch"]
        self.bar.update(
            self.task,
            description=f"epoch {step['epoch']}",
            total=step["steps"],
            completed=step["step"],
            figures=figures(step),
        )


class PlainLine:
    """A line when something new begins, and every half minute while it lasts."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.phase, self.began, self.spoke = "", 0.0, 0.0

    def show(self, phase: str, step: Row | None) -> None:
        now = time.monotonic()
        if phase != self.phase:
            self.phase, self.began, self.spoke = phase, now, now
            self.say(f"{phase} …")
        elif now - self.spoke >= LINE_SECONDS:
            self.spoke = now
            if step is None:
                self.say(f"{phase}: {now - self.began:.0f} s so far …")
            else:
                left = (step["steps"] - step["step"]) * step["images_per_step"] / step["images_per_second"]
                self.say(
                    f"epoch {step['epoch']}, step {step['step']}/{step['steps']}: {figures(step)}, {left:.0f} s left"
                )


def trial_lines(task: Trial) -> list[str]:
    """Return what there is to say of a trial so far, oldest first."""
    if task.status == "waiting":
        return []
    lines = [f"running {task.setting}".rstrip()]
    content = task.status_store.get("worker") or {}
    lines += [waiting] if (waiting := task.status_store.get("waiting")) else []
    lines += task.status_store.get("failures") or []
    lines += content.get("notices", [])
    lines += [epoch_line(row, task.recipe.epochs) for row in content.get("history", [])]
    if task.over:
        lines.append(task.status + (f": {task.reason}" if task.reason else ""))
    return lines


def trial_table(tasks: Sequence[Trial]) -> Table:
    """Return the trials as they stand."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("trial", "status", "epoch", "loss", "val top-1", "images/s", "time left"):
        table.add_column(heading, justify="left" if heading in ("trial", "status") else "right")
    for task in tasks:
        content = (None if task.status == "waiting" else task.status_store.get("worker")) or {}
        history, step, epochs = content.get("history", []), content.get("step"), task.recipe.epochs
        doing = content.get("phase") or task.status_store.get("waiting") or "starting"
        cells = [task.name, task.status if task.over or task.status == "waiting" else doing]
        cells.append(f"{step['epoch'] if step else len(history)}/{epochs}" if content else "")
        newest = history[-1] if history else {}
        loss = step["loss"] if step else newest.get("train_loss")
        speed = step["images_per_second"] if step else newest.get("images_per_second")
        val = newest.get("val_top1")
        cells += ["" if loss is None else f"{loss:.3f}", "" if val is None else f"{val:.4f}"]
        cells.append(f"{speed:,.0f}" if speed else "")
        cells.append("" if task.over or step is None else duration(seconds_left(step, epochs)))
        table.add_row(*cells)
    return table


def seconds_left(step: Row, epochs: int) -> float:
    """Return how long training still takes, validation aside, at the speed of the epoch under way."""
    steps = (epochs - step["epoch"] + 1) * step["steps"] - step["step"]
    return steps * step["images_per_step"] / step["images_per_second"]


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def figures(step: Row) -> str:
    return f"loss {step['loss']:.3f}  top-1 {step['top1']:.3f}  {step['images_per_second']:,.0f} images/s"


def epoch_line(row: Row, epochs: int) -> str:
    """Return the line that stays of a finished epoch."""
    number = f"{row['epoch']:>{len(str(epochs))}}/{epochs}"
    parts = [f"epoch {number}  loss {row['train_loss']:.4f}  top-1 {row['train_top1']:.4f}"]
    if row["val_loss"] is not None:
        parts.append(f"validation loss {row['val_loss']:.4f}  top-1 {row['val_top1']:.4f}  top-5 {row['val_top5']:.4f}")
    parts.append(f"lr {row['lr']:.2g}  {row['images_per_second']:,.0f} images/s  {row['seconds']:.0f} s")
    return "  |  ".join(parts)
