"""Which curves of a run are drawn, and what they show in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from raycifar.analysis.history import RunHistory
from raycifar.analysis.rules.generalization import generalization_gap
from raycifar.storage.schemas import sampled_steps
from raycifar.words import count

BLUE, ORANGE = "#0072b2", "#d55e00"
MAX_MARKS = 8


@dataclass(frozen=True)
class Line:
    """A curve: `values` (epochs,) is NaN where the value is unknown."""

    label: str
    values: np.ndarray
    color: str = BLUE
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """A chart of curves by epoch."""

    lines: Sequence[Line]
    ylabel: str
    description: str
    marks: Sequence[tuple[int, str]] = ()  # epochs with a word each
    fill: bool = False  # tint the area below the line
    log: bool = False
    from_zero: bool = False
    at: np.ndarray | None = None  # of the lines' values, in epochs since the beginning; None: at the end of each epoch

    @property
    def epochs(self) -> np.ndarray:
        return np.arange(1, len(self.lines[0].values) + 1) if self.at is None else self.at


def panels(history: RunHistory) -> dict[str, Panel]:
    """Return the charts of those of a run's curves that have values, by name, in reading order."""
    marked = marks(history)
    gap = Line("gap", 100 * generalization_gap(history)[0], ORANGE)
    lr = Line("learning rate", history.column("lr"))
    norm = Line("mean", history.column("grad_norm"))
    largest = Line("largest", history.column("grad_norm_max"), ORANGE, "--")
    speed = Line("speed", history.column("images_per_second"))
    every = {
        "top1": score_panel(history, "top1", "accuracy", marked),
        "loss": score_panel(history, "loss", "loss", marked),
        "steps": step_panel(history),
        "gap": Panel(
            [gap], "gap (points)", f"Training less validation accuracy, in points: {in_words(gap, 1)}.", fill=True
        ),
        "lr": Panel([lr], "learning rate", f"Learning rate by epoch: {in_words(lr, 5)}.", from_zero=True),
        "norm": Panel([norm, largest], "gradient norm", f"Gradient norm by epoch: {in_words(norm)}.", log=True),
        "speed": Panel(
            [speed], "images/s", f"Training images per second by epoch: {in_words(speed, 0)}.", from_zero=True
        ),
    }
    return {name: panel for name, panel in every.items() if any(np.isfinite(line.values).any() for line in panel.lines)}


def score_panel(history: RunHistory, score: str, word: str, marked: Sequence[tuple[int, str]]) -> Panel:
    lines = [
        Line("training, as trained", history.column(f"train_{score}"), style="--"),
        Line("training, as validation", history.column(f"train_eval_{score}")),
        Line("validation", history.column(f"val_{score}"), ORANGE),
    ]
    lines = [line for line in lines if np.isfinite(line.values).any()]
    words = " ".join(f"{line.label[:1].upper()}{line.label[1:]}: {in_words(line)}." for line in lines)
    return Panel(lines, word, f"{word.capitalize()} by epoch. {words}", marked)


def step_panel(history: RunHistory) -> Panel:
    """Return the chart of the training loss of single steps, of 2,000 at most."""
    steps, epochs, losses = history.steps_per_epoch, [], []
    for record in history.records:
        taken = sampled_steps(record.epoch, steps, history.recipe.epochs)
        for step, loss in zip(taken, record.step_losses or [], strict=False):
            epochs.append(record.epoch - 1 + (step + 1) / steps)
            losses.append(np.nan if loss is None else loss)
    line = Line("training loss of a step", np.array(losses))
    return Panel([line], "loss", f"Training loss of single steps: {in_words(line)}.", at=np.array(epochs))


def in_words(line: Line, digits: int = 3) -> str:
    """Return where a curve starts and ends, and its extremes."""
    known = line.values[np.isfinite(line.values)]
    if not len(known):
        return "unknown"
    first, last, low, high = (f"{value:,.{digits}f}" for value in (known[0], known[-1], known.min(), known.max()))
    return f"from {first} to {last}, lowest {low}, highest {high}"


def marks(history: RunHistory) -> list[tuple[int, str]]:
    """Return what is marked, by epoch: the best, a new stage, new workers, restarts, the peak learning rate."""
    records, found = history.records, []
    if len(records) == 1 and not records[0].restarts:
        return []
    top1, lr = history.column("val_top1"), history.column("lr")
    if np.isfinite(top1).any():
        found.append((int(np.nanargmax(top1)) + 1, "best"))
    for before, record in pairwise(records):
        if record.stage != before.stage:
            found.append((record.epoch, "whole network"))
        if record.workers != before.workers:
            found.append((record.epoch, count(record.workers, "worker")))
    found += [(record.epoch, "restart") for record in records if record.restarts]
    if records and 1 < (peak := int(np.argmax(lr)) + 1) < len(records):
        found.append((peak, "peak lr"))
    words: dict[int, str] = {}
    for epoch, word in found:
        words[epoch] = f"{words[epoch]}, {word}" if epoch in words else word
    return sorted([*words.items()][:MAX_MARKS])
