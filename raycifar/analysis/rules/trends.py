"""Where validation accuracy is going, and how noisy it is."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from raycifar.analysis.findings import COARSE, FEW_EPOCHS, SURE, Finding, calm, go_on, has, robust_slope, standard_error
from raycifar.analysis.history import RunHistory
from raycifar.analysis.rules.generalization import generalization_gap, regularize
from raycifar.words import change, count, points, span

# Neighboring second differences share epochs: their squares are correlated by (2/3)² and, two apart, by (1/6)².
SERIAL = 1 + 2 * (2 / 3) ** 2 + 2 * (1 / 6) ** 2


def validation_noise(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if not history.num_val:
        return []
    top1, n = history.column("val_top1"), history.num_val
    half = min(1.0, 1.96 * standard_error(float(top1[-1]), n))
    late = top1[max(last_bend(history), len(top1) // 2 if len(top1) >= 10 else 0) :]
    wiggle, ratio, chance = swings(history, late)
    falls = int((np.diff(late) < -half).sum())
    sampled = half >= COARSE
    settles = history.cut_short and history.recipe.schedule != "constant"  # as the learning rate falls
    swinging = chance < 0.001 and wiggle > half and falls > 1 and not settles and not has(found, "spike")
    if not sampled and not swinging:
        return []
    evidence = (
        f"With {count(n, 'validation image')}, an accuracy of {top1[-1]:.3f} is uncertain by ± {points(half)} (95%)."
    )
    if math.isfinite(wiggle):
        evidence += f" From epoch to epoch it fluctuates by {points(wiggle)} (standard deviation)"
        if math.isfinite(ratio):
            more = f"more than sampling explains ({math.sqrt(ratio):.1f} times as much)"
            evidence += f", {more if chance < 0.001 else 'no more than sampling explains'}"
        evidence += "."
    if sampled:
        advice = "Read nothing into single epochs, and hold out more images (--val-size 5000)."
    else:
        advice = "The network itself is unstable: lower --lr, raise --batch-size, or average weights with --ema 0.999."
    metrics = {"images": n, "half_width": half, "swings": wiggle, "cause": "sampling" if sampled else "network"}
    return [Finding("validation-noise", 0.95 if sampled else SURE, evidence, advice, [], metrics)]


def swings(history: RunHistory, top1: np.ndarray) -> tuple[float, float, float]:
    """Return how much a curve swings around its trend, relative to what sampling explains, and the p-value.

    The spread is estimated from second differences (Gasser, Sroka and Jennen-Steinmetz, 1986). The same images are
    scored at each epoch, so that sampling's part in a change is that of the images that changed sides (McNemar, 1947).
    """
    if len(top1) < FEW_EPOCHS:
        return math.nan, math.nan, 1.0
    second = top1[1:-1] - (top1[:-2] + top1[2:]) / 2
    variance = float((second**2).mean()) / 1.5
    moved = (history.column("val_gained") + history.column("val_lost"))[-len(top1) :]
    expected = float(np.nanmean(moved)) / history.num_val**2 / 2 if np.isfinite(moved).any() else math.nan
    ratio = variance / expected if expected and math.isfinite(expected) else math.nan
    freedom = len(second) / SERIAL
    chance = float(stats.chi2.sf(ratio * freedom, freedom)) if math.isfinite(ratio) else 1.0
    return math.sqrt(variance), ratio, chance


def last_bend(history: RunHistory) -> int:
    """Return the epoch (from 0) from which the curves bend no more, as they do in warm-up and at a schedule's steps."""
    lr = history.column("lr")
    falls = lr[1:] < lr[:-1] / 2 if history.recipe.schedule == "step" else np.array([])
    after = np.flatnonzero(falls) + 2  # accuracy still jumps in the epoch of the step
    return max([int(np.argmax(lr)), *map(int, after)])


def trend(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if not history.num_val:
        return []
    top1 = history.column("val_top1")
    late = top1[max(last_bend(history), len(top1) - max(4, len(top1) // 2)) :]
    if np.isfinite(late).sum() < 4:
        return []
    slope, low, high = robust_slope(late)
    epochs = list(range(len(top1) - len(late) + 1, len(top1) + 1))
    noise = standard_error(float(top1[-1]), history.num_val)
    metrics = {"slope": slope, "low": low, "high": high, "schedule_ended": history.decayed}
    interval = f"(95% interval: {change(low)} to {change(high)})"
    if low > 0 and low * len(late) > noise:
        return [improving(history, found, epochs, slope, interval, metrics)]
    if has(found, "overfitting", "underfitting"):
        return []
    if high < 0 and -high * len(late) > noise:
        return [falling(history, epochs, slope, interval, metrics)]
    gain = max(0.0, high) * len(late)
    worth = 2 * COARSE if history.decayed else COARSE  # with a learning rate near 0, a rise is over anyway
    # Before the end, a falling learning rate may still help; of few images, a curve that looks flat may be rising.
    if history.cut_short or gain > min(2 * 1.96 * noise, worth):
        return []
    stalls = "hardly rises" if low >= 0.00005 else "no longer rises"
    evidence = (
        f"{span(epochs)} validation accuracy {stalls}: it changes by {change(slope)} points per epoch {interval}."
    )
    if history.decayed:
        evidence += " The learning rate has fallen to the end of its schedule, so more of the same would change little."
        advice = "Stop here, or change the recipe: a longer schedule keeps the learning rate high for longer."
    else:
        evidence += (
            f" By this trend, as many epochs again would add at most {points(gain)}, which "
            f"{count(history.num_val, 'validation image')} can hardly show."
        )
        advice = "Stop here, or change the recipe."
        if history.recipe.schedule == "constant":
            advice = "Let the learning rate fall: --schedule cosine."
    return [Finding("plateau", 0.95, evidence, advice, epochs, {**metrics, "gain": gain})]


def improving(
    history: RunHistory,
    found: Sequence[Finding],
    epochs: list[int],
    slope: float,
    interval: str,
    metrics: dict[str, Any],
) -> Finding:
    """Return the finding of a curve that rises, and whether more epochs would continue it."""
    evidence = f"{span(epochs)} validation accuracy rises by {points(slope)} per epoch {interval}."
    longer = f"--epochs {2 * history.recipe.epochs}."
    if history.decayed and not history.cut_short and history.recipe.schedule != "step":
        evidence += (
            " It rises as the learning rate falls to the end of the schedule. At its end the learning rate is nearly "
            "0, so more epochs at that rate would add little."
        )
        advice = f"Train with a longer schedule: {longer}"
    else:
        advice = go_on(history, f"Train for more epochs: {longer}")
    if has(found, "overfitting"):
        evidence += (
            " The validation loss rises because the network grows overconfident in its errors, not because it makes "
            "more of them (Guo et al., 2017)."
        )
        if history.recipe.label_smoothing < 0.1:
            advice = "Against overconfidence, try --label-smoothing 0.1."
    return Finding("improving", 0.95, evidence, advice, epochs, metrics)


def falling(history: RunHistory, epochs: list[int], slope: float, interval: str, metrics: dict[str, Any]) -> Finding:
    """Return the finding of a curve that falls, though no loss shows overfitting."""
    evidence = f"{span(epochs)} validation accuracy falls by {points(-slope)} per epoch {interval}."
    advice = regularize(history)
    if robust_slope(history.column("train_loss")[epochs[0] - 1 :])[1] > 0:
        evidence += " The training loss rises, too: training itself gets worse."
        advice = calm(history)
    return Finding("plateau", 0.95, evidence, advice, epochs, {**metrics, "falls": True})


def healthy(history: RunHistory, found: Sequence[Finding]) -> Finding:
    losses, val_losses, val_top1 = (history.column(name) for name in ("train_loss", "val_loss", "val_top1"))
    few = len(losses) < FEW_EPOCHS
    so_far = " so far" if few or history.cut_short else ""
    if not history.num_val:
        falls = f"falls from {losses[0]:.3f} to" if losses[-1] < losses[0] else "is"
        evidence = (
            f"The training loss {falls} {losses[-1]:.3f}. No images are held out for validation, so how well the "
            "network generalizes can't be seen."
        )
    else:
        both_fall = losses[-1] < losses[0] and val_losses[-1] < val_losses[0]
        fall = f"fall together{so_far}, to" if both_fall else "are"
        evidence = (
            f"Training and validation loss {fall} {losses[-1]:.3f} and {val_losses[-1]:.3f}. "
            f"Validation accuracy is {val_top1[-1]:.3f}"
        )
        gap = float(generalization_gap(history)[0][-1])
        if math.isfinite(gap):
            side = "below" if gap >= 0 else "above"
            evidence += f", {points(abs(gap))} {side} that of training images scored the same way"
        evidence += "."
    if few:
        evidence += " Jumps and reversals can't be told from noise in so few epochs."
    more = has(found, "improving") and not history.cut_short
    advice = f"Nothing needs fixing{so_far}.{' More epochs may help.' if more else ''}"
    return Finding("healthy", 0.9, evidence, advice)
