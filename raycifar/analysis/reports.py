"""The report of a run and of a comparison: what is read from the files, drawn, and put into a page or into words."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raycifar.analysis import charts, findings, prose
from raycifar.analysis.charts import BLUE, ORANGE
from raycifar.analysis.classification import by_class, confused_pairs, confusion, reliability
from raycifar.analysis.findings import Finding, RunHistory
from raycifar.analysis.page import render
from raycifar.analysis.suspects import Suspects, suspects
from raycifar.data import CLASSES, SUPERCLASSES
from raycifar.data.names import COARSE, FINE
from raycifar.data.tables import Source, from_lists, to_numpy

GALLERY = 24  # images of the most suspect labels
PAIRS, EXAMPLES = 6, 4  # pairs of classes shown, and pictures of each direction


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder holds; what isn't there is None, and the report says so."""

    name: str
    story: RunHistory
    predictions: bytes | None
    images: bytes | None


def read_run(files: RunFiles) -> dict[str, Any]:
    """Return the report of a run as `report.json` holds it."""
    found = findings.read(files.story)
    return {
        "name": files.name,
        "state": prose.state(files.story),
        "headline": prose.headline(found),
        "findings": [finding.to_json() for finding in found],
        "next": prose.what_next(files.story, found) if files.story.history else [],
        "paragraph": prose.paragraph(files.story, found),
    }


def run_page(files: RunFiles, report: dict[str, Any], source: Source | None) -> str:
    """Return a run's `report.html`; pictures are left out where `source`, the images, is not at hand."""
    drawn = curve_charts(files.story) if files.story.history else {}
    test = read_predictions(files.predictions, source)
    if test:
        drawn |= test.pop("charts")
    return render(
        "report.html",
        drawn,
        title=files.name,
        report=report,
        run=files.story.run,
        history=files.story.history,
        result=files.story.result,
        test=test,
        suspects=gallery(suspects(files.images) if files.images else None, source),
        behind=behind_spikes(report, source),
        has_pictures=source is not None,
        epochs=files.story.recipe.epochs,
    )


# Curves ---------------------------------------------------------------------------------------------


def marks(story: RunHistory) -> list[tuple[int, str]]:
    """Return the epochs that are worth a mark: the best, restarts, changes of the workers, the end of a stage."""
    rows, found = story.history, []
    if story.validated:
        found.append((max(rows, key=lambda row: row["val_top1"])["epoch"], "best"))
    for before, row in zip([None, *rows], rows, strict=False):
        if row.get("restarts"):
            found.append((row["epoch"], "restart"))
        if before and row["workers"] != before["workers"]:
            found.append((row["epoch"], f"{row['workers']} workers"))
        if before and row.get("stage") != before.get("stage"):
            found.append((row["epoch"], "whole network"))
    peak = max(rows, key=lambda row: row["lr"])["epoch"]
    return [*found, (peak, "peak lr")] if 1 < peak < len(rows) else found


def curve_charts(story: RunHistory) -> dict[str, str]:
    top1, loss = (
        {name: story.column(f"{name}_{score}") for name in ("train", "val", "clean")} for score in ("top1", "loss")
    )
    marked, drawn = marks(story), {}
    for score, values, words in (("top1", top1, "top-1"), ("loss", loss, "loss")):
        lines = [
            ("training, as trained", values["train"], BLUE, "--"),
            ("training, scored alike", values["clean"], BLUE, "-"),
        ]
        lines += [("validation", values["val"], ORANGE, "-")] if story.validated else []
        lines = [line for line in lines if np.isfinite(line[1]).any()]
        description = f"{words} by epoch. " + " ".join(f"{line[0]}: {describe(line[1])}." for line in lines)
        drawn[score] = charts.curves(lines, words, description, marked)
    if story.validated:
        gap = 100 * (top1["clean"] - top1["val"])
        between = (np.zeros_like(gap), gap)
        description = f"Gap between training and validation top-1, scored alike, in points: {describe(gap, 1)}."
        drawn["gap"] = charts.curves([("gap", gap, ORANGE, "-")], "points", description, between=between)
    lr, speed = story.column("lr"), story.column("images_per_second")
    drawn["lr"] = charts.curves(
        [("learning rate", lr, BLUE, "-")], "learning rate", f"Learning rate: {describe(lr, 5)}."
    )
    norm = story.column("grad_norm")
    if np.isfinite(norm).any():
        lines = [("mean", norm, BLUE, "-"), ("largest", story.column("grad_norm_max"), ORANGE, "--")]
        drawn["norm"] = charts.curves(lines, "gradient norm", f"Gradient norm: {describe(norm)}.", log=True)
    lines = [("speed", speed, BLUE, "-")]
    drawn["speed"] = charts.curves(lines, "images/s", f"Images per second: {describe(speed, 0)}.", from_zero=True)
    return drawn


def describe(values: np.ndarray, digits: int = 3) -> str:
    """Return a curve in words."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "unknown"
    return (
        f"from {known[0]:.{digits}f} to {known[-1]:.{digits}f}, lowest {known.min():.{digits}f}, highest "
        f"{known.max():.{digits}f}"
    )


# The test set, and single images --------------------------------------------------------------------


def read_predictions(content: bytes | None, source: Source | None) -> dict[str, Any] | None:
    """Return what the predictions of the test set show, and its charts."""
    if content is None:
        return None
    table = pq.read_table(pa.BufferReader(content))
    labels, probabilities = table["label"].to_numpy(), from_lists(table["probabilities"])
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    matrix = confusion(labels, predicted, CLASSES)
    drawn = {
        "reliability": charts.reliability_diagram(reliability(confidence, predicted == labels)),
        "classes": charts.class_chart(by_class(matrix, FINE)),
    }
    pairs = confused_pairs(matrix, FINE)[:PAIRS]
    if source is not None:
        parents = np.array(source.superclass_of())
        drawn["superclasses"] = charts.confusion_chart(
            confusion(parents[labels], parents[predicted], SUPERCLASSES), COARSE
        )
        for pair in pairs:
            pair["pictures"] = examples(pair, labels, predicted, confidence, source)
    return {"charts": drawn, "pairs": pairs}


def examples(
    pair: dict[str, Any], labels: np.ndarray, predicted: np.ndarray, confidence: np.ndarray, source: Source
) -> list[dict[str, str]]:
    """Return the pictures of a pair of classes that were most surely taken for the other."""
    shown = []
    for label, taken in ((pair["a"], pair["b"]), (pair["b"], pair["a"])):
        rows = np.flatnonzero((labels == FINE.index(label)) & (predicted == FINE.index(taken)))
        for row in rows[np.argsort(-confidence[rows])][:EXAMPLES]:
            words = f"{label}, taken for {taken}".replace("_", " ")
            shown.append({"uri": picture(source.test, int(row)), "words": words})
    return shown


def gallery(found: Suspects | None, source: Source | None) -> list[dict[str, Any]]:
    if found is None or source is None:
        return []
    return [
        {
            "uri": picture(source.train, int(found.index[k])),
            "index": int(found.index[k]),
            "label": FINE[found.label[k]].replace("_", " "),
            "suggested": FINE[found.suggested[k]].replace("_", " "),
        }
        for k in range(min(GALLERY, len(found.index)))
    ]


def behind_spikes(report: dict[str, Any], source: Source | None) -> list[dict[str, Any]]:
    """Return, for each spike that a few hard images made, their pictures."""
    if source is None:
        return []
    labels = source.train["fine"]
    return [
        {
            "epoch": finding["epochs"][0],
            "pictures": [
                {"uri": picture(source.train, row), "words": FINE[labels[row].as_py()].replace("_", " ")}
                for row in finding["figures"]["images"]
            ],
        }
        for finding in report["findings"]
        if finding["kind"] == "spike" and finding["figures"].get("images")
    ]


def picture(table: pa.Table, row: int) -> str:
    """Return an image of the data set as a data URI."""
    pixels = to_numpy(table["image"].slice(row, 1).combine_chunks(), "image")[0]
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


# A comparison ---------------------------------------------------------------------------------------


def read_comparison(name: str, runs: Sequence[RunFiles], comparison: dict[str, Any] | None) -> dict[str, Any]:
    """Return the report of a comparison as `report.json` holds it; `comparison` is None while it is under way."""
    reports = [read_run(run) for run in runs]
    found = []
    for model, group in by_model(runs).items():
        tested = [run.story.result["test"] for run in group if run.story.result and "test" in run.story.result]
        if finding := findings.seed_variance(model, [t["top1"] for t in tested], tested[0]["images"] if tested else 0):
            found.append(finding.to_json())
    done = sum((run.story.result or {}).get("status") == "finished" for run in runs)
    sentences = [pair["sentence"] for pair in (comparison or {}).get("pairs", [])]
    sentences += [search["sentence"] for search in (comparison or {}).get("search", {}).values()]
    state = f"{done} of {len(runs)} runs are finished" + (
        "" if comparison else "; the comparison is under way, or was cut off"
    )
    return {
        "name": name,
        "state": f"{state}.",
        "headline": prose.headline([Finding(**finding) for finding in found]) if found else "",
        "findings": found,
        "paragraph": " ".join([f"{state}.", *sentences, *(finding["evidence"] for finding in found)]),
        "sentences": sentences,
        "runs": [{key: report[key] for key in ("name", "state", "headline", "findings")} for report in reports],
        "next": next_of(reports),
    }


def next_of(reports: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the most urgent step of each run, each once."""
    steps = {report["next"][0]["command"]: report["next"][0] for report in reports if report["next"]}
    return list(steps.values())[:4]


def by_model(runs: Sequence[RunFiles]) -> dict[str, list[RunFiles]]:
    groups: dict[str, list[RunFiles]] = {}
    for run in runs:
        groups.setdefault(run.story.run["model"], []).append(run)
    return groups


def comparison_page(
    report: dict[str, Any], runs: Sequence[RunFiles], comparison: dict[str, Any] | None, links: dict[str, str]
) -> str:
    """Return a comparison's `report.html`; `links` are the pages of its runs, by name."""
    drawn, groups = {}, by_model(runs)
    for score, words in (
        ("val_top1", "validation top-1"),
        ("val_loss", "validation loss"),
        ("train_loss", "training loss"),
    ):
        stacked = {model: stack([run.story.column(score) for run in group]) for model, group in groups.items()}
        stacked = {model: values for model, values in stacked.items() if np.isfinite(values).any()}
        if stacked:
            ends = "; ".join(f"{model} ends at {last_mean(values):.3f}" for model, values in stacked.items())
            description = f"{words} by epoch, mean and range over the seeds: {ends}."
            drawn[score] = charts.bands(stacked, words, description)
    if comparison:
        models = comparison["models"]
        for key, words in (("device_seconds", "device-seconds to train"), ("parameters", "parameters")):
            spots = {
                name: (m[key], m["top1"]["mean"], m["top1"]["low"], m["top1"]["high"]) for name, m in models.items()
            }
            ends = "; ".join(f"{name}: {mean:.3f} at {cost:,.0f}" for name, (cost, mean, _, _) in spots.items())
            drawn[key] = charts.scatter(spots, words, f"Test top-1 against {words}. {ends}.")
        if comparison["pairs"]:
            drawn["pairs"] = charts.differences(comparison["pairs"], " ".join(report["sentences"]))
    return render("compared.html", drawn, title=report["name"], report=report, comparison=comparison, links=links)


def stack(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return (runs, epochs) of curves that may not be equally long."""
    longest = max((len(column) for column in columns), default=0)
    return np.array([np.pad(column, (0, longest - len(column)), constant_values=np.nan) for column in columns])


def last_mean(values: np.ndarray) -> float:
    known = [row[np.isfinite(row)][-1] for row in values if np.isfinite(row).any()]
    return float(np.mean(known))


# In words -------------------------------------------------------------------------------------------


def to_markdown(report: dict[str, Any]) -> str:
    """Return a report as Markdown, without its charts."""
    lines = [f"# {report['name']}", "", report["state"], "", report["paragraph"], ""]
    lines += ["## Findings", ""] * bool(report["findings"])
    for finding in report["findings"]:
        lines += [f"- **{finding['kind']}** ({finding['confidence']:.2f}): {finding['evidence']} *{finding['advice']}*"]
    lines += ["", "## What next", ""] * bool(report["next"])
    for step in report["next"]:
        lines += [f"- {step['reason']}:", "", f"      {step['command']}", ""]
    return "\n".join(lines).rstrip() + "\n"
