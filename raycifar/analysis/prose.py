"""A run in words: the paragraph under the figure, and what to try next, as commands."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raycifar.analysis.findings import Finding, RunHistory, has
from raycifar.recipes import Recipe, changes, recipe_for

NOUNS = {
    "collapse": "the network has not learned",
    "overfitting": "it overfits",
    "spike": "the loss spikes",
    "plateau": "more epochs would not help",
    "improving": "it is still improving",
    "underfitting": "it underfits",
    "validation-noise": "the validation curve is noisy",
    "validation-above-training": "validation is ahead of training",
    "divergence": "training diverged",
    "learning-rate-high": "the learning rate is too high",
    "learning-rate-low": "the learning rate is too low",
    "seed-variance": "seeds differ more than they should",
    "healthy": "nothing is wrong",
}


def headline(findings: Sequence[Finding]) -> str:
    """Return what was found, in a phrase."""
    return "; ".join(dict.fromkeys(NOUNS[finding.kind] for finding in findings)) or "nothing to read yet"


def state(story: RunHistory) -> str:
    """Return how far a run has come, in a sentence."""
    done, epochs = len(story.history), story.recipe.epochs
    if story.result is None:
        return f"This run is under way, or was cut off: {done} of {epochs} epochs are recorded."
    match story.result["status"]:
        case "finished":
            return f"This run is finished: {done} epochs."
        case "stopped":
            return f"This run was stopped by a search after {done} of {epochs} epochs, for others did better."
        case _:
            reason = story.result.get("reason") or "no reason is recorded"
            return f"This run failed after {done} of {epochs} epochs: {reason}."


def paragraph(story: RunHistory, findings: Sequence[Finding]) -> str:
    """Return what could stand under the figure, in plain English."""
    run, recipe, data = story.run, story.recipe, story.run["data"]
    begun = "from scratch" if recipe.pretrained == "none" else f"from pre-trained weights ({recipe.pretrained})"
    text = [
        f"{run['model']} was trained {begun} on {data['train']:,} images of {data['source']} for {len(story.history)} "
        f"epochs, with {data['val']:,} images held out for validation."
    ]
    if story.history:
        last = story.history[-1]
        text.append(f"The training loss ended at {last['train_loss']:.3f} (top-1 {last['train_top1']:.1%}).")
        if story.validated:
            best = max(story.history, key=lambda row: row["val_top1"])
            text.append(
                f"Validation ended at loss {last['val_loss']:.3f} and top-1 {last['val_top1']:.1%}; its best was "
                f"{best['val_top1']:.1%}, at epoch {best['epoch']}."
            )
    test = (story.result or {}).get("test")
    if test:
        text.append(
            f"On the {test['images']:,} test images, scored once, it reaches a top-1 of {test['top1']:.1%} and a top-5 "
            f"of {test['top5']:.1%}."
        )
    text += [finding.evidence for finding in findings]
    return " ".join(text)


def command(story: RunHistory, command: str, recipe: Recipe, **options: Any) -> str:
    """Return a command that trains the run's model on its data with `recipe`."""
    run = story.run
    model = run["model"]
    base = recipe_for(model, recipe.pretrained)
    parts = ["raycifar", command, "--models" if command == "compare" else "--model", model]
    if run["data"]["source"] != "cifar100":
        parts += ["--data", run["data"]["source"]]
    if run["val_size"] != 5000 and "val_size" not in options:
        parts += ["--val-size", str(run["val_size"])]
    if run["limit"]:
        parts += ["--limit", str(run["limit"])]
    if recipe.pretrained != recipe_for(model).pretrained:
        parts += ["--pretrained", recipe.pretrained]
    for name, value in {**changes(recipe, base), **options}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{'' if value else 'no-'}{flag}")
        elif name != "pretrained":
            parts += [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(parts)


def what_next(story: RunHistory, findings: Sequence[Finding]) -> list[dict[str, str]]:
    """Return commands that are ready to run, each with its reason, the most urgent first."""
    recipe, own = story.recipe, recipe_for(story.run["model"], story.recipe.pretrained)

    def change(**values: Any) -> Recipe:
        return replace(recipe, **values)

    def train(reason: str, recipe: Recipe, **options: Any) -> dict[str, str]:
        return {"command": command(story, "train", recipe, **options), "reason": reason}

    steps: list[dict[str, str]] = []
    if has(findings, "collapse", "divergence", "learning-rate-high"):
        calm = change(lr=min(own.lr, recipe.lr) / 2, warmup=max(own.warmup, recipe.warmup), clip_norm=1.0)
        steps.append(
            train("half the learning rate, a warm-up and bounded gradients, to see whether it learns at all", calm)
        )
    if has(findings, "spike"):
        steps.append(
            train("half the learning rate, against spikes", change(lr=recipe.lr / 2))
            if recipe.clip_norm
            else train("bounded gradients, against spikes", change(clip_norm=1.0))
        )
    if has(findings, "overfitting"):
        mixup = max(min(0.3, 1 - recipe.cutmix), recipe.mixup)
        more = change(augment="cutout", label_smoothing=max(0.1, recipe.label_smoothing), mixup=mixup)
        steps.append(train("more augmentation against overfitting", more))
        if story.run["limit"]:
            story_without = RunHistory({**story.run, "limit": None}, story.history, story.result)
            again = command(story_without, "train", recipe)
            steps.append({"command": again, "reason": "all images, for more data is the best regularisation"})
    if has(findings, "underfitting", "learning-rate-low"):
        longer = change(lr=own.lr, epochs=max(10, 3 * recipe.epochs))
        steps.append(train("the recipe's own learning rate, and more epochs", longer))
    if has(findings, "validation-noise") and story.val_images < 5000 and (story.run["limit"] or story.images > 10_000):
        steps.append(train("a validation set that tells a point", recipe, val_size=5000))
    if has(findings, "improving"):
        steps.append(train("twice the epochs, for it was still improving", change(epochs=2 * recipe.epochs)))
    if has(findings, "plateau", "healthy", "validation-noise") or not steps:
        search = command(story, "compare", recipe, seeds=3, search=20)
        steps.append(
            {"command": search, "reason": "a search for a better recipe, and three seeds to tell how sure it is"}
        )
    return steps
