"""The report of a run and of a comparison: what is read from the files, drawn, and put into a page or into words."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from raycifar.analysis import charts, prose
from raycifar.analysis.classification import by_class, confused_pairs, confusion, reliability
from raycifar.analysis.curves import panels
from raycifar.analysis.findings import FIT, diagnose, fit, listed, seed_variance, standard_error
from raycifar.analysis.history import RunHistory
from raycifar.analysis.mismatch import find_mismatch
from raycifar.analysis.page import render
from raycifar.analysis.results import results_table
from raycifar.analysis.suspects import Suspects, rank_suspects
from raycifar.data import DatasetInfo
from raycifar.data.tables import Source, from_lists, to_images
from raycifar.models.recipe import changes
from raycifar.storage.parquet import read_parquet

GALLERY = 24  # images of the most suspect labels
PAIRS, EXAMPLES = 6, 4  # pairs of classes shown, and pictures of each direction
ROWS = 300  # epochs in a page's table


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder holds; what isn't there is None, and the report says so. `storage` is where it stands."""

    name: str
    history: RunHistory
    predictions: bytes | None
    example_stats: bytes | None
    storage: str = "results"


def report_run(files: RunFiles, source: Source | None = None) -> dict[str, Any]:
    """Return the report of a run as `report.json` holds it; `source` are the images, where they are at hand."""
    differs, found = find_mismatch(files.history, files.predictions, source), diagnose(files.history)
    if differs:
        found = [*differs, *(finding for finding in found if finding.kind != "healthy")]
    return {
        "name": files.name,
        "state": prose.state(files.history),
        "headline": prose.headline(found),
        "findings": [finding.to_json() for finding in found],
        "next": prose.next_steps(files.history, found, files.storage) if files.history.records else [],
        "paragraph": prose.paragraph(files.history, found),
    }


def run_page(files: RunFiles, report: dict[str, Any], source: Source | None) -> str:
    """Return a run's `report.html`; pictures are left out where `source`, the images, is not at hand."""
    history, info = files.history, files.history.info
    mature = bool(history.records) and fit(history) >= FIT  # before that, its doubts about labels mean nothing
    drawn = {name: charts.curve_chart(panel) for name, panel in panels(history).items()} if history.records else {}
    test = read_predictions(files.predictions, source, info)
    if test:
        drawn |= test.pop("charts")
    return render(
        "report.html",
        drawn,
        title=files.name,
        report=report,
        run=history.run,
        images=prose.data_name(history.run),
        records=history.records[-ROWS:],
        omitted=max(0, len(history.records) - ROWS),
        result=history.result,
        intervals=test_intervals(history),
        details=details(history),
        test=test,
        suspects=gallery(rank_suspects(files.example_stats), source, info) if files.example_stats and mature else [],
        mature=mature,
        behind=behind_spikes(report, source, info),
        has_pictures=source is not None,
    )


def test_intervals(history: RunHistory) -> dict[str, float]:
    """Return half of the 95% interval of each test accuracy, over the choice of test images."""
    test = (history.result or {}).get("test")
    names = ("top1", "top5", "superclass_top1")
    return {name: 1.96 * standard_error(test[name], test["images"]) for name in names} if test else {}


def details(history: RunHistory) -> dict[str, str]:
    """Return what a reader needs to train the same network again."""
    run, recipe = history.run, history.recipe
    values = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    return {
        "command": prose.to_command(run, "train", recipe, seed=run["seed"]),
        "recipe": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items()),
        "parameters": f"{run['parameters']:,}" if run.get("parameters") else "unknown",
        "started": run.get("created", "unknown"),
        "precision": run.get("precision", "unknown"),
        "versions": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()) or "unknown",
    }


# The test set, and single images --------------------------------------------------------------------


def read_predictions(content: bytes | None, source: Source | None, info: DatasetInfo) -> dict[str, Any] | None:
    """Return what the predictions of the test set show, and its charts."""
    if content is None:
        return None
    table = read_parquet(content, {"label": "integers", "probabilities": "lists of real numbers"})
    labels, probabilities = table["label"].to_numpy(), from_lists(table["probabilities"])
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    matrix = confusion(labels, predicted, info.num_classes)
    drawn = {
        "reliability": charts.reliability_diagram(reliability(confidence, predicted == labels)),
        "classes": charts.class_chart(by_class(matrix, info.class_names)),
    }
    pairs = confused_pairs(matrix, info.class_names)[:PAIRS]
    if source is not None:
        superclass_of = np.array(source.superclass_of())
        superclasses = confusion(superclass_of[labels], superclass_of[predicted], info.num_superclasses)
        drawn["superclasses"] = charts.confusion_chart(superclasses, info.superclass_names)
        for pair in pairs:
            pair["pictures"] = examples(pair, labels, predicted, confidence, source, info)
    return {"charts": drawn, "pairs": pairs}


def examples(
    pair: dict[str, Any],
    labels: np.ndarray,
    predicted: np.ndarray,
    confidence: np.ndarray,
    source: Source,
    info: DatasetInfo,
) -> list[dict[str, str]]:
    """Return the pictures of a pair of classes that are most confidently taken for the other class."""
    shown = []
    for label, taken_for in ((pair["a"], pair["b"]), (pair["b"], pair["a"])):
        a, b = (info.class_names.index(name) for name in (label, taken_for))
        rows = np.flatnonzero((labels == a) & (predicted == b))
        for row in rows[np.argsort(-confidence[rows])][:EXAMPLES]:
            words = f"{plain(label)}, taken for {plain(taken_for)}"
            shown.append({"uri": picture(source.test, int(row)), "words": words})
    return shown


def gallery(found: Suspects | None, source: Source | None, info: DatasetInfo) -> list[dict[str, Any]]:
    if found is None or source is None:
        return []
    return [
        {
            "uri": picture(source.train, int(found.index[k])),
            "index": int(found.index[k]),
            "label": plain(info.class_names[found.label[k]]),
            "suggested": plain(info.class_names[found.suggested[k]]),
        }
        for k in range(min(GALLERY, len(found.index)))
    ]


def behind_spikes(report: dict[str, Any], source: Source | None, info: DatasetInfo) -> list[dict[str, Any]]:
    """Return the training images whose losses rose most, of each spike that a few images caused."""
    if source is None:
        return []
    labels = source.train["fine"]
    return [
        {
            "epoch": finding["epochs"][0],
            "pictures": [
                {"uri": picture(source.train, row), "words": plain(info.class_names[labels[row].as_py()])}
                for row in finding["metrics"]["example_indices"]
            ],
        }
        for finding in report["findings"]
        if finding["kind"] == "spike" and finding["metrics"].get("example_indices")
    ]


def plain(class_name: str) -> str:
    return class_name.replace("_", " ")


def picture(table: pa.Table, row: int) -> str:
    """Return an image of the data set as a data URI."""
    pixels = to_images(table["image"].slice(row, 1))[0]
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


# A comparison ---------------------------------------------------------------------------------------


def report_comparison(name: str, runs: Sequence[RunFiles], comparison: dict[str, Any] | None) -> dict[str, Any]:
    """Return the report of a comparison as `report.json` holds it; `comparison` is None while it is under way."""
    reports = [report_run(run) for run in runs]
    found = []
    for model, group in by_model(runs).items():
        tested = [run.history.result["test"] for run in group if run.history.result and "test" in run.history.result]
        if tested and (finding := seed_variance(model, [test["top1"] for test in tested], tested[0]["images"])):
            found.append(finding)
    done = sum((run.history.result or {}).get("status") == "finished" for run in runs)
    sentences = [pair["sentence"] for pair in (comparison or {}).get("pairs", [])]
    sentences += [search["sentence"] for search in (comparison or {}).get("search", {}).values()]
    finished = f"{done} of {prose.count(len(runs), 'run')} finished"
    state = f"{finished}." if comparison else f"{finished}; the comparison is under way or was interrupted."
    return {
        "name": name,
        "state": state,
        "headline": prose.headline(found) if found else "",
        "findings": [finding.to_json() for finding in found],
        "paragraph": " ".join([state, *sentences, *(finding.evidence for finding in found)]),
        "sentences": sentences,
        "results": results_table(comparison, {run.name: run.history for run in runs}) if comparison else None,
        "runs": [{key: report[key] for key in ("name", "state", "headline", "findings")} for report in reports],
        "next": next_comparison(runs, comparison),
    }


def next_comparison(runs: Sequence[RunFiles], comparison: dict[str, Any] | None) -> list[prose.Step]:
    """Return the comparison that would tell more: of networks that are trained for longer, or with more seeds."""
    if not comparison or not comparison["pairs"]:
        return []
    pairs, histories = comparison["pairs"], [run.history for run in runs]
    run, epochs = histories[0].run, max(history.recipe.epochs for history in histories)
    seeds = max([3, *(pair["seeds_needed"] or 0 for pair in pairs if pair["verdict"] == "undecided")])
    reasons = [f"{prose.count(seeds, 'seed')} of each model"]
    if any(pair.get("immature") for pair in pairs):
        epochs *= 2
        reasons.append(f"{epochs} epochs, as the networks have more to learn")
    if run["limit"]:
        run = {**run, "limit": None}
        reasons.append("all images")
    shared = set.intersection(*(set(changes(history.recipe, history.own_recipe).items()) for history in histories))
    recipe = replace(histories[0].own_recipe, **{**dict(shared), "epochs": epochs})
    command = prose.to_command(run, "compare", recipe, list(by_model(runs)), seeds=seeds)
    return [{"command": command, "reason": listed(reasons)}]


def by_model(runs: Sequence[RunFiles]) -> dict[str, list[RunFiles]]:
    groups: dict[str, list[RunFiles]] = {}
    for run in runs:
        groups.setdefault(run.history.model, []).append(run)
    return groups


def comparison_page(
    report: dict[str, Any], runs: Sequence[RunFiles], comparison: dict[str, Any] | None, links: dict[str, str]
) -> str:
    """Return a comparison's `report.html`; `links` are the paths of its runs' pages from its own, by name."""
    drawn, groups = {}, by_model(runs)
    for score, words in (
        ("val_top1", "validation accuracy"),
        ("val_loss", "validation loss"),
        ("train_loss", "training loss"),
    ):
        stacked = {model: charts.stack([run.history.column(score) for run in group]) for model, group in groups.items()}
        stacked = {model: values for model, values in stacked.items() if np.isfinite(values).any()}
        if stacked:
            ends = "; ".join(f"{model} ends at {last_mean(values):.3f}" for model, values in stacked.items())
            description = f"{words.capitalize()} by epoch, mean over the seeds, and the runs: {ends}."
            drawn[score] = charts.bands(stacked, words, description)
    if comparison:
        models = comparison["models"]
        for key, words in (("device_seconds", "device-seconds to train"), ("parameters", "parameters")):
            spots = {
                name: (m[key], m["top1"]["mean"], m["top1"]["low"], m["top1"]["high"]) for name, m in models.items()
            }
            ends = "; ".join(f"{name}: {mean:.3f} at {cost:,.0f}" for name, (cost, mean, _, _) in spots.items())
            drawn[key] = charts.scatter(spots, words, f"Test accuracy against {words}. {ends}.")
        if comparison["pairs"]:
            drawn["pairs"] = charts.differences(comparison["pairs"], " ".join(report["sentences"]))
    return render("compared.html", drawn, title=report["name"], report=report, comparison=comparison, links=links)


def last_mean(values: np.ndarray) -> float:
    known = [row[np.isfinite(row)][-1] for row in values if np.isfinite(row).any()]
    return float(np.mean(known))


# In words -------------------------------------------------------------------------------------------


def to_markdown(report: dict[str, Any]) -> str:
    """Return a report as Markdown, without its charts."""
    lines = [f"# {report['name']}", "", report["state"], "", report["paragraph"], ""]
    lines += [report["results"], ""] if report.get("results") else []
    lines += ["## Findings", ""] * bool(report["findings"])
    for finding in report["findings"]:
        lines += [f"- **{finding['kind']}** ({finding['confidence']:.2f}): {finding['evidence']} *{finding['advice']}*"]
    lines += ["", "## What next", ""] * bool(report["next"])
    for step in report["next"]:
        lines += [f"- {step['reason']}:", "", f"      {step['command']}", ""]
    return "\n".join(lines).rstrip() + "\n"
