"""The training function that Ray Train runs on every worker."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raycifar.analysis.collapse import collapse
from raycifar.board import Board
from raycifar.data import CLASSES
from raycifar.data.shards import Shard, load_shard
from raycifar.engine.augment import augment, mix, normalise
from raycifar.engine.checkpoint import Checkpointer
from raycifar.engine.evaluate import evaluate, reduce_sum
from raycifar.engine.optim import set_learning_rate
from raycifar.engine.order import advance, batches, step_seed, steps_per_epoch
from raycifar.engine.state import Progress, TrainingState, to_weights_file
from raycifar.recipes import Recipe
from raycifar.runs import BEST, MODEL, RUN, Run

SHOW_SECONDS = 0.5  # between two looks at a step's figures
GPU_CHECK_STEPS = 50  # between two waits for the GPU to ask whether the loss is still finite


@dataclass(frozen=True)
class Job:
    """What the driver asks of the workers."""

    run: Run
    board: Board
    model: str
    recipe: Recipe
    seed: int
    images: int  # of the training split
    validate: bool
    parents: Sequence[int]  # the superclass of each class
    use_gpu: bool
    threads: int
    in_process: bool  # no worker actors
    compile: bool
    checkpoint_steps: int  # 0: at the end of each epoch alone


class StopTrainingError(Exception):
    """Training can't go on, and would fail again if it were tried again."""


def train_loop_per_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train, score and save; Ray Train calls it on each worker.

    Args:
        config: `job`, a `Job`.

    Returns:
        `test`, the scores on the test set, and `history`; or `failure`, a sentence.
    """
    worker = Worker(config["job"])
    try:
        return worker.train()
    except StopTrainingError as stop:
        return {"failure": str(stop)}


class FailureNotices(ray.train.UserCallback):
    """Tells the driver, from Ray Train's controller, that workers died and the run is restarted."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.told: list[str] = []

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
        reason = (str(next(iter(worker_exceptions.values()))).strip().splitlines() or ["no reason given"])[0]
        self.told.append(f"Worker {ranks} failed ({reason}); the workers are restarted from the last checkpoint.")
        self.board.put("failures", self.told)


class Worker:
    """One worker's part in a run."""

    def __init__(self, job: Job) -> None:
        self.job, self.recipe, self.run = job, job.recipe, job.run
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device() if job.use_gpu else torch.device("cpu")
        self.reporter = Reporter(job.board, leader=self.rank == 0)
        self.checkpointer = Checkpointer(job.run, in_process=job.in_process)
        self.steps = steps_per_epoch(job.images, job.recipe.batch_size)
        set_up_hardware(job, self.device)

    def train(self) -> dict[str, Any]:
        self.reporter.phase("loading images")
        train_set = load_shard("train", self.device)
        val_set = load_shard("val", self.device) if self.job.validate else None

        self.reporter.phase("building the model")
        self.autocast = self.choose_precision()
        self.state = TrainingState(self.job.model, self.recipe, self.job.seed, self.device)
        if self.job.compile:
            self.state.model.compile()
        self.model = self.parallelise(self.state.model)
        self.describe()
        self.resume()

        self.reporter.phase("training")
        while self.state.progress.epoch <= self.recipe.epochs:
            self.train_epoch(train_set)
            self.finish_epoch(val_set)

        self.reporter.phase("scoring the test set")
        test = evaluate(self.state.scored, load_shard("test", self.device), self.job.parents, self.autocast)
        if self.rank == 0:
            self.run.write(MODEL, to_weights_file(self.state.scored, self.job.model))
        self.checkpointer.wait()
        history = self.state.progress.history
        return {"test": test, "history": history, "best_epoch": best(history)["epoch"] if val_set else None}

    # An epoch ---------------------------------------------------------------------------------------

    def train_epoch(self, shard: Shard) -> None:
        """Take the steps that are left of the epoch under way."""
        job, recipe, progress = self.job, self.recipe, self.state.progress
        self.model.train()
        sums = torch.tensor(progress.sums if self.rank == 0 else [0.0] * 3, dtype=torch.float64, device=self.device)
        clock = time.perf_counter()
        spent, begun_at = progress.seconds, progress.step  # where it is resumed in mid-epoch
        watch = FiniteWatch(self.device, progress.epoch)
        for batch in batches(
            job.seed, progress.epoch, job.images, self.steps, progress.segments, self.world_size, self.rank
        ):
            torch.manual_seed(step_seed(job.seed, progress.epoch, batch.step, self.world_size, self.rank))
            lr = recipe.learning_rate((progress.epoch - 1) * self.steps + batch.step, recipe.epochs * self.steps)
            set_learning_rate(self.state.optimizer, lr)
            rows = torch.from_numpy(batch.rows).to(self.device, non_blocking=True)
            sums += self.take_step(shard, rows, batch.images, batch.step, watch)
            progress.segments = advance(progress.segments, self.world_size)

            progress.seconds = spent + time.perf_counter() - clock
            if self.reporter.due():
                self.show(sums, lr, begun_at, spent)
            if job.checkpoint_steps and progress.step % job.checkpoint_steps == 0 and progress.step < self.steps:
                watch.check()
                self.collect(sums)
                self.state.average_buffers()
                self.save({"epoch": progress.epoch, "step": progress.step})
        watch.check()
        self.collect(sums)

    def take_step(self, shard: Shard, rows: Tensor, images: int, step: int, watch: "FiniteWatch") -> Tensor:
        """Take one optimiser step on these rows, and return their number, summed loss and hits: (3,) float64."""
        count = len(rows)
        if count < 2:  # after a change of workers a share can run out: batch norm needs two, the loss ignores them
            rows = torch.cat([rows, torch.arange(2, device=self.device)])
        pixels = augment(shard.images[rows], self.recipe.augment)
        inputs, targets = mix(normalise(pixels), shard.labels[rows], self.recipe)
        with self.autocast:
            logits = self.model(inputs)
        objective, sums = loss_and_sums(logits[:count].float(), targets[:count], self.recipe.label_smoothing)
        # DDP averages over workers; times their number over the step's images it is the mean of all of them.
        (objective * (self.world_size / images)).backward()
        parameters = [p for p in self.state.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        watch.look(norm, step)
        if self.recipe.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.recipe.clip_norm, norm)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        if self.state.average:
            self.state.average.update_parameters(self.state.model)
        return sums

    def finish_epoch(self, val_set: Shard | None) -> None:
        """Validate, write the epoch's line, and leave a checkpoint from which the next epoch begins."""
        job, progress, clock = self.job, self.state.progress, time.perf_counter()
        self.state.average_buffers()
        images, loss, hits = progress.sums
        step = progress.epoch * self.steps - 1
        val = evaluate(self.state.scored, val_set, job.parents, self.autocast) if val_set else {}
        row = {
            "epoch": progress.epoch,
            "train_loss": loss / images,
            "train_top1": hits / images,
            "val_loss": val.get("loss"),
            "val_top1": val.get("top1"),
            "val_top5": val.get("top5"),
            "lr": self.recipe.learning_rate(step, self.recipe.epochs * self.steps),
            "images_per_second": images / progress.seconds,
            "training_seconds": progress.seconds,
            "seconds": progress.seconds + time.perf_counter() - clock,
            "workers": self.world_size,
        }
        history = [*progress.history, row]
        self.state.progress = Progress(epoch=progress.epoch + 1, history=history)
        if self.rank == 0:
            self.run.write_history(history)
            if val_set and row is best(history):
                self.run.write(BEST, to_weights_file(self.state.scored, job.model))
        if (warning := collapse(row, int(images), step + 1, CLASSES)) and len(history) <= 3:
            self.reporter.notice(f"Warning: {warning}")
        self.reporter.epoch(history)
        self.save(row)

    # Between steps ----------------------------------------------------------------------------------

    def collect(self, sums: Tensor) -> None:
        """Add up what all workers have counted of the epoch; the first keeps it, the rest begin anew."""
        reduce_sum(sums)
        self.state.progress.sums = sums.tolist()
        if self.rank:
            sums.zero_()

    def save(self, metrics: dict[str, Any]) -> None:
        self.checkpointer.save(metrics, self.state.to_files() if self.rank == 0 else None)

    def resume(self) -> None:
        """Go on from the newest checkpoint that can be read, on all workers the same."""
        found = next(self.run.sound_checkpoints(self.reporter.notice), None) if self.rank == 0 else None
        name = ray.train.collective.broadcast_from_rank_zero(found and found[0])
        if name is None:
            return
        self.state.load_files(found[1] if found else self.run.read_checkpoint(name))
        progress = self.state.progress
        where = (
            f"epoch {progress.epoch}, step {progress.step}" if progress.step else f"after epoch {progress.epoch - 1}"
        )
        self.reporter.notice(f"Continuing from {where} ({name}).")
        self.reporter.epoch(progress.history)
        if self.rank == 0:
            self.run.write_history(progress.history)

    def show(self, sums: Tensor, lr: float, begun_at: int, spent: float) -> None:
        images, loss, hits = sums.tolist()
        progress = self.state.progress
        images_per_step = self.job.images / self.steps
        self.reporter.step(
            epoch=progress.epoch,
            step=progress.step,
            steps=self.steps,
            lr=lr,
            loss=loss / max(1, images),
            top1=hits / max(1, images),
            images_per_step=images_per_step,
            images_per_second=(progress.step - begun_at) * images_per_step / (progress.seconds - spent),
        )

    def describe(self) -> None:
        """Tell what trains on what: on the screen, and in the run's record."""
        facts = {
            "parameters": sum(p.numel() for p in self.state.model.parameters()),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "precision": self.precision,
        }
        self.reporter.about(facts)
        if self.rank == 0:
            self.run.write_json(RUN, {**self.run.read_json(RUN), **facts})

    # Hardware ---------------------------------------------------------------------------------------

    def choose_precision(self) -> torch.autocast:
        """Return the autocast of the recipe's precision; `auto` is bfloat16 if every worker has it."""
        wanted = self.recipe.precision
        able = torch.tensor(float(has_bfloat16(self.device)), device=self.device)
        if dist.is_initialized():
            dist.all_reduce(able, op=dist.ReduceOp.MIN)
        enabled = wanted == "bfloat16" or (wanted == "auto" and bool(able))
        self.precision = "bfloat16" if enabled else "float32"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def parallelise(self, model: nn.Module) -> nn.Module:
        """Return the model as Ray Train prepares it: gradients are averaged over workers where there are several.

        Batch norm's running statistics are each worker's own, and averaged when they are read.
        """
        parallel = ray.train.torch.prepare_model(
            model,
            move_to_device=self.device,
            parallel_strategy_kwargs={"broadcast_buffers": False, "gradient_as_bucket_view": True},
        )
        if self.world_size > 1:
            settle_buckets(parallel, self.autocast)
        return parallel


def loss_and_sums(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the summed objective, and what the history counts.

    Args:
        logits: (n, classes) float32.
        targets: (n,) int64 classes, or (n, classes) float shares.
        smoothing: share of each label spread over all classes, in the objective alone.

    Returns:
        The objective to minimise, summed; and images, cross-entropy and hits, summed: (3,) float64.
    """
    log_probabilities = logits.log_softmax(1)
    if targets.ndim == 1:
        cross_entropy = -log_probabilities.gather(1, targets[:, None]).sum()
        labels = targets
    else:
        cross_entropy = -(log_probabilities * targets).sum()
        labels = targets.argmax(1)
    uniform = -log_probabilities.mean(1).sum()
    with torch.no_grad():
        hits = (logits.argmax(1) == labels).sum()
        images = torch.tensor(float(len(logits)), device=logits.device)
        sums = torch.stack([images, cross_entropy, hits]).double()
    return (1 - smoothing) * cross_entropy + smoothing * uniform, sums


def best(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the epoch with the highest validation top-1, the first of equals."""
    return max(history, key=lambda row: row["val_top1"])


class FiniteWatch:
    """Notices the first step whose gradients are not finite, as they are when the loss isn't.

    Gradients are averaged over workers before they are looked at, so that all workers notice the same step.
    """

    def __init__(self, device: torch.device, epoch: int) -> None:
        self.epoch = epoch
        self.first_bad = torch.full((), -1, device=device)
        self.every = 1 if device.type == "cpu" else GPU_CHECK_STEPS

    def look(self, norm: Tensor, step: int) -> None:
        self.first_bad = torch.where((self.first_bad < 0) & ~norm.isfinite(), step, self.first_bad)
        if step % self.every == 0:
            self.check()

    def check(self) -> None:
        if (step := int(self.first_bad)) >= 0:
            raise StopTrainingError(
                f"the loss is no longer finite: epoch {self.epoch}, step {step + 1}. Try a smaller --lr, a longer "
                "--warmup, --clip-norm 1 or --precision float32"
            )


class Reporter:
    """Tells the driver, by the board, how the run stands; only the first worker speaks."""

    def __init__(self, board: Board, *, leader: bool) -> None:
        self.board, self.leader = board, leader
        self.content: dict[str, Any] = {
            "attempt": os.getpid(),
            "history": [],
            "notices": [],
            "step": None,
            "about": {},
        }
        self.last = 0.0

    def phase(self, name: str) -> None:
        self._put(phase=name)

    def notice(self, sentence: str) -> None:
        self._put(notices=[*self.content["notices"], sentence])

    def about(self, facts: dict[str, Any]) -> None:
        self._put(about=facts)

    def epoch(self, history: list[dict[str, Any]]) -> None:
        self._put(history=history, step=None)

    def due(self) -> bool:
        return self.leader and time.perf_counter() - self.last >= SHOW_SECONDS

    def step(self, **figures: Any) -> None:
        self.last = time.perf_counter()
        self._put(step=figures)

    def _put(self, **changes: Any) -> None:
        self.content |= changes
        if self.leader:
            self.board.put("worker", self.content)


def settle_buckets(model: nn.Module, autocast: torch.autocast) -> None:
    """Take one pass that leaves no trace but the final layout of DDP's gradient buckets.

    DDP regroups its buckets after its first backward pass. With three workers or more the order of the
    additions follows the buckets, so a run that has just been resumed would round otherwise than one that
    was never stopped.
    """
    kept = [buffer.clone() for buffer in model.buffers()]
    device = next(model.parameters()).device
    model.train()
    for _ in range(2):
        with autocast:
            logits = model(torch.zeros(2, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last))
        logits.float().sum().backward()
        model.zero_grad()
    for buffer, value in zip(model.buffers(), kept, strict=True):
        buffer.copy_(value)


def set_up_hardware(job: Job, device: torch.device) -> None:
    torch.set_num_threads(job.threads)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware multiplies in bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
