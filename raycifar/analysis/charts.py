"""Charts as SVG text: they stand inside a page, take its ink and paper, and need no network.

Lines and texts are drawn in `currentColor`, so a page decides on light or dark. The two hues, blue and orange of
Okabe and Ito (2008), are told apart by people who don't see all colours, and differ in lightness for print.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"  # stands for currentColor until the SVG is written
BLUE, ORANGE = "#0072b2", "#e69f00"
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
