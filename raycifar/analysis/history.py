"""A run's settings, its epochs and its result, for those who read its curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from raycifar.analysis.collapse import GUESSING_LOSS
from raycifar.errors import FailureKind
from raycifar.models.recipe import Recipe
from raycifar.models.recipes import NamedRecipe, nearest_recipe, recipe_from_json
from raycifar.storage.schemas import EpochRecord

MAX_POINTS = 1000  # of a curve, for drawing and for computations whose time grows with their square


@dataclass(frozen=True)
class RunHistory:
    """A run as its files describe it."""

    run: dict[str, Any]  # the content of `run.json`
    records: Sequence[EpochRecord]  # of the finished epochs, none at the beginning
    result: dict[str, Any] | None  # the content of `result.json`, None while there is none

    @property
    def model(self) -> str:
        return self.run["model"]

    @cached_property
    def recipe(self) -> Recipe:
        return recipe_from_json(self.model, self.run["recipe"])

    @cached_property
    def base(self) -> NamedRecipe:
        """The model's recipe that the run's differs least from."""
        return nearest_recipe(self.model, self.recipe)

    @property
    def num_train(self) -> int:
        return self.run["data"]["train"]

    @property
    def num_val(self) -> int:
        return self.run["data"]["val"]

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_train // self.recipe.batch_size)

    @property
    def steps(self) -> int:
        """Steps in the recorded epochs."""
        return len(self.records) * self.steps_per_epoch

    @property
    def cut_short(self) -> bool:
        """Whether epochs of its schedule are left, whether or not they will be trained."""
        return len(self.records) < self.recipe.epochs

    @property
    def stopped_by_search(self) -> bool:
        return (self.result or {}).get("status") == "stopped"

    @property
    def unfinished(self) -> bool:
        """Whether epochs are left that the same command would train."""
        return self.cut_short and (self.result or {}).get("status") in (None, "failed")

    @property
    def test(self) -> dict[str, Any] | None:
        """The scores on the test set, None if it isn't scored."""
        return (self.result or {}).get("test")

    @property
    def decayed(self) -> bool:
        """Whether the learning rate has fallen to the end of its schedule."""
        return self.records[-1].lr < self.recipe.lr / 20

    @property
    def fit(self) -> float:
        """McFadden's pseudo-R² on training images: 0 for guessing, 1 for a perfect fit."""
        last = self.records[-1]
        loss = last.train_eval_loss if last.train_eval_loss is not None else last.train_loss
        return math.nan if loss is None else 1 - loss / GUESSING_LOSS

    @property
    def rate_ratio(self) -> float:
        """The peak learning rate over that of the base recipe; 1 where their scales differ.

        With SGD, a learning rate that grows with the batch is usual, too (Goyal et al., 2017): what is nearer to 1
        counts.
        """
        recipe, base = self.recipe, self.base.recipe
        if not base.lr or recipe.optimizer != base.optimizer:
            return 1.0
        ratio = recipe.lr / base.lr
        per_image = ratio * base.batch_size / recipe.batch_size if recipe.optimizer == "sgd" else ratio
        return sorted([1.0, ratio, per_image])[1]

    @property
    def became_not_finite(self) -> bool:
        """Whether the run failed because a value wasn't finite; earlier versions say so only in words."""
        if not self.result or self.result["status"] != "failed":
            return False
        kind, reason = self.result.get("failure"), self.result.get("reason")
        return kind == FailureKind.NOT_FINITE if kind else "no longer finite" in (reason or "")

    def column(self, name: str) -> np.ndarray:
        """Return a column of the records, (epochs,) float, not a number where it is unknown."""
        values = [getattr(record, name) for record in self.records]
        return np.array([math.nan if value is None else value for value in values], float)


def thinned(count: int) -> np.ndarray:
    """Return at most 1,000 of `count` indices, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int))
