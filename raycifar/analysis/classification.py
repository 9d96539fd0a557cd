"""What a network gets right and wrong: by class, by pair of classes, by confidence."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from raycifar.data import CIFAR100

CLASSES = tuple(name.replace("_", " ") for name in CIFAR100.class_names)  # as people write them
BINS = 15  # of confidence, Guo et al. (2017), arXiv:1706.04599


def confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int = CIFAR100.num_classes) -> np.ndarray:
    """Return the number of images of each class (rows) that are predicted as each class (columns)."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, -1)


def by_class(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return precision, recall, F1 and the number of images of each class; None where they are undefined."""
    correct, of_class, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    return [
        {
            "class": name,
            "images": int(of_class[k]),
            "recall": ratio(correct[k], of_class[k]),
            "precision": ratio(correct[k], predicted[k]),
            "f1": ratio(2 * correct[k], of_class[k] + predicted[k]),
        }
        for k, name in enumerate(names)
    ]


def ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def confused_pairs(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the 20 pairs of classes that are most often confused, in either direction."""
    both = np.triu(matrix + matrix.T, 1)
    pairs = np.argsort(-both, axis=None, kind="stable")[:20]
    return [
        {
            "a": names[a],
            "b": names[b],
            "images": int(both[a, b]),
            "a_taken_for_b": int(matrix[a, b]),
            "b_taken_for_a": int(matrix[b, a]),
        }
        for a, b in (divmod(int(pair), len(matrix)) for pair in pairs)
        if both[a, b]
    ]


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, Any]]:
    """Return, for each of 15 equal bins of confidence, its images, mean confidence and accuracy.

    Args:
        confidence: (images,) the probability of the likeliest class. correct: (images,) bool.
    """
    bin_of = np.ceil(confidence.astype(np.float64) * BINS).clip(1, BINS).astype(int) - 1
    return [
        {
            "from": k / BINS,
            "to": (k + 1) / BINS,
            "images": int(inside.sum()),
            "confidence": float(confidence[inside].mean()) if inside.any() else None,
            "accuracy": float(correct[inside].mean()) if inside.any() else None,
        }
        for k in range(BINS)
        for inside in (bin_of == k,)
    ]
