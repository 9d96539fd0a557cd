"""Search spaces, and the next trial of a search: Optuna's TPE as a function of the trials so far.

Optuna keeps no state. Each trial comes from a new sampler that is seeded with the trial's number and given all earlier
trials, so a killed search continues as if it hadn't been interrupted.
"""

import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from raycifar import models
from raycifar.errors import RequestError, in_a_line
from raycifar.models.initial_weights import InitialWeights
from raycifar.models.recipe import Recipe, field_types
from raycifar.models.recipes import models_with
from raycifar.storage.files import read_file
from raycifar.workflows.requests import ComparisonRequest

Space = dict[str, BaseDistribution]

MAX_PROPOSALS = 100  # for a trial, until one can be trained
STARTUP_TRIALS = 5  # random trials before TPE (Bergstra et al., 2011)
AUGMENTATIONS = ("none", "flip", "crop", "cutout", "trivial", "rand")
FIXED = {"epochs", "pretrained"}  # trials are compared by epoch, and start from the same weights
KEYS = {"min", "max", "log", "choices"}


@dataclass(frozen=True)
class PastTrial:
    """A search trial so far: its `status` (running, finished, stopped or failed), and its val_top1 by epoch."""

    recipe: Recipe
    status: str
    history: Sequence[float]


def default_space(recipe: Recipe, workers: int = 1) -> Space:
    """Return the space around a recipe; its batches leave two or more images for each worker.

    Raises:
        RequestError: the recipe has no learning rate to vary.
    """
    if not recipe.lr:
        raise RequestError("--search varies the learning rate: give a --lr above 0.")
    sizes = [size for size in (recipe.batch_size // 2, recipe.batch_size, recipe.batch_size * 2) if size >= 2 * workers]
    return {
        "lr": FloatDistribution(recipe.lr / 8, recipe.lr * 8, log=True),
        "weight_decay": FloatDistribution(1e-5, max(5e-3, recipe.weight_decay), log=True),
        "batch_size": CategoricalDistribution(sizes),
        "label_smoothing": FloatDistribution(0.0, max(0.2, recipe.label_smoothing)),
        "augment": CategoricalDistribution([*dict.fromkeys((*AUGMENTATIONS, recipe.augment))]),
    }


def read_space(file: str, model: str) -> Space:
    """Return the search space of a TOML file: a table for each field of the recipe, with min and max, or choices.

    Options that only other models have are ignored, so a file can serve several models.

    Raises:
        RequestError: the file can't be read, or isn't a search space for the model.
    """
    try:
        tables = tomllib.loads(read_file(file).decode())
    except (OSError, ValueError) as error:
        raise RequestError(f"--space {file} can't be read: {in_a_line(error)}.") from error
    kind = models.recipe_type(model)
    types = {name: field_type for name, field_type in field_types(kind).items() if name not in FIXED}
    space: Space = {}
    for name, table in tables.items():
        if name not in types and models_with(name):
            continue
        try:
            if name not in types:
                raise ValueError(f"a search can't vary it: choose from {', '.join(types)}")
            space[name] = to_distribution(table, types[name])
            for value in table["choices"] if "choices" in table else (table["min"], table["max"]):
                replace(kind(), **{name: value})
        except (ValueError, TypeError) as error:
            raise RequestError(f"--space {file}, [{name}]: {error}.") from error
    if not space:
        raise RequestError(f"--space {file} names no field of the recipe of {model}.")
    return space


def to_distribution(table: Any, kind: Any) -> BaseDistribution:
    if not isinstance(table, dict) or not table.keys() <= KEYS:
        raise ValueError(f"a table is needed of {', '.join(sorted(KEYS))}")
    if "choices" in table:
        if not isinstance(table["choices"], list) or table.keys() != {"choices"}:
            raise ValueError("choices is a list, and stands alone")
        return CategoricalDistribution(table["choices"])
    if kind not in (int, float):
        raise ValueError("it takes choices")
    if not {"min", "max"} <= table.keys() or not all(isinstance(table[end], int | float) for end in ("min", "max")):
        raise ValueError("min and max are needed, or choices")
    number = IntDistribution if kind is int else FloatDistribution
    return number(table["min"], table["max"], log=bool(table.get("log", False)))


def suggest(
    space: Space, base: Recipe, earlier: Sequence[PastTrial], seed: int, check: Callable[[Recipe], None]
) -> Recipe:
    """Return the next trial's recipe; the first trial is `base` itself.

    Args:
        base: the model's recipe, from which fields outside the space are taken.
        earlier: all earlier trials, in order.
        check: raises RequestError if a recipe can't be trained.

    Raises:
        RequestError: almost no recipe in the space can be trained.
    """
    if not earlier:
        return base
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(
        seed=(seed * 1009 + len(earlier)) % 2**32, n_startup_trials=STARTUP_TRIALS, constant_liar=True
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in earlier:
        with suppress(ValueError):  # outside the space, as the model's default recipe may be
            study.add_trial(to_optuna(space, trial))
    for _ in range(MAX_PROPOSALS):
        proposal = study.ask(space)
        try:
            recipe = replace(base, **proposal.params)
            check(recipe)
        except (ValueError, RequestError) as error:  # each value is allowed, but not all of them together
            study.tell(proposal, state=optuna.trial.TrialState.PRUNED)  # the sampler avoids it
            reason = in_a_line(error)
        else:
            return recipe
    raise RequestError(f"the search finds no recipe that can be trained: of {MAX_PROPOSALS}, the last fails: {reason}.")


def check_trainable(request: ComparisonRequest, initial: InitialWeights, recipe: Recipe) -> None:
    """Raise RequestError unless a trial with the recipe can be trained.

    Args:
        initial: those of the model's own recipe.
    """
    replace(request.training(initial.architecture.model), recipe=recipe)
    initial.architecture_for(recipe)


def to_optuna(space: Space, trial: PastTrial) -> optuna.trial.FrozenTrial:
    """Return a trial in Optuna's form, or raise ValueError if it lies outside the space."""
    state = {
        "finished": optuna.trial.TrialState.COMPLETE,
        "stopped": optuna.trial.TrialState.PRUNED,
        "running": optuna.trial.TrialState.RUNNING,
        "failed": optuna.trial.TrialState.FAIL,
    }[trial.status]
    return optuna.trial.create_trial(
        params={name: getattr(trial.recipe, name) for name in space},
        distributions=space,
        state=state,
        value=trial.history[-1] if trial.status == "finished" else None,
        intermediate_values=dict(enumerate(trial.history, start=1)),
    )


def space_to_json(space: Space) -> dict[str, Any]:
    """Return the search space for `study.json`."""
    return {
        name: list(distribution.choices)
        if isinstance(distribution, CategoricalDistribution)
        else {"min": distribution.low, "max": distribution.high, "log": distribution.log}  # type: ignore[attr-defined]
        for name, distribution in space.items()
    }
