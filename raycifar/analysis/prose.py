"""A run in words: the paragraph under the figure, its scores, and what to try next, as commands."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from raycifar.analysis.diagnosis import PHRASES
from raycifar.analysis.findings import Finding, has
from raycifar.analysis.history import RunHistory
from raycifar.analysis.rules.generalization import PLAIN
from raycifar.models.recipe import MAX_NUMBER, Recipe
from raycifar.models.recipes import options_for
from raycifar.words import count, listed


def headline(findings: Sequence[Finding]) -> str:
    """Return what was found, in a phrase."""
    return "; ".join(dict.fromkeys(PHRASES[finding.kind] for finding in findings)) or "nothing to read yet"


def without_near_duplicates(
    test: dict[str, Any], intervals: Mapping[str, Mapping[str, float]] | None = None
) -> str | None:
    """Return the test accuracies with and without near duplicates, as a clause; None if they are unknown or none.

    Args:
        test: the scores. intervals: low and high of each, by name.
    """
    if not test.get("near_duplicates") or test.get("top1_without_near_duplicates") is None:
        return None

    def score(name: str) -> str:
        ends = (intervals or {}).get(name)
        return f"{test[name]:.3f}" + (f" (95%: {ends['low']:.3f} to {ends['high']:.3f})" if ends else "")

    left = f"without near duplicates of training images ({test['images'] - test['near_duplicates']:,} left)"
    return f"{score('top1')} on all test images; {score('top1_without_near_duplicates')} {left}"


def data_name(run: dict[str, Any]) -> str:
    """Return what a run's images are called; a path says where a copy of CIFAR-100 is."""
    return "synthetic" if run["data"]["source"].startswith("synthetic") else "CIFAR-100"


def state(history: RunHistory, host: str | None = None) -> str:
    """Return how far a run has come, in a sentence.

    Args:
        host: on which it is being trained.
    """
    done, epochs = len(history.records), count(history.recipe.epochs, "epoch")
    if history.result is None:
        if host:
            return f"This run is being trained on {host}: {done} of {epochs} recorded."
        if done == history.recipe.epochs:
            return f"This run has recorded {done} of {epochs}, but no result yet."
        return f"This run is under way or was interrupted: {done} of {epochs} recorded."
    match history.result["status"]:
        case "finished":
            return f"This run is finished, after {count(done, 'epoch')}."
        case "stopped":
            return f"A search stopped this run after {done} of {epochs}, because others did better."
        case _:
            reason = (history.result.get("reason") or "the reason is not recorded").rstrip(".")
            return f"This run failed after {done} of {epochs}: {reason}."


def paragraph(history: RunHistory, findings: Sequence[Finding]) -> str:
    """Return a paragraph that could stand under the figure."""
    run, data, pretrained = history.run, history.run["data"], history.recipe.pretrained
    start = {"none": "from scratch", "imagenet": "from ImageNet weights"}.get(
        pretrained, f"from the weights in {PurePosixPath(pretrained).name}"
    )
    done, epochs = len(history.records), history.recipe.epochs
    images = f"on {count(data['train'], data_name(run) + ' image')}"
    if done:
        trained = f"was trained {start} {images} for {'' if done == epochs else f'{done} of '}{count(epochs, 'epoch')}"
    else:
        be = "was" if history.result else "is"
        trained = f"{be} to be trained {start} {images} for {count(epochs, 'epoch')}, of which none {be} finished"
    held_out = f", with {data['val']:,} more held out for validation" if data["val"] else ""
    sentences = [f"The {run['model']} {trained}{held_out}."]
    if history.records:
        last, ended = history.records[-1], "ended" if history.result or done == epochs else "stands"
        if last.train_loss is not None and last.train_top1 is not None:
            sentences.append(
                f"Training {ended} at a loss of {last.train_loss:.3f} and an accuracy of {last.train_top1:.1%}."
            )
        scored = [record for record in history.records if record.val_top1 is not None]
        if scored and last.val_loss is not None and last.val_top1 is not None:
            best = max(scored, key=lambda record: record.val_top1 or 0.0)
            text = f"Validation {ended} at a loss of {last.val_loss:.3f} and an accuracy of {last.val_top1:.1%}"
            later = (
                f"; the best, {best.val_top1:.1%}, came after epoch {best.epoch}"
                if f"{best.val_top1:.1%}" != f"{last.val_top1:.1%}"
                else ", its best" * (len(scored) > 1)
            )
            sentences.append(f"{text}{later}.")
    if test := history.test:
        sentences.append(
            f"On {count(test['images'], 'test image')}, scored once, it reached a top-1 accuracy of {test['top1']:.1%} "
            f"and a top-5 accuracy of {test['top5']:.1%}."
        )
        if without := without_near_duplicates(test):
            sentences.append(f"Top-1 is {without}.")
    return " ".join([*sentences, *(finding.evidence for finding in findings)])


def cells(model: dict[str, Any]) -> dict[str, str]:
    """Return a model's scores and costs in a comparison as they are shown, by heading."""
    return {
        "runs": str(model["top1"]["n"]),
        "test top-1": interval(model["top1"]),
        "test top-5": interval(model["top5"]),
        "test loss": interval(model["loss"]),
        "parameters": f"{model['parameters'] / 1e6:.1f} M",
        "GFLOPs": f"{model['flops'] / 1e9:.2f}",
        "images/s": f"{model['images_per_second']:,.0f}",
        "device-s": f"{model['device_seconds']:,.0f}",
        **({} if model["cost"] is None else {"cost": f"{model['cost']:.4g}"}),
    }


def interval(score: dict[str, Any]) -> str:
    half = "" if score["low"] is None else f" ± {score['high'] - score['mean']:.4f}"
    return f"{score['mean']:.4f}{half}"


def hardware(run: dict[str, Any]) -> str:
    """Return what a run was trained on, in words: its workers, and the device or the threads of each."""
    device = run["device"] or "unknown"
    if device == "cpu":
        device = f"{run['threads']}-thread CPU" if "threads" in run else "CPU"
    return f"{run['workers']} × {device}" if run["workers"] else device


def to_command(
    run: dict[str, Any], command: str, options: Mapping[str, Any], models: Sequence[str] | None = None
) -> str:
    """Return a command that trains a run's model, or several, on its data with other options."""
    model = run["model"]
    chosen = ["--models", ",".join(models or [model])] if command == "compare" else ["--model", model]
    parts = ["raycifar", command, *chosen]
    if run["data"]["source"] != "cifar100":
        parts += ["--data", run["data"]["source"]]
    if run["val_size"] != 5000 and "val_size" not in options:
        parts += ["--val-size", str(run["val_size"])]
    if run["limit"]:
        parts += ["--limit", str(run["limit"])]
    if workers := chosen_workers(run, command):
        parts += ["--workers", workers]
    if command == "train" and run.get("checkpoint_steps"):
        parts += ["--checkpoint-steps", str(run["checkpoint_steps"])]
    if run.get("compile"):
        parts += ["--compile"]
    for name, value in options.items():
        if isinstance(value, bool):
            parts.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        else:
            parts += [f"--{name.replace('_', '-')}", str(value)]  # in full: another value is another run
    return shlex.join(parts)


def chosen_workers(run: dict[str, Any], command: str) -> str | None:
    """Return a run's --workers, or None if it is the default without a GPU, or the command has no such value."""
    least, count = run.get("least_workers"), run.get("workers", 1)
    if command == "compare":
        return str(count) if count > 1 else None  # of each trial: not this process, nor a range
    return f"{least}:{count}" if least is not None else None if count == 1 else str(count)


def at(storage: str) -> dict[str, str]:
    """Return the option that names where a run is kept, unless that is the default."""
    return {} if os.path.realpath(storage) == os.path.realpath("results") else {"storage": storage}


IN_WORDS = {"augment": "augmentation", "lr": "learning rate", "warmup": "warm-up"}  # fields of the recipe
Step = dict[str, str]  # a command, and the reason for it


def next_steps(history: RunHistory, findings: Sequence[Finding], storage: str = "results") -> list[Step]:
    """Return commands that are ready to run, each with its reason, in the order in which an expert would try them.

    Continue the run; train on all images; train for longer; fix the recipe; search for a better one.
    """
    run, recipe, base = history.run, history.recipe, history.base
    steps: list[Step] = []

    def train(reason: str, recipe: Recipe, run: dict[str, Any] = run, **options: Any) -> None:
        options = {**options_for(history.model, recipe), **options, **at(storage)}
        steps.append({"command": to_command(run, "train", options), "reason": reason})

    broken = has(findings, "collapse", "divergence", "learning-rate-high")
    departed = {name: getattr(base.recipe, name) for finding in findings for name in finding.metrics.get("recipe", ())}
    departed_names = listed([IN_WORDS.get(name, name.replace("_", " ")) for name in departed])
    if history.unfinished and not broken:
        train("the rest of this run, under the same name", recipe, seed=run["seed"], name=run["name"])
        if not has(findings, "overfitting", "generalization-gap", "spike"):
            return steps
    early = has(findings, "too-early") and not history.stopped_by_search
    if run["limit"] and (early or has(findings, "overfitting", "generalization-gap")):
        more_data = "an epoch teaches more" if early else "nothing makes a network generalize better than more data"
        mended = f", with the {departed_names} of {base}" if departed else ""
        train(f"all images{mended}: {more_data}", replace(recipe, **departed), {**run, "limit": None})
    if has(findings, "learning-rate-low"):
        recipe = replace(recipe, lr=base.recipe.lr)
        train(f"the learning rate of {base}", recipe)
    if history.stopped_by_search and not broken:
        train("this recipe to its end, outside the search", recipe)
    elif (
        has(findings, "improving", "underfitting", "too-early")
        and not has(findings, "overfitting")
        and not departed
        and not history.cut_short
    ):
        needed = max((finding.metrics.get("epochs_needed", 0) for finding in findings), default=0)
        epochs = min(MAX_NUMBER, max(needed, (3 if has(findings, "underfitting") else 2) * recipe.epochs))
        train(f"{epochs} epochs, with a schedule that stretches over all of them", replace(recipe, epochs=epochs))
    if departed:
        recipe = replace(recipe, **departed)
        train(f"the {departed_names} of {base}", recipe)
    elif broken:
        usual = base.recipe
        rate = usual.lr if has(findings, "learning-rate-high") else min(usual.lr, recipe.lr) / 2
        scale = ""
        if recipe.optimizer != usual.optimizer:  # whose learning rates are of another scale
            rate, scale = recipe.lr / 10, f" (that of {base} is for {usual.optimizer})"
        gentle = replace(recipe, lr=rate, warmup=max(usual.warmup, recipe.warmup), clip_norm=1.0)
        never = any(finding.kind == "collapse" and finding.epochs[0] == 1 for finding in findings)
        aim = ", to see whether it learns at all" if never else ""
        train(f"a lower learning rate{scale}, a warm-up and clipped gradients{aim}", gentle)
    if has(findings, "spike"):
        if recipe.clip_norm or any("stage" in finding.metrics for finding in findings):
            train("half the learning rate, against spikes", replace(recipe, lr=recipe.lr / 2))
        else:
            train("clipped gradients, against spikes", replace(recipe, clip_norm=1.0))
    if has(findings, "overfitting", "generalization-gap"):
        mixup = max(min(0.3, 1 - recipe.cutmix), recipe.mixup)
        smoothing = max(0.1, recipe.label_smoothing)
        augment = "cutout" if recipe.augment in PLAIN else recipe.augment
        more = replace(recipe, augment=augment, label_smoothing=smoothing, mixup=mixup)
        if more != recipe:
            train("more augmentation, against the gap to validation", more)
    all_of_them = (run["limit"] or 0) > 45_000  # of CIFAR-100's images, where 5,000 are held out
    held_out = {**run, "limit": None} if all_of_them else run
    causes = {finding.metrics["cause"] for finding in findings if finding.kind == "validation-noise"}
    if "network" in causes and not recipe.ema:
        train("averaged weights, against the swings", replace(recipe, ema=0.999))
    if "sampling" in causes and history.num_val < 5000 and (run["limit"] or history.num_train > 10_000):
        train("a validation set that resolves a difference of a point", recipe, held_out, val_size=5000)
    if has(findings, "plateau", "healthy", "validation-noise") or not steps:
        options = {**options_for(history.model, recipe), "seeds": 3, "search": 20, **at(storage)}
        if not history.num_val:  # by which a search chooses
            run, options = held_out, options | {"val_size": 5000}
        search = to_command(run, "compare", options)
        reason = "a search for a better recipe, and three seeds to see how sure the result is"
        steps.append({"command": search, "reason": reason})
    return steps
