"""From finished runs to which model is better, how sure that is, and what it cost."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raycifar.analysis.statistics import difference, holm, mcnemar, mean_interval
from raycifar.models.recipe import Recipe, changes
from raycifar.models.recipes import recipe_from_json

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Finished:
    """A finished run: the contents of its files, and whether it classified each test image right."""

    name: str
    folder: str
    run: dict[str, Any]
    history: Sequence[Any]
    result: dict[str, Any]
    right: np.ndarray  # (images,) bool

    @property
    def seconds(self) -> list[float]:
        """Device-seconds from the beginning to the end of each epoch: a worker has one device."""
        return list(itertools.accumulate(row["seconds"] * row["workers"] for row in self.history))


def conditions(run: dict[str, Any]) -> dict[str, Any]:
    """Return what runs must have in common to be compared, by the words that name it."""
    data = run["data"]
    return {
        "data": data["fingerprint"],
        "training images": data["train"],
        "validation images": data["val"],
        "test images": data["test"],
        "epochs": run["recipe"]["epochs"],
    }


def not_comparable(runs: Sequence[Finished]) -> list[str]:
    """Return a clause for each run that differs from the first in what must be equal."""
    first = conditions(runs[0].run)
    clauses = []
    for other in runs[1:]:
        mine = conditions(other.run)
        if differing := [f"{mine[key]} {key}, not {first[key]}" for key in first if mine[key] != first[key]]:
            clauses.append(f"{other.name} has {' and '.join(differing)} as {runs[0].name} has")
    return clauses


def by_model(runs: Iterable[Finished]) -> dict[str, list[Finished]]:
    """Return the runs of each model; one that was trained with several recipes is several, named by the difference."""
    groups: dict[tuple[str, Recipe], list[Finished]] = {}
    for run in runs:
        model = run.run["model"]
        groups.setdefault((model, recipe_from_json(model, run.run["recipe"])), []).append(run)
    named = {}
    for (model, recipe), members in groups.items():
        others = [changes(recipe, other) for name, other in groups if name == model]
        fields = [field for field in vars(recipe) if any(field in differing for differing in others)]
        named[" ".join([model, *(f"{field}={getattr(recipe, field)}" for field in fields)])] = members
    return named


def compare(groups: dict[str, list[Finished]], flops: dict[str, int], price_per_hour: float | None) -> dict[str, Any]:
    """Return the comparison.

    Args:
        groups: the finished runs of each model, trained under the same conditions.
        flops: of each model's forward pass.
        price_per_hour: of one device, in any currency.

    Returns:
        models, pairs and equal_device_seconds, as they stand in `comparison.json`.
    """
    budget = min(max(run.seconds[-1] for run in runs) for runs in groups.values())  # the cheapest model's
    models = {name: summarise(runs, budget, price_per_hour) | {"flops": flops[name]} for name, runs in groups.items()}
    pairs = [compare_pair(a, groups[a], b, groups[b]) for a, b in itertools.combinations(groups, 2)]
    for pair, p_value in zip(pairs, holm([pair["p_value"] for pair in pairs]), strict=True):
        pair["p_holm"] = p_value
        pair["verdict"] = verdict(pair)
        pair["sentence"] = sentence(pair)
    return {"models": models, "pairs": pairs, "equal_device_seconds": budget}


def summarise(runs: Sequence[Finished], budget: float, price_per_hour: float | None) -> dict[str, Any]:
    """Return a model's scores with their intervals, and what they cost; costs are means of a run."""
    device_seconds = float(np.mean([run.seconds[-1] for run in runs]))
    return {
        "runs": [run.name for run in runs],
        "folders": [run.folder for run in runs],
        "seeds": [run.run["seed"] for run in runs],
        "recipe": runs[0].run["recipe"],
        **{score: mean_interval([run.result["test"][score] for run in runs]) for score in ("top1", "top5", "loss")},
        "parameters": runs[0].run["parameters"],
        "images_per_second": float(np.mean([run.result["images_per_second"] for run in runs])),
        "device_seconds": device_seconds,
        "cost": None if price_per_hour is None else price_per_hour * device_seconds / 3600,
        "at_equal_time": at_equal_time(runs, budget),
    }


def at_equal_time(runs: Sequence[Finished], budget: float) -> float | None:
    """Return the mean validation top-1 of the last epoch finished within so many device-seconds, None if none was."""
    reached = []
    for run in runs:
        done = [row["val_top1"] for row, end in zip(run.history, run.seconds, strict=True) if end <= budget]
        if not done or done[-1] is None:
            return None
        reached.append(done[-1])
    return float(np.mean(reached))


def compare_pair(a: str, runs_a: Sequence[Finished], b: str, runs_b: Sequence[Finished]) -> dict[str, Any]:
    right_a, right_b = (np.stack([run.right for run in runs]) for runs in (runs_a, runs_b))
    return {
        "a": a,
        "b": b,
        **difference(right_a, right_b),
        "images": right_a.shape[1],
        "runs": [len(runs_a), len(runs_b)],
        "mcnemar": [
            {"a": x.name, "b": y.name, "p_value": mcnemar(x.right, y.right)}
            for x in runs_a
            for y in runs_b
            if x.run["seed"] == y.run["seed"]
        ],
    }


def verdict(pair: dict[str, Any]) -> str:
    if pair["p_holm"] >= SIGNIFICANCE:
        return "undecided"
    return "better" if pair["difference"] > 0 else "worse"


def sentence(pair: dict[str, Any]) -> str:
    """Return what a pair's figures mean, in plain words."""
    a, b, points = pair["a"], pair["b"], 100 * pair["difference"]
    figures = (
        f"{points:+.2f} points of test top-1, 95 % interval {100 * pair['low']:+.2f} to {100 * pair['high']:+.2f}, "
        f"p = {pair['p_holm']:.2g}"
    )
    if pair["verdict"] != "undecided":
        text = f"{a} is {pair['verdict']} than {b}: {figures}."
    else:
        text = f"{a} and {b} are not told apart by these runs: {figures}. "
        if pair["difference"] == 0:
            text += "There is no difference that more seeds could confirm."
        elif needed := pair["seeds_needed"]:
            text += f"If the difference is as large as it looks, {needed} seeds of each would tell."
        else:
            text += f"If it is no larger, {pair['images']:,} test images don't tell it, with any number of seeds."
    if not pair["seeds_measured"]:
        text += " With one run of a model, how much another seed changes is inferred from how often runs disagree."
    return text
