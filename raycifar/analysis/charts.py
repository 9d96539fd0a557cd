"""Charts, as SVG text: they are embedded in a page, take its colors, and need no network.

Lines and texts are drawn in `currentColor`, so a page decides on light or dark. The hues have a contrast of 3:1 on both
(WCAG 2.2, 1.4.11). The first four are Okabe and Ito's (2008), which color-blind readers can tell apart; lines also
differ in their dashes, for print.
"""

import io
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import cycle
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from raycifar.analysis.curves import BLUE, ORANGE, Panel, panels
from raycifar.analysis.history import MAX_POINTS, RunHistory, thinned
from raycifar.storage.schemas import finite

INK = "#010203"  # stands for currentColor until the SVG is written
PLOT = "plot"  # of the area between the axes
GREEN, PURPLE = "#009e73", "#cc79a7"
COLORS, STYLES, MARKERS = (BLUE, ORANGE, GREEN, PURPLE, "#767676", "#a6761d"), ("-", "--", "-.", ":"), "osD^v"
TRANSPARENT_TO_ORANGE = LinearSegmentedColormap.from_list("", [to_rgba(ORANGE, 0), to_rgba(ORANGE, 1)])
COMPARED = {"val_top1": "validation accuracy", "val_loss": "validation loss", "train_loss": "training loss"}
FEW_RUNS = 3  # are drawn one by one
MAX_ROWS = 20  # of a chart
WORD_HEIGHT, CHARACTER_WIDTH = 0.07, 0.014  # of a mark's word, as fractions of its axes
LONG_NAME = 24  # characters: of a model that is named with its recipe
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a name may hold dollar signs
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
Groups = Mapping[str, Sequence[np.ndarray]]  # the curves (epochs,) of each model's runs


def to_svg(figure: Figure, description: str, figures: dict[str, Any] | None = None) -> str:
    """Return the figure as an SVG element with a text alternative.

    Args:
        figures: what it draws, for a page to show by pointer and keyboard and to save: see `values_of` and
            `confusion_chart`.
    """
    stream = io.StringIO()
    with rc_context({"svg.hashsalt": description}):  # equal charts, equal bytes; and no id twice on a page
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    attributes = f'role="img" aria-label="{escape(description)}"'
    if figures:
        attributes += f' data-figures="{escape(json.dumps(finite(figures), separators=(",", ":")))}"'
    return svg.replace(f'id="{PLOT}"', f'class="{PLOT}"').replace("<svg", f"<svg {attributes}", 1)


def values_of(axes: Axes, xlabel: str, x: Iterable[float], series: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return what a page needs to show a chart's values.

    Args:
        x: (n,) positions on the axis that `options["along"]` names, by default "x". series: (n,) values by name.
        options: names (n,) are shown instead of positions.
    """
    axes.patch.set_gid(PLOT)
    axis = axes.yaxis if options.get("along") == "y" else axes.xaxis

    def rounded(values: Iterable[float]) -> list[float]:
        return [float(f"{value:.6g}") for value in values]

    return {
        "xlabel": xlabel,
        "x": rounded(x),
        "range": [float(end) for end in axis.get_view_interval()],
        "log": axis.get_scale() == "log",
        "series": {name: rounded(values) for name, values in series.items()},
    } | options


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def label_epochs(axes: Axes, ylabel: str) -> None:
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))


def legend_above(axes: Axes, lines: Sequence[Line2D] | None = None, lift: float = 0.0) -> None:
    """Put a legend above the axes: inside, it would hide a part of the curves.

    Args:
        lines: those to name; by default all that have a label, except labels that begin with "_".
        lift: of the legend, as a fraction of the axes' height.
    """
    handles: Sequence[Any] = axes.get_legend_handles_labels()[0] if lines is None else lines
    columns = 2 if max((len(handle.get_label()) for handle in handles), default=0) <= LONG_NAME else 1
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1 + lift), ncols=columns)


def plain_number(value: float, position: float = 0) -> str:
    """Return a tick's label; Matplotlib gives its position, too."""
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value:,.6g}"


def plain_log(axes: Axes, axis: str) -> None:
    """Make an axis, "x" or "y", logarithmic, with ticks that read 2.4, 30, 5,000 or 2 M."""
    axes.set(**{f"{axis}scale": "log"})
    scale = axes.xaxis if axis == "x" else axes.yaxis
    low, high = scale.get_view_interval()
    subs = (1.0, 3.0) if high < 1000 * low else (1.0,)
    scale.set_major_locator(MaxNLocator(nbins=4) if high < 10 * low else LogLocator(subs=subs, numticks=6))
    scale.set_major_formatter(plain_number)
    scale.set_minor_formatter(NullFormatter())


# Curves ---------------------------------------------------------------------------------------------


def draw_panel(axes: Axes, panel: Panel) -> None:
    label_epochs(axes, panel.ylabel)
    for line, marker in zip(panel.lines, MARKERS, strict=False):
        shown = thinned(len(line.values))
        marker = marker if np.isfinite(line.values).sum() < 2 else ""
        epochs, values = panel.epochs[shown], line.values[shown]
        width = 1.8 if len(line.values) < MAX_POINTS else 0.8
        axes.plot(epochs, values, line.style, color=line.color, marker=marker, linewidth=width, label=line.label)
        if panel.fill:
            axes.fill_between(epochs, 0, values, color=line.color, alpha=0.15, linewidth=0)
    if panel.log:
        plain_log(axes, "y")
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    left, right = axes.get_xlim()
    ends: list[float] = []  # of each row of words
    for epoch, word in panel.marks:
        axes.axvline(epoch, color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
        half = len(word) * CHARACTER_WIDTH * (right - left) / 2
        row = next((row for row, end in enumerate(ends) if end < epoch - half), len(ends))
        ends[row : row + 1] = [epoch + half]
        place = (epoch, 1 + WORD_HEIGHT * row)
        axes.annotate(word, place, xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7)
    if len(panel.lines) > 1:
        legend_above(axes, lift=WORD_HEIGHT * len(ends))


@rc_context(STYLE)
def curve_chart(panel: Panel) -> str:
    figure, axes = new_axes(4.7, 2.9)
    draw_panel(axes, panel)
    shown = thinned(len(panel.epochs))
    series = {line.label: line.values[shown] for line in panel.lines}
    return to_svg(figure, panel.description, values_of(axes, "epoch", panel.epochs[shown], series))


class NotebookFigure(Figure):
    """A figure that a notebook shows, also where pyplot has not been imported."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png", dpi=120)
        return stream.getvalue()


def new_grid(panels: int, title: str | None) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, one for each panel, two in a row."""
    rows = -(-panels // 2)
    figure = NotebookFigure(figsize=(10, 3.3 * max(1, rows)), layout="constrained", facecolor="white")
    figure.suptitle(title or "")
    return figure, [figure.add_subplot(rows, 2, k + 1) for k in range(panels)]


@rc_context(STYLE)
def plot_history(history: RunHistory, title: str | None = None) -> Figure:
    """Return a figure of a run's accuracy, loss, generalization gap and learning rate by epoch."""
    drawn = panels(history)
    shown = [drawn[name] for name in ("top1", "loss", "gap", "lr") if name in drawn]
    figure, grid = new_grid(len(shown), title)
    for axes, panel in zip(grid, shown, strict=True):
        draw_panel(axes, panel)
    return figure


# Comparisons ----------------------------------------------------------------------------------------


def draw_bands(axes: Axes, groups: Groups, ylabel: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw the mean over seeds of each model's curve, and its runs: each of up to three, the range of more.

    Returns:
        The epochs that are drawn, and the models' means there.
    """
    label_epochs(axes, ylabel)
    longest = max((len(curve) for curves in groups.values() for curve in curves), default=0)
    shown, means, lines = thinned(longest), {}, []
    looks = zip(cycle(COLORS), cycle(STYLES), cycle(MARKERS), strict=False)
    for (model, curves), (color, style, marker) in zip(groups.items(), looks, strict=False):
        padded = [np.pad(curve, (0, longest - len(curve)), constant_values=np.nan) for curve in curves]
        values = np.stack(padded)[:, shown]
        with warnings.catch_warnings(action="ignore"):  # about epochs without values
            mean, low, high = np.nanmean(values, 0), np.nanmin(values, 0), np.nanmax(values, 0)
        point = marker if np.isfinite(mean).sum() < 2 else ""
        lines += axes.plot(shown + 1, mean, color=color, linestyle=style, marker=point, linewidth=1.8, label=model)
        if len(values) > FEW_RUNS:
            axes.fill_between(shown + 1, low, high, color=color, alpha=0.18, linewidth=0)
        elif len(values) > 1:
            axes.plot(shown + 1, values.T, color=color, marker=point, linewidth=0.6, alpha=0.6)
        means[model] = mean
    legend_above(axes, lines)
    return shown + 1, means


@rc_context(STYLE)
def bands(groups: Groups, ylabel: str, description: str) -> str:
    """Return the SVG of the models' curves; see `draw_bands`."""
    figure, axes = new_axes(4.7, 2.9)
    return to_svg(figure, description, values_of(axes, "epoch", *draw_bands(axes, groups, ylabel)))


@rc_context(STYLE)
def plot_comparison(groups: dict[str, list[RunHistory]], title: str | None = None) -> Figure:
    """Return a figure of the models' validation accuracy and training loss: means over the seeds, and ranges."""
    figure, grid = new_grid(2, title)
    for axes, column in zip(grid, ("val_top1", "train_loss"), strict=True):
        curves = {model: [run.column(column) for run in runs] for model, runs in groups.items() if runs}
        draw_bands(axes, curves, COMPARED[column])
    return figure


@rc_context(STYLE)
def scatter(models: Mapping[str, tuple[float, Sequence[float]]], xlabel: str, description: str) -> str:
    """Return test accuracy against a cost: a marker for the mean of each model, and a dot for each of its runs.

    Args:
        models: the cost of each, and its runs' accuracies.
    """
    figure, axes = new_axes(4.7, 2.9)
    axes.set(xlabel=xlabel, ylabel="test accuracy")
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    means = {model: float(np.mean(top1)) for model, (_, top1) in models.items()}
    for (model, (cost, top1)), color, marker in zip(models.items(), cycle(COLORS), cycle(MARKERS), strict=False):
        if len(top1) > 1:
            axes.plot([cost] * len(top1), top1, ".", color=color, markersize=5, alpha=0.7)
        axes.plot(cost, means[model], marker, color=color, markersize=7, label=model)
    axes.margins(0.25)
    plain_log(axes, "x")
    legend_above(axes)
    costs = [cost for cost, _ in models.values()]
    series = {xlabel: costs, "test accuracy": list(means.values())}
    return to_svg(figure, description, values_of(axes, "model", costs, series, names=list(models)))


@rc_context(STYLE)
def bars(
    rows: Sequence[tuple[str, float, float, float]], limit: tuple[str, float], xlabel: str, title: str, description: str
) -> str:
    """Return a bar for each name, its median with its range, beside a named limit.

    Args:
        rows: name, median, low and high of each.
    """
    figure, axes = new_axes(6.0, 1.3 + 0.38 * len(rows))
    names, medians, lows, highs = (list(column) for column in zip(*reversed(rows), strict=True))
    errors = [np.subtract(medians, lows), np.subtract(highs, medians)]
    axes.barh(names, medians, 0.6, color=BLUE, xerr=errors, error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2})
    axes.axvline(limit[1], color=ORANGE, linewidth=1.5, linestyle="--", label=limit[0])
    axes.set_yticks(names, [f"{name}: {median:,.0f}" for name, median in zip(names, medians, strict=True)])
    axes.set(xlabel=xlabel)
    axes.xaxis.set_major_formatter(plain_number)
    legend_above(axes)
    figure.suptitle(title, fontsize=10, y=1.02, va="bottom")
    return to_svg(figure, description)


@rc_context(STYLE)
def scaling(predicted: dict[int, float], measured: dict[int, tuple[float, float]], description: str) -> str:
    """Return the predicted rates by number of workers, with linear scaling and the measured rates.

    Args:
        measured: the slowest and the fastest of each.
    """
    figure, axes = new_axes(6.0, 3.2)
    counts, rates = list(predicted), list(predicted.values())
    axes.plot(counts, rates, "o-", color=BLUE, linewidth=1.8, label="predicted")
    ideal = [rates[0] * count / counts[0] for count in counts]
    axes.plot(counts, ideal, color=ORANGE, linewidth=1.5, linestyle="--", label="in proportion")
    lows, highs = (np.array(column) for column in zip(*measured.values(), strict=True))
    axes.errorbar(list(measured), highs, [highs - lows, 0 * highs], fmt="s", color=GREEN, label="measured")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, list(map(str, counts)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(plain_number)
    axes.set(xlabel="workers", ylabel="images per second")
    axes.set_ylim(bottom=0)
    legend_above(axes)
    return to_svg(figure, description)


@rc_context(STYLE)
def differences(pairs: Sequence[dict[str, Any]], description: str) -> str:
    """Return the difference of each pair of models with its interval, in points: of the 20 largest at most."""
    pairs = sorted(pairs, key=lambda pair: -abs(pair["difference"]))[:MAX_ROWS][::-1]  # the largest on top
    figure, axes = new_axes(4.7, 0.8 + 0.45 * len(pairs))
    for k, pair in enumerate(pairs):
        axes.plot([100 * pair["low"], 100 * pair["high"]], [k, k], color=BLUE, linewidth=1.8)
        axes.plot(100 * pair["difference"], k, "o", color=BLUE)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle="--")
    names = [f"{pair['a']} − {pair['b']}" for pair in pairs]
    axes.set_yticks(range(len(pairs)), [fill(name, 2 * LONG_NAME) for name in names])
    axes.set(xlabel="difference in test accuracy (points)", ylim=(-0.6, len(pairs) - 0.4))
    series = {key: [100 * pair[key] for pair in pairs] for key in ("difference", "low", "high")}
    rows = values_of(axes, "difference (points)", range(len(pairs)), series, names=names, along="y")
    return to_svg(figure, description, rows)


# The test set ---------------------------------------------------------------------------------------


@rc_context(STYLE)
def reliability_diagram(bins: Sequence[dict[str, Any]]) -> str:
    """Return accuracy against confidence, with the number of images of each bin."""
    filled = [b for b in bins if b["images"]]
    figure, axes = new_axes(4.2, 3.6)
    centers = [(b["from"] + b["to"]) / 2 for b in filled]
    widths = [b["to"] - b["from"] for b in filled]
    axes.bar(centers, [b["accuracy"] for b in filled], widths, color=BLUE, edgecolor="none", label="accuracy")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="perfectly calibrated")
    fraction = np.array([b["images"] for b in filled]) / sum(b["images"] for b in filled)
    axes.step(centers, fraction, where="mid", color=ORANGE, linewidth=1.5, label="fraction of images")
    axes.set(xlabel="confidence", ylabel="fraction", xlim=(0, 1), ylim=(0, 1))
    legend_above(axes)
    series = {"accuracy": [b["accuracy"] for b in filled], "images": [b["images"] for b in filled]}
    values = values_of(axes, "confidence", centers, series)
    return to_svg(figure, "Reliability diagram: accuracy by confidence of the prediction", values)


@rc_context(STYLE)
def class_chart(rows: Sequence[dict[str, Any]]) -> str:
    """Return the accuracy of each class that has test images, the hardest first."""
    of_each = sorted((row["recall"], row["class"].replace("_", " ")) for row in rows if row["recall"] is not None)
    recall, names = zip(*of_each, strict=True)
    figure, axes = new_axes(7.2, 2.4)
    axes.bar(range(len(names)), recall, 0.8, color=BLUE)
    for end, anchor in ((0, "left"), (len(names) - 1, "right")):
        place = end, recall[-1]  # above all bars, or they hide the names
        axes.annotate(names[end], place, (0, 4), textcoords="offset points", ha=anchor)
    axes.set(xlabel="classes, from the hardest to the easiest", ylabel="accuracy", ylim=(0, 1), xticks=[])
    values = values_of(axes, "class", range(len(names)), {"accuracy": recall}, names=names)
    return to_svg(figure, "Accuracy of each class, from the hardest to the easiest", values)


@rc_context(STYLE)
def confusion_chart(matrix: np.ndarray, names: Sequence[str], kind: str = "superclass") -> str:
    """Return a confusion matrix: each row holds fractions of that class's images.

    Args:
        kind: what the names are of, "superclass" or "class".
    """
    fractions = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    many = len(names) > MAX_ROWS
    figure, axes = new_axes(10.4, 9.6) if many else new_axes(6.4, 5.6)
    image = axes.imshow(fractions, cmap=TRANSPARENT_TO_ORANGE, vmin=0, vmax=max(0.5, float(fractions.max())))
    words, size = [name.replace("_", " ") for name in names], 5.0 if many else 9.0
    slant: Any = {"rotation": 90, "va": "center_baseline"} if many else {"rotation": 60, "va": "top"}
    axes.set_xticks(range(len(names)), words, fontsize=size, ha="right", rotation_mode="anchor", **slant)
    axes.set_yticks(range(len(names)), words, fontsize=size)
    axes.set(xlabel=f"predicted {kind}", ylabel=f"true {kind}")
    axes.patch.set_gid(PLOT)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label(f"fraction of the {kind}'s images")
    return to_svg(figure, f"Confusion matrix of the {kind}es", {"names": words, "matrix": matrix.tolist()})


@rc_context(STYLE)
def corruption_chart(corruptions: dict[str, dict[str, Any]]) -> str:
    """Return the accuracy by corruption, the hardest first, and severity."""
    ranked = sorted(corruptions, key=lambda name: -corruptions[name]["error"])
    top1 = np.array([[row["top1"] for row in corruptions[name]["severities"]] for name in ranked])
    figure, axes = new_axes(5.0, 1.1 + 0.27 * len(ranked))
    axes.imshow(1 - top1, cmap=TRANSPARENT_TO_ORANGE, vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*top1.shape):
        axes.text(column, row, f"{top1[row, column]:.2f}", ha="center", va="center")
    axes.set_xticks(range(top1.shape[1]), [str(k + 1) for k in range(top1.shape[1])])
    axes.set_yticks(range(len(ranked)), [name.replace("_", " ") for name in ranked])
    axes.set(xlabel="severity")
    return to_svg(figure, "Accuracy by corruption, from the hardest to the easiest, and severity")
