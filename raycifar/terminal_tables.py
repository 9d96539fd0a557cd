"""Tables of results for a terminal."""

from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from raycifar.models.recipes import NamedRecipe
from raycifar.words import duration
from raycifar.workflows.inventory import OVER, Entry, State

OF_SCORES = 4  # of a comparison's columns, which come first
GAP = 3  # between two columns of a table; its edges have two in all
# Columns that a narrow terminal leaves out, the first ones first.
LESS_OF_RUNS = ("val top-1", "time", "epochs", "model", "test top-1", "state")
LESS_OF_RECIPES = ("epochs", "for")
SPEEDRUN_ROWS = {  # with their digits
    "top1": ("top-1, one view", 4),
    "top1_flip": ("top-1, with the mirror image", 4),
    "seconds": ("seconds by the public clock", 3),
    "whole_seconds": ("seconds with scoring", 3),
}


def new_table(texts: Sequence[str], numbers: Sequence[str] = (), more: Sequence[str] = ()) -> Table:
    """Return a table with columns of text, which may take several lines, of numbers, and of more text."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (*texts, *numbers, *more):
        number = heading in numbers
        table.add_column(Text(heading), justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table


def fit(table: Table, console: Console, less: Sequence[str]) -> Table:
    """Leave out columns, in the order of `less`, until the first one fits whole and no word of the others is broken."""

    def room(column: Column) -> int:
        texts, whole = [str(cell) for cell in (column.header, *column.cells)], column in table.columns[:1]
        return max(cell_len(part) for text in texts for part in ([text] if whole or column.no_wrap else text.split()))

    rooms = {str(column.header): room(column) for column in table.columns}
    for heading in less:
        if sum(rooms.values()) + GAP * len(rooms) - 1 > console.width:
            del rooms[heading]
    kept = [column for column in table.columns if str(column.header) in rooms]
    fitted, first = Table(*kept, box=table.box, pad_edge=table.pad_edge), kept[0]
    fitted.rows = table.rows  # and their cells are in the columns
    first.width = min(rooms[str(first.header)], console.width - 2)  # else the widest column is narrowed first
    return fitted


def comparison_tables(comparison: dict[str, Any]) -> list[Table]:
    """Return the models' scores and their costs; each table fits 80 columns."""
    from raycifar.analysis.prose import cells  # and with it SciPy, which --help can do without

    at_equal_time = f"val top-1\nat {comparison['equal_device_seconds']:,.0f} s"
    rows = {
        name: cells(model)
        | {at_equal_time: "no epoch" if model["at_equal_time"] is None else f"{model['at_equal_time']:.4f}"}
        for name, model in comparison["models"].items()
    }
    headings = [*next(iter(rows.values()))]
    tables = []
    for part in (headings[:OF_SCORES], headings[OF_SCORES:]):
        tables.append(new_table(["model"], part))
        for name, row in rows.items():
            tables[-1].add_row(name, *(row[heading] for heading in part))
    return tables


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """Return the hardest, the easiest and the most confused classes."""
    classes = sorted((row for row in evaluation["classes"] if row["images"]), key=lambda row: row["recall"])
    table = Table("hardest classes", "recall", "easiest", "recall", "most confused", "images", box=box.SIMPLE_HEAD)
    hardest, easiest = (
        [(row["class"], f"{row['recall']:.2f}") for row in rows[:10]] for rows in (classes, classes[::-1])
    )
    confused = [(f"{pair['a']}, {pair['b']}", str(pair["images"])) for pair in evaluation["confused"][:10]]
    for cells in zip_longest(hardest, easiest, confused, fillvalue=("", "")):
        table.add_row(*chain(*cells))
    return table


def corruption_table(evaluation: dict[str, Any]) -> Table:
    table = new_table(["corruption"], ["1", "2", "3", "4", "5", "mean error"])
    for name, row in evaluation["corruptions"].items():
        scores = (f"{score['top1']:.3f}" for score in row["severities"])
        table.add_row(name.replace("_", " "), *scores, f"{row['error']:.3f}")
    return table


def predictions_table(predictions: list[dict[str, Any]]) -> Table:
    table = new_table(["image", "top 5"])
    for row in predictions:
        classes = ", ".join(f"{likely['class']} {likely['probability']:.2f}" for likely in row.get("top5", []))
        table.add_row(row["image"], classes or f"can't be read: {row['error']}")
    return table


def bench_table(bench: dict[str, Any], stages: dict[str, str]) -> Table:
    """Return the rate of each stage; `stages` are their descriptions by name."""
    table = new_table(["stage", ""], ["images/s", "low to high", "share of bare"])
    rows = dict(bench["stages"])
    bare = bench["bare_images_per_second"]
    for name, way in bench["against"].items():
        rate = way["spread"]["images_per_second"]
        rows[name] = {"images_per_second": rate, "share": {"median": rate["median"] / bare}}
    for name, row in rows.items():
        rate = row["images_per_second"]
        ends = f"{rate['low']:,.0f} to {rate['high']:,.0f}"
        table.add_row(name, stages[name], f"{rate['median']:,.0f}", ends, f"{row['share']['median']:.3f}")
    return table


def plan_table(workers: dict[int, dict[str, Any]]) -> Table:
    priced = any(figures["cost"] is not None for figures in workers.values())
    table = new_table([], ["workers", "images/s", "hours", "device-hours", *["cost"] * priced])
    for count, figures in workers.items():
        table.add_row(
            str(count),
            f"{figures['images_per_second']:,.0f}",
            f"{figures['seconds'] / 3600:,.3g}",
            f"{figures['device_hours']:,.3g}",
            *([f"{figures['cost']:,.4g}"] if priced else []),
        )
    return table


def speedrun_table(found: dict[str, Any]) -> Table:
    table = new_table([""], [f"mean of {len(found['runs'])}", "95% interval"])
    for name, (label, digits) in SPEEDRUN_ROWS.items():
        mean, *ends = (found[name][part] for part in ("mean", "low", "high"))
        interval = "" if ends[0] is None else " to ".join(f"{end:.{digits}f}" for end in ends)
        table.add_row(label, f"{mean:.{digits}f}", interval)
    return table


def recipes_table(recipes: Iterable[NamedRecipe]) -> Table:
    table = new_table(["model", "recipe"], ["epochs"], ["for"])
    for row in recipes:
        table.add_row(row.model, row.name + " (default)" * row.own, str(row.recipe.epochs), row.purpose)
    return table


def runs_table(entries: Sequence[Entry]) -> Table:
    """Return the runs of a folder; a comparison is one row, with how many of its trials are over."""
    table = new_table(["name", "model", "state"], ["epochs", "val top-1", "test top-1", "time"])
    for entry in entries:
        table.add_row(
            entry.name,
            ", ".join(entry.models),
            entry.state + (f" on {entry.host}" if entry.state == State.RUNNING else ""),
            progress_of(entry),
            "" if entry.val_top1 is None else f"{entry.val_top1:.4f}",
            ", ".join(f"{top1:.4f}" for top1 in entry.test_top1),
            duration(entry.seconds) if entry.seconds else "",
        )
    return table


def progress_of(entry: Entry) -> str:
    if entry.trials is not None:
        return f"{sum(trial.state in OVER for trial in entry.trials)}/{len(entry.trials)} trials"
    return "" if entry.epochs is None else f"{entry.epochs}/{entry.of_epochs or '?'}"
