"""How long training takes on CPUs, before it starts: from the time of a few steps on this machine."""

import math
import timeit
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from raycifar import models
from raycifar.data.dataset import Splits
from raycifar.machine import available_cpus
from raycifar.models.initial_weights import InitialWeights
from raycifar.models.recipe import FORWARD_PASSES_PER_STEP, Recipe
from raycifar.terminal import Screen
from raycifar.words import duration

if TYPE_CHECKING:
    from raycifar.cluster.sizing import Workers

FEW = 4  # images of the first steps that are timed
ENOUGH_SECONDS = 0.5  # of a step, to be timed well
LONGEST_SECONDS = 60  # that a dry run may take to time steps
HOUR = 3600
SLOWEST = 1e10  # operations per second of a CPU: what takes under an hour at that rate isn't worth a measurement


def operations_of(recipe: Recipe, initial: InitialWeights, splits: Splits) -> float:
    """Return the floating-point operations of training and validation."""
    passes_per_epoch = FORWARD_PASSES_PER_STEP * len(splits.train) + len(splits.val)
    return passes_per_epoch * recipe.epochs * models.flops(initial.architecture)


def cpu_seconds(recipe: Recipe, initial: InitialWeights, splits: Splits) -> float:
    """Return about how long training and validation take on all CPUs of this process.

    Steps with few and with many images are timed: a step takes the optimizer's time plus a time proportional to its
    images.
    """
    import torch

    from raycifar.engine.train_step import step_of_random_images

    def time_step(num_images: int) -> float:
        """Return the least of up to three times; the first step loads libraries."""
        step, times = step_of_random_images(initial, recipe, num_images, torch.device("cpu")), [math.inf]
        while len(times) <= 3 and sum(times[1:]) < 2 * ENOUGH_SECONDS:
            times.append(timeit.timeit(step, number=1))
        return min(times)

    with torch.random.fork_rng(devices=()), cpu_threads(available_cpus()):
        many, slow = FEW, time_step(FEW)
        fast, seconds_of_image = slow, slow / FEW
        while many < recipe.batch_size and slow < max(2 * fast, ENOUGH_SECONDS):
            many = min(4 * many, recipe.batch_size)
            slow = time_step(many)
            seconds_of_image = min(max(0, (slow - fast) / (many - FEW)), fast / FEW)
    seconds_of_step = fast + (recipe.batch_size - FEW) * seconds_of_image
    epoch = len(splits.train) / recipe.batch_size * seconds_of_step
    size = initial.architecture.preprocessing.size
    epoch *= recipe.mean_cost(size) / recipe.cost(size, 1.0)  # the timed steps are like the last ones
    return recipe.epochs * (epoch + len(splits.val) * seconds_of_image / FORWARD_PASSES_PER_STEP)


def if_soon(estimate: Callable[[], float]) -> float:
    """Return an estimate, or infinity if it takes long to make; its thread then ends with the process."""
    try:
        return ThreadPoolExecutor(1).submit(estimate).result(LONGEST_SECONDS)
    except TimeoutError:
        return math.inf


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Have PyTorch use `count` threads, as workers do: a container may have fewer CPUs than the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warn_of_hours(
    runs: Collection[tuple[Recipe, InitialWeights]],
    splits: Splits,
    workers: "Workers",
    screen: Screen,
    *,
    repeats: int = 1,
    at_once: int = 1,
) -> list[str]:
    """Return a line if training takes over an hour on CPUs, which says what would be shorter.

    Args:
        runs: each is trained `repeats` times, `at_once` of them at a time, each on `workers`.
    """
    cpus = at_once * max(1, workers.count) * workers.cpus
    operations = repeats * sum(operations_of(*run, splits) for run in runs)
    if workers.device != "cpu" or operations < HOUR * SLOWEST * cpus:
        return []
    with screen.waiting("Timing a few steps"):
        seconds = repeats * sum(cpu_seconds(*run, splits) for run in runs) * available_cpus() / cpus
    if seconds < HOUR:
        return []
    part = HOUR / seconds
    epochs = int(part * max(recipe.epochs for recipe, _ in runs))
    images = int(part * len(splits.train)) // 100 * 100
    ways = [f"--epochs {epochs}"] * (epochs > 0) + [f"--limit {images}"] * (images > 0)
    shorter = f"{' or '.join(ways) or '--epochs 1 with a --limit'} would take about an hour"
    return [f"On these CPUs this takes about {duration(seconds)}: {shorter}, and a GPU far less."]
