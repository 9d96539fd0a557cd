"""The training function that Ray Train runs on every worker."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from torch import Tensor

from raycifar.cluster.nodes import objection
from raycifar.cluster.status import ModelFacts, Phase
from raycifar.data.shards import Shard, load_shard, shard_bounds
from raycifar.engine import hardware
from raycifar.engine.checkpoint import Checkpointer, Snapshot
from raycifar.engine.config import Outcome, Status, TrainLoopConfig
from raycifar.engine.cuda import graphs_freed
from raycifar.engine.distributed import all_gather_objects, all_gather_rows
from raycifar.engine.epoch_meter import CHECK_STEPS, EpochMeter
from raycifar.engine.evaluator import Evaluator
from raycifar.engine.example_stats import blank_stats, describe_rise, end_epoch, to_example_stats_file
from raycifar.engine.interruption import Interruption, InterruptionWatch
from raycifar.engine.optimizers import set_learning_rate
from raycifar.engine.order import Batch, EpochOrder, Segment, advance, step_seed, steps_per_epoch
from raycifar.engine.profile import StepProfiler
from raycifar.engine.reporter import Gauges, Reporter
from raycifar.engine.state import Progress, TrainingState
from raycifar.engine.tensorboard import EventLog
from raycifar.engine.train_step import TrainStep
from raycifar.errors import FailureKind, PreemptedError, StopTrainingError, notice
from raycifar.models.recipe import FORWARD_PASSES_PER_STEP, Stage
from raycifar.storage.checkpoints import Checkpoints
from raycifar.storage.run_folder import BEST, EXAMPLE_STATS, MODEL, RUN
from raycifar.storage.schemas import EpochRecord, Rise, sampled_steps
from raycifar.storage.weights import to_file

TRAIN_EVAL_IMAGES = 1000  # training images scored as validation images are, after each epoch


@graphs_freed()
def train_loop_per_worker(config: dict[str, Any]) -> Outcome:
    """Train, score and save; Ray Train calls it on each worker, with the fields of `TrainLoopConfig`."""
    worker = TrainWorker(TrainLoopConfig(**config))
    try:
        worker.set_up()
        return worker.train()
    except StopTrainingError as stop:
        worker.checkpointer.wait()
        return Outcome("failed", worker.folder.history(notice), failure=stop.kind, reason=str(stop))
    finally:
        if worker.profiler:
            worker.profiler.stop()


class TrainWorker:
    """One worker's part in a run."""

    def __init__(self, config: TrainLoopConfig) -> None:
        context = ray.train.get_context()
        self.config, self.recipe, self.folder = config, config.recipe, config.folder
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device() if config.gpus else torch.device(config.device)
        self.architecture = config.initial.architecture
        self.steps_per_epoch = steps_per_epoch(config.num_train_images, config.recipe.batch_size)
        gauges = Gauges(self.folder.name, self.architecture.model)
        self.reporter = Reporter(config.status_store, gauges, leader=self.rank == 0)
        self.checkpointer = Checkpointer(self.folder)
        self.profiler = StepProfiler(self.folder, self.rank, self.device) if config.profile else None
        self.interruptions = InterruptionWatch(self.reporter, in_process=config.in_process)
        # Pairs of stage and image size that are past their slow first steps.
        self.warmed_up: set[tuple[Stage | None, int | None]] = set()
        # Set by `set_up`, once there are images and a network.
        self.train_set: Shard
        self.index: Tensor  # (n,) int64, of all workers' training images: rows in the source
        self.state: TrainingState
        self.shard_stats: Tensor  # of this worker's images, as `state.example_stats` is of all workers'
        self.train_step: TrainStep
        self.evaluator: Evaluator
        self.meter: EpochMeter

    # From images and weights to a trained network -----------------------------------------------------

    def set_up(self) -> None:
        """Load the images, and build or resume the network."""
        hardware.set_up(self.device, self.config.threads)
        hardware.limit_gpu_memory(self.config.gpus)
        hardware.retain_malloc_pages(self.device)
        self.reporter.phase(Phase.LOADING_IMAGES)
        self.check_node()
        self.train_set = load_shard("train", self.device)
        num_eval = math.ceil(len(self.train_set) * min(1, TRAIN_EVAL_IMAGES / self.config.num_train_images))
        val_set = load_shard("val", self.device) if self.config.num_val_images else None

        self.reporter.phase(Phase.BUILDING_MODEL)
        weights, seed = self.config.initial.weights, self.config.seed
        self.state = TrainingState(self.architecture, weights, self.recipe, seed, self.device)
        self.evaluator = Evaluator(self.config, self.state, self.reporter, self.train_set.head(num_eval), val_set)
        self.resume()
        self.prepare_train_set()

    def train(self) -> Outcome:
        """Train to the end, score the test set, and save the weights."""
        self.report_model()
        self.reporter.phase(Phase.COMPILING if self.config.compile else Phase.TRAINING)
        for epoch in range(self.state.progress.epoch, self.recipe.epochs + 1):
            if self.search_stops_trial():
                return self.outcome("stopped")
            interruption = self.train_epoch()
            if not interruption:
                self.finish_epoch()
                interruption = self.interruptions.check() if epoch < self.recipe.epochs else None
            if interruption:
                self.prepare_to_leave(interruption)
                return self.outcome("interrupted")
        return self.outcome("finished", test=self.finish())

    def train_epoch(self) -> Interruption | None:
        """Take the current epoch's remaining steps; if the run is interrupted before their end, return why."""
        progress, steps_per_epoch = self.state.progress, self.steps_per_epoch
        self.state.train_mode()
        sampled = sampled_steps(progress.epoch, steps_per_epoch, self.recipe.epochs)
        self.meter = EpochMeter(progress.epoch, steps_per_epoch, progress.step, progress.totals, self.device, sampled)
        for batch in self.batches(progress.epoch, progress.segments):
            lr = self.recipe.learning_rate(progress.epoch, batch.step, steps_per_epoch)
            set_learning_rate(self.state.optimizer, lr)
            image_size = self.recipe.image_size_at(progress.epoch, batch.step, steps_per_epoch)
            with hardware.seeded(self.step_seed(batch), self.device):
                metrics = self.train_step(batch, image_size)
            self.meter.add(batch.step, metrics)
            if self.profiler:
                self.profiler.step()
            progress.segments = advance(progress.segments, self.world_size)

            if batch.step % CHECK_STEPS[self.device.type] == 0:
                self.meter.check_finite()
            if self.reporter.due():
                self.report_step(lr, image_size)
            if progress.step < steps_per_epoch:
                interruption = self.interruptions.check()
                if interruption or self.checkpoint_is_due():
                    self.save_mid_epoch()
                if interruption:
                    return interruption
        self.collect()
        return None

    def finish_epoch(self) -> None:
        """Score the network, record the epoch, and save a checkpoint."""
        began = time.perf_counter()
        self.state.average_buffers()
        record = self.record_epoch()
        record = replace(
            record,
            diagnostics=self.evaluator.diagnose(record, record.epoch * self.steps_per_epoch),
            seconds=record.training_seconds + time.perf_counter() - began,
        )
        self.state.progress = Progress(record.epoch + 1, history=[*self.state.progress.history, record])
        self.reporter.put(step=None, part=None)
        if self.state.enter_stage():
            self.train_step.close()
            self.train_step = self.build_train_step()
        publish = partial(self.publish_history, self.state.progress.history)
        self.save(record.to_json(), best=self.state.progress.ends_with_best, stored=publish)

    def finish(self) -> dict[str, Any] | None:
        """Score the test set, write the final weights and the images' statistics, and return the scores."""
        scores = self.evaluator.score_test_set() if self.config.num_test_images else None
        labels = self.gather(self.train_set.labels)
        if self.rank == 0:
            self.folder.write(MODEL, to_file(self.state.eval_model.state_dict(), self.architecture))
            if self.config.track_examples and self.state.example_stats is not None:
                self.folder.write(EXAMPLE_STATS, to_example_stats_file(self.state.example_stats, self.index, labels))
        return scores

    def outcome(self, status: Status, test: dict[str, Any] | None = None) -> Outcome:
        """Return the outcome, once the last checkpoint is stored."""
        self.checkpointer.wait()
        progress = self.state.progress
        return Outcome(status, progress.history, progress.best.epoch if progress.best else None, test)

    # Setting up ---------------------------------------------------------------------------------------

    def check_node(self) -> None:
        """Stop all workers if one's node can't take part; nodes may join after the driver's check."""
        unseen = None if self.folder.exists(RUN) else f"{self.folder.location}/{RUN}"
        objections = all_gather_objects(objection(unseen, self.config.versions))
        if reason := next(filter(None, objections), None):
            raise StopTrainingError(f"a node can't take part: {reason}", FailureKind.NODE_MISMATCH)
        node = None if self.config.in_process else ray.get_runtime_context().get_node_id()
        self.reporter.put(nodes=all_gather_objects(node))

    def resume(self) -> None:
        """Resume all workers from the newest checkpoint that can be read."""
        found = self.newest_checkpoint() if self.rank == 0 else None
        name = ray.train.collective.broadcast_from_rank_zero(found and found[0])
        if name is None:
            return
        self.state.load_checkpoint(found[1] if found else Checkpoints(self.folder).read(name))
        progress = self.state.progress
        progress.restarts += 1
        step = f"epoch {progress.epoch}, step {progress.step}" if progress.step else f"after epoch {progress.epoch - 1}"
        workers = f", with {self.world_size} workers" if self.world_size > 1 else ""
        self.reporter.notice(f"Continuing from {step} ({name}){workers}.")
        if self.rank == 0:
            self.publish_history(progress.history)
            if progress.ends_with_best:  # the run may have been killed between the checkpoint and these weights
                self.folder.write(BEST, to_file(self.state.eval_model.state_dict(), self.architecture))

    def newest_checkpoint(self) -> tuple[str, dict[str, bytes]] | None:
        """Return the checkpoint to resume from, and delete those that are skipped: new ones will pass them."""
        checkpoints = Checkpoints(self.folder)
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
            self.shard_stats = blank_stats(len(self.train_set), self.device)
        else:
            first = shard_bounds(self.config.num_train_images, self.world_size)[self.rank]
            self.shard_stats = self.state.example_stats[first : first + len(self.train_set)].clone()
        self.train_step = self.build_train_step()

    def build_train_step(self) -> TrainStep:
        """Return the current stage's step: each stage trains, and so exchanges, other parameters."""
        return TrainStep(
            self.state,
            self.train_set,
            self.shard_stats if self.config.track_examples else None,
            exchange=self.world_size > 1,
            compile=self.config.compile,
            notice=self.reporter.notice,
        )

    # Within an epoch ----------------------------------------------------------------------------------

    def batches(self, epoch: int, completed: Sequence[Segment] = ()) -> Iterator[Batch]:
        """Return this worker's remaining batches of an epoch."""
        order = EpochOrder(self.config.seed, epoch, self.config.num_train_images, self.steps_per_epoch)
        return order.batches(completed, self.world_size, self.rank)

    def step_seed(self, batch: Batch) -> int:
        """Return the seed of a step on this worker."""
        return step_seed(self.config.seed, self.state.progress.epoch, batch.step, self.world_size, self.rank)

    def checkpoint_is_due(self) -> bool:
        """Return whether `--checkpoint-steps` asks for a checkpoint after this step."""
        every = self.config.checkpoint_steps
        return every > 0 and self.state.progress.step % every == 0

    def save_mid_epoch(self) -> None:
        """Save a checkpoint between two steps of an epoch."""
        self.collect()
        self.state.gather_buffers()
        self.save({"epoch": self.state.progress.epoch, "step": self.state.progress.step})

    def prepare_to_leave(self, interruption: Interruption) -> None:
        """Wait until the last checkpoint is stored.

        Raises:
            PreemptedError: a node is being preempted; the run continues elsewhere.
        """
        self.reporter.phase(Phase.SAVING, interruption)
        self.checkpointer.wait()
        if interruption is Interruption.PREEMPTION:
            ray.train.collective.barrier()  # Ray ends all workers as soon as one has raised
            raise PreemptedError

    def collect(self) -> None:
        """Update the epoch's totals and the statistics of all images."""
        self.meter.collect()
        if self.config.track_examples:
            self.state.example_stats = self.gather(self.shard_stats)

    def save(self, metrics: dict[str, Any], *, best: bool = False, **options: Any) -> None:
        """Save a checkpoint, and the weights if they are the `best` so far; see `Checkpointer.save`."""
        snapshot = Snapshot(self.state, best=best) if self.rank == 0 else None
        self.checkpointer.save(metrics, snapshot, **options)

    # Between epochs -----------------------------------------------------------------------------------

    def search_stops_trial(self) -> bool:
        """Return whether the search stops this trial after the previous epoch; all workers call it together."""
        epoch = self.state.progress.epoch - 1
        if epoch not in self.config.rungs:
            return False
        decision = self.reporter.stop_decision(epoch) if self.rank == 0 else None
        return ray.train.collective.broadcast_from_rank_zero(decision)

    def record_epoch(self) -> EpochRecord:
        """Score the network, and return the record of the trained epoch; its `seconds` don't include scoring yet."""
        progress, totals, steps_per_epoch = self.state.progress, self.state.progress.totals, self.steps_per_epoch
        return EpochRecord(
            epoch=progress.epoch,
            train_loss=totals.loss / totals.num_images,
            train_top1=totals.num_correct / totals.num_images,
            **self.evaluator.score_epoch(),
            step_losses=[*totals.step_losses],
            lr=self.recipe.learning_rate(progress.epoch, steps_per_epoch - 1, steps_per_epoch),
            stage=self.state.stage,
            **(totals.gradients(steps_per_epoch) if self.config.track_examples else {}),
            rise=self.end_example_stats(),
            restarts=progress.restarts,
            images_per_second=totals.num_images / totals.seconds,
            training_seconds=totals.seconds,
            seconds=totals.seconds,
            workers=self.world_size,
            time=time.time(),
        )

    def end_example_stats(self) -> Rise | None:
        """Start a new epoch of the images' statistics, if they are kept, and return the rise of this one's losses."""
        if not self.config.track_examples or self.state.example_stats is None:
            return None
        rise = describe_rise(self.state.example_stats, self.index)
        for stats in (self.shard_stats, self.state.example_stats):
            end_epoch(stats)
        return rise

    def gather(self, part: Tensor) -> Tensor:
        """Return the rows of all workers' training images."""
        return all_gather_rows(part, self.config.num_train_images)

    # Reports ------------------------------------------------------------------------------------------

    def report_model(self) -> None:
        """Tell what trains on what: on the screen, and in the run's record, with the time at which training begins."""
        facts = ModelFacts(
            parameters=sum(p.numel() for p in self.state.model.parameters()),
            device=hardware.device_name(self.device),
            threads=torch.get_num_threads(),
            precision=str(self.state.dtype).removeprefix("torch."),
        )
        self.reporter.put(model=facts)
        if self.rank == 0:
            began = {"training_began": time.time()}
            self.folder.write_json(RUN, self.folder.read_json(RUN) | vars(facts) | began)

    def report_step(self, lr: float, image_size: int | None) -> None:
        """Report the epoch's progress; the first steps of each stage and image size are slow, so they are left out."""
        progress = self.state.progress
        if (kind := (self.state.stage, image_size)) not in self.warmed_up:
            self.warmed_up.add(kind)
            if self.reporter.status.phase == Phase.COMPILING:
                self.reporter.phase(Phase.TRAINING)
            self.meter.restart_timer(progress.step)
            return
        running = self.meter.running(progress.step)
        steps_per_second = running.pop("steps_per_second")
        scoring = self.scoring_seconds(steps_per_second)
        self.reporter.step(
            epoch=progress.epoch,
            step=progress.step,
            steps=self.steps_per_epoch,
            lr=lr,
            **running,
            images_per_second=steps_per_second * self.config.num_train_images / self.steps_per_epoch,
            seconds_of_epoch=self.steps_per_epoch / steps_per_second + scoring,
            seconds_left=self.seconds_left(steps_per_second, scoring),
        )

    def scoring_seconds(self, steps_per_second: float) -> float:
        """Return what scoring took after the last epoch or, in the first one, about what it will take."""
        if history := self.state.progress.history:
            return history[-1].seconds - history[-1].training_seconds
        steps = self.evaluator.num_images / self.config.num_train_images * self.steps_per_epoch
        return steps / steps_per_second / FORWARD_PASSES_PER_STEP

    def seconds_left(self, steps_per_second: float, scoring: float) -> float:
        """Return about how long the rest of the run takes; later steps may cost more: see `Recipe.cost`."""
        progress, recipe = self.state.progress, self.recipe
        total_steps, network_size = recipe.epochs * self.steps_per_epoch, self.architecture.preprocessing.size
        done = (progress.epoch - 1) * self.steps_per_epoch + progress.step
        cost_now = recipe.cost(network_size, (done - 1) / total_steps)
        steps_left = (total_steps - done) * recipe.mean_cost(network_size, done / total_steps) / cost_now
        test_scoring = scoring * self.config.num_test_images / self.evaluator.num_images
        return steps_left / steps_per_second + (recipe.epochs - progress.epoch + 1) * scoring + test_scoring

    def publish_history(self, history: Sequence[EpochRecord]) -> None:
        """Write and report the finished epochs, whose checkpoint is stored."""
        self.folder.write_history(history)
        self.event_log.write(history)
        self.reporter.history(history)

    @cached_property
    def event_log(self) -> EventLog:
        return EventLog(self.folder)
