"""Where a step's time goes: the same work with less and more of what surrounds it, in turn, several times over."""

import socket
import time
from collections.abc import Callable, Iterator
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
from torch import Tensor

from raycifar.cluster.status import Phase
from raycifar.engine import baseline_dataloader
from raycifar.engine.augment import mix
from raycifar.engine.cuda import cuda_graphed
from raycifar.engine.example_stats import describe_rise
from raycifar.engine.optimizers import set_learning_rate
from raycifar.engine.order import Batch, EpochOrder
from raycifar.engine.state import Progress
from raycifar.engine.trainer import Job, Trainer

SHUFFLED_BATCHES = 10  # batches in the local shuffle buffer of Ray's documented ingest


@dataclass(frozen=True)
class BenchmarkJob:
    """What is timed: `rounds` of each stage, and the `baselines` to compare with."""

    job: Job
    rounds: int
    baselines: tuple[str, ...]


def bench_loop_per_worker(config: dict[str, Any]) -> dict[str, list[float]]:
    """Time every stage; Ray Train calls it on each worker.

    Args:
        config: `job`, a `BenchmarkJob`.

    Returns:
        Images per second over all workers, by stage, a figure for each round.
    """
    benchmark: BenchmarkJob = config["job"]
    trainer = Trainer(benchmark.job)
    trainer.set_up()
    trainer.describe()
    stages: dict[str, Callable[[], None]] = {"bare": bare_steps(trainer)}
    if trainer.world_size > 1:
        stages["gradients"] = bare_steps(trainer, exchange=True)
    stages |= {
        "images": bare_steps(trainer, exchange=True, images=True),
        "train": lambda: train_epoch(trainer),
        "epoch": lambda: train_epoch(trainer, finish=True),
        "following": update_example_stats(trainer),
        "checkpoint": lambda: save_checkpoint(trainer),
        **{name: BASELINES[name](trainer) for name in benchmark.baselines},
    }
    trainer.reporter.phase(Phase.WARMING_UP)
    for stage in stages.values():
        stage()  # compiles, fills caches, starts processes
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for number in range(benchmark.rounds):
        trainer.reporter.phase(Phase.TIMING, f"round {number + 1} of {benchmark.rounds}")
        for name, stage in stages.items():
            began = clock(trainer)
            stage()
            seconds[name].append(clock(trainer) - began)
            trainer.checkpointer.wait()  # what is still being written is not the next stage's
    num_images = benchmark.job.num_train_images
    return {name: [num_images / took for took in values] for name, values in seconds.items()}


def clock(trainer: Trainer) -> float:
    """Return the time at which all workers are done."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter()


# raycifar's own stages -------------------------------------------------------------------------------


def bare_steps(trainer: Trainer, *, exchange: bool = False, images: bool = False) -> Callable[[], None]:
    """Return what takes an epoch's steps with nothing around them.

    Args:
        exchange: sum the gradients over workers. images: train on the worker's images, not on random tensors.
    """
    step = BareStep(trainer, exchange=exchange)

    def run() -> None:
        set_learning_rate(trainer.state.optimizer, 1e-6)  # random tensors teach nothing
        trainer.state.train_mode()
        random = None if images else random_batch(trainer)
        for batch in epoch_batches(trainer):
            if random:
                inputs, targets = random[0][: len(batch.rows)], random[1][: len(batch.rows)]
            else:
                _, inputs, targets = trainer.train_step.prepare(batch.rows)
            step(inputs, targets)

    return run


class BareStep:
    """Forward, loss, backward and optimizer, as `train` takes them on this device, and nothing else."""

    def __init__(self, trainer: Trainer, *, exchange: bool) -> None:
        self.state, self.autocast = trainer.state, trainer.autocast
        self.exchange, self.exchanges = trainer.train_step.exchange, exchange
        self.captured = cuda_graphed(self.take, trainer.device, trainer.train_step.obstacle if exchange else None)

    def __call__(self, inputs: Tensor, targets: Tensor) -> None:
        if self.exchange:
            self.exchange.enabled = self.exchanges
        self.captured(inputs, targets)
        if self.exchange:
            self.exchange.enabled = True

    def take(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with self.autocast:
            logits = self.state.model(inputs)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.state.recipe.label_smoothing)
        loss.backward()
        if self.exchange:
            self.exchange.wait()
        with self.autocast:
            self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        return loss.detach()


def random_batch(trainer: Trainer) -> tuple[Tensor, Tensor]:
    size, batch_size = trainer.preprocessing.size, batch_size_per_worker(trainer)
    channels = len(trainer.preprocessing.mean)
    inputs = torch.randn(batch_size, channels, size, size, device=trainer.device)
    targets = torch.randint(0, trainer.job.info.num_classes, (batch_size,), device=trainer.device)
    return inputs.contiguous(memory_format=torch.channels_last), targets


def batch_size_per_worker(trainer: Trainer) -> int:
    return -(-trainer.recipe.batch_size // trainer.world_size)


def epoch_batches(trainer: Trainer) -> Iterator[Batch]:
    order = EpochOrder(trainer.job.seed, 1, trainer.job.num_train_images, trainer.steps_per_epoch)
    return order.batches([], trainer.world_size, trainer.rank)


def train_epoch(trainer: Trainer, *, finish: bool = False) -> None:
    """Train an epoch as `train` does; with `finish`, score the network and leave a checkpoint too."""
    trainer.state.progress = Progress(epoch=trainer.recipe.epochs)
    trainer.train_epoch()
    if finish:
        trainer.finish_epoch()


def update_example_stats(trainer: Trainer) -> Callable[[], None]:
    """Return what follows every image for an epoch, and does nothing else: too small a part to be a difference."""
    logits = torch.randn(trainer.recipe.batch_size, trainer.job.info.num_classes, device=trainer.device)
    stats = trainer.example_stats

    def update(rows: Tensor) -> Tensor:
        stats.update(rows, logits[: len(rows)], trainer.train_set.labels[rows])
        return stats.values

    captured = cuda_graphed(update, trainer.device)

    def run() -> None:
        for batch in epoch_batches(trainer):
            captured(torch.from_numpy(batch.rows).to(trainer.device, non_blocking=True))
        describe_rise(trainer.gather(stats.values), trainer.index)
        stats.end_epoch()

    return run


def save_checkpoint(trainer: Trainer) -> None:
    """Leave a checkpoint, as each epoch does; in this process alone, on a CPU, which writes it, wait until it has."""
    trainer.save({})
    if trainer.device.type == "cpu":
        trainer.checkpointer.wait()


# Baselines -------------------------------------------------------------------------------------------


def dataloader(trainer: Trainer) -> Callable[[], None]:
    """Return an epoch of the common script, see `baseline_dataloader`, in a process of its own beside each worker."""
    address = free_address() if trainer.rank == 0 and trainer.world_size > 1 else None
    setting = baseline_dataloader.Setting(
        architecture=trainer.architecture,
        dropout=trainer.recipe.dropout,
        images=trainer.train_set.images.permute(0, 2, 3, 1).cpu().numpy(),
        labels=trainer.train_set.labels.tolist(),
        batch_size=batch_size_per_worker(trainer),
        device=trainer.device,
        threads=trainer.job.threads,
        rank=trainer.rank,
        world_size=trainer.world_size,
        address=ray.train.collective.broadcast_from_rank_zero(address),
    )
    process = ProcessPoolExecutor(1, get_context("spawn"), initializer=baseline_dataloader.start, initargs=(setting,))
    return lambda: process.submit(baseline_dataloader.train_epoch).result()


def free_address() -> str:
    """Return an address of this node on which nobody listens."""
    with socket.socket() as free:
        free.bind(("", 0))
        return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


def stream(trainer: Trainer) -> Callable[[], None]:
    """Return an epoch of Ray's documented ingest: a shard streamed through a local shuffle buffer; the step is ours."""
    shard = ray.train.get_dataset_shard("train")
    batch_size = batch_size_per_worker(trainer)
    step = BareStep(trainer, exchange=True)

    def collate(batch: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        pixels = np.frombuffer(b"".join(batch["image"]), np.uint8).reshape(-1, *trainer.job.info.image_shape)
        return torch.from_numpy(pixels.copy()), torch.from_numpy(batch["fine"].astype(np.int64))

    def run() -> None:
        trainer.state.train_mode()
        options = {"batch_size": batch_size, "local_shuffle_buffer_size": SHUFFLED_BATCHES * batch_size}
        for pixels, labels in shard.iter_torch_batches(**options, collate_fn=collate):
            inputs = trainer.train_step.augment_and_normalize(pixels.to(trainer.device))
            step(*mix(inputs, labels.to(trainer.device), trainer.recipe, trainer.job.info.num_classes))

    return run


BASELINES: dict[str, Callable[[Trainer], Callable[[], None]]] = {"dataloader": dataloader, "stream": stream}
