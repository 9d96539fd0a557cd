"""Charts: what they draw, that it is bounded, and what they say to those who can't see them."""

import io
import re
from html import unescape
from itertools import combinations, pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from histories import OVERFITS, made_up
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from raycifar.analysis import charts
from raycifar.analysis.charts import (
    MAX_ROWS,
    bands,
    bars,
    class_chart,
    confusion_chart,
    curve_chart,
    differences,
    draw_panel,
    plot_comparison,
    plot_history,
    reliability_diagram,
    scaling,
    scatter,
    thinned,
)
from raycifar.analysis.curves import MAX_MARKS, Line, Panel, panels
from raycifar.analysis.history import MAX_POINTS

WEIGHTS = (0.2126, 0.7152, 0.0722)  # of red, green and blue in luminance
HOSTILE = "\"><script>alert(1)</script> $a & b's$ _{"
PAIR = {"a": HOSTILE, "b": "b", "difference": 0.01, "low": -0.01, "high": 0.03}


RESTARTED = {"restarts": lambda e: 1}
DEAD = {
    "train_top1": lambda e: (0.005, 0.0055, 0.008, 0.005, 0.0065, 0.01)[e - 1],
    "train_eval_top1": lambda e: (0.01, 0.004, 0.012, 0.009, 0.01, 0.01)[e - 1],
    "val_top1": lambda e: 0.01,
}
FULL = {
    f"{name}{k}": np.random.default_rng(k).random((4, 50))
    for name in ("cnn", "cnn augment=trivial lr=0.02")
    for k in range(5)
}
BINS = [{"from": k / 15, "to": (k + 1) / 15, "images": 1, "accuracy": 1.0, "confidence": 1.0} for k in range(15)]
LEGENDS = {
    **{f"{n} epochs": lambda n=n: plot_history(made_up(n, **OVERFITS, **RESTARTED), "a") for n in (1, 2, 50)},
    "a dead network": lambda: curve_chart(panels(made_up(6, **DEAD))["top1"]),
    **{name: lambda n=name: curve_chart(panels(made_up(50, **RESTARTED))[n]) for name in ("top1", "norm")},
    "short names": lambda: bands({name: values for name, values in FULL.items() if len(name) < 9}, "y", "d"),
    "long names": lambda: bands(FULL, "y", "d"),
    "two models": lambda: plot_comparison({"cnn": [made_up(9)], "vgg16": [made_up(9)]}),
    "scatter": lambda: scatter({"cnn": (1.0, [0.4, 0.6]), "vgg16": (1.1, [0.5, 0.7])}, "x", "d"),
    "bars": lambda: bars([("bare", 10.0, 9.0, 11.0), ("train", 9.0, 8.0, 10.0)], ("limit", 10.0), "x", "title", "d"),
    "scaling": lambda: scaling({1: 100.0, 2: 200.0, 64: 200.0}, {1: (90.0, 95.0)}, "d"),
    "reliability": lambda: reliability_diagram(BINS),
}  # fmt: skip


def label_of(svg):
    return ElementTree.fromstring(svg).attrib["aria-label"]


def test_a_run_has_a_panel_for_each_curve_that_is_known():
    assert list(panels(made_up())) == ["top1", "loss", "gap", "lr", "norm", "speed"]
    assert list(panels(made_up(val=0, grad_norm=lambda e: None, grad_norm_max=lambda e: None))) == [
        "top1",
        "loss",
        "lr",
        "speed",
    ]
    labels = [line.label for line in panels(made_up())["top1"].lines]
    assert labels == ["training, as trained", "training, as validation", "validation"]


@pytest.mark.parametrize("epochs", [1, 2, 300])
def test_every_panel_becomes_an_svg_that_describes_itself(epochs):
    for panel in panels(made_up(epochs=epochs)).values():
        svg = curve_chart(panel)
        assert label_of(svg) == panel.description
        assert "currentColor" in svg
        assert "from " in panel.description


@pytest.mark.parametrize(
    "draw",
    [
        lambda: curve_chart(
            Panel([Line(HOSTILE, np.arange(3.0)), Line("b", np.ones(3))], HOSTILE, HOSTILE, [(2, HOSTILE)])
        ),
        lambda: bands({HOSTILE: np.ones((2, 3))}, HOSTILE, HOSTILE),
        lambda: scatter({HOSTILE: (1.0, [0.4, 0.6]), "b": (2.0, [0.5])}, HOSTILE, HOSTILE),
        lambda: differences([PAIR], HOSTILE),
    ],
)
def test_names_and_descriptions_are_text_and_nothing_else(draw):
    svg = draw()
    assert label_of(svg) == HOSTILE
    assert "<script" not in svg
    assert HOSTILE in unescape(svg)


def test_a_legend_names_runs_whose_name_begins_with_an_underscore():
    svg = bands({name: [np.arange(3.0)] for name in ("_a", "__b", "c")}, "y", "d")
    assert [name for name in ("_a", "__b", "c") if f">{name}</text>" in svg] == ["_a", "__b", "c"]


def test_long_curves_are_thinned_and_keep_their_ends():
    assert thinned(0).tolist() == []
    assert thinned(3).tolist() == [0, 1, 2]
    shown = thinned(100_000)
    assert len(shown) == MAX_POINTS
    assert (shown[0], shown[-1]) == (0, 99_999)
    long, short = (
        curve_chart(Panel([Line("a", np.random.default_rng(0).random(n))], "y", "d")) for n in (100_000, 1000)
    )
    assert len(long) < 1.2 * len(short)


@pytest.mark.parametrize("color", charts.COLORS)
@pytest.mark.parametrize("paper", ["#ffffff", "#14181c"])
def test_lines_have_the_contrast_that_wcag_asks_of_graphics(color, paper):
    def luminance(hue):
        return (
            np.where((rgb := np.array(to_rgb(hue))) <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ WEIGHTS
        )

    dark, light = sorted([luminance(color), luminance(paper)])
    assert (light + 0.05) / (dark + 0.05) >= 3


def test_marks_of_an_epoch_are_one_and_none_covers_another():
    rates = {"lr": lambda e: 0.01 * min(e, 7)}
    history = made_up(12, workers=lambda e: 4 if e > 3 else 2, restarts=lambda e: int(3 < e < 8), **rates)
    panel = panels(history)["loss"]
    assert panel.marks == [
        (4, "4 workers, restart"), (5, "restart"), (6, "restart"), (7, "restart, peak lr"), (12, "best")
    ]  # fmt: skip
    figure = Figure(figsize=(4.7, 2.9))
    axes = figure.subplots()
    draw_panel(axes, panel)
    figure.draw_without_rendering()
    boxes = [words.get_window_extent() for words in axes.texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_marks_and_rows_are_bounded():
    history = made_up(epochs=100, restarts=lambda e: 1, workers=lambda e: 1 + e % 2)
    assert len(panels(history)["loss"].marks) == MAX_MARKS
    many = differences([{**PAIR, "a": f"a{k}"} for k in range(100)], "many")
    assert len(re.findall(r"a\d+ − b<", many)) == MAX_ROWS


def test_the_figure_of_a_run_shows_four_panels_and_itself_in_a_notebook():
    figure = plot_history(made_up())
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy", "loss", "gap (points)", "learning rate"]
    assert len(figure.axes[0].lines) == 4  # three curves and the mark of the best epoch
    assert Image.open(io.BytesIO(figure._repr_png_())).size[0] == 1200
    assert len(plot_history(made_up(val=0)).axes) == 3


def test_the_figure_of_a_run_without_an_epoch_is_empty():
    assert plot_history(made_up(epochs=0, recipe={"epochs": 3})).axes == []


def test_the_charts_of_the_test_set():
    bins = [
        {"from": k / 15, "to": (k + 1) / 15, "images": k % 3, "accuracy": 0.5, "confidence": 0.5} for k in range(15)
    ]
    assert "perfectly calibrated" in reliability_diagram(bins)
    known = {"apple_tree": 0.0, "bee": None, "cattle": 0.4}
    svg = class_chart([{"class": name, "recall": recall} for name, recall in known.items()])
    assert "apple tree" in svg
    assert "bee" not in svg  # no image tells how hard it is
    assert "predicted superclass" in confusion_chart(np.array([[3, 1], [0, 0]]), ["fish", "large_man-made_things"])


def test_the_figure_of_a_comparison_has_a_line_for_each_model():
    figure = plot_comparison({"cnn": [made_up(epochs=3), made_up(epochs=5)], "vgg16": [made_up(epochs=5)]}, "c")
    assert [axes.get_ylabel() for axes in figure.axes] == ["validation accuracy", "training loss"]
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert [label for label in labels if not label.startswith("_")] == ["cnn", "vgg16"]
    assert len(labels) == 4  # the means, and the runs of the model that has two
    assert len(figure.axes[0].lines[0].get_xdata()) == 5


def test_the_figure_of_a_comparison_leaves_out_a_model_whose_runs_are_gone():
    figure = plot_comparison({"cnn": [], "vgg16": [made_up(epochs=3)]})
    assert [line.get_label() for line in figure.axes[0].lines] == ["vgg16"]


def test_ticks_of_logarithmic_axes_are_plain_numbers():
    for factor in (1, 100, 10_000):
        svg = curve_chart(
            Panel([Line("a", factor * np.array([2.4, 3.0, 3.6, 7.0])), Line("b", np.ones(4))], "y", "d", log=True)
        )
        assert "mathdefault" not in svg
        assert "10^" not in svg
        ticks = [float(text.replace(",", "")) for text in re.findall(r">([\d.,]+)</text>", svg)]
        assert any(tick >= factor for tick in ticks)


def test_one_epoch_is_drawn_as_points_that_can_be_told_apart():
    figure = plot_history(made_up(epochs=1))
    assert [line.get_marker() for line in figure.axes[0].lines[:3]] == ["o", "s", "D"]


@pytest.mark.parametrize("name", LEGENDS)
def test_no_legend_covers_what_is_drawn(name, monkeypatch):
    drawn, to_svg = [], charts.to_svg
    monkeypatch.setattr(charts, "to_svg", lambda figure, *rest: drawn.append(figure) or to_svg(figure, *rest))
    if isinstance(figure := LEGENDS[name](), Figure):
        drawn.append(figure)
    (figure,) = drawn
    figure.draw_without_rendering()
    legends = [(axes, axes.get_legend().get_window_extent()) for axes in figure.axes if axes.get_legend()]
    assert legends
    for axes, box in legends:
        for line in axes.lines:
            points = line.get_transform().transform(line.get_xydata())
            between = [np.linspace(a, b, 100) for a, b in pairwise(points)] or [points]
            assert not any(box.contains(*point) for point in np.concatenate(between))
        areas = [area.get_tightbbox() for area in (*axes.patches, *axes.collections, *axes.texts)]
        assert not any(box.overlaps(area) for area in areas if np.isfinite(area.get_points()).all())
