"""How long training takes on CPUs, before it starts: from the rate of this machine's matrix products."""

import timeit
from typing import TYPE_CHECKING

from raycifar import models
from raycifar.data.tables import Splits
from raycifar.machine import available_cpus
from raycifar.models.recipe import Recipe
from raycifar.words import duration

if TYPE_CHECKING:
    from raycifar.cluster.sizing import Workers

PROBE = 2048  # rows of the matrices by whose product the machine's rate is measured
HOUR = 3600
SLOWEST = 1e10  # operations per second of a CPU: what takes under an hour at that rate isn't worth a measurement


def operations_of(recipe: Recipe, architecture: models.Architecture, splits: Splits) -> float:
    """Return the floating-point operations of training and validation."""
    passes_per_epoch = models.FORWARD_PASSES_PER_STEP * len(splits.train) + len(splits.val)
    return passes_per_epoch * recipe.epochs * models.flops(architecture)


def cpu_seconds(operations: float, recipe: Recipe) -> float:
    """Return about how long so many floating-point operations take on all CPUs of this process."""
    import torch

    from raycifar.engine.hardware import choose_precision

    a, b = torch.ones(2, PROBE, PROBE, dtype=choose_precision(recipe.precision, torch.device("cpu")))
    fastest = min(timeit.repeat(lambda: a @ b, number=1, repeat=4))
    return operations * fastest / (2 * PROBE**3)


def warn_of_hours(
    operations: float, recipe: Recipe, num_images: int, workers: "Workers", *, at_once: int = 1
) -> list[str]:
    """Return a line if training takes over an hour on CPUs, which says what would be shorter.

    Args:
        operations: of all runs. recipe: the one with the most epochs. num_images: of an epoch.
        at_once: runs that train at a time, each on `workers`.
    """
    cpus = at_once * max(1, workers.count) * workers.cpus
    if workers.device != "cpu" or operations < HOUR * SLOWEST * cpus:
        return []
    seconds = cpu_seconds(operations, recipe) * available_cpus() / cpus
    if seconds < HOUR:
        return []
    part = HOUR / seconds
    epochs, images = int(recipe.epochs * part), int(num_images * part) // 100 * 100
    ways = [f"--epochs {epochs}"] * (epochs > 0) + [f"--limit {images}"] * (images > 0)
    shorter = f"{' or '.join(ways) or '--epochs 1 with a --limit'} would take about an hour"
    return [f"On these CPUs this takes about {duration(seconds)}: {shorter}, and a GPU far less."]
