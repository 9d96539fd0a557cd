"""Reading the curves of a run as an expert would: what they show, how sure that is, and what to do about it.

Every threshold is statistical, with its source beside it. An accuracy p over n images has the binomial standard
error sqrt(p (1 - p) / n); a loss has the standard error of its mean over the images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from typing import Any

import numpy as np
from scipy import stats

from raycifar.analysis.collapse import MIN_STEPS, guesses
from raycifar.analysis.departures import LOOSE, departures, plain_value
from raycifar.analysis.history import RunHistory, thinned
from raycifar.data import CIFAR100
from raycifar.errors import FailureKind
from raycifar.models.recipe import Recipe
from raycifar.storage.records import Diagnostics, finite
from raycifar.words import count, listed

SIGMAS = 3.0  # a difference of so many standard errors is taken as real: Shewhart (1931), p = 0.0027
SURE = 0.99  # no finding is surer than that
SPIKE_SIGMAS = 6.0  # of the robust spread of all changes: a long run reaches 4 by chance
FIT = 0.2  # McFadden (1979): a pseudo-R² of 0.2 to 0.4 is an excellent fit, less explains little
COARSE = 0.025  # half a 95% interval of 5 points: architectures that are compared differ by less
DEAD = 0.9  # fraction of a layer's units that output 0 for all images, above which little passes it
VANISHED = 1e-3  # first layer's gradient over the last's: bfloat16 keeps 3 digits of a sum
PLAIN = ("none", "flip", "crop")  # augmentations that cutout adds to
CONCENTRATED = 0.25  # fraction of a rise that is due to 1% of the images; equal images would cause 3 or 4%
OFF = 8.0  # factor from a recipe's own learning rate, the range that a search covers
FEW_EPOCHS = 5  # of fewer, no spread of changes can be estimated
MAX_SPIKES = 5  # that are reported one by one
LEARNED = 0.4  # pseudo-R² of a network that can be called healthy: the upper end of McFadden's excellent fits
FEW_SIGMAS = 1.5  # of a loss, next to a gap that is beyond doubt
BEYOND_DOUBT = 10.0  # standard errors of a gap next to which a noisy loss need not be significant by itself


@dataclass(frozen=True)
class Finding:
    """What a curve shows: `kind` is one of `docs/report.md`, `confidence` a probability, `epochs` where it is seen."""

    kind: str
    confidence: float
    evidence: str
    advice: str
    epochs: list[int] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return finite(asdict(self))


def standard_error(p: float, n: int) -> float:
    """Return the standard error of a fraction `p` of `n`."""
    return math.sqrt(max(p * (1 - p), 1 / n) / n)


def confidence(z: float) -> float:
    """Return the probability that chance causes less than `z` standard errors."""
    return round(min(SURE, float(1 - 2 * stats.norm.sf(abs(z)))), 3)


def points(fraction: float) -> str:
    return f"{100 * fraction:.1f} points"


def change(fraction: float) -> str:
    """Return a fraction in points, with its sign: +0.31 or -2.00, and +0.00 of what rounds to nothing."""
    return f"{round(100 * fraction, 2) + 0.0:+.2f}"


def times(factor: float) -> str:
    return f"{factor:,.0f} times" if factor < 1000 else "more than 1,000 times"


def span(epochs: Sequence[int]) -> str:
    """Return "At epoch 3," or "From epoch 3 to 5,"."""
    return f"At epoch {epochs[0]}," if len(epochs) == 1 else f"From epoch {epochs[0]} to {epochs[-1]},"


def diagnose(history: RunHistory) -> list[Finding]:
    """Return what the curves of a run show, what matters most first."""
    early = not history.records or history.steps < MIN_STEPS
    found: list[Finding] = []
    for rule in (divergence, learning_rate) if early else RULES:
        if rule in ALWAYS or not has(found, "collapse", "divergence"):
            found += rule(history, found)
    if early:
        return [blame_recipe(history, finding) for finding in found] or [too_few_steps(history)] * bool(history.records)
    if all(finding.kind in TRENDS or finding.metrics.get("explained") for finding in found):
        if fit(history) >= LEARNED:
            found.insert(0, healthy(history, found))
        elif not found:
            found.append(too_little_learned(history))
    return [blame_recipe(history, finding) for finding in found]


def blame_recipe(history: RunHistory, finding: Finding) -> Finding:
    """Return the finding with its cause in the recipe, if there is one, named first."""
    causes = departures(history, finding.kind)
    if not causes:
        return finding
    defaults = "default" if len(causes) == 1 else "defaults"
    evidence = f"A likely cause is in the recipe: {listed(list(map(str, causes)))}, the {history.model}'s {defaults}. "
    remedies = listed([f"{cause.option} {plain_value(cause.own)}" for cause in causes])
    advice = regularize(history, remedies) if finding.kind in LOOSE else f"First of all, use {remedies}."
    metrics = {**finding.metrics, "recipe": {cause.field: cause.value for cause in causes}}
    return replace(finding, evidence=evidence + finding.evidence, advice=advice, metrics=metrics)


def has(found: Sequence[Finding], *kinds: str) -> bool:
    return any(finding.kind in kinds for finding in found)


def fit(history: RunHistory) -> float:
    """Return McFadden's pseudo-R² on training images: 0 for guessing, 1 for a perfect fit."""
    last = history.records[-1]
    loss = last.train_eval_loss if last.train_eval_loss is not None else last.train_loss
    return math.nan if loss is None else 1 - loss / history.guessing_loss


def calm(history: RunHistory) -> str:
    clip = [] if history.recipe.clip_norm else ["clip gradients (--clip-norm 1)"]
    return f"{listed(['Lower --lr', 'lengthen --warmup', *clip], 'or')}."


# Too early to tell ----------------------------------------------------------------------------------


def too_few_steps(history: RunHistory) -> Finding:
    steps, epochs = history.steps, -(-MIN_STEPS // history.steps_per_epoch)
    evidence = (
        f"The network has taken {count(steps, 'step')}, in {count(len(history.records), 'epoch')}: too few to tell "
        f"how well it learns. The curves can be read after {MIN_STEPS} steps, which take {count(epochs, 'epoch')} of "
        f"{count(history.num_train, 'image')}."
    )
    advice = "Continue this run." if history.unfinished else "Train for more --epochs, or on more images."
    return Finding("too-early", 0.95, evidence, advice, [], {"steps": steps, "epochs_needed": epochs})


def too_little_learned(history: RunHistory) -> Finding:
    done, epochs = len(history.records), history.recipe.epochs
    after = f"{done} of {count(epochs, 'epoch')}" if done < epochs else count(done, "epoch")
    evidence = (
        f"After {after}, the loss on training images has come {max(0.0, fit(history)):.0%} of the way from guessing to "
        "a perfect fit. Whether the network underfits, overfits or is healthy can't be told yet."
    )
    advice, needed = ("Continue this run.", epochs) if history.unfinished else ("Train for more --epochs.", 2 * epochs)
    return Finding("too-early", 0.9, evidence, advice, [], {"epochs_needed": needed})


# A network that doesn't learn -----------------------------------------------------------------------


def divergence(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if history.result and history.failure == FailureKind.NOT_FINITE:
        reason = history.result["reason"].split(". ")[0].rstrip(".")
        return [
            Finding("divergence", SURE, f"{reason[:1].upper()}{reason[1:]}. Training stopped there.", calm(history))
        ]
    if not history.records:
        return []
    losses, guessing = history.column("train_loss"), history.guessing_loss
    low, last = float(np.fmin.reduce(losses)), float(losses[-1])
    if not last > max(2 * guessing, 1.5 * low):
        return []
    evidence = (
        f"The training loss rises from {low:.2f} (epoch {int(np.nanargmin(losses)) + 1}) to {last:.2f} (epoch "
        f"{len(losses)}), more than twice the loss of guessing, ln({CIFAR100.num_classes}) = {guessing:.4f}."
    )
    return [Finding("divergence", SURE, evidence, calm(history), [len(losses)])]


def never_recovers(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    """Return the jump of the loss from which a run never recovers, if there is one."""
    (name, losses, top1, images), train = judged(history), history.column("train_loss")
    for k, z in jumps(losses):
        recovered = recovers(losses, top1, k, images)
        if not recovered and train[-1] > train[:k].min():  # else training goes on: it is overfitting
            cause, metrics = explain_spike(history, k)
            evidence = (
                f"At epoch {k + 1}, the {name} loss jumps from {losses[k - 1]:.3f} to {losses[k]:.3f}, {times(z)} its "
                f"usual variation, and it never recovers: it ends at {losses[-1]:.3f}. {cause}"
            )
            return [Finding("divergence", confidence(z), evidence, calm(history), [k + 1], metrics)]
    return []


def collapsed(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    classes = CIFAR100.num_classes
    last = history.records[-1]
    slow = rate_ratio(history) <= 1 / OFF  # then it has not moved far enough to collapse
    if has(found, "divergence") or slow or last.epoch * history.steps_per_epoch < MIN_STEPS:
        return []
    guessing = takewhile(lambda record: guesses(record, history.num_train, classes), reversed(history.records))
    epochs = [record.epoch for record in guessing][::-1]
    if not epochs:
        return []
    z = (history.column("train_top1")[-1] - 1 / classes) / standard_error(1 / classes, history.num_train)
    cause, metrics = explain_collapse(last.diagnostics)
    stays, so_far = "is" if len(epochs) == 1 else "stays", " so far" if history.unfinished else ""
    evidence = (
        f"{span(epochs)} the training loss {stays} at the level of guessing ({last.train_loss:.4f}; ln({classes}) = "
        f"{history.guessing_loss:.4f}). Training accuracy is {last.train_top1:.2%}, {abs(z):.1f} standard errors from "
        f"chance (1 in {classes}): the network has learned nothing{so_far}. {cause}"
    )
    advice = f"{calm(history)} Then look at the gradients of the first layers."
    return [Finding("collapse", SURE, evidence.strip(), advice, epochs, metrics)]


def explain_collapse(diagnostics: Diagnostics | None) -> tuple[str, dict[str, Any]]:
    """Return a sentence with the cause of a collapse, where one batch shows it, and its metrics."""
    if not diagnostics:
        return "", {}
    norms = [(name, norm) for name, norm in diagnostics["gradient_norms"].items() if norm is not None]
    if not norms:
        return "", {}
    dead = [(layer, fraction) for layer, fraction in diagnostics["dead_relus"].items() if fraction is not None]
    layer, fraction = max(dead, key=lambda item: item[1], default=("", 0.0))
    if fraction >= DEAD:
        text = (
            f"Its ReLUs have died: in layer {layer}, {fraction:.0%} of the units output 0 for every image, so no "
            "gradient passes through them."
        )
        return text, {"cause": "dead ReLUs", "layer": layer, "fraction": fraction}
    (first, small), (last, large) = norms[0], norms[-1]
    both = f"the norm is {small:.2g} at {first} and {large:.2g} at {last}"
    if small < VANISHED * large:
        text = f"Its gradients vanish on the way to the input: {both}."
        return text, {"cause": "vanishing gradients", "ratio": small / large}
    if small > large / VANISHED:
        text = f"Its gradients explode on the way to the input: {both}."
        return text, {"cause": "exploding gradients", "ratio": small / large if large else None}
    return "", {}


def underfitting(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    last, fitted = history.records[-1], fit(history)
    if not fitted < FIT:
        return []
    if history.unfinished:
        return [too_little_learned(history)]
    loss = (1 - fitted) * history.guessing_loss
    evidence = (
        f"After epoch {last.epoch}, the loss on training images, scored without augmentation, is {loss:.3f}. Guessing "
        f"gives ln({CIFAR100.num_classes}) = {history.guessing_loss:.3f}, so the loss has come "
        f"{max(fitted, 0):.1%} of the way to a perfect fit; below {FIT:.0%}, a network underfits."
        if fitted >= 0.005
        else f"After epoch {last.epoch}, the network does no better on training images than guessing: their loss is "
        f"{loss:.3f}, and that of guessing is ln({CIFAR100.num_classes}) = {history.guessing_loss:.3f}."
    )
    if last.val_loss is not None:
        evidence += f" The validation loss is {last.val_loss:.3f}."
    if len(history.records) < FEW_EPOCHS:
        evidence += " So few epochs may be the only reason."
    advice = "Train for more --epochs. If that isn't enough, raise --lr, augment less or take a larger model."
    if rate_ratio(history) <= 1 / OFF:
        advice = "First of all, raise --lr."
    sure = confidence((FIT - fitted) / 0.02)
    return [Finding("underfitting", sure, evidence, advice, [last.epoch], {"fit": fitted})]


def rate_ratio(history: RunHistory) -> float:
    """Return the peak learning rate over that of the model's own recipe; 1 where their scales differ."""
    own, same = history.own_recipe.lr, history.recipe.optimizer == history.own_recipe.optimizer
    return history.recipe.lr / own if own and same else 1.0


def learning_rate(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    lr, own, ratio = history.recipe.lr, history.own_recipe.lr, rate_ratio(history)
    advice = f"Use --lr {own:g}."
    if has(found, "underfitting") and ratio <= 1 / OFF:
        evidence = (
            f"The network has hardly learned, and the peak learning rate, {lr:g}, is {times(1 / max(ratio, 1e-9))} "
            f"smaller than that of the {history.model} recipe, {own:g}."
        )
        return [Finding("learning-rate-low", 0.95, evidence, advice, [], {"ratio": ratio})]
    losses = history.column("train_loss")
    usual = SIGMAS * spread_of_changes(losses)
    rises = [k + 2 for k, step in enumerate(np.diff(losses)) if step > usual]
    unstable = has(found, "collapse", "divergence") or len(rises) >= max(2, len(losses) // 4)
    if unstable and ratio >= OFF:
        evidence = (
            f"Training is unstable, and the peak learning rate, {lr:g}, is {times(ratio)} that of the {history.model} "
            f"recipe, {own:g}."
        )
        return [Finding("learning-rate-high", 0.95, evidence, advice, rises, {"ratio": ratio})]
    return []


# What single epochs show ----------------------------------------------------------------------------


def spread_of_changes(values: np.ndarray) -> float:
    """Return the robust standard deviation of the changes from epoch to epoch: 1.4826 times their median deviation."""
    changes = np.diff(values)
    return float(stats.median_abs_deviation(changes, scale="normal")) if len(changes) else math.inf


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
    changes, spread = np.diff(losses), spread_of_changes(losses)
    scores = (changes - np.median(changes)) / max(spread, 1e-9)
    return [(k, float(scores[k - 1])) for k in range(1, len(losses) - 1) if scores[k - 1] > SPIKE_SIGMAS]


def dips(top1: np.ndarray, k: int, images: int) -> bool:
    """Return whether accuracy falls at epoch k by more than sampling explains."""
    return bool(top1[k - 1] - top1[k] > least_change(top1[k], images))


def least_change(p: float, images: int) -> float:
    """Return by how much an accuracy must change from `p` to be significant."""
    return SIGMAS * standard_error(p, images) * math.sqrt(2)


def recovers(losses: np.ndarray, top1: np.ndarray, k: int, images: int) -> bool:
    """Return whether at least half of the loss's rise at epoch k is undone later, and accuracy rises if it dips."""
    rises = top1[k + 1 :].max() - top1[k] > least_change(top1[k], images)
    return bool(losses[k + 1 :].min() < (losses[k - 1] + losses[k]) / 2 and (rises or not dips(top1, k, images)))


def spikes(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    name, losses, top1, images = judged(history)
    noise = history.column("val_loss_se") * math.sqrt(2) if history.num_val else np.zeros(len(losses))
    advice = calm(history)
    recovered = []
    for k, z in jumps(losses):
        seen = dips(top1, k, images) and losses[k] - losses[k - 1] > SIGMAS * noise[k]
        if seen and recovers(losses, top1, k, images):
            recovered.append((k, z))
    result = []
    for k, z in sorted(sorted(recovered, key=lambda jump: -jump[1])[:MAX_SPIKES]):
        cause, metrics = explain_spike(history, k)
        evidence = (
            f"At epoch {k + 1}, the {name} loss jumps from {losses[k - 1]:.3f} to {losses[k]:.3f}, {times(z)} its "
            f"usual variation, and accuracy falls from {top1[k - 1]:.3f} to {top1[k]:.3f}; both recover. {cause}"
        )
        result.append(Finding("spike", confidence(z), evidence, advice, [k + 1], metrics))
    return result


def explain_spike(history: RunHistory, k: int) -> tuple[str, dict[str, Any]]:
    """Return a sentence that names what a spike at epoch k (from 0) coincides with, and its metrics."""
    record, causes, metrics = history.records[k], [], {}
    lr = history.column("lr")
    if lr[k - 1] > 0 and lr[k] / lr[k - 1] > 2:
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
        return "Nothing that was recorded coincides with it.", metrics
    return f"It coincides with {'; with '.join(causes)}.", metrics


# What the ends of the curves show -------------------------------------------------------------------


def overfitting(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if not history.num_val or len(history.records) < 3:
        return []
    val, train, se = (history.column(name) for name in ("val_loss", "train_eval_loss", "val_loss_se"))
    end, best = float(np.median(val[-3:])), int(np.argmin(val))
    z = (end - val[best]) / math.hypot(se[-1], se[best])
    gap, gap_se = (values[-1] for values in generalization_gap(history))
    # The loss of few, hard images is noisy: next to a gap that is beyond doubt, half as much will do.
    rises = z >= (FEW_SIGMAS if gap >= BEYOND_DOUBT * gap_se else SIGMAS)
    if not (rises and gap >= SIGMAS * gap_se and train[-1] < train[best]):
        return []
    last = history.records[-1]
    seen = float(history.column("train_top1")[-1] - history.column("val_top1")[-1])
    hidden = float(gap) - seen
    significant = f", {z:.0f} standard errors above it" if z >= SIGMAS else ""
    evidence = (
        f"The validation loss is lowest after epoch {best + 1}, {val[best]:.3f}; the median of the last three epochs "
        f"is {end:.3f}{significant}. Meanwhile, the loss on training images falls from {train[best]:.3f} to "
        f"{train[-1]:.3f}. After epoch {last.epoch}, accuracy is {last.train_eval_top1:.3f} on training images and "
        f"{last.val_top1:.3f} on validation images, both scored without augmentation: a gap of {points(gap)}, "
        f"{gap / gap_se:.0f} standard errors."
    )
    if hidden >= 0.005 and seen > 0:
        evidence += (
            f" Accuracy as trained shows only {points(seen)} of it, because it is lowered by "
            f"{listed(lower_training_accuracy(history.recipe))}."
        )
    metrics = {"gap": float(gap), "from_epoch": best + 1, "hidden_by_regularization": hidden}
    epochs = list(range(best + 1, len(val) + 1))
    return [Finding("overfitting", confidence(max(z, gap / gap_se)), evidence, regularize(history), epochs, metrics)]


def gap_to_validation(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if not history.num_val or has(found, "overfitting"):
        return []
    gap, gap_se = generalization_gap(history)
    if not gap[-1] - SIGMAS * gap_se[-1] > COARSE:
        return []
    last, late = history.records[-1], gap[-max(4, len(gap) // 2) :]
    slope, low, _ = robust_slope(late) if len(late) >= 4 else (math.nan,) * 3
    evidence = (
        f"After epoch {last.epoch}, accuracy is {last.train_eval_top1:.3f} on training images and {last.val_top1:.3f} "
        f"on validation images, both scored without augmentation: a gap of {points(gap[-1])}, "
        f"{gap[-1] / gap_se[-1]:.0f} standard errors"
    )
    if low > 0:
        evidence += f", which grows by {points(slope)} per epoch"
    metrics = {"gap": float(gap[-1]), "slope": float(slope)}
    sure = confidence(gap[-1] / gap_se[-1])
    return [Finding("generalization-gap", sure, f"{evidence}.", regularize(history), [last.epoch], metrics)]


def regularize(history: RunHistory, remedies: str | None = None) -> str:
    """Return what helps a network to generalize, the most effective first, of what isn't done yet.

    Args:
        remedies: options of the model's own recipe that do.
    """
    recipe = history.recipe
    more = {
        "--augment cutout": recipe.augment in PLAIN,
        "--mixup 0.5": recipe.mixup + recipe.cutmix < 0.5,
        "--label-smoothing 0.1": recipe.label_smoothing < 0.1,
        "more weight decay": True,
    }
    options = listed([option for option, missing in more.items() if missing], "or")
    ways = ["train on all images, without --limit"] if history.run["limit"] else []
    ways += [f"use {remedies}"] if remedies else []
    first, *others = [*ways, f"try {options}"]
    return " ".join(f"{way}." for way in [first[0].upper() + first[1:], *(f"Then {way}" for way in others)])


def generalization_gap(history: RunHistory) -> tuple[np.ndarray, np.ndarray]:
    """Return the accuracy of training images less that of validation images, scored alike, and its standard error."""
    train, val, n = (history.column(name) for name in ("train_eval_top1", "val_top1", "train_eval_images"))
    errors = [
        math.hypot(standard_error(v, history.num_val), standard_error(t, int(k)))
        if np.isfinite([t, v, k]).all()
        else np.nan
        for t, v, k in zip(train, val, n, strict=True)
    ]
    return train - val, np.array(errors)


def validation_above_training(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    # A first epoch's training accuracy is a mean over all of its learning: validation after it must be higher.
    if not history.num_val or len(history.records) < 2:
        return []
    last = history.records[-1]
    train, val = (float(history.column(name)[-1]) for name in ("train_top1", "val_top1"))
    z = (val - train) / math.hypot(standard_error(val, history.num_val), standard_error(train, history.num_train))
    gap, gap_se = (values[-1] for values in generalization_gap(history))
    if z < SIGMAS or not math.isfinite(gap):
        return []
    explained = bool(-gap < SIGMAS * gap_se)
    evidence = (
        f"At epoch {last.epoch}, accuracy is {val:.3f} on validation images and {train:.3f} on training images, "
        f"{points(val - train)} lower ({z:.0f} standard errors). Scored without augmentation and in evaluation mode, "
        f"training images reach {last.train_eval_top1:.3f}"
    )
    if explained:
        causes = listed(lower_training_accuracy(history.recipe))
        evidence += (
            f", {'no less' if gap >= 0 else 'not significantly less'}: what lowers training accuracy is {causes}."
        )
        advice = "Nothing is wrong. Judge the gap by training images that are scored without augmentation."
    else:
        evidence += ", which is still less: augmentation and averaging over the epoch don't explain it."
        advice = "Check whether the validation images are easier, or are also among the training images."
    metrics = {"explained": explained}
    return [Finding("validation-above-training", confidence(z), evidence, advice, [last.epoch], metrics)]


def lower_training_accuracy(recipe: Recipe) -> list[str]:
    """Return what makes accuracy as trained lower than that of the same images, scored like validation."""
    causes = {
        f"augmentation ({recipe.augment})": recipe.augment != "none",
        "mixup or CutMix": recipe.mixup + recipe.cutmix > 0,
        "dropout": recipe.dropout > 0,
        "the running average of the weights": recipe.ema > 0,
        "averaging over the whole epoch": True,
    }
    return [cause for cause, on in causes.items() if on]


def validation_noise(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if not history.num_val:
        return []
    top1, n = history.column("val_top1"), history.num_val
    half = min(1.0, 1.96 * standard_error(float(top1[-1]), n))
    late = top1[max(warmed_up(history), len(top1) // 2 if len(top1) >= 10 else 0) :]
    wiggle, ratio, chance = swings(history, late)
    falls = int((np.diff(late) < -half).sum())
    sampled = half >= COARSE
    settles = history.unfinished and history.recipe.schedule != "constant"  # as the learning rate falls
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
    sure = 0.95 if sampled else confidence(float(stats.norm.isf(chance / 2)))
    return [Finding("validation-noise", sure, evidence, advice, [], metrics)]


def robust_slope(values: np.ndarray) -> tuple[float, float, float]:
    """Return the change per epoch by Theil (1950) and Sen (1968), and the ends of its 95% interval."""
    epochs = thinned(len(values))
    slope, _, low, high = stats.theilslopes(values[epochs], epochs, alpha=0.95)
    return float(slope), float(low), float(high)


def warmed_up(history: RunHistory) -> int:
    """Return the epoch (from 0) at whose end the learning rate is highest: the curves bend while it rises."""
    return int(np.argmax(history.column("lr")))


def swings(history: RunHistory, top1: np.ndarray) -> tuple[float, float, float]:
    """Return how much a curve swings around its trend, over what sampling explains, and the chance of as much.

    The spread is estimated from second differences (Gasser, Sroka and Jennen-Steinmetz, 1986). The same images are
    scored at each epoch, so that sampling's part in a change is that of the images that changed sides (McNemar, 1947).
    """
    if len(top1) < 5:
        return math.nan, math.nan, 1.0
    second = top1[1:-1] - (top1[:-2] + top1[2:]) / 2
    variance = float((second**2).mean()) / 1.5
    moved = (history.column("val_gained") + history.column("val_lost"))[-len(top1) :]
    expected = float(np.nanmean(moved)) / history.num_val**2 / 2 if np.isfinite(moved).any() else math.nan
    ratio = variance / expected if expected and math.isfinite(expected) else math.nan
    chance = float(stats.chi2.sf(ratio * len(second), len(second))) if math.isfinite(ratio) else 1.0
    return math.sqrt(variance), ratio, chance


def trend(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if not history.num_val or has(found, "overfitting"):
        return []
    top1 = history.column("val_top1")
    late = top1[max(warmed_up(history), len(top1) - max(4, len(top1) // 2)) :]
    if len(late) < 4:
        return []
    slope, low, high = robust_slope(late)
    epochs = list(range(len(top1) - len(late) + 1, len(top1) + 1))
    noise = standard_error(float(top1[-1]), history.num_val)
    metrics = {"slope": slope, "low": low, "high": high, "schedule_ended": history.decayed}
    interval = f"(95% interval: {change(low)} to {change(high)})"
    if low > 0 and low * len(late) > noise:
        return [improving(history, epochs, slope, interval, metrics)]
    gain = max(0.0, high) * len(late)
    if history.unfinished or gain > 2 * 1.96 * noise:  # before the end, a falling learning rate may still help
        return []
    stalls = "hardly rises" if low > 0 else "no longer rises"
    evidence = (
        f"{span(epochs)} validation accuracy {stalls}: it changes by {change(slope)} points per epoch {interval}."
    )
    if history.decayed:
        evidence += " The learning rate has fallen to the end of its schedule, so more of the same would change little."
        advice = "Stop here, or change the recipe: a longer schedule keeps the learning rate high for longer."
    else:
        evidence += (
            f" As many epochs again would hardly add more than {points(gain)}, which "
            f"{count(history.num_val, 'validation image')} can hardly show."
        )
        advice = "Stop here, or change the recipe."
        if history.recipe.schedule == "constant":
            advice = "Let the learning rate fall: --schedule cosine."
    return [Finding("plateau", 0.95, evidence, advice, epochs, {**metrics, "gain": gain})]


def improving(history: RunHistory, epochs: list[int], slope: float, interval: str, metrics: dict[str, Any]) -> Finding:
    """Return the finding of a curve that rises, and whether more epochs would go on like that."""
    evidence = f"{span(epochs)} validation accuracy rises by {points(slope)} per epoch {interval}."
    if history.unfinished:
        advice = "Continue this run."
    elif history.decayed:
        before, last = history.column("val_top1")[-2:]
        added = points(last - before) if last - before >= 0.0005 else "nothing"
        evidence += (
            f" It rises as the learning rate falls to the end of the schedule: the last epoch adds {added}, so more of "
            "the same would add little."
        )
        advice = f"Train with a longer schedule: --epochs {2 * history.recipe.epochs}."
    else:
        advice = f"Train for more epochs: --epochs {2 * history.recipe.epochs}."
    return Finding("improving", 0.95, evidence, advice, epochs, metrics)


def healthy(history: RunHistory, found: Sequence[Finding]) -> Finding:
    losses, val_losses, val_top1 = (history.column(name) for name in ("train_loss", "val_loss", "val_top1"))
    few = len(losses) < FEW_EPOCHS
    so_far = " so far" if few or history.unfinished else ""
    if not history.num_val:
        evidence = (
            f"The training loss falls from {np.fmax.reduce(losses):.3f} to {losses[-1]:.3f}. No images are held out "
            "for validation, so how well the network generalizes can't be seen."
        )
    else:
        evidence = (
            f"Training and validation loss fall together{so_far}, to {losses[-1]:.3f} and {val_losses[-1]:.3f}. "
            f"Validation accuracy is {val_top1[-1]:.3f}"
        )
        gap = float(generalization_gap(history)[0][-1])
        if math.isfinite(gap):
            side = "below" if gap >= 0 else "above"
            evidence += f", {points(abs(gap))} {side} that of training images scored the same way"
        evidence += "."
    if few:
        evidence += " Jumps and reversals can't be told from noise in so few epochs."
    more = has(found, "improving") and not history.unfinished
    advice = f"Nothing needs fixing{so_far}.{' More epochs may help.' if more else ''}"
    return Finding("healthy", 0.9, evidence, advice)


RULES: Sequence[Callable[[RunHistory, Sequence[Finding]], list[Finding]]] = (
    divergence,
    collapsed,
    never_recovers,
    underfitting,
    learning_rate,
    spikes,
    overfitting,
    gap_to_validation,
    validation_above_training,
    validation_noise,
    trend,
)
ALWAYS = (divergence, collapsed, learning_rate)  # the others are of networks that learn
TRENDS = {"improving", "plateau"}


# Several seeds --------------------------------------------------------------------------------------


def seed_variance(model: str, top1: Sequence[float], num_images: int) -> Finding | None:
    """Return whether runs that differ in their seed alone differ by more than their test images explain.

    Runs that err independently differ by the binomial variance of p (1 - p) / n at most (Jordan, 2023,
    arXiv:2304.01910); more is instability. The variance of several runs follows chi-squared.
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
    sure = round(min(SURE, 1 - chance), 3)
    return Finding("seed-variance", sure, evidence, advice, [], {"ratio": math.sqrt(ratio)})
