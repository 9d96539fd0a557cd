"""The images that a report shows: confused, doubted, behind a spike, or as the network sees them."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raycifar.analysis.classification import CLASSES, confused_pairs
from raycifar.analysis.findings import Finding
from raycifar.analysis.history import RunHistory
from raycifar.analysis.run_files import RunFiles
from raycifar.data.dataset import Source, to_images
from raycifar.data.pictures import to_png
from raycifar.storage.schemas import PicturesFile, Pixels

GALLERY = 24  # images of the most suspect labels
CONTRADICTIONS = 12  # pairs of near duplicates with different labels that are shown
PAIRS, EXAMPLES = 6, 4  # pairs of classes shown, and pictures of each direction
PNG = "data:image/png;base64,"
SEEN = 16  # augmented images shown
SAMPLE = 2000  # images of each split whose pixels are measured


def choose_pictures(files: RunFiles, source: Source) -> PicturesFile:
    """Return the content of `pictures.json`: what the report shows of a data set, a few hundred kilobytes."""
    train = {image["index"] for image in doubted_images(files)}
    train |= {row for _, rows in behind_spikes(files.findings) for row in rows}
    test = {row for pair in confused(files) for row, _ in pair["rows"]}
    return {
        "train": {str(row): to_base64(source.train, row) for row in sorted(train)},
        "test": {str(row): to_base64(source.test, row) for row in sorted(test)},
        "superclass_of": list(source.superclass_of()),
        "pixels": {"train": measure_pixels(source.train), "test": measure_pixels(source.test)},
        "augmented": augmented(files.history, source),
    }


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


def doubted_images(files: RunFiles) -> list[dict[str, Any]]:
    """Return the training images whose labels are most suspect, if the network knows enough to doubt them.

    Pairs of near duplicates with different labels come first.
    """
    if not files.mature or (found := files.suspects) is None:
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
    """Return the pairs of near duplicates with different labels."""
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


def augmented(history: RunHistory, source: Source) -> list[str]:
    """Return a few training images as the network sees them, as PNG files in base64."""
    from raycifar.engine.augment import as_trained

    images = as_trained(to_images(source.train["image"].slice(0, SEEN)), history.recipe, history.run["seed"])
    return [base64.b64encode(to_png(image)).decode() for image in images]


def measure_pixels(table: pa.Table) -> Pixels:
    rows = np.linspace(0, len(table) - 1, min(SAMPLE, len(table))).astype(int)  # of all classes, whatever their order
    pixels = to_images(table["image"].take(rows)) / 255.0
    return {"mean": float(pixels.mean()), "std": float(pixels.std())}


def to_base64(table: pa.Table, row: int) -> str:
    """Return the image of a row as a PNG file in base64."""
    return base64.b64encode(to_png(to_images(table["image"].slice(row, 1))[0])).decode()


def as_uris(pictures: PicturesFile | None, split: str, rows: Sequence[tuple[int, str]]) -> list[dict[str, str]]:
    """Return those of the images that are there, as data URIs with their words."""
    there: dict[str, str] = pictures[split] if pictures else {}  # type: ignore[literal-required]
    return [{"uri": PNG + there[str(row)], "words": words} for row, words in rows if str(row) in there]
