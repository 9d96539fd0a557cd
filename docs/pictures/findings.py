"""Draws the charts of docs/report.md from recorded runs, and prints the findings:  python docs/pictures/findings.py

A chart is one that the report has, of a run with that finding, recorded in tests/recorded.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "findings"
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from provoked import FOLDER as PROVOKED  # noqa: E402
from provoked import recorded, to_history  # noqa: E402

from raycifar.analysis.charts import bands, curve_chart  # noqa: E402
from raycifar.analysis.curves import panels  # noqa: E402
from raycifar.analysis.diagnosis import diagnose, seed_variance  # noqa: E402
from raycifar.analysis.findings import Finding  # noqa: E402
from raycifar.analysis.history import RunHistory  # noqa: E402

# As the report itself, on a card of its own: an <img> takes no colors from its page.
STYLE = (
    "<style>svg { color: #1d2329; background: #fff }"
    "@media (prefers-color-scheme: dark) { svg { color: #e6e9ec; background: #14181c } }</style>"
)


class Example(NamedTuple):
    """A chart of a recorded run, as it stands after a number of epochs."""

    run: str
    epochs: int
    chart: str
    seed: int = 0


EXAMPLES = {
    "too-early": Example("too early", 3, "top1"),
    "collapse": Example("dies", 8, "loss"),
    "divergence": Example("never recovers", 12, "loss"),
    "underfitting": Example("drops out", 25, "loss", seed=2),
    "learning-rate-high": Example("is unstable", 8, "loss"),
    "learning-rate-low": Example("is slow", 25, "loss"),
    "overfitting": Example("overfits", 25, "loss"),
    "generalization-gap": Example("has a gap", 25, "top1"),
    "spike": Example("spikes", 25, "loss"),
    "validation-above-training": Example("cnn-trivial", 25, "top1"),
    "validation-noise": Example("is validated by few", 8, "top1"),
    "improving": Example("vgg16-trivial", 25, "top1"),
    "plateau": Example("has a gap", 25, "top1", seed=1),
    "healthy": Example("cnn-trivial", 25, "loss"),
}


def found() -> Iterator[tuple[Finding, str]]:
    """Yield each finding with its chart."""
    for kind, example in EXAMPLES.items():
        history = history_of(example)
        (finding,) = [finding for finding in diagnose(history) if finding.kind == kind]
        yield finding, curve_chart(panels(history)[example.chart])
    runs = list(recorded("differs by seed"))
    tests = [run.result["test"] for run in runs]
    finding = seed_variance("cnn", [test["top1"] for test in tests], tests[0]["images"])
    curves = {"cnn": [run.column("val_top1") for run in runs]}
    words = "validation accuracy"
    yield finding, bands(curves, words, f"{words.capitalize()} by epoch: the mean over the seeds, and the runs.")


def history_of(example: Example) -> RunHistory:
    for line in PROVOKED.with_name("whole.jsonl").read_text().splitlines():
        whole = to_history(json.loads(line))
        if whole.run["name"] == example.run:
            return RunHistory(whole.run, whole.records[: example.epochs], None)
    is_wanted = (example.epochs, example.seed)
    return next(run for run in recorded(example.run) if (run.recipe.epochs, run.run["seed"]) == is_wanted)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for finding, svg in found():
        drawn = re.sub(' data-figures="[^"]*"', "", svg)
        (FOLDER / f"{finding.kind}.svg").write_text(re.sub("(<svg[^>]*>)", rf"\1{STYLE}", drawn, count=1))
        print(f"{finding.kind}: {finding.evidence} {finding.advice}\n")


if __name__ == "__main__":
    main()
