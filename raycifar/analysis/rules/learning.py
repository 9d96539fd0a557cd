"""Whether a network learns at all."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
from scipy import stats

from raycifar.analysis.collapse import CHANCE, GUESSING_LOSS, MIN_STEPS, chance_level, guesses
from raycifar.analysis.findings import (
    FEW_EPOCHS,
    FIT,
    OUTSIDE,
    SIGMAS,
    SURE,
    Finding,
    calm,
    go_on,
    has,
    spread_of_changes,
    standard_error,
)
from raycifar.analysis.history import RunHistory
from raycifar.analysis.rules.generalization import gap_unknown
from raycifar.data import CIFAR100
from raycifar.storage.schemas import Diagnostics
from raycifar.words import count, span, times

OFF = 8.0  # factor from the base recipe's learning rate, the range that a search covers
FIT_ERROR = 0.02  # of a fit: this close to the limit, chance decides the side
DEAD = 0.9  # fraction of a layer's units that output 0 for all images, above which little passes it
VANISHED = 1e-3  # first layer's gradient over the last's: bfloat16 keeps 3 digits of a sum


def too_few_steps(history: RunHistory) -> Finding:
    steps, epochs = history.steps, -(-MIN_STEPS // history.steps_per_epoch)
    evidence = (
        f"The network has taken {count(steps, 'step')}, in {count(len(history.records), 'epoch')}: too few to tell "
        f"how well it learns. The curves can be read after {MIN_STEPS} steps, which take {count(epochs, 'epoch')} of "
        f"{count(history.num_train, 'image')}."
    )
    advice = go_on(history, "Train for more --epochs, or on more images.")
    return Finding("too-early", 0.95, evidence, advice, [], {"steps": steps, "epochs_needed": epochs})


def too_little_learned(history: RunHistory) -> Finding:
    done, epochs = len(history.records), history.recipe.epochs
    after = f"{done} of {count(epochs, 'epoch')}" if done < epochs else count(done, "epoch")
    evidence = (
        f"After {after}, the loss on training images has come {max(0.0, history.fit):.0%} of the way from guessing to "
        "a perfect fit. Whether the network underfits, overfits or is healthy can't be told yet."
    )
    if history.fit >= FIT and gap_unknown(history):
        evidence = (
            f"After {after}, not all scores of training and validation images are known, so whether the network "
            "overfits can't be told."
        )
        return Finding("too-early", 0.9, evidence, go_on(history, "Train again with --val-size above 0."), [])
    advice, needed = ("Continue this run.", epochs) if history.unfinished else ("Train for more --epochs.", 2 * epochs)
    return Finding("too-early", 0.9, evidence, advice, [], {"epochs_needed": needed})


def stopped_early(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if not history.stopped_by_search:
        return []
    after = f"{len(history.records)} of {count(history.recipe.epochs, 'epoch')}"
    evidence = f"A search stopped this run after {after}, so how well it would end can't be told."
    return [Finding("too-early", 0.95, evidence, OUTSIDE)]


def divergence(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    if history.result and history.became_not_finite:
        reason = (history.result.get("reason") or "the loss is no longer finite").split(". ")[0].rstrip(".")
        return [
            Finding("divergence", SURE, f"{reason[:1].upper()}{reason[1:]}. Training stopped there.", calm(history))
        ]
    if not history.records:
        return []
    losses = history.column("train_loss")
    low, last = float(np.fmin.reduce(losses)), float(losses[-1])
    if not last > 2 * GUESSING_LOSS:
        return []
    rises = f"rises from {low:.2f} (epoch {int(np.nanargmin(losses)) + 1}) to" if last > 1.5 * low else "stands at"
    evidence = (
        f"The training loss {rises} {last:.2f} (epoch {len(losses)}), more than twice the loss of guessing, "
        f"ln({CIFAR100.num_classes}) = {GUESSING_LOSS:.4f}."
    )
    epochs = list(range(int(np.argmax(losses > 2 * GUESSING_LOSS)) + 1, len(losses) + 1))
    return [Finding("divergence", SURE, evidence, calm(history), epochs)]


def collapsed(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    classes = CIFAR100.num_classes
    last = history.records[-1]
    slow = history.rate_ratio <= 1 / OFF  # then it has not moved far enough to collapse
    if has(found, "divergence") or slow or last.epoch * history.steps_per_epoch < MIN_STEPS:
        return []
    guessing = takewhile(lambda record: guesses(record, history.num_train), reversed(history.records))
    epochs = [record.epoch for record in guessing][::-1]
    if not epochs:
        return []
    z = (history.column("train_top1")[-1] - CHANCE) / standard_error(CHANCE, history.num_train)
    cause, metrics = explain_collapse(last.diagnostics)
    stays, so_far = "is" if len(epochs) == 1 else "stays", " so far" if history.cut_short else ""
    learned = (history.column("train_top1")[: epochs[0] - 1] > chance_level(history.num_train)).any()
    state = "lost what it had learned" if learned else f"learned nothing{so_far}"
    at = "above" if (last.train_loss or 0) > 1.01 * GUESSING_LOSS else "at"
    evidence = (
        f"{span(epochs)} the training loss {stays} {at} the level of guessing ({last.train_loss:.4f}; ln({classes}) = "
        f"{GUESSING_LOSS:.4f}). Training accuracy is {last.train_top1:.2%}, {abs(z):.1f} standard errors from "
        f"chance (1 in {classes}): the network has {state}. {cause}"
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
    (first, at_first), (last, at_last) = norms[0], norms[-1]
    if not (vanish := at_first < VANISHED * at_last) and at_first <= at_last / VANISHED:
        return "", {}
    text = (
        f"Its gradients {'vanish' if vanish else 'explode'} on the way to the input: the norm is {at_first:.2g} at "
        f"{first} and {at_last:.2g} at {last}."
    )
    cause = f"{'vanishing' if vanish else 'exploding'} gradients"
    return text, {"cause": cause, "ratio": at_first / at_last if at_last else None}


def underfitting(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    last, fitted = history.records[-1], history.fit
    if not fitted < FIT or history.stopped_by_search:
        return []
    if history.cut_short:
        return [too_little_learned(history)]
    loss = (1 - fitted) * GUESSING_LOSS
    scored = ", scored without augmentation," if last.train_eval_loss is not None else ""
    evidence = (
        f"After epoch {last.epoch}, the loss on training images{scored} is {loss:.3f}. Guessing "
        f"gives ln({CIFAR100.num_classes}) = {GUESSING_LOSS:.3f}, so the loss has come "
        f"{max(fitted, 0):.1%} of the way to a perfect fit; below {FIT:.0%}, a network underfits."
        if fitted >= 0.005
        else f"After epoch {last.epoch}, the network does no better on training images than guessing: their loss is "
        f"{loss:.3f}, and that of guessing is ln({CIFAR100.num_classes}) = {GUESSING_LOSS:.3f}."
    )
    if last.val_loss is not None:
        evidence += f" The validation loss is {last.val_loss:.3f}."
    if len(history.records) < FEW_EPOCHS:
        evidence += " So few epochs may be the only reason."
    advice = "Train for more --epochs. If that isn't enough, raise --lr, augment less or take a larger model."
    if history.rate_ratio <= 1 / OFF:
        advice = "First of all, raise --lr."
    sure = round(min(SURE, float(stats.norm.cdf((FIT - fitted) / FIT_ERROR))), 3)
    return [Finding("underfitting", sure, evidence, advice, [last.epoch], {"fit": fitted})]


def learning_rate(history: RunHistory, found: Sequence[Finding]) -> list[Finding]:
    lr, usual, ratio = history.recipe.lr, history.base.recipe.lr, history.rate_ratio
    advice = f"Use --lr {usual:g}."
    if has(found, "underfitting") and ratio <= 1 / OFF:
        evidence = (
            f"The network has hardly learned, and the peak learning rate, {lr:g}, is {times(usual / max(lr, 1e-9))} "
            f"smaller than that of {history.base}, {usual:g}."
        )
        return [Finding("learning-rate-low", 0.95, evidence, advice, [], {"ratio": ratio})]
    losses = history.column("train_loss")
    threshold = SIGMAS * spread_of_changes(losses)
    rises = [k + 2 for k, step in enumerate(np.diff(losses)) if step > threshold]
    unstable = has(found, "collapse", "divergence") or len(rises) >= max(2, len(losses) // 4)
    if unstable and ratio >= OFF:
        seen = "The network doesn't learn" if has(found, "collapse") else "Training is unstable"
        higher = f"{times(lr / usual)} that of {history.base}, {usual:g}"
        evidence = f"{seen}, and the peak learning rate, {lr:g}, is {higher}."
        return [Finding("learning-rate-high", 0.95, evidence, advice, rises, {"ratio": ratio})]
    return []
