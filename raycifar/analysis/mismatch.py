"""Test images that don't match the validation images, and how they differ."""

import math
from typing import Any

import pyarrow as pa
from scipy.optimize import linear_sum_assignment

from raycifar.analysis.classification import CLASSES, confusion
from raycifar.analysis.findings import COARSE, SURE, Finding, standard_error
from raycifar.analysis.history import RunHistory
from raycifar.storage.parquet import from_lists
from raycifar.storage.schemas import PicturesFile
from raycifar.words import points

SIGMAS = 5.0  # the network was not chosen by either set, but test images may be a little harder: Recht et al. (2019)
RESTORED = 0.5  # fraction of the validation accuracy that a matching of labels must restore to explain the difference
NAMED = 3  # pairs of classes


def find_mismatch(history: RunHistory, predictions: pa.Table | None, pictures: PicturesFile | None) -> list[Finding]:
    """Return whether test and validation accuracy differ by more than sampling explains, and what explains it.

    Args:
        predictions: the content of `predictions.parquet`. pictures: that of `pictures.json`, for a look at pixels.
    """
    test, last = history.test, history.records[-1] if history.records else None
    if not test or last is None or last.val_top1 is None:
        return []
    error = math.hypot(standard_error(last.val_top1, history.num_val), standard_error(test["top1"], test["images"]))
    gap = last.val_top1 - test["top1"]
    if abs(gap) < max(COARSE, SIGMAS * error):
        return []
    evidence = [
        f"Accuracy is {last.val_top1:.3f} on the validation images and {test['top1']:.3f} on the test images: "
        f"{points(abs(gap))} apart, {abs(gap) / error:.0f} standard errors, which sampling can't explain."
    ]
    advice = "Check where the test images and their labels come from. Until then, don't report the test accuracy."
    metrics: dict[str, Any] = {"gap": gap}
    explanations = explain_by_answers(predictions, last.val_top1, test["top1"]), explain_by_pixels(pictures)
    for sentence, remedy, found in filter(None, explanations):
        evidence.append(sentence)
        advice = remedy
        metrics |= found
    return [Finding("test-differs", SURE, " ".join(evidence), advice, [], metrics)]


Explanation = tuple[str, str, dict[str, Any]] | None  # a sentence, what to do, and metrics


def explain_by_answers(predictions: pa.Table | None, val_top1: float, test_top1: float) -> Explanation:
    if predictions is None:
        return None
    labels, predicted = predictions["label"].to_numpy(), from_lists(predictions["top5"])[:, 0]
    matrix = confusion(labels, predicted)
    commonest = int(matrix.sum(0).argmax())
    if (fraction := matrix[:, commonest].sum() / len(labels)) > 0.5:
        sentence = f"The network gives the same answer, {CLASSES[commonest]}, to {fraction:.0%} of the test images."
        return sentence, "Check that the test images are prepared like the training images.", {"same": float(fraction)}
    rows, columns = linear_sum_assignment(-matrix)
    restored = float(matrix[rows, columns].sum() / len(labels))
    if restored < max(RESTORED * val_top1, 2 * test_top1):
        return None
    moved = [(CLASSES[a], CLASSES[b]) for a, b in zip(rows, columns, strict=True) if a != b and matrix[a, b]]
    pairs = ", ".join(f"“{a}” is what the network calls “{b}”" for a, b in moved[:NAMED])
    sentence = (
        f"The test labels stand in another order than the training labels: matched one to one, predictions and labels "
        f"agree on {restored:.3f} of the test images ({pairs}{', and so on' if len(moved) > NAMED else ''})."
    )
    advice = "Put the test labels in the order of the training labels, and score the test set again."
    return sentence, advice, {"restored": restored, "pairs": moved}


def explain_by_pixels(pictures: PicturesFile | None) -> Explanation:
    if pictures is None or not pictures["pixels"].keys() >= {"train", "test"}:
        return None
    train, test = pictures["pixels"]["train"], pictures["pixels"]["test"]
    means, stds = [train["mean"], test["mean"]], [train["std"], test["std"]]
    if abs(means[0] - means[1]) < 0.05 and 0.8 < stds[1] / max(stds[0], 1e-9) < 1.25:
        return None
    sentence = (
        f"The test images look different: their pixels have a mean of {means[1]:.2f} and a standard deviation of "
        f"{stds[1]:.2f}, those of the training images {means[0]:.2f} and {stds[0]:.2f} (from 0 to 1)."
    )
    advice = "Prepare the test images like the training images, and score the test set again."
    return sentence, advice, {"means": means, "stds": stds}
