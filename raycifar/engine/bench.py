"""Where a step's time goes: the same work with less and more of what surrounds it, in turn, several times over."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import ray.train
import ray.util
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ray.train.collective import broadcast_from_rank_zero
from torch import Tensor
from torch.distributed.elastic.utils.distributed import get_free_port

from raycifar.cluster.status import Phase
from raycifar.data import CIFAR100
from raycifar.data.shards import Shard, shard_bounds
from raycifar.engine import baseline_dataloader
from raycifar.engine.augment import mix
from raycifar.engine.cuda import WARM_UP, cuda_graphed
from raycifar.engine.example_stats import describe_rise, end_epoch, update_stats
from raycifar.engine.hardware import synchronize
from raycifar.engine.optimizers import set_learning_rate
from raycifar.engine.order import Batch, EpochOrder, steps_per_epoch
from raycifar.engine.state import Progress
from raycifar.engine.train_loop import TrainLoopConfig
from raycifar.engine.trainer import Trainer
from raycifar.models.recipe import FORWARD_PASSES_PER_STEP

SHUFFLED_BATCHES = 10  # batches in the local shuffle buffer of Ray's documented ingest
MIN_STEPS = 4  # of a stage, unless even two rounds of them take too long
SLOWER = {"dataloader": 3, "stream": 1}  # about how many of our epochs one of theirs takes; known once it is timed


@dataclass(frozen=True, kw_only=True)
class BenchLoopConfig(TrainLoopConfig):
    """What is timed: at most `rounds` of each stage, and the `baselines` to compare with, in about so many seconds."""

    rounds: int
    baselines: tuple[str, ...]
    seconds: float


def bench_loop_per_worker(config: dict[str, Any]) -> None:
    """Time every stage; Ray Train calls it on each worker, with the fields of `BenchLoopConfig`.

    After each round the status store has the images per second over all workers, by stage, a figure for each round.
    """
    timed = BenchLoopConfig(**config)
    began = time.perf_counter()
    trainer = Trainer(timed)
    trainer.set_up()
    trainer.report_model()
    trainer.reporter.phase(Phase.WARMING_UP, "one step")
    left = timed.seconds - (time.perf_counter() - began)
    step_seconds, work = time_step(trainer), work_of_round(trainer, timed.baselines)
    num_steps = choose_steps(left, timed.rounds, work * step_seconds, trainer.steps_per_epoch)
    use_fewer_images(trainer, num_steps)
    stages = build_stages(trainer, timed.baselines)
    round_seconds = work * step_seconds * trainer.steps_per_epoch
    trainer.reporter.phase(
        Phase.WARMING_UP,
        f"then up to {timed.rounds} rounds of {trainer.config.num_train_images:,} images: "
        f"about {min(timed.seconds, round_seconds * (timed.rounds + 1)):.0f} s",
    )
    round_seconds = time_round(trainer, stages, {})  # compiles, fills caches, starts processes
    rates: dict[str, list[float]] = {}
    for number in range(1, timed.rounds + 1):
        left = timed.seconds - (time.perf_counter() - began)
        rounds = max(1, min(timed.rounds, number - 1 + broadcast_from_rank_zero(int(left / round_seconds))))
        if number > rounds:
            break
        to_come = (rounds - number + 1) * round_seconds
        trainer.reporter.phase(Phase.TIMING, f"round {number} of {rounds}, about {to_come:.0f} s left")
        round_seconds = time_round(trainer, stages, rates)
        trainer.reporter.timings(rates)


def build_stages(trainer: Trainer, baselines: Sequence[str]) -> dict[str, Callable[[], None]]:
    stages: dict[str, Callable[[], None]] = {"bare": bare_steps(trainer)}
    if trainer.world_size > 1:
        stages["gradients"] = bare_steps(trainer, exchange=True)
    return stages | {
        "images": bare_steps(trainer, exchange=True, images=True),
        "train": lambda: train_epoch(trainer),
        "epoch": lambda: train_epoch(trainer, finish=True),
        "following": update_example_stats(trainer),
        "checkpoint": lambda: save_checkpoint(trainer),
        **{name: BASELINES[name](trainer) for name in baselines},
    }


def time_round(trainer: Trainer, stages: dict[str, Callable[[], None]], rates: dict[str, list[float]]) -> float:
    """Add each stage's images per second to `rates`, and return the seconds of all."""
    first = clock(trainer)
    for number, (name, stage) in enumerate(stages.items(), 1):
        trainer.reporter.part(f"{name}, stage", number, len(stages))
        began = clock(trainer)
        stage()
        rates.setdefault(name, []).append(trainer.config.num_train_images / (clock(trainer) - began))
        trainer.checkpointer.wait()  # what is still being written is not the next stage's
    return clock(trainer) - first


def clock(trainer: Trainer) -> float:
    """Return the time at which all workers are done."""
    synchronize(trainer.device)
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter()


# How much is timed -----------------------------------------------------------------------------------


def time_step(trainer: Trainer) -> float:
    """Return the seconds of a step of training, the same on all workers."""
    set_learning_rate(trainer.state.optimizer, 1e-6)
    trainer.state.train_mode()
    batch = next(epoch_batches(trainer))
    for _ in range(WARM_UP + 2 if trainer.device.type == "cuda" else 1):
        trainer.train_step(batch)
    began = clock(trainer)
    trainer.train_step(batch)
    return broadcast_from_rank_zero(clock(trainer) - began)


def work_of_round(trainer: Trainer, baselines: Sequence[str]) -> float:
    """Return about how many epochs of training take as long as a round."""
    scored = trainer.evaluator.num_images / trainer.config.num_train_images
    stages = 4 + (trainer.world_size > 1) + scored / FORWARD_PASSES_PER_STEP
    return stages + sum(SLOWER[name] for name in baselines)


def choose_steps(seconds: float, rounds: int, seconds_of_step: float, most: int) -> int:
    """Return the steps of each stage with which all rounds, and one to warm up, end in so many seconds.

    A step of all stages together takes `seconds_of_step`. Few steps say little: where there is no time for MIN_STEPS,
    there are fewer rounds.
    """
    steps = int(seconds / seconds_of_step / (rounds + 1))
    return min(most, max(1, steps, min(MIN_STEPS, int(seconds / seconds_of_step / 2))))


def use_fewer_images(trainer: Trainer, num_steps: int) -> None:
    """Shorten an epoch to so many steps, and what is scored after it by the same factor."""
    before, world_size = trainer.config.num_train_images, trainer.world_size
    num_images = max(1, num_steps) * trainer.recipe.batch_size
    if num_images > before - world_size:
        return

    def fewer(rows: int) -> int:
        return max(world_size, rows * num_images // before)

    def shorten(shard: Shard, rows: int) -> Shard:
        first, last = shard_bounds(rows, world_size)[trainer.rank :][:2]
        return shard.head(last - first)

    scored, val_set = trainer.evaluator.train_eval_set, trainer.evaluator.val_set
    num_val_images = fewer(trainer.config.num_val_images) if val_set else 0
    trainer.config = replace(trainer.config, num_train_images=num_images, num_val_images=num_val_images)
    trainer.steps_per_epoch = steps_per_epoch(num_images, trainer.recipe.batch_size)
    trainer.train_set = shorten(trainer.train_set, num_images)
    trainer.evaluator = replace(
        trainer.evaluator,
        config=trainer.config,
        train_eval_set=scored.head(max(1, len(scored) * num_images // before)),
        val_set=shorten(val_set, num_val_images) if val_set else None,
    )
    trainer.state.example_stats = None
    trainer.train_step.close()
    trainer.prepare_train_set()


# raycifar's own stages -------------------------------------------------------------------------------


def bare_steps(trainer: Trainer, *, exchange: bool = False, images: bool = False) -> Callable[[], None]:
    """Return a function that takes an epoch's steps with nothing around them.

    With `exchange`, gradients are summed over the workers; without `images`, the images are random tensors.
    """
    step = bare_step(trainer, exchange=exchange)

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


def bare_step(trainer: Trainer, *, exchange: bool) -> Callable[[Tensor, Tensor], None]:
    """Return forward, loss, backward and optimizer, as `train` takes them on this device, and nothing else."""
    state, exchanged = trainer.state, trainer.train_step.exchange

    def update(inputs: Tensor, targets: Tensor) -> Tensor:
        with state.autocast:
            logits = state.model(inputs)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=state.recipe.label_smoothing)
        loss.backward()
        if exchanged:
            exchanged.wait()
        with state.autocast:
            state.optimizer.step()
        state.optimizer.zero_grad()
        return loss.detach()

    captured = cuda_graphed(update, trainer.device, trainer.train_step.obstacle if exchange else None)

    def step(inputs: Tensor, targets: Tensor) -> None:
        if exchanged:
            exchanged.enabled = exchange
        captured(inputs, targets)
        if exchanged:
            exchanged.enabled = True

    return step


def random_batch(trainer: Trainer) -> tuple[Tensor, Tensor]:
    pixels, batch_size = trainer.architecture.preprocessing, batch_size_per_worker(trainer)
    inputs = torch.randn(batch_size, len(pixels.mean), pixels.size, pixels.size, device=trainer.device)
    targets = torch.randint(0, CIFAR100.num_classes, (batch_size,), device=trainer.device)
    return inputs.contiguous(memory_format=torch.channels_last), targets


def batch_size_per_worker(trainer: Trainer) -> int:
    return -(-trainer.recipe.batch_size // trainer.world_size)


def epoch_batches(trainer: Trainer) -> Iterator[Batch]:
    order = EpochOrder(trainer.config.seed, 1, trainer.config.num_train_images, trainer.steps_per_epoch)
    return order.batches([], trainer.world_size, trainer.rank)


def train_epoch(trainer: Trainer, *, finish: bool = False) -> None:
    """Train an epoch as `train` does; with `finish`, score the network and leave a checkpoint too."""
    trainer.state.progress = Progress(epoch=trainer.recipe.epochs)
    trainer.train_epoch()
    if finish:
        trainer.finish_epoch()


def update_example_stats(trainer: Trainer) -> Callable[[], None]:
    """Return a function that only follows every image for an epoch; a difference of stages would hide it."""
    logits = torch.randn(trainer.recipe.batch_size, CIFAR100.num_classes, device=trainer.device)
    stats = trainer.example_stats

    def update(rows: Tensor) -> Tensor:
        update_stats(stats, rows, logits[: len(rows)], trainer.train_set.labels[rows])
        return stats

    captured = cuda_graphed(update, trainer.device)

    def run() -> None:
        for batch in epoch_batches(trainer):
            captured(torch.from_numpy(batch.rows).to(trainer.device, non_blocking=True))
        describe_rise(trainer.gather(stats), trainer.index)
        end_epoch(stats)

    return run


def save_checkpoint(trainer: Trainer) -> None:
    """Leave a checkpoint, as each epoch does; in this process alone, on a CPU, which writes it, wait until it has."""
    trainer.save({})
    if trainer.device.type == "cpu":
        trainer.checkpointer.wait()


# Baselines -------------------------------------------------------------------------------------------


def dataloader(trainer: Trainer) -> Callable[[], None]:
    """Return an epoch of the common script, see `baseline_dataloader`, in a process of its own beside each worker."""
    address = None
    if trainer.rank == 0 and trainer.world_size > 1:
        address = f"tcp://{ray.util.get_node_ip_address()}:{get_free_port()}"
    setting = baseline_dataloader.Setting(
        architecture=trainer.architecture,
        dropout=trainer.recipe.dropout,
        images=trainer.train_set.images.permute(0, 2, 3, 1).cpu().numpy(),
        labels=trainer.train_set.labels.tolist(),
        batch_size=batch_size_per_worker(trainer),
        device=trainer.device,
        threads=trainer.config.threads,
        rank=trainer.rank,
        world_size=trainer.world_size,
        address=broadcast_from_rank_zero(address),
    )
    process = ProcessPoolExecutor(1, get_context("spawn"), initializer=baseline_dataloader.start, initargs=(setting,))
    return lambda: process.submit(baseline_dataloader.train_epoch).result()


def stream(trainer: Trainer) -> Callable[[], None]:
    """Return an epoch of Ray's documented ingest: a shard streamed through a local shuffle buffer; the step is ours."""
    shard = ray.train.get_dataset_shard("train")
    batch_size = batch_size_per_worker(trainer)
    step = bare_step(trainer, exchange=True)

    def collate(batch: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        pixels = np.frombuffer(b"".join(batch["image"]), np.uint8).reshape(-1, *CIFAR100.image_shape)
        return torch.from_numpy(pixels.copy()), torch.from_numpy(batch["fine"].astype(np.int64))

    def run() -> None:
        trainer.state.train_mode()
        options = {"batch_size": batch_size, "local_shuffle_buffer_size": SHUFFLED_BATCHES * batch_size}
        batches = shard.iter_torch_batches(**options, collate_fn=collate)
        for pixels, labels in itertools.islice(batches, trainer.steps_per_epoch):
            inputs = trainer.train_step.augment_and_normalize(pixels.to(trainer.device))
            step(*mix(inputs, labels.to(trainer.device), trainer.recipe, CIFAR100.num_classes))

    return run


BASELINES: dict[str, Callable[[Trainer], Callable[[], None]]] = {"dataloader": dataloader, "stream": stream}
