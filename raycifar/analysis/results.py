"""The results of a comparison as a table in Markdown, with what it takes to reproduce each."""

from collections.abc import Mapping
from typing import Any

from raycifar.analysis.history import RunHistory
from raycifar.analysis.prose import to_command

HEADINGS = ("model", "n", "test top-1", "top-5", "loss", "epochs", "hardware", "seconds", "command")


def results_table(comparison: dict[str, Any], histories: Mapping[str, RunHistory]) -> str:
    """Return a row for each model: means over its seeds, with 95% intervals where there are several.

    Args:
        comparison: the content of `comparison.json`. histories: of its runs, by name.
    """
    rows = [HEADINGS, ["---"] * len(HEADINGS)]
    for name, model in comparison["models"].items():
        history = histories[model["runs"][0]]
        scores = [interval(model[score]) for score in ("top1", "top5", "loss")]
        command = f"`{to_command(history.run, 'train', history.recipe)}`"
        seeds = f", seeds {', '.join(map(str, model['seeds']))}"
        epochs = str(len(history.records))
        seconds = f"{sum(record.seconds for record in history.records):,.0f}"
        rows.append([name, str(model["top1"]["n"]), *scores, epochs, hardware(history.run), seconds, command + seeds])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def interval(score: dict[str, Any]) -> str:
    half = "" if score["low"] is None else f" ± {score['high'] - score['mean']:.4f}"
    return f"{score['mean']:.4f}{half}"


def hardware(run: dict[str, Any]) -> str:
    """Return what a run was trained on, in words: its workers, and the device or the threads of each."""
    device = f"{run['threads']}-thread CPU" if run["device"] == "cpu" else run["device"]
    return f"{run['workers']} × {device}" if run["workers"] else device
