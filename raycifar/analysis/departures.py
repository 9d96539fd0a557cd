"""Where a recipe departs far from the model's own, and which findings that explains.

The learning rate isn't here: it has findings of its own, beside which a short warm-up is no cause.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raycifar.analysis.history import RunHistory
from raycifar.models.recipe import Recipe

DULL = {"collapse", "underfitting"}  # regularization that leaves too little to learn from
UNSTABLE = {"collapse", "divergence", "spike"}
LOOSE = {"overfitting", "generalization-gap"}  # too little regularization
NOISY = {"validation-noise", "generalization-gap"}

# Field, whether a recipe's value is far from the model's own, and the kinds of findings that it explains.
FAR: tuple[tuple[str, Callable[[Recipe, Recipe], bool], set[str]], ...] = (
    ("dropout", lambda recipe, own: recipe.dropout >= own.dropout + 0.4, DULL),
    ("weight_decay", lambda recipe, own: recipe.weight_decay >= 10 * max(own.weight_decay, 1e-5), DULL),
    ("weight_decay", lambda recipe, own: recipe.weight_decay <= own.weight_decay / 10, LOOSE),
    ("label_smoothing", lambda recipe, own: recipe.label_smoothing >= own.label_smoothing + 0.4, DULL),
    ("mixup", lambda recipe, own: recipe.mixup >= own.mixup + 0.7, DULL),
    ("cutmix", lambda recipe, own: recipe.cutmix >= own.cutmix + 0.7, DULL),
    ("batch_size", lambda recipe, own: recipe.batch_size >= 16 * own.batch_size, DULL),
    ("momentum", lambda recipe, own: recipe.momentum >= 0.98 > own.momentum, UNSTABLE),
    ("warmup", lambda recipe, own: recipe.warmup <= own.warmup / 4 and recipe.lr < 8 * own.lr, UNSTABLE),
    ("batch_size", lambda recipe, own: recipe.batch_size <= own.batch_size / 16, {*UNSTABLE, *NOISY}),
    ("schedule", lambda recipe, own: recipe.schedule == "constant" != own.schedule, NOISY),
    ("augment", lambda recipe, own: recipe.augment == "none" != own.augment, LOOSE),
)


@dataclass(frozen=True)
class Departure:
    """A field of a recipe whose value is far from the model's own."""

    field: str
    value: Any
    own: Any

    def __str__(self) -> str:
        return f"{self.option} is {plain_value(self.value)} instead of {plain_value(self.own)}"

    @property
    def option(self) -> str:
        return f"--{self.field.replace('_', '-')}"


def plain_value(value: Any) -> str:
    """Return a recipe's value as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def departures(history: RunHistory, kind: str) -> list[Departure]:
    """Return where the run's recipe is so far from the model's own that it explains a finding of this kind."""
    recipe, own = history.recipe, history.own_recipe
    return [
        Departure(name, value, default)
        for name, is_far, kinds in FAR
        if (value := getattr(recipe, name)) != (default := getattr(own, name)) and kind in kinds and is_far(recipe, own)
    ]
