"""Reading the curves of a run as an expert would: what they show, how sure that is, and what to do about it.

A rule is a function of `rules` that takes a run's history and the findings so far, and returns a list of findings. To
add one, list it in `RULES`, and give its kind a phrase in `PHRASES`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from raycifar.analysis.collapse import MIN_STEPS
from raycifar.analysis.departures import LOOSE, departures
from raycifar.analysis.findings import FIT, SIGMAS, SURE, Finding, has, standard_error
from raycifar.analysis.history import RunHistory
from raycifar.analysis.rules import generalization, jumps, learning, trends
from raycifar.words import listed, points

LEARNED = 0.4  # pseudo-R² of a network that can be called healthy: the upper end of McFadden's excellent fits
RULES: Sequence[Callable[[RunHistory, Sequence[Finding]], list[Finding]]] = (
    learning.divergence,
    learning.collapsed,
    jumps.never_recovers,
    learning.underfitting,
    learning.learning_rate,
    jumps.spikes,
    generalization.overfitting,
    generalization.gap_to_validation,
    generalization.validation_above_training,
    trends.validation_noise,
    trends.trend,
    learning.stopped_early,
)
ALWAYS = (learning.divergence, learning.collapsed, learning.learning_rate)  # the others are of networks that learn
TRENDS = {"improving", "plateau"}
PHRASES = {
    "test-differs": "the test set doesn't match the validation images",
    "too-early": "it is too early to tell",
    "collapse": "the network is no better than guessing",
    "overfitting": "it overfits",
    "generalization-gap": "it does better on training images than on new ones",
    "spike": "the loss spikes",
    "plateau": "validation accuracy has stopped rising",
    "improving": "it is still improving",
    "underfitting": "it underfits",
    "validation-noise": "the validation curve is noisy",
    "validation-above-training": "validation is ahead of training",
    "divergence": "training diverges",
    "learning-rate-high": "the learning rate is too high",
    "learning-rate-low": "the learning rate is too low",
    "seed-variance": "seeds differ more than they should",
    "healthy": "nothing looks wrong",
}


def diagnose(history: RunHistory) -> list[Finding]:
    """Return what the curves of a run show, the most important first."""
    early = not history.records or (history.steps < MIN_STEPS and not history.fit >= FIT)
    found: list[Finding] = []
    for rule in (learning.divergence, learning.learning_rate) if early else RULES:
        if rule in ALWAYS or not has(found, "collapse", "divergence"):
            found += rule(history, found)
    if early and not found:
        return [learning.too_few_steps(history)] if history.records else []
    if not early and all(map(is_harmless, found)):
        if history.fit >= LEARNED and not generalization.gap_unknown(history):
            found.insert(0, trends.healthy(history, found))
        elif not found:
            found.append(learning.too_little_learned(history))
    return [blame_recipe(history, finding) for finding in found]


def is_harmless(finding: Finding) -> bool:
    """Return whether a healthy run can have it, too."""
    return bool((finding.kind in TRENDS and not finding.metrics.get("falls")) or finding.metrics.get("explained"))


def blame_recipe(history: RunHistory, finding: Finding) -> Finding:
    """Return the finding with its cause in the recipe, if there is one, named first."""
    causes = departures(history, finding)
    if not causes:
        return finding
    evidence = f"A likely cause: compared with {history.base}, {listed(list(map(str, causes)))}. "
    first = f"First of all, use {listed([cause.remedy for cause in causes])}."
    advice = generalization.regularize(history, causes) if finding.kind in LOOSE else first
    metrics = {**finding.metrics, "recipe": {cause.field: cause.value for cause in causes}}
    return replace(finding, evidence=evidence + finding.evidence, advice=advice, metrics=metrics)


def seed_variance(model: str, top1: Sequence[float], num_images: int, *, limited: bool = False) -> Finding | None:
    """Return whether runs that differ in their seed alone differ by more than their test images explain.

    Runs that err independently differ by the binomial variance of p (1 - p) / n at most (Jordan, 2023,
    arXiv:2304.01910); more is instability. The variance of several runs follows chi-squared.

    Args:
        limited: whether each trains on a different part of the training images.
    """
    if len(top1) < 2:
        return None
    mean, variance = float(np.mean(top1)), float(np.var(top1, ddof=1))
    ratio = variance / standard_error(mean, num_images) ** 2
    chance = float(stats.chi2.sf(ratio * (len(top1) - 1), len(top1) - 1))
    if chance >= 2 * stats.norm.sf(SIGMAS):
        return None
    evidence = (
        f"The {len(top1)} runs of {model} end with test accuracies from {min(top1):.3f} to {max(top1):.3f}. Their "
        f"standard deviation, {points(math.sqrt(variance))}, is {math.sqrt(ratio):.1f} times what {num_images:,} test "
        "images explain."
    )
    advice = "Lower --lr or lengthen --warmup, and report more seeds."
    if limited:
        evidence += " With --limit, each seed trains on other images, which may be the reason."
        advice = "Train on all images, without --limit, and report more seeds."
    return Finding("seed-variance", SURE, evidence, advice, [], {"ratio": math.sqrt(ratio)})
