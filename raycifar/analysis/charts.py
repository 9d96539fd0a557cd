"""Charts as SVG text: they stand inside a page, take its ink and paper, and need no network.

Lines and texts are drawn in `currentColor`, so a page decides on light or dark. The hues are Okabe and
Ito's (2008), told apart by people who don't see all colours; lines differ in their dashes too, for print.
"""

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#010203"  # stands for currentColor until the SVG is written
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#e69f00", "#009e73", "#cc79a7"
SERIES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"), ("#56b4e9", "-"), ("#d55e00", "--"))
MARKERS = "osD^vP"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}


def to_svg(figure: Figure, description: str) -> str:
    """Return the figure as an SVG element with a text alternative."""
    stream = io.StringIO()
    with rc_context({"svg.hashsalt": description}):  # equal charts, equal bytes; and no id twice on a page
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def draw(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def line_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))


def curves(
    lines: Sequence[tuple[str, np.ndarray, str, str]],
    ylabel: str,
    description: str,
    marks: Sequence[tuple[int, str]] = (),
    *,
    between: tuple[np.ndarray, np.ndarray] | None = None,
    log: bool = False,
    from_zero: bool = False,
) -> str:
    """Return figures by epoch.

    Args:
        lines: label, (epochs,) values, colour and line style of each.
        marks: epochs that are marked, each with a word.
        between: two lines, the area between which is tinted.
    """
    with rc_context(STYLE):
        figure, axes = draw(4.7, 2.9)
        line_axes(axes, "epoch", ylabel)
        for label, values, colour, style in lines:
            epochs = np.arange(1, len(values) + 1)
            single = "o" if np.isfinite(values).sum() < 2 else ""
            axes.plot(epochs, values, color=colour, linestyle=style, marker=single, linewidth=1.8, label=label)
        if between is not None:
            epochs = np.arange(1, len(between[0]) + 1)
            axes.fill_between(epochs, *between, color=ORANGE, alpha=0.15, linewidth=0)
        if log:
            axes.set_yscale("log")
        if from_zero:
            axes.set_ylim(bottom=0)
        for place, (epoch, word) in enumerate(marks):
            axes.axvline(epoch, color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
            axes.annotate(
                word,
                (epoch, 1.0 + 0.07 * (place % 2)),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=7,
            )
        if len(lines) > 1:
            axes.legend(loc="best")
        return to_svg(figure, description)


def bands(groups: dict[str, np.ndarray], ylabel: str, description: str) -> str:
    """Return the mean over seeds of each model's curve, with the range of its runs.

    Args:
        groups: (runs, epochs) by model, not a number where a run has no such epoch.
    """
    with rc_context(STYLE):
        figure, axes = draw(4.7, 2.9)
        line_axes(axes, "epoch", ylabel)
        for k, (model, values) in enumerate(groups.items()):
            epochs = np.arange(1, values.shape[1] + 1)
            colour, style = SERIES[k % len(SERIES)]
            with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
                mean, low, high = np.nanmean(values, 0), np.nanmin(values, 0), np.nanmax(values, 0)
            marker = "o" if values.shape[1] < 2 else ""
            axes.plot(epochs, mean, color=colour, linestyle=style, marker=marker, linewidth=1.8, label=model)
            axes.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.legend(loc="best")
        return to_svg(figure, description)


def scatter(models: dict[str, tuple[float, float, float | None, float | None]], xlabel: str, description: str) -> str:
    """Return test top-1 with its interval against a cost.

    Args:
        models: cost, mean, low and high of each.
    """
    with rc_context(STYLE):
        figure, axes = draw(4.7, 2.9)
        axes.set(xlabel=xlabel, ylabel="test top-1", xscale="log")
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        for k, (model, (cost, mean, low, high)) in enumerate(models.items()):
            colour, _ = SERIES[k % len(SERIES)]
            if low is not None and high is not None:
                axes.plot([cost, cost], [low, high], color=colour, linewidth=1.4)
            axes.plot(cost, mean, MARKERS[k % len(MARKERS)], color=colour, markersize=7)
            axes.annotate(model, (cost, mean), (7, 5), textcoords="offset points")
        axes.margins(0.25)
        return to_svg(figure, description)


def bars(rows: Sequence[tuple[str, float, float, float]], limit: float, xlabel: str, description: str) -> str:
    """Return a bar for each name, its median with least and most, beside a limit."""
    with rc_context(STYLE):
        figure, axes = draw(6.0, 0.9 + 0.38 * len(rows))
        names, medians, lows, highs = (list(column) for column in zip(*reversed(rows), strict=True))
        errors = [np.subtract(medians, lows), np.subtract(highs, medians)]
        axes.barh(names, medians, 0.6, color=BLUE, xerr=errors, error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2})
        axes.axvline(limit, color=ORANGE, linewidth=1.5, linestyle="--")
        for name, median in zip(names, medians, strict=True):
            axes.annotate(f" {median:,.0f}", (0, name), color="white", va="center")
        axes.set(xlabel=xlabel)
        return to_svg(figure, description)


def differences(pairs: Sequence[dict[str, Any]], description: str) -> str:
    """Return the difference of each pair of models with its interval, in points."""
    with rc_context(STYLE):
        figure, axes = draw(4.7, 0.8 + 0.45 * len(pairs))
        for k, pair in enumerate(reversed(pairs)):
            axes.plot([100 * pair["low"], 100 * pair["high"]], [k, k], color=BLUE, linewidth=1.8)
            axes.plot(100 * pair["difference"], k, "o", color=BLUE)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(pairs)), [f"{pair['a']} less {pair['b']}" for pair in reversed(pairs)])
        axes.set(xlabel="points of test top-1", ylim=(-0.6, len(pairs) - 0.4))
        return to_svg(figure, description)


def reliability_diagram(bins: Sequence[dict[str, Any]]) -> str:
    """Return accuracy against confidence, with the number of images of each bin."""
    with rc_context(STYLE):
        filled = [b for b in bins if b["images"]]
        figure, axes = draw(4.2, 3.6)
        centres = [(b["from"] + b["to"]) / 2 for b in filled]
        widths = [b["to"] - b["from"] for b in filled]
        axes.bar(centres, [b["accuracy"] for b in filled], widths, color=BLUE, edgecolor="none", label="accuracy")
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="perfectly calibrated")
        share = np.array([b["images"] for b in filled]) / sum(b["images"] for b in filled)
        axes.step(centres, share, where="mid", color=ORANGE, linewidth=1.5, label="share of images")
        axes.set(xlabel="confidence", ylabel="accuracy, share", xlim=(0, 1), ylim=(0, 1))
        axes.legend(loc="upper left")
        return to_svg(figure, "Reliability diagram: accuracy by confidence of the answer")


def class_chart(rows: Sequence[dict[str, Any]]) -> str:
    """Return the accuracy of each class, the hardest first."""
    with rc_context(STYLE):
        ranked = sorted(rows, key=lambda row: row["recall"] or 0.0)
        figure, axes = draw(7.2, 2.4)
        axes.bar(range(len(ranked)), [row["recall"] or 0.0 for row in ranked], 0.8, color=BLUE)
        for end, anchor in ((0, "left"), (len(ranked) - 1, "right")):
            axes.annotate(
                ranked[end]["class"].replace("_", " "),
                (end, ranked[end]["recall"] or 0.0),
                (0, 4),
                textcoords="offset points",
                ha=anchor,
            )
        axes.set(xlabel="classes, from the hardest to the easiest", ylabel="accuracy", ylim=(0, 1), xticks=[])
        return to_svg(figure, "Accuracy of each class, from the hardest to the easiest")


def confusion_chart(matrix: np.ndarray, names: Sequence[str]) -> str:
    """Return a confusion matrix, each row's shares of that class's images."""
    with rc_context(STYLE):
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        figure, axes = draw(6.4, 5.6)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=max(0.5, float(shares.max())))
        words = [name.replace("_", " ") for name in names]
        axes.set_xticks(range(len(names)), words, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), words)
        axes.set(xlabel="taken for", ylabel="superclass")
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
        bar.outline.set_visible(False)
        bar.set_label("share of the superclass's images")
        return to_svg(figure, "Confusion matrix of the superclasses")
