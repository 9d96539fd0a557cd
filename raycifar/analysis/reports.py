"""The report of a run and of a comparison: what is read from the files, drawn, and put into a page or into words."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raycifar.analysis import charts, prose
from raycifar.analysis.classification import CLASSES, by_class, confused_pairs, confusion, reliability
from raycifar.analysis.comparison import by_model, conclusions
from raycifar.analysis.curves import panels
from raycifar.analysis.departures import plain_value
from raycifar.analysis.findings import FIT, Finding, diagnose, fit, seed_variance, standard_error
from raycifar.analysis.history import RunHistory
from raycifar.analysis.mismatch import find_mismatch
from raycifar.analysis.page import render
from raycifar.analysis.results import cells, hardware, results_table, text
from raycifar.analysis.suspects import Suspects, rank_suspects
from raycifar.data import CIFAR100
from raycifar.data.pictures import to_png
from raycifar.data.tables import Source, from_lists, to_images
from raycifar.models.recipe import changes
from raycifar.storage.records import PicturesFile, Pixels
from raycifar.words import count, listed

GALLERY = 24  # images of the most suspect labels
CONTRADICTIONS = 12  # photographs under two labels that are shown
PAIRS, EXAMPLES = 6, 4  # pairs of classes shown, and pictures of each direction
ROWS = 300  # epochs in a page's table
PNG = "data:image/png;base64,"
SEEN = 16  # augmented images shown
SAMPLE = 2000  # images of each split whose pixels are measured


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder holds; what isn't there is None, and the report says so."""

    name: str
    history: RunHistory
    predictions: pa.Table | None = None
    example_stats: pa.Table | None = None
    pictures: PicturesFile | None = None
    storage: str = "results"  # where the folder stands
    notes: Sequence[str] = ()  # sentences about what is damaged, has changed or is missing
    copies: np.ndarray | None = None  # (n, 2): training images that show one photograph, by rows in the source

    @cached_property
    def findings(self) -> list[Finding]:
        """What the run shows, what matters most first."""
        differs, found = find_mismatch(self.history, self.predictions, self.pictures), diagnose(self.history)
        return [*differs, *(finding for finding in found if not (differs and finding.kind == "healthy"))]

    @cached_property
    def answers(self) -> "Answers | None":
        """What the network says of the test images."""
        if self.predictions is None:
            return None
        labels, probabilities = self.predictions["label"].to_numpy(), from_lists(self.predictions["probabilities"])
        predicted = probabilities.argmax(1)
        return Answers(labels, predicted, probabilities.max(1), confusion(labels, predicted))

    @cached_property
    def suspects(self) -> Suspects | None:
        """The training images, those with the most suspect labels first."""
        return None if self.example_stats is None else rank_suspects(self.example_stats, self.copies)


class Answers(NamedTuple):
    """Of each test image its label, its likeliest class and the probability of this; and the confusion matrix."""

    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    matrix: np.ndarray


def report_run(files: RunFiles) -> dict[str, Any]:
    """Return the report of a run as `report.json` holds it."""
    history, found = files.history, files.findings
    return {
        "name": files.name,
        "state": prose.state(history),
        "notes": list(files.notes),
        "headline": prose.headline(found),
        "findings": [finding.to_json() for finding in found],
        "next": prose.next_steps(history, found, files.storage) if found else [],
        "paragraph": prose.paragraph(history, found),
    }


def run_page(files: RunFiles, report: dict[str, Any]) -> str:
    """Return a run's `report.html`."""
    history, pictures = files.history, files.pictures
    drawn = {name: charts.curve_chart(panel) for name, panel in panels(history).items()} if history.records else {}
    drawn |= test_charts(files.answers, pictures) if files.answers else {}
    labels = labels_of(files)
    spikes = [
        {"epoch": epoch, "pictures": shown_of(pictures, "train", [(row, labels.get(row, "")) for row in rows])}
        for epoch, rows in behind_spikes(files.findings)
    ]
    doubted = suspects(files)
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
        mature=mature(history),
        has_predictions=files.predictions is not None,
        has_pictures=pictures is not None,
        classes=every_class(files.answers.matrix) if files.answers else [],
        pairs=[{**pair, "pictures": shown_of(pictures, "test", pair["rows"])} for pair in confused(files)],
        behind=[spike for spike in spikes if spike["pictures"]],
        suspects=[
            {**image, **picture}
            for image in doubted
            if not image["contradicted"]
            for picture in shown_of(pictures, "train", [(image["index"], "")])
        ],
        contradictions=[
            pair
            for both in contradictions(doubted)
            if len(pair := shown_of(pictures, "train", [(image["index"], image["words"]) for image in both])) == 2
        ],
        augmented=[PNG + image for image in (pictures.get("augmented", []) if pictures else [])],
    )


def mature(history: RunHistory) -> bool:
    """Return whether the network has learned enough for its doubts about labels to mean anything."""
    return bool(history.records) and fit(history) >= FIT


def test_intervals(history: RunHistory) -> dict[str, float]:
    """Return half of the 95% interval of each test accuracy, over the choice of test images."""
    test = history.test
    if not test:
        return {}
    images = dict.fromkeys(("top1", "top5", "superclass_top1"), test["images"])
    images["top1_without_near_duplicates"] = test["images"] - test.get("near_duplicates", 0)
    return {name: 1.96 * standard_error(test[name], n) for name, n in images.items() if test.get(name) is not None}


def details(history: RunHistory) -> dict[str, str]:
    """Return what a reader needs to train the same network again."""
    run, recipe = history.run, history.recipe
    values = {f.name.replace("_", " "): plain_value(getattr(recipe, f.name)) or "none" for f in fields(recipe)}
    known = {
        "command": prose.to_command(run, "train", recipe, seed=run["seed"]),
        "recipe": ", ".join(f"{name} {value}" for name, value in values.items()),
        "parameters": f"{run['parameters']:,}" if run.get("parameters") else None,
        "hardware": hardware(run),
        "precision": run.get("precision"),
        "versions": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()),
        "started": date(run.get("created")),
    }
    return {name: value or "unknown" for name, value in known.items()}


def date(created: str | None) -> str | None:
    """Return a time of `run.json` as 27 November 2026, 01:05 UTC; as it stands if it is no time."""
    try:
        time = datetime.fromisoformat(created or "")
    except ValueError:
        return created
    return f"{time.day} {time:%B %Y, %H:%M} {time.tzname() or ''}".rstrip()


# The test set ---------------------------------------------------------------------------------------


def test_charts(answers: Answers, pictures: PicturesFile | None) -> dict[str, str]:
    labels, predicted, confidence, matrix = answers
    drawn = {
        "reliability": charts.reliability_diagram(reliability(confidence, predicted == labels)),
        "classes": charts.class_chart(by_class(matrix, CLASSES)),
    }
    order = np.arange(CIFAR100.num_classes)
    if pictures is not None:
        superclass_of = np.array(pictures["superclass_of"])
        order = np.argsort(superclass_of, kind="stable")
        superclasses = confusion(superclass_of[labels], superclass_of[predicted], CIFAR100.num_superclasses)
        drawn["superclasses"] = charts.confusion_chart(superclasses, CIFAR100.superclass_names)
    names = [CLASSES[k] for k in order]
    drawn["confusion"] = charts.confusion_chart(matrix[np.ix_(order, order)], names, "class")
    return drawn


def every_class(matrix: np.ndarray) -> list[dict[str, Any]]:
    """Return the scores of each class, by name, and what it is most often taken for."""
    errors = matrix * (1 - np.eye(len(matrix), dtype=int))
    rows = by_class(matrix, CLASSES)
    for row, mistaken in zip(rows, errors, strict=True):
        most = int(mistaken.argmax())
        row["taken_for"] = f"{CLASSES[most]} ({mistaken[most]})" if mistaken[most] else "–"
    return sorted(rows, key=lambda row: row["class"])


# Single images --------------------------------------------------------------------------------------


def confused(files: RunFiles) -> list[dict[str, Any]]:
    """Return the pairs of classes that are most often confused, each with its clearest test images and their words."""
    if files.answers is None:
        return []
    labels, predicted, confidence, matrix = files.answers
    pairs = confused_pairs(matrix, CLASSES)[:PAIRS]
    for pair in pairs:
        pair["rows"] = []
        for label, taken_for in ((pair["a"], pair["b"]), (pair["b"], pair["a"])):
            a, b = (CLASSES.index(name) for name in (label, taken_for))
            rows = np.flatnonzero((labels == a) & (predicted == b))
            clearest = rows[np.argsort(-confidence[rows])][:EXAMPLES]
            pair["rows"] += [(int(row), f"{label}, taken for {taken_for}") for row in clearest]
    return pairs


def suspects(files: RunFiles) -> list[dict[str, Any]]:
    """Return the training images whose labels are most suspect, where the network knows enough to doubt them.

    First come pairs of images that show one photograph under two labels.
    """
    if not mature(files.history) or (found := files.suspects) is None:
        return []
    contradicted, confirmed = found.contradicted(), found.confirmed()
    rows = [*np.flatnonzero(contradicted)[: 2 * CONTRADICTIONS], *np.flatnonzero(~contradicted)[:GALLERY]]
    return [
        {
            "index": int(found.index[row]),
            "label": CLASSES[label],
            "suggested": CLASSES[found.suggested[row]],
            "contradicted": bool(contradicted[row]),
            "confirmed": bool(confirmed[row]),
            "copy": int(found.copy[row]),
            "words": f"image {found.index[row]}: {CLASSES[label]}, the network says {CLASSES[found.says[row]]}",
        }
        for row in rows
        for label in (found.label[row],)
    ]


def contradictions(doubted: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the pairs of images that show one photograph under two labels."""
    by_index = {image["index"]: image for image in doubted if image["contradicted"]}
    pairs = dict.fromkeys(tuple(sorted((image["index"], image["copy"]))) for image in by_index.values())
    return [(by_index[one], by_index[other]) for one, other in pairs if one in by_index and other in by_index]


def behind_spikes(findings: Sequence[Finding]) -> list[tuple[int, list[int]]]:
    """Return the epoch of each spike that a few images caused, and the training images whose losses rose most."""
    return [
        (finding.epochs[0], finding.metrics["example_indices"])
        for finding in findings
        if finding.kind == "spike" and finding.metrics.get("example_indices")
    ]


def labels_of(files: RunFiles) -> dict[int, str]:
    """Return the class of each training image, by its row in the source, as far as the folder tells it."""
    if files.example_stats is None:
        return {}
    index, label = (files.example_stats[name].to_pylist() for name in ("index", "label"))
    return {row: CLASSES[k] for row, k in zip(index, label, strict=True)}


def choose_pictures(files: RunFiles, source: Source) -> PicturesFile:
    """Return the content of `pictures.json`: what the report shows of a data set, a few hundred kilobytes."""
    train = {image["index"] for image in suspects(files)}
    train |= {row for _, rows in behind_spikes(files.findings) for row in rows}
    test = {row for pair in confused(files) for row, _ in pair["rows"]}
    return {
        "train": {str(row): to_base64(source.train, row) for row in sorted(train)},
        "test": {str(row): to_base64(source.test, row) for row in sorted(test)},
        "superclass_of": list(source.superclass_of()),
        "pixels": {"train": measured(source.train), "test": measured(source.test)},
        "augmented": augmented(files.history, source),
    }


def augmented(history: RunHistory, source: Source) -> list[str]:
    """Return a few training images as the network sees them, as PNG files in base64."""
    from raycifar.engine.augment import as_trained

    images = as_trained(to_images(source.train["image"].slice(0, SEEN)), history.recipe, history.run["seed"])
    return [base64.b64encode(to_png(image)).decode() for image in images]


def measured(table: pa.Table) -> Pixels:
    pixels = to_images(table["image"].slice(0, SAMPLE)) / 255.0
    return {"mean": float(pixels.mean()), "std": float(pixels.std())}


def to_base64(table: pa.Table, row: int) -> str:
    """Return the image of a row as a PNG file in base64."""
    return base64.b64encode(to_png(to_images(table["image"].slice(row, 1))[0])).decode()


def shown_of(pictures: PicturesFile | None, split: str, rows: Sequence[tuple[int, str]]) -> list[dict[str, str]]:
    """Return those of the images that are there, as data URIs with their words."""
    there: dict[str, str] = pictures[split] if pictures else {}  # type: ignore[literal-required]
    return [{"uri": PNG + there[str(row)], "words": words} for row, words in rows if str(row) in there]


# A comparison ---------------------------------------------------------------------------------------


def report_comparison(
    name: str,
    runs: Sequence[RunFiles],
    comparison: dict[str, Any] | None,
    storage: str = "results",
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the report of a comparison as `report.json` holds it; `comparison` is None while it is under way."""
    found = []
    for model, same in by_model(runs).items():
        tested = [test for run in same if (test := run.history.test)]
        if tested and (finding := seed_variance(model, [test["top1"] for test in tested], tested[0]["images"])):
            found.append(finding)
    done = sum((run.history.result or {}).get("status") == "finished" for run in runs)
    sentences = conclusions(comparison) if comparison else []
    finished = f"{done} of {count(len(runs), 'run')} finished"
    state = f"{finished}." if comparison else f"{finished}; the comparison is under way or was interrupted."
    return {
        "name": name,
        "state": state,
        "notes": [*notes, *(note for run in runs for note in run.notes)],
        "headline": prose.headline(found) if found else "",
        "findings": [finding.to_json() for finding in found],
        "paragraph": " ".join([state, *sentences, *(finding.evidence for finding in found)]),
        "sentences": sentences,
        "results": results_table(comparison, {run.name: run.history for run in runs}) if comparison else None,
        "conditions": conditions(runs),
        "runs": [about_run(run) for run in runs],
        "next": next_comparison(runs, comparison, storage),
    }


def about_run(files: RunFiles) -> dict[str, Any]:
    """Return what a page of several runs says of each."""
    history = files.history
    return {
        "name": files.name,
        "state": prose.state(history),
        "headline": prose.headline(files.findings),
        "findings": [finding.to_json() for finding in files.findings],
        "model": history.model,
        "seed": history.run["seed"],
        "images": history.num_train,
        "epochs": f"{len(history.records)} of {history.recipe.epochs}",
        "top1": (history.test or {}).get("top1"),
    }


def conditions(runs: Sequence[RunFiles]) -> str:
    """Return what all runs have in common, in a sentence; empty where they share nothing that matters."""
    histories = [run.history for run in runs]
    values = {
        "epoch": {history.recipe.epochs for history in histories},
        "training image": {history.num_train for history in histories},
        "validation image": {history.num_val for history in histories},
        "test image": {history.run["data"]["test"] for history in histories},
    }
    shared = [count(numbers.pop(), noun) for noun, numbers in values.items() if len(numbers) == 1]
    seeds = sorted({history.run["seed"] for history in histories})
    shared.append(f"seed{'s' * (len(seeds) > 1)} {listed(list(map(str, seeds)))}")
    return f"Conditions: {', '.join(shared)}." if runs else ""


def report_overlay(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Return the report of any runs side by side, without a verdict."""
    return report_comparison(listed([run.name for run in runs]), runs, None) | {
        "state": f"{count(len(runs), 'run')} side by side, without a verdict.",
        "headline": "",
        "findings": [],
        "paragraph": "\n\n".join(f"{run.name}: {prose.paragraph(run.history, run.findings)}" for run in runs),
    }


def next_comparison(runs: Sequence[RunFiles], comparison: dict[str, Any] | None, storage: str) -> list[prose.Step]:
    """Return the comparison that would tell more: of networks that are trained for longer, or with more seeds."""
    if not comparison or not comparison["pairs"] or not runs:
        return []
    pairs, histories = comparison["pairs"], [run.history for run in runs]
    run, epochs = histories[0].run, max(history.recipe.epochs for history in histories)
    undecided = [pair for pair in pairs if pair["verdict"] == "undecided"]
    seeds = max([3, *(max(pair["seeds_needed"] or 0, 1 + max(pair.get("runs", [0]))) for pair in undecided)])
    models = list(dict.fromkeys(history.model for history in histories))
    if len(models) < len(by_model(runs)):  # a command takes one recipe of each model
        return []
    reasons = [f"{count(seeds, 'seed')} of each model"]
    if any(pair.get("immature") for pair in pairs):
        epochs *= 2
        reasons.append(f"{epochs} epochs")
    if run["limit"]:
        run = {**run, "limit": None}
        reasons.append("all images")
    shared = set.intersection(*(set(changes(history.recipe, history.own_recipe).items()) for history in histories))
    recipe = replace(histories[0].own_recipe, **{**dict(shared), "epochs": epochs})
    command = prose.to_command(run, "compare", recipe, models, seeds=seeds, **prose.at(storage))
    return [{"command": command, "reason": listed(reasons)}]


def comparison_page(
    report: dict[str, Any],
    runs: Sequence[RunFiles],
    comparison: dict[str, Any] | None,
    links: dict[str, str],
    *,
    overlay: bool = False,
) -> str:
    """Return the `report.html` of a comparison, or of runs side by side.

    Args:
        links: the paths of the runs' pages from this one, by name. overlay: draw each run by itself.
    """
    drawn: dict[str, str] = {}
    groups = {run.name: [run] for run in runs} if overlay else by_model(runs)
    for score, words in charts.COMPARED.items():
        stacked = {model: charts.stack([run.history.column(score) for run in same]) for model, same in groups.items()}
        stacked = {model: values for model, values in stacked.items() if np.isfinite(values).any()}
        if stacked:
            ends = "; ".join(f"{model} ends at {last_mean(values):.3f}" for model, values in stacked.items())
            averaged = "" if overlay else ", mean over the seeds, and the runs"
            description = f"{words.capitalize()} by epoch{averaged}: {ends}."
            drawn[score] = charts.bands(stacked, words, description)
    if comparison:
        models = comparison["models"]
        for key, words in (("device_seconds", "device-seconds to train"), ("parameters", "parameters")):
            spots = {name: (m[key], top1_of(m, runs)) for name, m in models.items()}
            ends = "; ".join(f"{name}: {np.mean(top1):.3f} at {cost:,.0f}" for name, (cost, top1) in spots.items())
            drawn[key] = charts.scatter(spots, words, f"Test accuracy against {words}. {ends}.")
        if comparison["pairs"]:
            drawn["pairs"] = charts.differences(comparison["pairs"], " ".join(report["sentences"]))
    several = max(map(len, groups.values()), default=0)
    return render(
        "compared.html",
        drawn,
        title=report["name"],
        report=report,
        comparison=comparison,
        models={name: cells(model) for name, model in (comparison or {"models": {}})["models"].items()},
        links=links,
        several=several,
        overlay=overlay,
    )


def top1_of(model: dict[str, Any], runs: Sequence[RunFiles]) -> list[float]:
    """Return the test accuracy of each run of a model of a comparison; the mean alone where a run is gone."""
    top1 = [test["top1"] for run in runs if run.name in model["runs"] and (test := run.history.test)]
    return top1 if len(top1) == len(model["runs"]) else [model["top1"]["mean"]]


def last_mean(values: np.ndarray) -> float:
    known = [row[np.isfinite(row)][-1] for row in values if np.isfinite(row).any()]
    return float(np.mean(known))


# In words -------------------------------------------------------------------------------------------


def to_markdown(report: dict[str, Any]) -> str:
    """Return a report as Markdown, without its charts."""
    lines = [f"# {text(report['name'])}", "", text(report["state"]), ""]
    lines += [part for note in report["notes"] for part in (f"Note: {text(note)}", "")]
    lines += [part for words in report["paragraph"].split("\n\n") for part in (text(words), "")]
    lines += [report["results"], ""] if report.get("results") else []
    lines += ["## Findings", ""] * bool(report["findings"])
    for finding in report["findings"]:
        evidence, advice = text(finding["evidence"]), text(finding["advice"])
        lines += [f"- **{finding['kind']}** ({finding['confidence']:.2f}): {evidence} *{advice}*"]
    lines += ["", "## What next", ""] * bool(report["next"])
    for step in report["next"]:
        lines += [f"- {text(step['reason'])}:", "", f"      {' '.join(step['command'].split())}", ""]
    return "\n".join(lines).rstrip() + "\n"
