"""Whether a network does as well on new images as on those it is trained on."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from raycifar.analysis.departures import Departure
from raycifar.analysis.findings import COARSE, SIGMAS, SURE, Finding, has, robust_slope, standard_error
from raycifar.analysis.history import RunHistory
from raycifar.models.recipe import Recipe
from raycifar.words import listed, points

PLAIN = ("none", "flip", "crop")  # augmentations that cutout adds to
FEW_SIGMAS = 1.5  # of a loss, next to a gap that is beyond doubt
BEYOND_DOUBT = 10.0  # standard errors of a gap next to which a noisy loss need not be significant by itself


def overfitting(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if not history.num_val or len(history.records) < 3:
        return []
    val, train, se = (history.column(name) for name in ("val_loss", "train_eval_loss", "val_loss_se"))
    if not np.isfinite(val[-3:]).any():
        return []
    end, best = float(np.nanmedian(val[-3:])), int(np.nanargmin(val))
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
    return [Finding("overfitting", SURE, evidence, regularize(history), epochs, metrics)]


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
    return [Finding("generalization-gap", SURE, f"{evidence}.", regularize(history), [last.epoch], metrics)]


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
    return [Finding("validation-above-training", SURE, evidence, advice, [last.epoch], metrics)]


def generalization_gap(history: RunHistory) -> tuple[np.ndarray, np.ndarray]:
    """Return training accuracy minus validation accuracy, scored alike, and the standard error of the difference."""
    train, val, n = (history.column(name) for name in ("train_eval_top1", "val_top1", "train_eval_images"))
    errors = [
        math.hypot(standard_error(v, history.num_val), standard_error(t, int(k)))
        if np.isfinite([t, v, k]).all()
        else np.nan
        for t, v, k in zip(train, val, n, strict=True)
    ]
    return train - val, np.array(errors)


def gap_unknown(history: RunHistory) -> bool:
    """Return whether a run with validation images lacks scores that tell how well it generalizes."""
    scores = generalization_gap(history)[0][-1], history.column("val_loss")[-1]
    return bool(history.num_val) and not np.isfinite(scores).all()


def regularize(history: RunHistory, causes: Sequence[Departure] = ()) -> str:
    """Return what would help the network generalize and isn't done yet, the most effective first.

    Args:
        causes: where the recipe departs from its base, to be put right first.
    """
    recipe = replace(history.recipe, **{cause.field: cause.base for cause in causes})
    more = {
        "--augment cutout": recipe.augment in PLAIN,
        "--mixup 0.5": recipe.mixup + recipe.cutmix < 0.5,
        "--label-smoothing 0.1": recipe.label_smoothing < 0.1,
        "more dropout" if recipe.optimizer == "muon" else "more weight decay": True,  # muon's filters have none
    }
    options = listed([option for option, missing in more.items() if missing], "or")
    ways = ["train on all images, without --limit"] if history.run["limit"] else []
    ways += [f"use {listed([cause.remedy for cause in causes])}"] if causes else []
    first, *others = [*ways, f"try {options}"]
    return " ".join(f"{way}." for way in [first[0].upper() + first[1:], *(f"Then {way}" for way in others)])


def lower_training_accuracy(recipe: Recipe) -> list[str]:
    """Return what makes accuracy as trained lower than that of the same images, scored like validation."""
    causes = {
        f"augmentation ({recipe.augment})": recipe.augment != "none",
        "random erasing": recipe.erasing > 0,
        "mixup or CutMix": recipe.mixup + recipe.cutmix > 0,
        "dropout": recipe.dropout > 0,
        "the running average of the weights": recipe.ema > 0,
        "averaging over the whole epoch": True,
    }
    return [cause for cause, on in causes.items() if on]
