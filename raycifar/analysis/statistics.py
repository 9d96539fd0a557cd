"""How sure a comparison is: intervals over seeds, and paired tests on the same test images.

Two things make a test accuracy uncertain: the seed of the training, and which images happen to be in the test
set. The variance of a difference is the sum of both parts, minus what is in both; its degrees of freedom follow
Satterthwaite (1946), with the images' part treated as known.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8  # the chance that the advised number of seeds detects the difference
MAX_SEEDS = 100


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, low, high and n: Student's t interval of 95%, None for its ends where n is 1."""
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return {"mean": mean, "low": float(mean - half), "high": float(mean + half), "n": n}


def accuracy_interval(accuracy: float, n: int) -> dict[str, float]:
    """Return low and high: the 95% interval of an accuracy on n images, over the choice of images (Wilson, 1927)."""
    ends = stats.binomtest(round(accuracy * n), n).proportion_ci(CONFIDENCE, method="wilson")
    return {"low": float(ends.low), "high": float(ends.high)}


def accuracy_intervals(test: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the interval of each accuracy among a network's scores, by name."""
    num_images = dict.fromkeys(("top1", "top5", "superclass_top1"), test["images"])
    num_images["top1_without_near_duplicates"] = test["images"] - test.get("near_duplicates", 0)
    known = {name: n for name, n in num_images.items() if n > 0 and test.get(name) is not None}
    return {name: accuracy_interval(test[name], n) for name, n in known.items()}


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Return the exact p-value of McNemar (1947) for two networks.

    Args:
        a, b: (images,) bool, whether each image is classified correctly.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def seed_variances(a: np.ndarray, b: np.ndarray) -> tuple[list[tuple[float, int]], bool]:
    """Return the parts of the variance due to seeds, each with its degrees of freedom, and whether they are measured.

    With equal numbers of runs, both models are assumed to have the same variance, as in Student's test, which is
    robust to a difference. With unequal numbers, each has its own part, as in Welch's test.

    With a single run of either model, the parts can't be measured. If runs that differ only in their seed err on images
    independently of each other (Jordan, 2023, arXiv:2304.01910), the variance is at most that of the images on which
    two runs disagree. This is used then, although seeds may do more.
    """
    if min(len(a), len(b)) > 1:
        of_a, of_b = ((float(runs.mean(1).var(ddof=1)) / len(runs), len(runs) - 1) for runs in (a, b))
        return [of_a, of_b] if len(a) != len(b) else [(of_a[0] + of_b[0], of_a[1] + of_b[1])], True
    disagreement = float(np.mean([(one != other).mean() for one in a for other in b]))
    return [(disagreement / a.shape[1], 10**9)], False


def interaction_variance(runs: np.ndarray) -> float:
    """Return the variance of a model's mean accuracy that is due to images which only some seeds get right.

    It is in the variance between the means of images as well as in that between the means of runs.

    Args:
        runs: (runs, images) bool, two runs or more.
    """
    residual = runs - runs.mean(0) - runs.mean(1, keepdims=True) + runs.mean()
    return float((residual**2).sum()) / ((len(runs) - 1) * (runs.shape[1] - 1)) / runs.size


def difference(a: np.ndarray, b: np.ndarray, pairs: int = 1) -> dict[str, Any]:
    """Return how much the accuracies of two models differ, and how sure that is.

    Args:
        a, b: (runs, images) bool, whether each run classifies each test image correctly.
        pairs: how many are compared. The interval, p_adjusted and seeds_needed allow for their number (Bonferroni:
            more powerful corrections, such as Holm's, have no intervals that agree with them).

    Returns:
        difference (of the means, a less b), low and high (95%), p_value (two-sided t test), p_adjusted,
        degrees_of_freedom, seeds_measured, and seeds_needed: how many runs of each model would detect a difference of
        this size with a power of 0.8; None where no number up to 100 would.
    """
    confidence = 1 - (1 - CONFIDENCE) / pairs
    d = float(a.mean() - b.mean())
    images = float((a.mean(0) - b.mean(0)).var(ddof=1)) / a.shape[1]  # the variance due to the choice of test images
    seeds, measured = seed_variances(a, b)
    of_seeds = sum(part for part, _ in seeds)
    shared = interaction_variance(a) + interaction_variance(b) if measured else 0.0  # counted in both
    variance = images + max(0.0, of_seeds - shared)
    spread = sum(part**2 / freedom for part, freedom in seeds)
    freedom = max(variance**2 / spread, min(freedom for _, freedom in seeds)) if spread else 1e9
    error = math.sqrt(variance)
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error
    p_value = float(2 * stats.t.sf(abs(d) / error, freedom)) if error else float(d == 0)
    each = of_seeds / (1 / len(a) + 1 / len(b))  # the variance between two seeds
    return {
        "difference": d,
        "low": d - half,
        "high": d + half,
        "p_value": p_value,
        "p_adjusted": min(1.0, pairs * p_value),
        "degrees_of_freedom": freedom,
        "seeds_measured": measured,
        "seeds_needed": seeds_needed(d, each, max(0.0, images - shared), confidence),
    }


def seeds_needed(d: float, seed: float, images: float, confidence: float = CONFIDENCE) -> int | None:
    """Return the smallest number of seeds for each of two models that would detect a difference of `d`.

    Args:
        seed: variance of a model's accuracy between seeds. images: variance of the difference due to the images,
            whatever the number of seeds.
    """
    for n in range(2, MAX_SEEDS + 1) if d else ():
        needed = stats.t.ppf((1 + confidence) / 2, 2 * n - 2) + stats.norm.ppf(POWER)
        if abs(d) >= needed * math.sqrt(2 * seed / n + images):
            return n
    return None
