"""What a network got right and wrong, held against torchmetrics and scipy."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
)

from raycifar.analysis.classification import by_class, confused_pairs, confusion, reliability

CLASSES = 10
NAMES = [f"class {k}" for k in range(CLASSES)]


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 3000)
    logits = rng.normal(size=(3000, CLASSES)) + 2 * np.eye(CLASSES)[labels]
    logits[:, 9] -= 99  # a class that is never predicted
    probabilities = torch.from_numpy(logits).softmax(1)
    return labels, probabilities


def test_the_table_of_classes_is_torchmetrics_s(predictions):
    labels, probabilities = predictions
    predicted, target = probabilities.argmax(1), torch.from_numpy(labels)
    matrix = confusion(labels, predicted.numpy(), CLASSES)
    assert (matrix == multiclass_confusion_matrix(predicted, target, CLASSES).numpy()).all()
    rows = by_class(matrix, NAMES)
    for key, function in (
        ("recall", multiclass_accuracy),
        ("precision", multiclass_precision),
        ("f1", multiclass_f1_score),
    ):
        expected = function(predicted, target, CLASSES, average=None).tolist()
        assert [row[key] or 0.0 for row in rows] == pytest.approx(expected)
    assert rows[9]["precision"] is None
    assert sum(row["images"] for row in rows) == 3000


def test_the_most_confused_pairs_count_both_directions():
    matrix = np.diag([5, 5, 5])
    matrix[0, 1], matrix[1, 0], matrix[2, 1] = 3, 1, 2
    assert confused_pairs(matrix, "abc") == [
        {"a": "a", "b": "b", "images": 4, "a_taken_for_b": 3, "b_taken_for_a": 1},
        {"a": "b", "b": "c", "images": 2, "a_taken_for_b": 0, "b_taken_for_a": 2},
    ]


def test_the_bins_of_confidence_add_up_to_the_calibration_error(predictions):
    labels, probabilities = predictions
    confidence, predicted = (values.numpy() for values in probabilities.max(1))
    bins = reliability(confidence, predicted == labels)
    assert sum(b["images"] for b in bins) == 3000
    error = sum(b["images"] * abs(b["confidence"] - b["accuracy"]) for b in bins if b["images"]) / 3000
    expected = multiclass_calibration_error(probabilities, torch.from_numpy(labels), CLASSES, n_bins=15)
    assert error == pytest.approx(expected.item(), abs=1e-6)
