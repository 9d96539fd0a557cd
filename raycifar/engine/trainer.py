"""The training function that Ray Train runs on every worker."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, partial
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from torch import Tensor

from raycifar.analysis.collapse import collapse
from raycifar.cluster.nodes import objection
from raycifar.cluster.status import ModelFacts, Phase, StatusStore
from raycifar.data import CIFAR100
from raycifar.data.shards import Shard, load_shard, shard_bounds
from raycifar.engine import hardware
from raycifar.engine.augment import preprocess
from raycifar.engine.checkpoint import Checkpointer, Snapshot
from raycifar.engine.diagnostics import examine
from raycifar.engine.distributed import all_gather_objects, all_gather_rows
from raycifar.engine.epoch_meter import EpochMeter
from raycifar.engine.evaluate import per_image, predict, score, score_without, to_predictions_file
from raycifar.engine.example_stats import blank_stats, describe_rise, end_epoch, to_example_stats_file
from raycifar.engine.interruption import Interruption, InterruptionWatch, PreemptedError
from raycifar.engine.loss import CHECK_STEPS
from raycifar.engine.optimizers import set_learning_rate
from raycifar.engine.order import Batch, EpochOrder, advance, step_seed, steps_per_epoch
from raycifar.engine.profile import StepProfiler
from raycifar.engine.ray_metrics import Gauges
from raycifar.engine.reporter import Reporter
from raycifar.engine.state import Progress, TrainingState
from raycifar.engine.tensorboard import EventLog
from raycifar.engine.train_step import TrainStep
from raycifar.errors import FailureKind, StopTrainingError, notice
from raycifar.models import FORWARD_PASSES_PER_STEP
from raycifar.models.initial_weights import InitialWeights
from raycifar.models.recipe import Recipe
from raycifar.storage.checkpoints import Checkpoints
from raycifar.storage.records import EpochRecord, Rise, sampled_steps
from raycifar.storage.run_folder import EXAMPLE_STATS, MODEL, PREDICTIONS, RUN, RunFolder
from raycifar.storage.weights import to_file

TRAIN_EVAL_IMAGES = 1000  # training images scored as validation images are, after each epoch
EXAMINED_IMAGES = 250  # of those, passed through a network that doesn't learn, to see why
WARNED_EPOCHS = 3  # first epochs after which a network that doesn't learn is reported at once


@dataclass(frozen=True)
class Job:
    """What the driver asks of the workers."""

    run: RunFolder
    status_store: StatusStore
    initial: InitialWeights
    recipe: Recipe
    seed: int
    superclass_of: Sequence[int]  # of each class
    num_train_images: int
    num_val_images: int  # 0: none are scored
    num_test_images: int  # 0: none are scored
    gpus: float  # of each worker; a share of one GPU, or 0
    device: str  # cpu or mps, of workers without `gpus`
    threads: int  # of each worker
    in_process: bool  # without worker actors
    versions: dict[str, str]  # the driver's
    compile: bool
    record: bool  # follow each training image and the gradient's norm
    checkpoint_steps: int  # between two checkpoints; 0: only at the end of each epoch
    profile: bool  # trace some steps
    rungs: Sequence[int]  # epochs after which the driver says whether to stop
    near_duplicates: np.ndarray | None  # rows of test images whose photograph is trained on; None: unknown


class Ending(StrEnum):
    """How training ends."""

    FINISHED = "finished"
    STOPPED = "stopped"  # by a search, because other trials are better
    INTERRUPTED = "interrupted"  # by the driver
    FAILED = "failed"


@dataclass(frozen=True)
class Outcome:
    """The training function's result."""

    ending: Ending
    history: Sequence[EpochRecord]
    best_epoch: int | None = None  # with the highest validation top-1
    test: dict[str, Any] | None = None  # the scores on the test set
    failure: FailureKind | None = None  # why training failed
    reason: str | None = None  # the same in words


def train_loop_per_worker(config: dict[str, Any]) -> Outcome:
    """Train, score and save; Ray Train calls it on each worker.

    Args:
        config: `job`, a `Job`.
    """
    trainer = Trainer(config["job"])
    try:
        trainer.set_up()
        return trainer.train()
    except StopTrainingError as stop:
        trainer.checkpointer.wait()
        return Outcome(Ending.FAILED, trainer.run.history(notice), failure=stop.kind, reason=str(stop))
    finally:
        if trainer.profiler:
            trainer.profiler.stop()


class Trainer:
    """One worker's part in a run."""

    def __init__(self, job: Job) -> None:
        context = ray.train.get_context()
        self.job, self.recipe, self.run = job, job.recipe, job.run
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device() if job.gpus else torch.device(job.device)
        self.architecture = job.initial.architecture
        self.preprocessing = self.architecture.preprocessing
        self.steps_per_epoch = steps_per_epoch(job.num_train_images, job.recipe.batch_size)
        self.reporter = Reporter(job.status_store, Gauges(job.run.name, self.architecture.model), leader=self.rank == 0)
        self.checkpointer = Checkpointer(job.run)
        self.profiler = StepProfiler(job.run, self.rank, self.device) if job.profile else None
        self.interruptions = InterruptionWatch(self.reporter, in_process=job.in_process)
        # Set by `set_up`, once there are images and a network.
        self.train_set: Shard
        self.train_eval_set: Shard
        self.val_set: Shard | None
        self.index: Tensor  # (n,) int64, of all workers' training images: rows in the source
        self.state: TrainingState
        self.example_stats: Tensor  # of this worker's images
        self.train_step: TrainStep
        self.meter: EpochMeter

    # From images and weights to a trained network -----------------------------------------------------

    def set_up(self) -> None:
        """Load the images, and build or resume the network."""
        hardware.set_up(self.device, self.job.threads)
        hardware.limit_gpu_memory(self.job.gpus)
        hardware.retain_malloc_pages(self.device)
        self.reporter.phase(Phase.LOADING_IMAGES)
        self.check_node()
        self.train_set = load_shard("train", self.device)
        num_eval = math.ceil(len(self.train_set) * min(1, TRAIN_EVAL_IMAGES / self.job.num_train_images))
        self.train_eval_set = self.train_set.head(num_eval)
        self.val_set = load_shard("val", self.device) if self.job.num_val_images else None

        self.reporter.phase(Phase.BUILDING_MODEL)
        self.state = TrainingState(self.architecture, self.job.initial.weights, self.recipe, self.job.seed, self.device)
        self.resume()
        self.prepare_train_set()

    def train(self) -> Outcome:
        """Train to the end, score the test set, and save the weights."""
        self.report_model()
        self.reporter.phase(Phase.TRAINING)
        while self.state.progress.epoch <= self.recipe.epochs:
            if self.search_stops_trial():
                return self.outcome(Ending.STOPPED)
            if self.train_epoch() is Interruption.STOP:
                return self.outcome(Ending.INTERRUPTED)
            self.finish_epoch()
        return self.outcome(Ending.FINISHED, test=self.finish())

    def train_epoch(self) -> Interruption | None:
        """Take the current epoch's remaining steps, or until the run is interrupted."""
        progress = self.state.progress
        self.state.train_mode()
        sampled = sampled_steps(progress.epoch, self.steps_per_epoch, self.recipe.epochs)
        self.meter = EpochMeter(
            progress.epoch, self.steps_per_epoch, progress.step, progress.totals, self.device, sampled
        )
        for batch in self.remaining_batches():
            hardware.seed(step_seed(self.job.seed, progress.epoch, batch.step, self.world_size, self.rank), self.device)
            lr = self.recipe.learning_rate(progress.epoch, batch.step, self.steps_per_epoch)
            set_learning_rate(self.state.optimizer, lr)
            size = self.recipe.size(progress.epoch, batch.step, self.steps_per_epoch)
            self.meter.add(batch.step, self.train_step(batch, size))
            if self.profiler:
                self.profiler.step()
            progress.segments = advance(progress.segments, self.world_size)

            if batch.step % CHECK_STEPS[self.device.type] == 0:
                self.meter.check_finite()
            if self.reporter.due():
                self.report_step(lr)
            if interruption := self.save_in_mid_epoch():
                return interruption
        self.collect()
        return None

    @cached_property
    def event_log(self) -> EventLog:
        return EventLog(self.run)

    def finish_epoch(self) -> None:
        """Score the network, record the epoch, and save a checkpoint."""
        began = time.perf_counter()
        self.state.average_buffers()
        record = self.diagnose(self.score_epoch())
        record = replace(record, seconds=record.training_seconds + time.perf_counter() - began)
        self.state.progress = Progress(record.epoch + 1, history=[*self.state.progress.history, record])
        self.reporter.end_epoch()
        if self.state.enter_stage():
            self.train_step.close()
            self.train_step = self.build_train_step()
        publish = partial(self.publish_history, self.state.progress.history)
        self.save(record.to_json(), best=self.state.progress.best is record, stored=publish)

    def publish_history(self, history: Sequence[EpochRecord]) -> None:
        """Write and report the finished epochs, whose checkpoint is stored."""
        self.run.write_history(history)
        self.event_log.write(history)
        self.reporter.history(history)

    def finish(self) -> dict[str, Any] | None:
        """Score the test set, write the final weights and the images' statistics, and return the scores."""
        scores = self.score_test_set() if self.job.num_test_images else None
        labels = self.gather(self.train_set.labels)
        if self.rank == 0:
            self.run.write(MODEL, to_file(self.state.scored.state_dict(), self.architecture))
            if self.job.record and self.state.example_stats is not None:
                self.run.write(EXAMPLE_STATS, to_example_stats_file(self.state.example_stats, self.index, labels))
        return scores

    def outcome(self, ending: Ending, test: dict[str, Any] | None = None) -> Outcome:
        """Return the outcome, once the last checkpoint is stored."""
        self.checkpointer.wait()
        progress = self.state.progress
        return Outcome(ending, progress.history, progress.best.epoch if progress.best else None, test)

    # Setting up ---------------------------------------------------------------------------------------

    def check_node(self) -> None:
        """Stop all workers if one's node can't take part; nodes may join after the driver's check."""
        sees_run = self.run.exists(RUN)
        objections = all_gather_objects(objection(None if sees_run else f"{self.run.folder}/{RUN}", self.job.versions))
        if reason := next(filter(None, objections), None):
            raise StopTrainingError(f"a node can't take part: {reason}", FailureKind.NODE_MISMATCH)
        node = None if self.job.in_process else ray.get_runtime_context().get_node_id()
        self.reporter.nodes(all_gather_objects(node))

    def resume(self) -> None:
        """Resume all workers from the newest checkpoint that can be read."""
        found = self.newest_checkpoint() if self.rank == 0 else None
        name = ray.train.collective.broadcast_from_rank_zero(found and found[0])
        if name is None:
            return
        self.state.load_files(found[1] if found else Checkpoints(self.run).read(name))
        progress = self.state.progress
        progress.restarts += 1
        step = f"epoch {progress.epoch}, step {progress.step}" if progress.step else f"after epoch {progress.epoch - 1}"
        workers = f", with {self.world_size} workers" if self.world_size > 1 else ""
        self.reporter.notice(f"Continuing from {step} ({name}){workers}.")
        if self.rank == 0:
            self.publish_history(progress.history)

    def newest_checkpoint(self) -> tuple[str, dict[str, bytes]] | None:
        """Return the checkpoint to resume from, and delete those that are skipped: new ones will pass them."""
        checkpoints = Checkpoints(self.run)
        skipped = checkpoints.names()
        found = next(checkpoints.sound(self.reporter.notice), None)
        checkpoints.delete(skipped[: skipped.index(found[0])] if found else skipped)
        return found

    def prepare_train_set(self) -> None:
        """Prepare what belongs to `train_set`: the rows of all workers, the images' statistics, and the step.

        `bench` calls it again after it has shortened `train_set`.
        """
        self.index = self.gather(self.train_set.index)
        if self.state.example_stats is None:
            self.example_stats = blank_stats(len(self.train_set), self.device)
        else:
            first = shard_bounds(self.job.num_train_images, self.world_size)[self.rank]
            self.example_stats = self.state.example_stats[first : first + len(self.train_set)].clone()
        self.train_step = self.build_train_step()

    def build_train_step(self) -> TrainStep:
        """Return the current stage's step: each stage trains, and so exchanges, other parameters."""
        return TrainStep(
            self.state,
            self.train_set,
            self.example_stats if self.job.record else None,
            exchange=self.world_size > 1,
            compile=self.job.compile,
            notice=self.reporter.notice,
        )

    def report_model(self) -> None:
        """Tell what trains on what: on the screen, and in the run's record, with the time at which training begins."""
        facts = ModelFacts(
            parameters=sum(p.numel() for p in self.state.model.parameters()),
            device=hardware.device_name(self.device),
            threads=torch.get_num_threads(),
            precision=str(self.state.dtype).removeprefix("torch."),
        )
        self.reporter.about(facts)
        if self.rank == 0:
            self.run.write_json(RUN, {**self.run.read_json(RUN), **vars(facts), "training_began": time.time()})

    # Within an epoch ----------------------------------------------------------------------------------

    def remaining_batches(self) -> Iterator[Batch]:
        """Return this worker's remaining batches of the current epoch."""
        order = EpochOrder(self.job.seed, self.state.progress.epoch, self.job.num_train_images, self.steps_per_epoch)
        return order.batches(self.state.progress.segments, self.world_size, self.rank)

    def save_in_mid_epoch(self) -> Interruption | None:
        """Save a checkpoint if one is due or the run is interrupted; return STOP if the run ends here.

        Raises:
            PreemptedError: a node is being preempted; the run continues elsewhere.
        """
        step = self.state.progress.step
        interruption = self.interruptions.check()
        due = self.job.checkpoint_steps and step % self.job.checkpoint_steps == 0
        if step == self.steps_per_epoch or not (due or interruption):
            return None  # after the last step, the epoch's own checkpoint follows, and the next step looks again
        if interruption:
            self.reporter.phase(Phase.SAVING, interruption)
        self.collect()
        self.state.average_buffers()
        self.save({"epoch": self.state.progress.epoch, "step": step}, wait=interruption is not None)
        if interruption is Interruption.PREEMPTION:
            raise PreemptedError
        return interruption

    def collect(self) -> None:
        """Update the epoch's totals and the statistics of all images."""
        self.meter.collect()
        self.state.example_stats = self.gather(self.example_stats)

    def report_step(self, lr: float) -> None:
        progress = self.state.progress
        running = self.meter.running(progress.step)
        steps_per_second = running["steps_per_second"]
        images_per_second = steps_per_second * self.job.num_train_images / self.steps_per_epoch
        num_scored = self.job.num_val_images + len(self.train_eval_set) * self.world_size  # after each epoch
        if progress.history:
            scoring = progress.history[-1].seconds - progress.history[-1].training_seconds
        else:
            scoring = num_scored / images_per_second / FORWARD_PASSES_PER_STEP
        epoch = self.steps_per_epoch / steps_per_second + scoring
        epochs_left = self.recipe.epochs - progress.epoch + 1
        trained, test_scoring = progress.step / steps_per_second, scoring * self.job.num_test_images / num_scored
        self.reporter.step(
            epoch=progress.epoch,
            step=progress.step,
            steps=self.steps_per_epoch,
            lr=lr,
            loss=running["loss"],
            top1=running["top1"],
            images_per_second=images_per_second,
            seconds_of_epoch=epoch,
            seconds_left=epochs_left * epoch - trained + test_scoring,
        )

    # Between epochs -----------------------------------------------------------------------------------

    def score_epoch(self) -> EpochRecord:
        """Return the record of the trained epoch; its `seconds` don't include scoring yet."""
        progress, totals = self.state.progress, self.state.progress.totals
        train_eval = score(self.predict(self.train_eval_set, "scoring training images")[1])
        return EpochRecord(
            epoch=progress.epoch,
            train_loss=totals.loss / totals.num_images,
            train_top1=totals.num_correct / totals.num_images,
            **(self.validate(self.val_set) if self.val_set else {}),
            train_eval_loss=train_eval["loss"],
            train_eval_top1=train_eval["top1"],
            train_eval_images=train_eval["images"],
            step_losses=[*totals.step_losses],
            lr=self.recipe.learning_rate(progress.epoch, self.steps_per_epoch - 1, self.steps_per_epoch),
            stage=self.state.stage,
            **(totals.gradients(self.steps_per_epoch) if self.job.record else {}),
            rise=self.end_example_stats(),
            restarts=progress.restarts,
            images_per_second=totals.num_images / totals.seconds,
            training_seconds=totals.seconds,
            seconds=totals.seconds,
            workers=self.world_size,
            time=time.time(),
        )

    def validate(self, shard: Shard) -> dict[str, Any]:
        """Return the validation metrics of an epoch's record, and keep which images are classified correctly."""
        _, images = self.predict(shard, "validating")
        scores = score(images)
        losses, correct = (self.gather(images[name].float(), self.job.num_val_images) for name in ("loss", "top1"))
        before, self.state.val_correct = self.state.val_correct, correct
        return {
            **{f"val_{name}": scores[name] for name in ("loss", "top1", "top5")},
            "val_loss_se": (losses.cpu().double().std() / len(losses) ** 0.5).item(),
            "val_gained": None if before is None else int((correct > before).sum()),
            "val_lost": None if before is None else int((correct < before).sum()),
        }

    def score_test_set(self) -> dict[str, Any]:
        """Return the scores on the test set, and write the predictions."""
        self.reporter.phase(Phase.SCORING_TEST)
        test_set, num_images = load_shard("test", self.device), self.job.num_test_images
        logits, images = self.predict(test_set, Phase.SCORING_TEST)
        scores = score(images)
        probabilities, labels = (self.gather(part, num_images) for part in (logits.softmax(1), test_set.labels))
        if self.job.near_duplicates is not None:
            correct = (probabilities.argmax(1) == labels).cpu().numpy()
            scores |= score_without(self.job.near_duplicates, correct)
        if self.rank == 0:
            self.run.write(PREDICTIONS, to_predictions_file(probabilities, labels, self.job.near_duplicates))
        return scores

    def predict(self, shard: Shard, doing: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits of this worker's images, and how they are scored: see `per_image`."""

        def progress(done: int) -> None:
            if self.reporter.due():
                self.reporter.part(doing, done * self.world_size, len(shard) * self.world_size)

        logits = predict(self.state.scored, shard.images, self.state.autocast, self.preprocessing, progress)
        return logits, per_image(logits, shard.labels, shard.coarse, self.job.superclass_of)

    def diagnose(self, record: EpochRecord) -> EpochRecord:
        """Return the record with diagnostics if the network isn't learning; warn of that in the first epochs."""
        num_steps = record.epoch * self.steps_per_epoch
        num_images = int(self.state.progress.totals.num_images)
        warning = collapse(record, num_images, num_steps, CIFAR100.num_classes)
        if warning is None:
            return record
        if record.epoch <= WARNED_EPOCHS:
            self.reporter.notice(f"Warning: {warning}")
        some = self.train_eval_set.head(EXAMINED_IMAGES)
        inputs = preprocess(some.images, self.preprocessing)
        return replace(record, diagnostics=examine(self.state.model, inputs, some.labels))

    def end_example_stats(self) -> Rise | None:
        """Start a new epoch of the images' statistics, and return the rise of this one's losses."""
        assert self.state.example_stats is not None
        rise = describe_rise(self.state.example_stats, self.index)
        for stats in (self.example_stats, self.state.example_stats):
            end_epoch(stats)
        return rise

    def search_stops_trial(self) -> bool:
        """Return whether the search stops this trial after the last epoch; all workers call it together."""
        epoch = self.state.progress.epoch - 1
        if epoch not in self.job.rungs:
            return False
        decision = self.reporter.stop_decision(epoch) if self.rank == 0 else None
        return ray.train.collective.broadcast_from_rank_zero(decision)

    def save(self, metrics: dict[str, Any], *, best: bool = False, **options: Any) -> None:
        """Save a checkpoint, and the weights if they are the `best` so far; see `Checkpointer.save`."""
        snapshot = Snapshot(self.state, best=best) if self.rank == 0 else None
        self.checkpointer.save(metrics, snapshot, **options)

    def gather(self, part: Tensor, num_rows: int | None = None) -> Tensor:
        """Return the rows of all workers' shards of a split with `num_rows` images; None is the training set."""
        num_rows = num_rows or self.job.num_train_images
        return all_gather_rows(part, num_rows, shard_bounds(num_rows, self.world_size)[self.rank])
