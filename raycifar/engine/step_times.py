"""How long a step takes, by the number of images in it, and how long its exchange of gradients."""

import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raycifar.cluster.status import Phase
from raycifar.data.shards import Shard
from raycifar.engine.bench import clock, time_step, train_epoch, use_fewer_images
from raycifar.engine.cuda import WARM_UP
from raycifar.engine.distributed import BUCKET_BYTES, all_gather_objects, group_by_size
from raycifar.engine.example_stats import ExampleStats
from raycifar.engine.hardware import choose_precision, set_up
from raycifar.engine.optimizers import set_learning_rate
from raycifar.engine.order import Batch
from raycifar.engine.state import TrainingState
from raycifar.engine.train_step import TrainStep
from raycifar.engine.trainer import Job, Trainer

ROUNDS = 3  # of everything that is timed
EXCHANGES = 20  # in a round


@dataclass(frozen=True)
class StepTimesJob:
    """What is timed: steps of so many images on each worker, then epochs of all workers, in about so many seconds."""

    job: Job
    batch_sizes: tuple[int, ...]
    seconds: float


def step_times_loop_per_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Time steps, exchanges and epochs; Ray Train calls it on each worker.

    Args:
        config: `job`, a `StepTimesJob`.

    Returns:
        `alone`: seconds of a step without an exchange, by its images; of several workers the slowest's, while the
        others take theirs. `exchanging`, of one worker: the same with an exchange of one rank. `buckets`: bytes of
        gradients that travel together. `link`, of several workers: seconds of a hop and bytes per second between
        two. `rates`: images per second of epochs as `train` runs them, over all workers.
    """
    timed: StepTimesJob = config["job"]
    trainer = Trainer(timed.job)
    trainer.set_up()
    trainer.describe()
    world_size = trainer.world_size
    trainer.reporter.phase(Phase.TIMING, f"{world_size} worker{'s' * (world_size > 1)}")
    parts = len(timed.batch_sizes) * (1 + (world_size == 1)) + 1
    each = timed.seconds / parts / (ROUNDS + 1)

    def steps(*, exchange: bool) -> dict[int, float]:
        times = time_steps(timed.job, trainer.device, timed.batch_sizes, exchange=exchange, seconds=each)
        own = {size: statistics.median(values) for size, values in times.items()}
        everyone = all_gather_objects(own)
        return {size: max(worker[size] for worker in everyone) for size in own}

    trained = [p for p in trainer.state.model.parameters() if p.requires_grad]
    measured: dict[str, Any] = {
        "alone": steps(exchange=False),
        "buckets": [sum(p.nbytes for p in group) for group in group_by_size(trained[::-1])],
    }
    if world_size == 1:
        with nullcontext() if dist.is_initialized() else process_group_of_one(trainer.device):
            measured["exchanging"] = steps(exchange=True)
    else:
        measured["link"] = measure_link(trainer.device)
    use_fewer_images(trainer, int(each / time_step(trainer)))
    train_epoch(trainer)
    rates = measured["rates"] = []
    for _ in range(ROUNDS):
        began = clock(trainer)
        train_epoch(trainer)
        rates.append(trainer.job.num_train_images / (clock(trainer) - began))
    return measured


def time_steps(
    job: Job, device: torch.device, batch_sizes: Sequence[int], *, exchange: bool, seconds: float
) -> dict[int, list[float]]:
    """Return the seconds of a step, for each number of images, a figure for each round.

    A step is that of training, with its images prepared, and captured on a GPU. The batch sizes take turns, so that a
    machine that slows down slows all.

    Args:
        exchange: sum the gradients too, over the process group. seconds: that a round takes for each batch size, about.
    """
    set_up(device, job.threads)
    steps = {size: build_step(job, device, size, exchange=exchange) for size in batch_sizes}
    first = WARM_UP + 2 if device.type == "cuda" else 1
    repeats = {}
    for size, step in steps.items():
        time_one(step, first)
        repeats[size] = max(1, round(seconds / time_one(step, 1)))
    times: dict[int, list[float]] = {size: [] for size in batch_sizes}
    for _ in range(ROUNDS):
        for size, step in steps.items():
            times[size].append(time_one(step, repeats[size]))
    return times


def build_step(job: Job, device: torch.device, batch_size: int, *, exchange: bool) -> TrainStep:
    """Return a step of random images."""
    dtype = choose_precision(job.recipe.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    pixels = torch.randint(0, 256, (batch_size, *job.info.image_shape), dtype=torch.uint8, device=device)
    labels = torch.randint(0, job.info.num_classes, (batch_size,), device=device)
    state = TrainingState(job.initial.architecture, job.initial.weights, job.recipe, job.seed, device)
    set_learning_rate(state.optimizer, 1e-6)  # random images teach nothing
    state.train_mode()
    if job.compile:
        state.model.compile()
    train_set = Shard(pixels, labels, labels, torch.arange(batch_size, device=device))
    return TrainStep(state, train_set, ExampleStats.blank(batch_size, device), autocast, exchange=exchange)


def time_one(step: TrainStep, repeats: int) -> float:
    """Return the seconds of a step, the mean of some in a row."""
    num_images = len(step.train_set)
    batch = Batch(0, np.arange(num_images), num_images)
    synchronize(step.device)
    began = time.perf_counter()
    for _ in range(repeats):
        step(batch)
    synchronize(step.device)
    return (time.perf_counter() - began) / repeats


def measure_link(device: torch.device) -> tuple[float, float]:
    """Return the seconds of a hop between two workers and the bytes per second, from a small and a large all-reduce.

    Each worker of n sends 2 (n - 1) times, 1/n of the bytes, around a ring (Patarasuk and Yuan, 2009).
    """
    hops = 2 * (dist.get_world_size() - 1)
    small, large = (time_all_reduce(num_bytes, device) for num_bytes in (4, BUCKET_BYTES))
    latency, bandwidth = small / hops, hops / dist.get_world_size() * BUCKET_BYTES / max(large - small, 1e-9)
    return tuple(all_gather_objects((latency, bandwidth))[0])  # all workers' are the same time


def time_all_reduce(num_bytes: int, device: torch.device) -> float:
    """Return the seconds of an all-reduce, the median of some rounds."""
    tensor, times = torch.zeros(num_bytes // 4, device=device), []
    for number in range(ROUNDS + 1):
        dist.barrier()
        synchronize(device)
        began = time.perf_counter()
        for _ in range(EXCHANGES):
            dist.all_reduce(tensor)
        synchronize(device)
        if number:  # the first one connects the workers
            times.append((time.perf_counter() - began) / EXCHANGES)
    return statistics.median(times)


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
