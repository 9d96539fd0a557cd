"""Where a step's time goes: the same work with less and more of what surrounds it, in turn, several times over."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import ray.train
import ray.train.collective
import ray.util
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from raycifar.cluster.status import Phase
from raycifar.data import SHAPE
from raycifar.engine import baseline_dataloader as common
from raycifar.engine.cuda import cuda_graphed
from raycifar.engine.example_stats import describe_rise
from raycifar.engine.optimizers import set_learning_rate
from raycifar.engine.order import batches
from raycifar.engine.state import Progress
from raycifar.engine.trainer import Job, Trainer

SHUFFLED = 10  # batches in the local shuffle buffer of Ray's documented ingest


@dataclass(frozen=True)
class Plan:
    """What is timed: `rounds` of each stage, and the ways of others to compare with."""

    job: Job
    rounds: int
    against: tuple[str, ...]


def bench_loop_per_worker(config: dict[str, Any]) -> dict[str, list[float]]:
    """Time every stage; Ray Train calls it on each worker.

    Args:
        config: `plan`, a `Plan`.

    Returns:
        Images per second over all workers, by stage, a figure for each round.
    """
    plan: Plan = config["plan"]
    worker = Trainer(plan.job)
    worker.prepare()
    stages: dict[str, Callable[[], None]] = {"bare": steps(worker, worker.state.model)}
    if worker.world_size > 1:
        stages["gradients"] = steps(worker, worker.model)
    stages |= {
        "images": steps(worker, worker.model, images=True),
        "train": lambda: train(worker),
        "epoch": lambda: train(worker, finish=True),
        "following": follow(worker),
        "checkpoint": lambda: save(worker),
        **{name: WAYS[name](worker) for name in plan.against},
    }
    worker.reporter.phase(Phase.WARMING_UP)
    for stage in stages.values():
        stage()  # compiles, fills caches, starts processes
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for number in range(plan.rounds):
        worker.reporter.phase(Phase.TIMING, f"round {number + 1} of {plan.rounds}")
        for name, stage in stages.items():
            begun = clock(worker)
            stage()
            seconds[name].append(clock(worker) - begun)
            worker.checkpointer.wait()  # what is still being written is not the next stage's
    return {name: [plan.job.images / took for took in values] for name, values in seconds.items()}


def clock(worker: Trainer) -> float:
    """Return the time when all workers, and their devices, have done what they were given."""
    if worker.device.type == "cuda":
        torch.cuda.synchronize(worker.device)
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter()


# raycifar's own stages -------------------------------------------------------------------------------


def steps(worker: Trainer, model: nn.Module, *, images: bool = False) -> Callable[[], None]:
    """Take an epoch's steps with nothing around them, on tensors that are there, or on the worker's images."""
    job, optimizer = worker.job, worker.state.optimizer
    take_step = replay_step(worker, model)

    def run() -> None:
        set_learning_rate(optimizer, 1e-6)  # random tensors teach nothing
        worker.state.train_mode()
        staged = None if images else stage(worker)
        for batch in batches(job.seed, 1, job.images, worker.steps, [], worker.world_size, worker.rank):
            if staged:
                inputs, targets = staged[0][: len(batch.rows)], staged[1][: len(batch.rows)]
            else:
                _, inputs, targets = worker.ready(batch)
            take_step(inputs, targets)

    return run


def replay_step(worker: Trainer, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the bare step, as `train` would take it on this device: replayed on one GPU."""

    def take_step(inputs: Tensor, targets: Tensor) -> Tensor:
        return step(model, worker.state.optimizer, inputs, targets, worker.autocast, worker.recipe.label_smoothing)

    return cuda_graphed(take_step, worker.device, worker.world_size)


def stage(worker: Trainer) -> tuple[Tensor, Tensor]:
    size = worker.preprocessing.size
    count = -(-worker.recipe.batch_size // worker.world_size)
    inputs = torch.randn(count, 3, size, size, device=worker.device).contiguous(memory_format=torch.channels_last)
    return inputs, torch.randint(0, 100, (count,), device=worker.device)


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    autocast: torch.autocast,
    smoothing: float,
) -> Tensor:
    with autocast:
        logits = model(inputs)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
    loss.backward()
    with autocast:
        optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train(worker: Trainer, *, finish: bool = False) -> None:
    """Train an epoch as `train` does; with `finish`, validate and leave a checkpoint too."""
    worker.state.progress = Progress(epoch=worker.recipe.epochs)
    worker.train_epoch()
    if finish:
        worker.finish_epoch()


def follow(worker: Trainer) -> Callable[[], None]:
    """Do for an epoch what follows every image, and nothing else: a part of `train`, too small to be a difference."""
    logits = torch.randn(worker.recipe.batch_size, 100, device=worker.device)

    def update(rows: Tensor) -> Tensor:
        worker.record.update(rows, logits[: len(rows)], worker.train_set.labels[rows])
        return worker.record.values

    update = cuda_graphed(update, worker.device, worker.world_size)

    def run() -> None:
        for batch in batches(worker.job.seed, 1, worker.job.images, worker.steps, [], worker.world_size, worker.rank):
            update(torch.from_numpy(batch.rows).to(worker.device, non_blocking=True))
        describe_rise(worker.gather(worker.record.values), worker.index)
        worker.record.end_epoch()

    return run


def save(worker: Trainer) -> None:
    """Leave a checkpoint, as each epoch does; in this process alone, on a CPU, which writes it, wait until it has."""
    worker.save({})
    if worker.device.type == "cpu":
        worker.checkpointer.wait()


# Ways of others --------------------------------------------------------------------------------------


def dataloader(worker: Trainer) -> Callable[[], None]:
    """The common way, see `common`, in a process of its own beside each worker."""
    address = meeting_place() if worker.rank == 0 and worker.world_size > 1 else None
    setting = common.Setting(
        architecture=worker.architecture,
        dropout=worker.recipe.dropout,
        images=worker.train_set.images.permute(0, 2, 3, 1).cpu().numpy(),
        labels=worker.train_set.labels.tolist(),
        batch_size=-(-worker.recipe.batch_size // worker.world_size),
        device=worker.device,
        threads=worker.job.threads,
        rank=worker.rank,
        world_size=worker.world_size,
        address=ray.train.collective.broadcast_from_rank_zero(address),
    )
    process = ProcessPoolExecutor(1, get_context("spawn"), initializer=common.begin, initargs=(setting,))
    return lambda: process.submit(common.train_epoch).result()


def meeting_place() -> str:
    """Return an address of this node on which nobody listens."""
    with socket.socket() as free:
        free.bind(("", 0))
        return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


def stream(worker: Trainer) -> Callable[[], None]:
    """Ray's documented ingest: each epoch streams its shard through a local shuffle buffer; the step is ours."""
    shard = ray.train.get_dataset_shard("train")
    count = -(-worker.recipe.batch_size // worker.world_size)
    take_step = replay_step(worker, worker.model)

    def collate(batch: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        pixels = np.frombuffer(b"".join(batch["image"]), np.uint8).reshape(-1, *SHAPE)
        return torch.from_numpy(pixels.copy()), torch.from_numpy(batch["fine"].astype(np.int64))

    def run() -> None:
        worker.state.train_mode()
        options = {"batch_size": count, "local_shuffle_buffer_size": SHUFFLED * count}
        for images, labels in shard.iter_torch_batches(**options, collate_fn=collate):
            inputs, targets = worker.see(images.to(worker.device), labels.to(worker.device))
            take_step(inputs, targets)

    return run


WAYS: dict[str, Callable[[Trainer], Callable[[], None]]] = {"dataloader": dataloader, "stream": stream}
