"""Distinguishing a network that isn't learning from one that learns slowly."""

import math

from raycifar.data import CIFAR100
from raycifar.storage.schemas import EpochRecord

MIN_STEPS = 100  # before that, a healthy network may still stand at chance
CHANCE = 1 / CIFAR100.num_classes  # accuracy of guessing
GUESSING_LOSS = math.log(CIFAR100.num_classes)  # cross-entropy where every class has the same probability


def chance_level(num_images: int) -> float:
    """Return the accuracy that guessing hardly ever exceeds: three standard deviations above chance."""
    return CHANCE + 3 * math.sqrt(CHANCE * (1 - CHANCE) / num_images)


def guesses(record: EpochRecord, num_images: int) -> bool:
    """Return whether an epoch's training loss and accuracy are those of guessing.

    Guessing gives a cross-entropy of ln(classes), and a number of correct answers that is binomial around
    images / classes. A network at or above that loss, and within three standard deviations of that number, has
    learned nothing that `num_images` could show. A network that begins to learn within the epoch shows it in the loss
    at the epoch's end.
    """
    loss, top1, at_end = record.train_loss, record.train_top1, record.train_eval_loss
    if loss is None or top1 is None:
        return False
    least = loss if at_end is None else min(loss, at_end)
    return least >= GUESSING_LOSS - 0.01 and top1 <= chance_level(num_images)


def collapse(record: EpochRecord, num_images: int, steps: int) -> str | None:
    """Return a warning if an epoch's training loss and accuracy are those of guessing, else None.

    Args:
        num_images: trained on in the epoch.
        steps: taken since training began.
    """
    if steps < MIN_STEPS or not guesses(record, num_images):
        return None
    return (
        f"after epoch {record.epoch} the network is not learning. Its loss is {record.train_loss:.4f} and its accuracy "
        f"{record.train_top1:.2%}, as by guessing (ln({CIFAR100.num_classes}) = {GUESSING_LOSS:.4f}, "
        f"{CHANCE:.2%}). Stop it, and try a smaller --lr or a longer --warmup."
    )
