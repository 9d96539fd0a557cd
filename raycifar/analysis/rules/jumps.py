"""Jumps of the loss from one epoch to the next, and whether it recovers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from raycifar.analysis.findings import FEW_EPOCHS, SIGMAS, SURE, Finding, calm, spread_of_changes, standard_error
from raycifar.analysis.history import RunHistory
from raycifar.words import times

SPIKE_SIGMAS = 6.0  # of the robust spread of changes: a long run reaches 4 by chance
NEARBY = 10  # epochs before and after a jump, whose spread counts, too: a falling learning rate calms a loss
CONCENTRATED = 0.25  # fraction of a rise that is due to 1% of the images; equal images would cause 3 or 4%
MAX_SPIKES = 5  # that are reported one by one


def spikes(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    name, losses, top1, images = judged(history)
    recovered = [
        (k, z)
        for k, z in jumps(losses)
        if dips(top1, k, images) and is_large(history, losses, k) and recovers(losses, top1, k, images)
    ]
    result = []
    for k, z in sorted(sorted(recovered, key=lambda jump: -jump[1])[:MAX_SPIKES]):  # the largest, in their order
        cause, advice, metrics = explain_spike(history, k)
        falls = f"accuracy falls from {top1[k - 1]:.3f} to {top1[k]:.3f}; both recover"
        evidence = f"{jump_in_words(name, losses, k, z)}, and {falls}. {cause}"
        result.append(Finding("spike", SURE, evidence, advice, [k + 1], metrics))
    return result


def never_recovers(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    """Return the jump of the loss from which a run never recovers, if there is one."""
    (name, losses, top1, images), train = judged(history), history.column("train_loss")
    for k, z in jumps(losses):
        stays = is_large(history, losses, k) and not recovers(losses, top1, k, images)
        if stays and train[-1] > np.fmin.reduce(train[:k]):  # else training goes on: it is overfitting
            cause, advice, metrics = explain_spike(history, k)
            verb = "has not recovered so far: it stands" if history.cut_short else "never recovers: it ends"
            evidence = f"{jump_in_words(name, losses, k, z)}, and it {verb} at {losses[-1]:.3f}. {cause}"
            return [Finding("divergence", SURE, evidence, advice, [k + 1], metrics)]
    return []


def jump_in_words(name: str, losses: np.ndarray, k: int, z: float) -> str:
    rise = f"from {losses[k - 1]:.3f} to {losses[k]:.3f}"
    return f"At epoch {k + 1}, the {name} loss jumps {rise}, {times(z)} its usual variation"


def judged(history: RunHistory) -> tuple[str, np.ndarray, np.ndarray, int]:
    """Return what jumps are judged by, validation if there is any: name, loss, accuracy and number of images."""
    name, split = ("validation", "val") if history.num_val else ("training", "train")
    images = history.num_val or history.num_train
    return name, history.column(f"{split}_loss"), history.column(f"{split}_top1"), images


def jumps(losses: np.ndarray) -> list[tuple[int, float]]:
    """Return the epochs (from 0) at which a loss rises out of all proportion, and by how many robust deviations.

    The last epoch is left out: its rise may be the beginning of anything.
    """
    if len(losses) < FEW_EPOCHS:
        return []
    if not np.isfinite(changes := np.diff(losses)).any():
        return []
    rises, usual = changes - np.nanmedian(changes), max(spread_of_changes(losses), 1e-9)
    candidates = 1 + np.flatnonzero(rises[:-1] > SPIKE_SIGMAS * usual)
    nearby = [spread_of_changes(losses[max(0, k - NEARBY) : k + NEARBY]) for k in candidates]
    scored = [(int(k), float(rises[k - 1]) / max(usual, near)) for k, near in zip(candidates, nearby, strict=True)]
    return [(k, z) for k, z in scored if z > SPIKE_SIGMAS]


def is_large(history: RunHistory, losses: np.ndarray, k: int) -> bool:
    """Return whether a loss rises at epoch k by more than sampling explains, or by a tenth where that is unknown."""
    error = history.records[k].val_loss_se
    least = losses[k - 1] / 10 if error is None else SIGMAS * math.sqrt(2) * error
    return bool(losses[k] - losses[k - 1] > least)


def dips(top1: np.ndarray, k: int, images: int) -> bool:
    """Return whether accuracy falls at epoch k by more than sampling explains."""
    return bool(top1[k - 1] - top1[k] > least_change(top1[k], images))


def least_change(p: float, images: int) -> float:
    """Return by how much an accuracy must change from `p` to be significant."""
    return SIGMAS * standard_error(p, images) * math.sqrt(2)


def recovers(losses: np.ndarray, top1: np.ndarray, k: int, images: int) -> bool:
    """Return whether at least half of the loss's rise at epoch k is undone later, and accuracy rises if it dips."""
    rises = np.fmax.reduce(top1[k + 1 :]) - top1[k] > least_change(top1[k], images)
    return bool(
        np.fmin.reduce(losses[k + 1 :]) < (losses[k - 1] + losses[k]) / 2 and (rises or not dips(top1, k, images))
    )


def explain_spike(history: RunHistory, k: int) -> tuple[str, str, dict[str, Any]]:
    """Return a sentence that names what a spike at epoch k (from 0) coincides with, advice, and metrics."""
    before, record, advice = history.records[k - 1], history.records[k], calm(history)
    causes: list[str] = []
    metrics: dict[str, Any] = {}
    lr = history.column("lr")
    if (before.stage, record.stage) == ("head", "whole"):  # each has its own warm-up: their rates can't be compared
        causes.append("the change from training the head alone to training the whole network")
        metrics["stage"] = record.stage
        advice = "Start the whole network more gently: a smaller --lr or --layer-decay, or a longer --warmup."
    elif lr[k - 1] > 0 and lr[k] / lr[k - 1] > 2:
        causes.append(f"a learning rate {times(lr[k] / lr[k - 1])} that of the epoch before ({lr[k]:.3g})")
        metrics["learning_rate_ratio"] = lr[k] / lr[k - 1]
    if record.restarts:
        causes.append("a restart of the run")
        metrics["restarts"] = record.restarts
    norms = history.column("grad_norm_max")
    usual = float(np.nanmedian(norms)) if np.isfinite(norms).any() else 0.0
    if usual > 0 and norms[k] > 3 * usual:
        step = (record.grad_norm_max_step or 0) + 1
        causes.append(f"a gradient norm of {norms[k]:.2f} (usually {usual:.2f}) at step {step}")
        metrics["gradient_norm_ratio"] = norms[k] / usual
    rise = record.rise
    if rise and rise["fraction"] > CONCENTRATED:
        causes.append(f"a few hard images: 1% of them cause {rise['fraction']:.0%} of the rise in training loss")
        metrics["example_indices"] = rise["indices"]
    if not causes:
        return "Nothing that was recorded coincides with it.", advice, metrics
    return f"It coincides with {'; with '.join(causes)}.", advice, metrics
