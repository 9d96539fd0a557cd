"""Where a recipe departs far from the one that it is based on, and which findings that explains.

The learning rate isn't here: it has its own findings, and next to these a short warm-up isn't named as a cause.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raycifar.analysis.findings import Finding
from raycifar.analysis.history import RunHistory
from raycifar.models.recipe import Recipe

DULL = {"collapse", "underfitting"}  # regularization that leaves too little to learn from
UNSTABLE = {"collapse", "divergence", "spike"}
LOOSE = {"overfitting", "generalization-gap"}  # too little regularization
NOISY = {"validation-noise", "generalization-gap"}
OF_OPTIMIZER = {"weight_decay", "momentum", "warmup"}  # each optimizer has its own usual values of these

# Field, whether a recipe's value is far from the base's, and the kinds of findings that it explains.
FAR: tuple[tuple[str, Callable[[Recipe, Recipe], bool], set[str]], ...] = (
    ("dropout", lambda recipe, base: recipe.dropout >= base.dropout + 0.4, DULL),
    ("weight_decay", lambda recipe, base: recipe.weight_decay >= 10 * max(base.weight_decay, 1e-5), DULL),
    ("weight_decay", lambda recipe, base: recipe.weight_decay <= base.weight_decay / 10, LOOSE),
    ("label_smoothing", lambda recipe, base: recipe.label_smoothing >= base.label_smoothing + 0.4, DULL),
    ("mixup", lambda recipe, base: recipe.mixup >= base.mixup + 0.7, DULL),
    ("cutmix", lambda recipe, base: recipe.cutmix >= base.cutmix + 0.7, DULL),
    ("batch_size", lambda recipe, base: recipe.batch_size >= 16 * base.batch_size, DULL),
    ("momentum", lambda recipe, base: recipe.momentum >= 0.98 > base.momentum, UNSTABLE),
    ("warmup", lambda recipe, base: recipe.warmup <= base.warmup / 4 and recipe.lr < 8 * base.lr, UNSTABLE),
    ("batch_size", lambda recipe, base: recipe.batch_size <= base.batch_size / 16, {*UNSTABLE, *NOISY}),
    ("schedule", lambda recipe, base: recipe.schedule == "constant" != base.schedule, NOISY),
    ("augment", lambda recipe, base: recipe.augment == "none" != base.augment, LOOSE),
)


@dataclass(frozen=True)
class Departure:
    """A field of a recipe whose value is far from the base's."""

    field: str
    value: Any
    base: Any

    def __str__(self) -> str:
        return f"{self.option} is {plain_value(self.value)} instead of {plain_value(self.base)}"

    @property
    def option(self) -> str:
        return f"--{self.field.replace('_', '-')}"

    @property
    def remedy(self) -> str:
        return f"{self.option} {plain_value(self.base)}"


def plain_value(value: Any) -> str:
    """Return a recipe's value as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def departures(history: RunHistory, finding: Finding) -> list[Departure]:
    """Return where the run's recipe is so far from its base that it explains a finding."""
    recipe, base = history.recipe, history.base.recipe
    if finding.metrics.get("cause") == "sampling":
        return []
    begins = finding.epochs[0] if finding.epochs else len(history.records) + 1
    skipped = OF_OPTIMIZER if recipe.optimizer != base.optimizer else set()
    if recipe.optimizer == "muon":
        skipped = skipped | {"weight_decay"}  # its filters have none
    if begins > max(1, 2 * base.warmup * recipe.epochs):
        skipped = skipped | {"warmup"}  # it would have been over for long
    return [
        Departure(name, value, default)
        for name, is_far, kinds in FAR
        if (value := getattr(recipe, name)) != (default := getattr(base, name))
        and finding.kind in kinds
        and name not in skipped
        and is_far(recipe, base)
    ]
