"""The curves as matplotlib figures, for notebooks; a report's are in `charts`."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot  # noqa: F401 (where a notebook learns to show figures)
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raycifar.analysis.charts import BLUE, ORANGE, SERIES

CURVES = {
    "loss": (("train_loss", "training", BLUE, "--"), ("val_loss", "validation", ORANGE, "-")),
    "top-1 accuracy": (("train_top1", "training", BLUE, "--"), ("val_top1", "validation", ORANGE, "-")),
    "learning rate": (("lr", None, BLUE, "-"),),
}


def plot_run(history: pd.DataFrame, title: str) -> Figure:
    """Return loss, accuracy and learning rate by epoch.

    Args:
        history: a row for each epoch, by its number.
    """
    figure, panels = build(title, list(CURVES))
    for axes, lines in zip(panels, CURVES.values(), strict=True):
        for column, label, color, style in lines:
            values = history[column].astype(float)
            if values.notna().any():
                axes.plot(values.index, values, color=color, linestyle=style, marker=".", label=label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    return figure


def plot_comparison(histories: Mapping[str, Sequence[pd.DataFrame]], title: str) -> Figure:
    """Return validation accuracy and training loss by epoch: the mean of each model's runs, and their range."""
    columns = {"validation top-1": "val_top1", "training loss": "train_loss"}
    figure, panels = build(title, list(columns))
    for axes, column in zip(panels, columns.values(), strict=True):
        for (model, runs), (color, style) in zip(histories.items(), SERIES * len(histories), strict=False):
            values = pd.concat([run[column].astype(float) for run in runs], axis=1)
            axes.plot(values.index, values.mean(axis=1), color=color, linestyle=style, label=model)
            axes.fill_between(values.index, values.min(axis=1), values.max(axis=1), color=color, alpha=0.2)
        axes.legend(frameon=False)
    return figure


def build(title: str, labels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.5 * len(labels), 3.4), layout="constrained")
    figure.suptitle(title)
    panels = list(figure.subplots(1, len(labels)))
    for axes, label in zip(panels, labels, strict=True):
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
