"""Telling a network that isn't learning from one that is slow."""

import math
from typing import Any

MIN_STEPS = 100  # before that, a healthy network may still stand at chance


def collapse(row: Any, images: int, steps: int, classes: int) -> str | None:
    """Return a sentence if an epoch's training loss and accuracy are those of guessing, else None.

    Guessing gives a cross-entropy of ln(classes) and a number of hits that is binomial around
    images / classes; a run at or above that loss, and within three standard deviations of that number,
    has learned nothing that `images` could show.

    Args:
        row: a line of the history.
        images: trained on in the epoch.
        steps: taken since training began.
    """
    chance = 1 / classes
    noise = 3 * math.sqrt(chance * (1 - chance) / images)
    if steps < MIN_STEPS or row["train_loss"] < math.log(classes) - 0.01 or row["train_top1"] > chance + noise:
        return None
    return (
        f"after epoch {row['epoch']} the loss is {row['train_loss']:.4f}, ln({classes}) = {math.log(classes):.4f}, and "
        f"{row['train_top1']:.2%} are right, which is chance: the network is not learning. Stop it, and try "
        "a smaller --lr or a longer --warmup."
    )
