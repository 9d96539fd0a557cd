"""The results of a comparison as a table in Markdown, with what it takes to reproduce each."""

import re
from collections.abc import Mapping
from typing import Any

from raycifar.analysis.history import RunHistory
from raycifar.analysis.prose import to_command
from raycifar.models.recipes import options_for

HEADINGS = ("model", "n", "test top-1", "top-5", "loss", "epochs", "hardware", "seconds", "command")


def results_table(comparison: dict[str, Any], histories: Mapping[str, RunHistory]) -> str:
    """Return a row for each model: means over its seeds, with 95% intervals where there are several.

    Args:
        comparison: the content of `comparison.json`. histories: of its runs, by name.
    """
    rows = [HEADINGS, ["---"] * len(HEADINGS)]
    for name, model in comparison["models"].items():
        scores = [interval(model[score]) for score in ("top1", "top5", "loss")]
        rows.append([escaped(name), str(model["top1"]["n"]), *scores, *how(model, histories)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def how(model: dict[str, Any], histories: Mapping[str, RunHistory]) -> list[str]:
    """Return epochs, hardware, seconds and command of a model's first run that is there."""
    history = next((histories[run] for run in model["runs"] if run in histories), None)
    if history is None:
        return ["unknown"] * 4
    seconds = f"{sum(record.seconds for record in history.records):,.0f}"
    seeds = ", ".join(map(str, model["seeds"]))
    command = code(to_command(history.run, "train", options_for(history.model, history.recipe)))
    return [str(len(history.records)), escaped(hardware(history.run)), seconds, f"{command}, seeds {seeds}"]


def escaped(words: str) -> str:
    """Return words that Markdown shows as they are: no HTML, no link, no cell or line that ends early."""
    quoted = re.sub(r"[\[\]|]", r"\\\g<0>", " ".join(words.split()))
    return quoted.replace("&", "&amp;").replace("<", "&lt;")


def code(words: str) -> str:
    """Return words as code in a cell of a Markdown table, where only a bar has to be escaped."""
    line = " ".join(words.split()).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " * (line.startswith("`") or line.endswith("`"))  # which isn't shown
    return f"{fence}{space}{line}{space}{fence}"


def cells(model: dict[str, Any]) -> dict[str, str]:
    """Return a model's scores and costs in a comparison as they are shown, by heading."""
    return {
        "runs": str(model["top1"]["n"]),
        "test top-1": interval(model["top1"]),
        "test top-5": interval(model["top5"]),
        "test loss": interval(model["loss"]),
        "parameters": f"{model['parameters'] / 1e6:.1f} M",
        "GFLOPs": f"{model['flops'] / 1e9:.2f}",
        "images/s": f"{model['images_per_second']:,.0f}",
        "device-s": f"{model['device_seconds']:,.0f}",
        **({} if model["cost"] is None else {"cost": f"{model['cost']:.4g}"}),
    }


def interval(score: dict[str, Any]) -> str:
    half = "" if score["low"] is None else f" ± {score['high'] - score['mean']:.4f}"
    return f"{score['mean']:.4f}{half}"


def hardware(run: dict[str, Any]) -> str:
    """Return what a run was trained on, in words: its workers, and the device or the threads of each."""
    device = run["device"] or "unknown"
    if device == "cpu":
        device = f"{run['threads']}-thread CPU" if "threads" in run else "CPU"
    return f"{run['workers']} × {device}" if run["workers"] else device
