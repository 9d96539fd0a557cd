"""How long a step takes, by the number of images in it, with and without an exchange of gradients.

`python -m raycifar.engine.step_times --out steps.json` measures the three models on this machine's GPU, or its CPU.
"""

import argparse
import json
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from raycifar.data import CIFAR100
from raycifar.data.shards import Shard
from raycifar.data.synthetic import synthetic
from raycifar.engine.cuda import WARM_UP
from raycifar.engine.example_stats import ExampleStats
from raycifar.engine.hardware import choose_precision, set_up
from raycifar.engine.state import TrainingState
from raycifar.engine.train_step import TrainStep
from raycifar.models.initial_weights import InitialWeights, load_initial_weights
from raycifar.models.recipe import Recipe


def time_steps(
    initial: InitialWeights,
    recipe: Recipe,
    device: torch.device,
    threads: int,
    batch_sizes: Sequence[int],
    *,
    exchange: bool,
    seconds: float = 1.0,
    rounds: int = 5,
) -> dict[int, list[float]]:
    """Return the seconds of a step, for each number of images, a figure for each round.

    A step is that of training, captured on a GPU, on random images that are there. The batch sizes take turns, so that
    a machine that slows down slows all.

    Args:
        exchange: sum the gradients too, over the one rank of a process group that must be there: what it costs beside
            the network between workers. seconds: that a round takes for each batch size, about.
    """
    set_up(device, threads)
    steps = {size: build_step(initial, recipe, device, size, exchange=exchange) for size in batch_sizes}
    repeats = {size: max(1, round(seconds / time_one(step, WARM_UP + 2, device))) for size, step in steps.items()}
    times: dict[int, list[float]] = {size: [] for size in batch_sizes}
    for _ in range(rounds):
        for size, step in steps.items():
            times[size].append(time_one(step, repeats[size], device))
    return times


def build_step(
    initial: InitialWeights, recipe: Recipe, device: torch.device, batch_size: int, *, exchange: bool
) -> TrainStep:
    dtype = choose_precision(recipe.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    pixels = torch.randint(0, 256, (batch_size, *CIFAR100.image_shape), dtype=torch.uint8, device=device)
    labels = torch.randint(0, CIFAR100.num_classes, (batch_size,), device=device)
    state = TrainingState(initial.architecture, initial.weights, recipe, 0, device)
    state.train_mode()
    return TrainStep(
        state,
        Shard(pixels, labels, labels, torch.arange(batch_size, device=device)),
        ExampleStats.blank(batch_size, device),
        autocast,
        exchange=exchange,
    )


def time_one(step: TrainStep, repeats: int, device: torch.device) -> float:
    """Return the seconds of a step, the mean of some in a row."""
    batch = step.prepare_batch(torch.arange(len(step.train_set)).numpy())
    num_images = len(step.train_set)
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        step.captured_update(*batch, num_images, num_images)
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def process_group_of_one(device: torch.device) -> Iterator[None]:
    """Be the one rank of a process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", address, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--small", action="store_true", help="as little as can be, to see that it works")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_sizes, rounds = ([16], 1) if options.small else ([128, 64, 32, 16], 5)
    milliseconds: dict[str, dict[str, dict[int, float]]] = {}
    for model in ("cnn",) if options.small else ("cnn", "vgg16", "resnet50"):
        recipe = Recipe()
        initial = load_initial_weights(model, recipe, synthetic(1000, 100))
        with process_group_of_one(device):
            for exchange in (False, True):
                times = time_steps(
                    initial, recipe, device, torch.get_num_threads(), batch_sizes,
                    exchange=exchange, seconds=0.2, rounds=rounds,
                )  # fmt: skip
                medians = {size: 1000 * statistics.median(values) for size, values in times.items()}
                milliseconds.setdefault(model, {})["with exchange" if exchange else "alone"] = medians
        print(model, milliseconds[model], flush=True)
    Path(options.out).write_text(json.dumps({"rounds": rounds, "milliseconds": milliseconds}))


if __name__ == "__main__":
    main()
