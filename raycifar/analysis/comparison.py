"""From finished runs to which model is better, how sure that is, and what it cost."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from raycifar.analysis.diagnosis import diagnose
from raycifar.analysis.findings import FIT
from raycifar.analysis.history import RunHistory
from raycifar.analysis.run_files import RunFiles
from raycifar.analysis.statistics import difference, mcnemar, mean_interval
from raycifar.errors import RequestError
from raycifar.models.recipe import Recipe, changes
from raycifar.words import count

SIGNIFICANCE = 0.05
IMMATURE = {"too-early", "underfitting", "improving"}  # findings of runs that have not learned what they could


@dataclass(frozen=True)
class Finished:
    """A finished run, and how it does on each test image."""

    name: str
    folder: str
    history: RunHistory
    correct: np.ndarray  # (images,) bool
    top5: np.ndarray  # (images,) bool
    loss: np.ndarray  # (images,) float32
    near_duplicate: np.ndarray | None = None  # (images,) bool, of an image that the run trained on; None: unknown

    @property
    def run(self) -> dict[str, Any]:
        return self.history.run

    @property
    def result(self) -> dict[str, Any]:
        return self.history.result or {}

    @property
    def identity(self) -> tuple[str, Recipe, int]:
        return self.history.model, self.history.recipe, self.run["seed"]

    @property
    def seconds(self) -> list[float]:
        """Device-seconds from the start to the end of each epoch: a worker has one device, or a share of a GPU."""
        share = self.run.get("gpus_per_worker", 1)
        return list(itertools.accumulate(record.seconds * record.workers * share for record in self.history.records))


Run = TypeVar("Run", bound=Finished | RunFiles)


def conditions(history: RunHistory) -> dict[str, Any]:
    """Return what runs must have in common to be compared, by name."""
    data = history.run["data"]
    return {
        "data with the fingerprint": data["fingerprint"],
        "training images": data["train"],
        "validation images": data["val"],
        "test images": data["test"],
        "epochs": history.recipe.epochs,
    }


def not_comparable(runs: Sequence[Finished]) -> list[str]:
    """Return a clause for each run that differs from the first in what must be equal, or that is there twice."""
    first = conditions(runs[0].history)
    clauses = []
    for one, other in itertools.combinations(runs, 2):
        if one.folder == other.folder or (one.identity == other.identity and np.array_equal(one.loss, other.loss)):
            clauses.append(f"{other.name} is the same run as {one.name}")
    for other in runs[1:]:
        mine = conditions(other.history)
        if differing := [f"{key} {mine[key]} (not {first[key]})" for key in first if mine[key] != first[key]]:
            clauses.append(f"{other.name} differs from {runs[0].name} in {', '.join(differing)}")
    return clauses


def by_model(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Return the runs of each model; one with several recipes counts as several, named by what differs."""
    groups: dict[tuple[str, Recipe], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.history.model, run.history.recipe), []).append(run)
    bases = {key: members[0].history.base.name for key, members in groups.items()}
    named = {}
    for (model, recipe), members in groups.items():
        same_model = {other: base for (name, other), base in bases.items() if name == model}
        base = same_model[recipe]
        differing = [changes(recipe, other) for other, its_base in same_model.items() if its_base == base]
        fields = [field for field in vars(recipe) if any(field in changed for changed in differing)]
        names = [base] if len(set(same_model.values())) > 1 else []
        named[" ".join([model, *names, *(f"{field}={getattr(recipe, field)}" for field in fields)])] = members
    return named


def leave_out_near_duplicates(runs: Sequence[Finished]) -> list[Finished]:
    """Return the runs as if the test set held no near duplicates of images that any of them has trained on."""
    new = ~np.any([run.near_duplicate for run in runs if run.near_duplicate is not None], axis=0)
    if new.sum() < 2:
        raise RequestError("nearly every test image is a near duplicate of a training image: too few others are left.")
    kept = []
    for run in runs:
        correct, top5, loss = run.correct[new], run.top5[new], run.loss[new]
        means = {"top1": float(correct.mean()), "top5": float(top5.mean()), "loss": float(loss.mean())}
        test = {**run.result["test"], "images": int(new.sum()), **means}
        history = replace(run.history, result={**run.result, "test": test})
        kept.append(replace(run, history=history, correct=correct, top5=top5, loss=loss, near_duplicate=None))
    return kept


def whether_the_order_changes(before: dict[str, Any], after: dict[str, Any], images: int, left: int) -> str:
    """Return a sentence that says whether leaving out near duplicates changes the order of the models.

    Args:
        before: the models on all test images, `images` of them.
        after: the models on the test images without near duplicates, `left` of them.
    """
    rankings = [sorted(models, key=lambda name: -models[name]["top1"]["mean"]) for models in (before, after)]
    scores = [
        ", ".join(f"{name} {models[name]['top1']['mean']:.4f}" for name in ranking)
        for models, ranking in zip((before, after), rankings, strict=True)
    ]
    if rankings[0] == rankings[1]:
        told = f"the order stays the same: {scores[1]}; on all {images:,}, {scores[0]}"
    else:
        told = f"the order changes: {scores[1]}; on all {images:,}, it is {scores[0]}"
    return f"Without near duplicates ({left:,} test images left), {told}."


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
    models = {name: summarize(runs, budget, price_per_hour) | {"flops": flops[name]} for name, runs in groups.items()}
    names = list(itertools.combinations(groups, 2))
    pairs = [compare_pair(a, groups[a], b, groups[b], len(names)) for a, b in names]
    first = next(iter(groups.values()))[0].run
    kinds = {name: [{found.kind for found in diagnose(run.history)} for run in runs] for name, runs in groups.items()}
    for pair in pairs:
        both = {name: kinds[name] for name in (pair["a"], pair["b"])}
        pair["hardly_learned"] = [
            name
            for name, runs in both.items()
            if any(
                "too-early" in shown and not run.history.fit >= FIT
                for shown, run in zip(runs, groups[name], strict=True)
            )
        ]
        pair["too_early"] = len(pair["hardly_learned"]) == len(both)
        pair["immature"] = all(shown & IMMATURE for runs in both.values() for shown in runs)
        pair["verdict"] = verdict(pair)
        pair["epochs"], pair["train_images"] = first["recipe"]["epochs"], first["data"]["train"]
        pair["sentence"] = sentence(pair)
    return {"models": models, "pairs": pairs, "equal_device_seconds": budget}


def conclusions(comparison: Mapping[str, Any]) -> list[str]:
    """Return the sentences of a comparison: about its pairs, near duplicates, and searches."""
    parts = [*comparison["pairs"], comparison.get("without_near_duplicates"), *comparison.get("search", {}).values()]
    return [part["sentence"] for part in parts if part]


def summarize(runs: Sequence[Finished], budget: float, price_per_hour: float | None) -> dict[str, Any]:
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
    """Return the mean validation top-1 of the last epoch finished within `budget` device-seconds, None if none was."""
    reached = []
    for run in runs:
        done = [record.val_top1 for record, end in zip(run.history.records, run.seconds, strict=True) if end <= budget]
        if not done or done[-1] is None:
            return None
        reached.append(done[-1])
    return float(np.mean(reached))


def compare_pair(a: str, runs_a: Sequence[Finished], b: str, runs_b: Sequence[Finished], pairs: int) -> dict[str, Any]:
    correct_a, correct_b = (np.stack([run.correct for run in runs]) for runs in (runs_a, runs_b))
    return {
        "a": a,
        "b": b,
        "pairs": pairs,
        **difference(correct_a, correct_b, pairs),
        "images": correct_a.shape[1],
        "runs": [len(runs_a), len(runs_b)],
        "mcnemar": [
            {"a": x.name, "b": y.name, "p_value": mcnemar(x.correct, y.correct)}
            for x in runs_a
            for y in runs_b
            if x.run["seed"] == y.run["seed"]
        ],
    }


def verdict(pair: dict[str, Any]) -> str:
    if pair["p_adjusted"] >= SIGNIFICANCE or pair["too_early"]:
        return "undecided"
    return "better" if pair["difference"] > 0 else "worse"


def sentence(pair: dict[str, Any]) -> str:
    """Return what a pair's metrics mean, in plain words."""
    a, b = pair["a"], pair["b"]
    low, high, mean = (100 * pair[key] for key in ("low", "high", "difference"))
    p = f"p = {pair['p_adjusted']:.2g}" if pair["p_adjusted"] >= 1e-4 else "p < 0.0001"
    adjusted = f", adjusted for {pair['pairs']} pairs" if pair["pairs"] > 1 else ""
    when = f"After {count(pair['epochs'], 'epoch')} on {count(pair['train_images'], 'training image')}"
    if pair["verdict"] != "undecided":
        near, far = sorted((abs(low), abs(high)))
        text = (
            f"{when}, {a} is {pair['verdict']} than {b}, by {abs(mean):.2f} points of test accuracy (95% interval: "
            f"{near:.2f} to {far:.2f}, {p}{adjusted})."
        )
    elif pair["too_early"]:
        return (
            f"{when}, it is too early to compare {a} with {b}: they have hardly learned anything. Their test accuracy "
            f"differs by {mean:+.2f} points (95% interval: {low:+.2f} to {high:+.2f}{adjusted})."
        )
    else:
        text = (
            f"{when}, {a} and {b} can't be told apart: test accuracy differs by {mean:+.2f} points (95% interval: "
            f"{low:+.2f} to {high:+.2f}, {p}{adjusted}). "
        )
        if mean == 0:
            text += "There is no difference for more seeds to confirm."
        elif pair["seeds_needed"]:
            needed = max(pair["seeds_needed"], 1 + max(pair["runs"]))
            text += f"If the difference is as large as it looks, {needed} seeds of each model would show it."
        elif pair["seeds_measured"]:
            text += f"No number of seeds would show so small a difference on {pair['images']:,} test images."
        else:
            text += "More seeds of each model may show it."
    if pair["hardly_learned"]:
        text += f" {pair['hardly_learned'][0]} has hardly learned anything, and longer training may change the order."
    elif pair["immature"]:
        text += " Both have more to learn, and longer training may change the order."
    if not pair["seeds_measured"]:
        text += " With a single run of a model, the effect of the seed is estimated from how often the runs disagree."
    return text
