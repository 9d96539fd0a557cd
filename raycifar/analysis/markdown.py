"""Reports in Markdown, and the table of a comparison's results, with what it takes to reproduce each."""

import re
from collections.abc import Mapping
from typing import Any

from raycifar.analysis.history import RunHistory
from raycifar.analysis.prose import hardware, interval, to_command
from raycifar.models.recipes import options_for

HEADINGS = ("model", "n", "test top-1", "top-5", "loss", "epochs", "hardware", "seconds", "command")


def to_markdown(report: dict[str, Any]) -> str:
    """Return a report as Markdown, without its charts."""
    lines = [f"# {escaped(report['name'])}", "", escaped(report["state"]), ""]
    lines += [part for note in report["notes"] for part in (f"Note: {escaped(note)}", "")]
    lines += [part for words in report["paragraph"].split("\n\n") for part in (escaped(words), "")]
    lines += [report["results"], ""] if report.get("results") else []
    lines += ["## Findings", ""] * bool(report["findings"])
    for finding in report["findings"]:
        evidence, advice = escaped(finding["evidence"]), escaped(finding["advice"])
        lines += [f"- **{finding['kind']}** ({finding['confidence']:.2f}): {evidence} *{advice}*"]
    lines += ["", "## What next", ""] * bool(report["next"])
    for step in report["next"]:
        lines += [f"- {escaped(step['reason'])}:", "", f"      {' '.join(step['command'].split())}", ""]
    return "\n".join(lines).rstrip() + "\n"


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
