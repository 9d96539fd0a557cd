"""Where a step's time goes: the same work with less and more of what surrounds it, in turn, several times over."""

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
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
from raycifar.engine.config import TrainLoopConfig
from raycifar.engine.cuda import WARM_UP, cuda_graphed, graphs_freed
from raycifar.engine.example_stats import describe_rise, end_epoch, update_stats
from raycifar.engine.hardware import synchronize
from raycifar.engine.optimizers import set_learning_rate
from raycifar.engine.order import steps_per_epoch
from raycifar.engine.state import Progress
from raycifar.engine.train_loop import TrainWorker
from raycifar.models.recipe import FORWARD_PASSES_PER_STEP

SHUFFLED_BATCHES = 10  # batches in the local shuffle buffer of Ray's documented ingest
MIN_STEPS = 4  # of a stage, unless even two rounds of them take too long
SLOWER = {"dataloader": 3, "stream": 1}  # about how many of our epochs one of theirs takes; known once it is timed


@dataclass(frozen=True, kw_only=True)
class BenchLoopConfig(TrainLoopConfig):
    """What is timed: at most `rounds` of each stage, and the `baselines` to compare with, in about `seconds`."""

    rounds: int
    baselines: tuple[str, ...]
    seconds: float


@graphs_freed()
def bench_loop_per_worker(config: dict[str, Any]) -> None:
    """Time every stage; Ray Train calls it on each worker, with the fields of `BenchLoopConfig`.

    After each round the status store has the images per second over all workers, by stage, a figure for each round.
    """
    timed = BenchLoopConfig(**config)
    began = time.perf_counter()
    worker = TimedWorker(timed)
    worker.set_up()
    worker.report_model()
    worker.reporter.phase(Phase.WARMING_UP, "one step")
    left = timed.seconds - (time.perf_counter() - began)
    step_seconds, work = worker.time_step(), worker.work_of_round(timed.baselines)
    worker.use_fewer_images(choose_steps(left, timed.rounds, work * step_seconds, worker.steps_per_epoch))
    stages = worker.stages(timed.baselines)
    round_seconds = work * step_seconds * worker.steps_per_epoch
    worker.reporter.phase(
        Phase.WARMING_UP,
        f"then up to {timed.rounds} rounds of {worker.config.num_train_images:,} images: "
        f"about {min(timed.seconds, round_seconds * (timed.rounds + 1)):.0f} s",
    )
    round_seconds = worker.time_round(stages, {})  # compiles, fills caches, starts processes
    rates: dict[str, list[float]] = {}
    for number in range(1, timed.rounds + 1):
        left = timed.seconds - (time.perf_counter() - began)
        rounds = max(1, min(timed.rounds, number - 1 + broadcast_from_rank_zero(int(left / round_seconds))))
        if number > rounds:
            break
        to_come = (rounds - number + 1) * round_seconds
        worker.reporter.phase(Phase.TIMING, f"round {number} of {rounds}, about {to_come:.0f} s left")
        round_seconds = worker.time_round(stages, rates)
        worker.reporter.timings(rates)


def choose_steps(seconds: float, rounds: int, seconds_of_step: float, most: int) -> int:
    """Return the steps of each stage with which all rounds, and one to warm up, end within `seconds`.

    A step of all stages together takes `seconds_of_step`. Few steps say little: where there is no time for MIN_STEPS,
    there are fewer rounds.
    """
    steps = int(seconds / seconds_of_step / (rounds + 1))
    return min(most, max(1, steps, min(MIN_STEPS, int(seconds / seconds_of_step / 2))))


class TimedWorker(TrainWorker):
    """A worker that takes its steps with less and more of what surrounds them, on few images."""

    def clock(self) -> float:
        """Return the time at which all workers are done."""
        synchronize(self.device)
        if dist.is_initialized():
            dist.barrier()
        return time.perf_counter()

    def time_step(self) -> float:
        """Return the seconds of a step of training, the same on all workers."""
        set_learning_rate(self.state.optimizer, 1e-6)
        self.state.train_mode()
        batch = next(self.batches(epoch=1))
        for _ in range(WARM_UP + 2 if self.device.type == "cuda" else 1):
            self.train_step(batch)
        began = self.clock()
        self.train_step(batch)
        return broadcast_from_rank_zero(self.clock() - began)

    def time_round(self, stages: dict[str, Callable[[], None]], rates: dict[str, list[float]]) -> float:
        """Add each stage's images per second to `rates`, and return the seconds of all."""
        first = self.clock()
        for number, (name, stage) in enumerate(stages.items(), 1):
            self.reporter.part(f"{name}, stage", number, len(stages))
            began = self.clock()
            stage()
            rates.setdefault(name, []).append(self.config.num_train_images / (self.clock() - began))
            self.checkpointer.wait()  # what is still being written is not the next stage's
        return self.clock() - first

    def work_of_round(self, baselines: Sequence[str]) -> float:
        """Return about how many epochs of training take as long as a round."""
        scored = self.evaluator.num_images / self.config.num_train_images
        stages = 4 + (self.world_size > 1) + scored / FORWARD_PASSES_PER_STEP
        return stages + sum(SLOWER[name] for name in baselines)

    def use_fewer_images(self, num_steps: int) -> None:
        """Shorten an epoch to `num_steps`, and what is scored after it by the same factor."""
        before, world_size = self.config.num_train_images, self.world_size
        num_images = max(1, num_steps) * self.recipe.batch_size
        if num_images > before - world_size:
            return

        def shorten(shard: Shard, rows: int) -> Shard:
            first, last = shard_bounds(rows, world_size)[self.rank :][:2]
            return shard.head(last - first)

        scored, val_set, num_val_images = self.evaluator.train_eval_set, self.evaluator.val_set, 0
        if val_set:
            num_val_images = max(world_size, self.config.num_val_images * num_images // before)
            val_set = shorten(val_set, num_val_images)
        self.config = replace(self.config, num_train_images=num_images, num_val_images=num_val_images)
        self.steps_per_epoch = steps_per_epoch(num_images, self.recipe.batch_size)
        self.train_set = shorten(self.train_set, num_images)
        self.evaluator = replace(
            self.evaluator,
            config=self.config,
            train_eval_set=scored.head(max(1, len(scored) * num_images // before)),
            val_set=val_set,
        )
        self.state.example_stats = None
        self.train_step.close()
        self.prepare_train_set()

    # The stages -----------------------------------------------------------------------------------------

    def stages(self, baselines: Sequence[str]) -> dict[str, Callable[[], None]]:
        stages: dict[str, Callable[[], None]] = {"bare": self.bare_steps()}
        if self.world_size > 1:
            stages["gradients"] = self.bare_steps(exchange=True)
        return stages | {
            "images": self.bare_steps(exchange=True, images=True),
            "train": self.train_whole_epoch,
            "epoch": partial(self.train_whole_epoch, finish=True),
            "following": self.example_stats_updates(),
            "checkpoint": self.save_checkpoint,
            **{name: BASELINES[name](self) for name in baselines},
        }

    @property
    def batch_size(self) -> int:
        """The most images of a step on one worker."""
        return -(-self.recipe.batch_size // self.world_size)

    def bare_steps(self, *, exchange: bool = False, images: bool = False) -> Callable[[], None]:
        """Return a function that takes an epoch's steps with nothing around them.

        With `exchange`, gradients are summed over the workers; without `images`, the images are random tensors.
        """
        step = self.bare_step(exchange=exchange)

        def run() -> None:
            set_learning_rate(self.state.optimizer, 1e-6)  # random tensors teach nothing
            self.state.train_mode()
            random = None if images else self.random_batch()
            for batch in self.batches(epoch=1):
                if random:
                    inputs, targets = random[0][: len(batch.rows)], random[1][: len(batch.rows)]
                else:
                    _, inputs, targets = self.train_step.prepare(batch.rows)
                step(inputs, targets)

        return run

    def bare_step(self, *, exchange: bool) -> Callable[[Tensor, Tensor], None]:
        """Return forward, loss, backward and optimizer, as `train` takes them on this device, and nothing else."""
        state, exchanged = self.state, self.train_step.exchange

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

        captured = cuda_graphed(update, self.device, self.train_step.obstacle if exchange else None)

        def step(inputs: Tensor, targets: Tensor) -> None:
            if exchanged:
                exchanged.enabled = exchange
            captured(inputs, targets)
            if exchanged:
                exchanged.enabled = True

        return step

    def random_batch(self) -> tuple[Tensor, Tensor]:
        pixels = self.architecture.preprocessing
        inputs = torch.randn(self.batch_size, len(pixels.mean), pixels.size, pixels.size, device=self.device)
        targets = torch.randint(0, CIFAR100.num_classes, (self.batch_size,), device=self.device)
        return inputs.contiguous(memory_format=torch.channels_last), targets

    def train_whole_epoch(self, *, finish: bool = False) -> None:
        """Train an epoch as `train` does; with `finish`, score the network and leave a checkpoint too."""
        self.state.progress = Progress(epoch=self.recipe.epochs)
        self.train_epoch()
        if finish:
            self.finish_epoch()

    def example_stats_updates(self) -> Callable[[], None]:
        """Return a function that only follows every image for an epoch; a difference of stages would hide it."""
        logits = torch.randn(self.recipe.batch_size, CIFAR100.num_classes, device=self.device)
        stats = self.shard_stats

        def update(rows: Tensor) -> Tensor:
            update_stats(stats, rows, logits[: len(rows)], self.train_set.labels[rows])
            return stats

        captured = cuda_graphed(update, self.device)

        def run() -> None:
            for batch in self.batches(epoch=1):
                captured(torch.from_numpy(batch.rows).to(self.device, non_blocking=True))
            describe_rise(self.gather(stats), self.index)
            end_epoch(stats)

        return run

    def save_checkpoint(self) -> None:
        """Leave a checkpoint, as each epoch does; on a CPU, which writes it, wait until it has."""
        self.save({})
        if self.device.type == "cpu":
            self.checkpointer.wait()


# Baselines -------------------------------------------------------------------------------------------


def dataloader(worker: TimedWorker) -> Callable[[], None]:
    """Return an epoch of the common script, see `baseline_dataloader`, in a process of its own beside each worker."""
    address = None
    if worker.rank == 0 and worker.world_size > 1:
        address = f"tcp://{ray.util.get_node_ip_address()}:{get_free_port()}"
    setting = baseline_dataloader.Setting(
        architecture=worker.architecture,
        dropout=worker.recipe.dropout,
        images=worker.train_set.images.permute(0, 2, 3, 1).cpu().numpy(),
        labels=worker.train_set.labels.tolist(),
        batch_size=worker.batch_size,
        device=worker.device,
        threads=worker.config.threads,
        rank=worker.rank,
        world_size=worker.world_size,
        address=broadcast_from_rank_zero(address),
    )
    process = ProcessPoolExecutor(1, get_context("spawn"), initializer=baseline_dataloader.start, initargs=(setting,))
    return lambda: process.submit(baseline_dataloader.train_epoch).result()


def stream(worker: TimedWorker) -> Callable[[], None]:
    """Return an epoch of Ray's documented ingest: a shard streamed through a local shuffle buffer; the step is ours."""
    shard = ray.train.get_dataset_shard("train")
    step = worker.bare_step(exchange=True)

    def collate(batch: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        pixels = np.frombuffer(b"".join(batch["image"]), np.uint8).reshape(-1, *CIFAR100.image_shape)
        return torch.from_numpy(pixels.copy()), torch.from_numpy(batch["fine"].astype(np.int64))

    def run() -> None:
        worker.state.train_mode()
        options = {
            "batch_size": worker.batch_size,
            "local_shuffle_buffer_size": SHUFFLED_BATCHES * worker.batch_size,
        }
        batches = shard.iter_torch_batches(**options, collate_fn=collate)
        for pixels, labels in itertools.islice(batches, worker.steps_per_epoch):
            inputs = worker.train_step.augment_and_normalize(pixels.to(worker.device))
            step(*mix(inputs, labels.to(worker.device), worker.recipe, CIFAR100.num_classes))

    return run


BASELINES: dict[str, Callable[[TimedWorker], Callable[[], None]]] = {"dataloader": dataloader, "stream": stream}
