"""The report of a run: as report.json, and as a page."""

from dataclasses import fields
from datetime import datetime
from typing import Any

import numpy as np

from raycifar.analysis import charts, prose
from raycifar.analysis.classification import CLASSES, by_class, confusion, reliability
from raycifar.analysis.curves import panels
from raycifar.analysis.departures import plain_value
from raycifar.analysis.gallery import PNG, as_uris, behind_spikes, confused, contradictions, doubted_images, labels_of
from raycifar.analysis.history import RunHistory
from raycifar.analysis.page import render
from raycifar.analysis.run_files import Answers, RunFiles
from raycifar.analysis.statistics import accuracy_intervals
from raycifar.data import CIFAR100
from raycifar.models.recipes import options_for
from raycifar.storage.schemas import PicturesFile

ROWS = 300  # epochs in a page's table


def report_run(files: RunFiles) -> dict[str, Any]:
    """Return the report of a run as `report.json` holds it."""
    history, found = files.history, files.findings
    return {
        "name": files.name,
        "state": prose.state(history, files.host),
        "notes": list(files.notes),
        "headline": prose.headline(found),
        "findings": [finding.to_json() for finding in found],
        "next": prose.next_steps(history, found, files.storage) if found and not files.host else [],
        "paragraph": prose.paragraph(history, found),
    }


def run_page(files: RunFiles, report: dict[str, Any]) -> str:
    """Return a run's `report.html`."""
    history, pictures = files.history, files.pictures
    drawn = {name: charts.curve_chart(panel) for name, panel in panels(history).items()} if history.records else {}
    drawn |= test_charts(files.answers, pictures) if files.answers else {}
    labels = labels_of(files)
    spikes = [
        {"epoch": epoch, "pictures": as_uris(pictures, "train", [(row, labels.get(row, "")) for row in rows])}
        for epoch, rows in behind_spikes(files.findings)
    ]
    doubted = doubted_images(files)
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
        intervals=accuracy_intervals(history.test) if history.test else {},
        details=details(history),
        mature=files.mature,
        has_predictions=files.predictions is not None,
        has_pictures=pictures is not None,
        classes=every_class(files.answers.matrix) if files.answers else [],
        pairs=[{**pair, "pictures": as_uris(pictures, "test", pair["rows"])} for pair in confused(files)],
        behind=[spike for spike in spikes if spike["pictures"]],
        suspects=[
            {**image, **picture}
            for image in doubted
            if not image["contradicted"]
            for picture in as_uris(pictures, "train", [(image["index"], "")])
        ],
        contradictions=[
            pair
            for both in contradictions(doubted)
            if len(pair := as_uris(pictures, "train", [(image["index"], image["words"]) for image in both])) == 2
        ],
        augmented=[PNG + image for image in (pictures.get("augmented", []) if pictures else [])],
    )


def details(history: RunHistory) -> dict[str, str]:
    """Return what a reader needs to train the same network again."""
    run, recipe = history.run, history.recipe
    values = {f.name.replace("_", " "): plain_value(getattr(recipe, f.name)) or "none" for f in fields(recipe)}
    known = {
        "command": prose.to_command(run, "train", {**options_for(history.model, recipe), "seed": run["seed"]}),
        "recipe": ", ".join(f"{name} {value}" for name, value in values.items()),
        "parameters": f"{run['parameters']:,}" if run.get("parameters") else None,
        "hardware": prose.hardware(run),
        "precision": run.get("precision"),
        "versions": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()),
        "started": date(run.get("created")),
    }
    return {name: value or "unknown" for name, value in known.items()}


def date(created: str | None) -> str | None:
    """Return a time of `run.json` as 27 November 2026, 01:05 UTC; unchanged if it isn't a time."""
    try:
        time = datetime.fromisoformat(created or "")
    except ValueError:
        return created
    return f"{time.day} {time:%B %Y, %H:%M} {time.tzname() or ''}".rstrip()


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
