"""The training function that Ray Train runs on every worker."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raycifar.analysis.collapse import collapse
from raycifar.cluster.sizing import objection
from raycifar.cluster.status import StatusStore
from raycifar.data import CLASSES
from raycifar.data.shards import Shard, bounds, load_shard
from raycifar.engine.augment import augment, mix, preprocess
from raycifar.engine.checkpoint import Checkpointer
from raycifar.engine.cuda import SideStream, cuda_graphed, prefetched
from raycifar.engine.diagnostics import examine
from raycifar.engine.evaluate import gather, per_image, predict, reduce_sum, score, to_predictions_file
from raycifar.engine.example_stats import ExampleStats, describe_rise, to_images_file
from raycifar.engine.hardware import choose_precision, keep_memory, parallelise, seed, set_up
from raycifar.engine.loss import CHECK_STEPS, StopTrainingError, check_finite, loss_and_sums
from raycifar.engine.optimizers import set_learning_rate
from raycifar.engine.order import Batch, advance, batches, step_seed, steps_per_epoch
from raycifar.engine.preemption import PreemptedError, PreemptionWatch
from raycifar.engine.ray_metrics import Gauges
from raycifar.engine.reporter import Reporter
from raycifar.engine.state import Progress, TrainingState, copies
from raycifar.engine.tensorboard import to_events
from raycifar.models.initial_weights import InitialWeights
from raycifar.recipes import Recipe
from raycifar.storage.records import EpochRecord
from raycifar.storage.run_folder import BEST, EVENTS, EXAMPLE_STATS, MODEL, PREDICTIONS, RUN, RunFolder
from raycifar.storage.weights import to_file

TRAIN_EVAL_IMAGES = 1000  # training images scored as validation images are, without augmentation, after each epoch
SIGNAL_IMAGES = 250  # of those, looked at from inside where the network doesn't learn
FIGURES = ("images", "loss", "hits", "norm")  # of a step: the first three summed over its images, the gradient's norm
NORM = FIGURES.index("norm")
VALIDATION = ("val_loss", "val_top1", "val_top5", "val_loss_se", "val_gained", "val_lost")


@dataclass(frozen=True)
class Job:
    """What the driver asks of the workers."""

    run: RunFolder
    status_store: StatusStore
    start: InitialWeights
    recipe: Recipe
    seed: int
    images: int  # of the training split
    val_images: int  # 0: none are held out
    test_images: int  # 0: the test set is left alone
    parents: Sequence[int]  # the superclass of each class
    use_gpu: bool
    threads: int
    in_process: bool  # no worker actors
    versions: dict[str, str]  # the driver's
    compile: bool
    checkpoint_steps: int  # 0: at the end of each epoch alone
    rungs: Sequence[int]  # epochs after which the status store is asked whether to stop


def train_loop_per_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train, score and save; Ray Train calls it on each worker.

    Args:
        config: `job`, a `Job`.

    Returns:
        `test`, the scores on the test set, and `history`; or `failure`, a sentence; or `stopped`, the
        number of epochs after which the run was told to stop.
    """
    worker = Trainer(config["job"])
    try:
        return worker.train()
    except StopTrainingError as stop:
        worker.checkpointer.wait()
        return {"failure": str(stop)}


class Trainer:
    """One worker's part in a run."""

    def __init__(self, job: Job) -> None:
        self.job, self.recipe, self.run = job, job.recipe, job.run
        self.architecture, self.preprocessing = job.start.architecture, job.start.architecture.preprocessing
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device() if job.use_gpu else torch.device("cpu")
        self.reporter = Reporter(
            job.status_store, Gauges(job.run.name, job.start.architecture.model), leader=self.rank == 0
        )
        self.checkpointer = Checkpointer(job.run, in_process=job.in_process)
        self.preemption = PreemptionWatch(in_process=job.in_process)
        self.steps = steps_per_epoch(job.images, job.recipe.batch_size)
        set_up(self.device, job.threads)
        if self.device.type == "cpu":
            keep_memory()

    def train(self) -> dict[str, Any]:
        self.prepare()
        self.reporter.phase("training")
        while self.state.progress.epoch <= self.recipe.epochs:
            if self.told_to_stop():
                self.checkpointer.wait()
                return {"stopped": self.state.progress.epoch - 1}
            self.train_epoch()
            self.finish_epoch()

        test = self.test() if self.job.test_images else None
        if self.rank == 0:
            self.run.write(MODEL, to_file(self.state.scored.state_dict(), self.architecture))
            if self.state.images is not None:
                self.run.write(EXAMPLE_STATS, to_images_file(self.state.images, self.index, self.labels))
        self.checkpointer.wait()
        history = self.state.progress.history
        return {"test": test, "history": history, "best_epoch": best(history)["epoch"] if self.val_set else None}

    def prepare(self) -> None:
        """Bring the images to the device, and the network to where training begins or goes on."""
        self.reporter.phase("loading images")
        self.check_node()
        self.train_set = load_shard("train", self.device)
        self.val_set = load_shard("val", self.device) if self.job.val_images else None

        self.reporter.phase("building the model")
        self.dtype = choose_precision(self.recipe.precision, self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        weights = self.job.start.weights
        self.state = TrainingState(self.architecture, weights, self.recipe, self.job.seed, self.device)
        self.describe()
        self.resume()
        if self.job.compile:
            self.state.model.compile()
        self.parallelise()
        self.index, self.labels = (self.gather(part) for part in (self.train_set.index, self.train_set.labels))
        self.record = self.begin_record()
        share = min(TRAIN_EVAL_IMAGES, self.job.images) / self.job.images
        self.train_eval_set = self.train_set.head(math.ceil(share * len(self.train_set)))

    def check_node(self) -> None:
        """Stop, all workers together, if one is on a node that can't take part: it may have come after the start."""
        seen = self.run.read(RUN) is not None
        complaints = self.from_all(objection(None if seen else f"{self.run.folder}/{RUN}", self.job.versions))
        if complaint := next(filter(None, complaints), None):
            raise StopTrainingError(f"a node can't take part: {complaint}")
        self.reporter.nodes(self.from_all(None if self.job.in_process else ray.get_runtime_context().get_node_id()))

    def from_all(self, value: Any) -> list[Any]:
        """Return what each worker gives."""
        values = [value] * self.world_size
        if dist.is_initialized():
            dist.all_gather_object(values, value)
        return values

    def test(self) -> dict[str, float]:
        """Score the test set, and keep what was predicted of each image."""
        self.reporter.phase("scoring the test set")
        test_set, images = load_shard("test", self.device), self.job.test_images
        logits, scores = self.score(test_set)
        probabilities, labels = (self.gather(part, images) for part in (logits.softmax(1), test_set.labels))
        if self.rank == 0:
            self.run.write(PREDICTIONS, to_predictions_file(probabilities, labels))
        return scores

    def score(self, shard: Shard) -> tuple[Tensor, dict[str, float]]:
        """Return the logits of this worker's images, and the scores over all workers'."""
        logits = predict(self.state.scored, shard.images, self.autocast, self.preprocessing)
        return logits, score(logits, shard.labels, shard.coarse, self.job.parents)

    def validate(self, shard: Shard) -> dict[str, Any]:
        """Return the validation's part of an epoch's line, and remember which images were right."""
        logits, scores = self.score(shard)
        counted = per_image(logits, shard.labels, shard.coarse, self.job.parents)
        losses, right = (self.gather(counted[name].float(), self.job.val_images) for name in ("loss", "top1"))
        before, self.state.val_right = self.state.val_right, right
        return {
            **{f"val_{name}": scores[name] for name in ("loss", "top1", "top5")},
            "val_loss_se": (losses.double().std() / len(losses) ** 0.5).item(),
            "val_gained": None if before is None else int((right > before).sum()),
            "val_lost": None if before is None else int((right < before).sum()),
        }

    # An epoch ---------------------------------------------------------------------------------------

    def train_epoch(self) -> None:
        """Take the steps that are left of the epoch under way."""
        job, recipe, progress = self.job, self.recipe, self.state.progress
        self.state.train_mode()
        self.figures = torch.zeros(self.steps, len(FIGURES), dtype=torch.float64, device=self.device)
        self.entered, begun_at = time.perf_counter(), progress.step  # where it is resumed in mid-epoch
        self.begun = self.entered - progress.seconds
        for batch in batches(
            job.seed, progress.epoch, job.images, self.steps, progress.segments, self.world_size, self.rank
        ):
            seed(step_seed(job.seed, progress.epoch, batch.step, self.world_size, self.rank), self.device)
            lr = recipe.learning_rate(progress.epoch, batch.step, self.steps)
            set_learning_rate(self.state.optimizer, lr)
            self.figures[batch.step] = self.take_step(batch)
            progress.segments = advance(progress.segments, self.world_size)

            if batch.step % CHECK_STEPS[self.device.type] == 0:
                check_finite(self.figures[:, NORM], progress.epoch)
            if self.reporter.due():
                self.tell(lr, begun_at)
            if job.checkpoint_steps and progress.step % job.checkpoint_steps == 0 and progress.step < self.steps:
                self.save_in_mid_epoch()
            if self.preemption.announced() and progress.step < self.steps:
                self.leave()
        self.collect()

    def save_in_mid_epoch(self, *, wait: bool = False) -> None:
        self.collect()
        self.state.average_buffers()
        self.save({"epoch": self.state.progress.epoch, "step": self.state.progress.step}, wait=wait)

    def leave(self) -> None:
        """Leave a node that is being taken away, with nothing lost."""
        self.reporter.phase("saving: a node is being taken away")
        self.save_in_mid_epoch(wait=True)
        raise PreemptedError(PreemptedError.sentence)

    def take_step(self, batch: Batch) -> Tensor:
        """Take one optimiser step, and return its figures: (4,) float64."""
        rows, inputs, targets = self.ready(batch)
        figures = self.learn(rows, inputs, targets, len(batch.rows), batch.images)
        if self.state.average:
            self.state.average.update_parameters(self.state.model)
        return figures

    def get_ready(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows of this worker's images, on the device, with the images and targets that the network sees."""
        rows = torch.from_numpy(batch.rows).to(self.device, non_blocking=True)
        if len(rows) < 2:  # after a change of workers a share can run out: batch norm needs two, the loss ignores them
            rows = torch.cat([rows, torch.arange(2, device=self.device)])
        return rows, *self.see(self.train_set.images[rows], self.train_set.labels[rows])

    def learn_from(self, rows: Tensor, inputs: Tensor, targets: Tensor, count: int, images: int) -> Tensor:
        """Take one optimiser step on these inputs, the first `count` of which count, of `images` over all workers."""
        with self.autocast:
            logits = self.model(inputs)
        rows, logits, targets = rows[:count], logits[:count].float(), targets[:count]
        objective, sums = loss_and_sums(logits, targets, self.recipe.label_smoothing)
        answers = logits.detach()
        if targets.ndim == 1:  # a blended image's loss is not its own
            with self.side.beside():
                self.record.update(rows, answers, targets)
        # DDP averages over workers; times their number over the step's images it is the mean of all of them.
        (objective * (self.world_size / images)).backward()
        parameters = [p for p in self.state.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.recipe.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.recipe.clip_norm, norm)
        with self.autocast:
            self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        self.side.join()
        return torch.cat([sums, norm.double()[None]])

    def see(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return images as the network is to see them, augmented, and their targets."""
        pixels = augment(images, self.recipe.augment)
        return mix(preprocess(pixels, self.preprocessing), labels, self.recipe)

    def finish_epoch(self) -> None:
        """Validate, write the epoch's line, and leave a checkpoint from which the next epoch begins."""
        progress, clock = self.state.progress, time.perf_counter()
        self.state.average_buffers()
        images, loss, hits = progress.sums
        clean = self.score(self.train_eval_set)[1]
        row = {
            "epoch": progress.epoch,
            "train_loss": loss / images,
            "train_top1": hits / images,
            **(self.validate(self.val_set) if self.val_set else dict.fromkeys(VALIDATION)),
            "train_eval_loss": clean["loss"],
            "train_eval_top1": clean["top1"],
            "train_eval_images": clean["images"],
            "lr": self.recipe.learning_rate(progress.epoch, self.steps - 1, self.steps),
            "stage": self.state.stage,
            "grad_norm": progress.norms[0] / self.steps,
            "grad_norm_max": progress.norms[1],
            "grad_norm_max_step": int(progress.norms[2]),
            "rise": self.end_record(),
            "restarts": progress.restarts,
            "images_per_second": images / progress.seconds,
            "training_seconds": progress.seconds,
            "workers": self.world_size,
            "time": time.time(),
        }
        if warning := collapse(row, int(images), progress.epoch * self.steps, CLASSES):
            some = self.train_eval_set.head(SIGNAL_IMAGES)
            row["diagnostics"] = examine(self.state.model, preprocess(some.images, self.preprocessing), some.labels)
            if progress.epoch <= 3:
                self.reporter.notice(f"Warning: {warning}")
        row["seconds"] = progress.seconds + time.perf_counter() - clock
        history = [*progress.history, row]
        self.state.progress = Progress(epoch=progress.epoch + 1, history=history)
        if self.rank == 0:
            self.run.write_history(map(EpochRecord.from_json, history))
            self.run.write(EVENTS, to_events(history))
        self.reporter.epoch(history)
        if self.state.enter_stage():
            self.parallelise()
        self.save(row, best=row is best(history) if self.val_set else False)

    def begin_record(self) -> ExampleStats:
        """Return what is known of this worker's training images."""
        if self.state.images is None:
            return ExampleStats.blank(len(self.train_set), self.device)
        first = bounds(self.job.images, self.world_size)[self.rank]
        return ExampleStats(self.state.images[first : first + len(self.train_set)].clone())

    def end_record(self) -> dict[str, Any] | None:
        """Begin the next epoch of the training images' record, and return what there is to say of this one's."""
        assert self.state.images is not None
        rise = describe_rise(self.state.images, self.index)
        for record in (self.record, ExampleStats(self.state.images)):
            record.end_epoch()
        return rise

    def parallelise(self) -> None:
        self.model = parallelise(self.state.model, self.preprocessing.size, self.device, self.autocast)
        self.learn, self.side = cuda_graphed(self.learn_from, self.device, self.world_size), SideStream(self.device)
        self.ready = prefetched(self.get_ready, self.device)

    # Between steps ----------------------------------------------------------------------------------

    def collect(self) -> None:
        """Add up what all workers have counted of the epoch since it was last collected."""
        norms, progress = self.figures[:, NORM], self.state.progress
        check_finite(norms, progress.epoch)
        progress.seconds = time.perf_counter() - self.begun
        sums = self.figures[:, :NORM].sum(0)
        reduce_sum(sums)
        progress.sums = add(progress.sums, sums)
        total, largest, at = progress.norms
        if norms.max() > largest:
            largest, at = norms.max().item(), norms.argmax().item()
        progress.norms = [total + norms.sum().item(), largest, at]
        self.figures.zero_()
        self.state.images = self.gather(self.record.values)

    def gather(self, part: Tensor, images: int | None = None) -> Tensor:
        """Return the rows of all workers' shards, of a split of so many images; by default the training set's."""
        images = images or self.job.images
        return gather(part, images, bounds(images, self.world_size)[self.rank])

    def told_to_stop(self) -> bool:
        """Return, after an epoch at which trials of a search are compared, whether this one ends here."""
        epoch = self.state.progress.epoch - 1
        if epoch not in self.job.rungs:
            return False
        return ray.train.collective.broadcast_from_rank_zero(self.reporter.verdict(epoch) if self.rank == 0 else None)

    def save(self, metrics: dict[str, Any], *, best: bool = False, wait: bool = False) -> None:
        """Leave a checkpoint and, before it, the weights, if they are the `best` so far; training goes on meanwhile."""
        self.checkpointer.save(metrics, self.files(best) if self.rank == 0 else None, wait=wait)

    def files(self, best: bool) -> Callable[[], dict[str, bytes]]:
        """Return what writes the weights as they are now, if they are the `best`, and gives the checkpoint's files."""
        snapshot = self.state.snapshot()
        if not best:
            return snapshot
        weights = copies(self.state.scored.state_dict())

        def write() -> dict[str, bytes]:
            self.run.write(BEST, to_file(weights(), self.architecture))
            return snapshot()

        return write

    def resume(self) -> None:
        """Go on from the newest checkpoint that can be read, on all workers the same."""
        found = next(self.run.sound_checkpoints(self.reporter.notice), None) if self.rank == 0 else None
        name = ray.train.collective.broadcast_from_rank_zero(found and found[0])
        if name is None:
            return
        self.state.load_files(found[1] if found else self.run.read_checkpoint(name))
        progress = self.state.progress
        progress.restarts += 1
        where = (
            f"epoch {progress.epoch}, step {progress.step}" if progress.step else f"after epoch {progress.epoch - 1}"
        )
        workers = f", with {self.world_size} workers" if self.world_size > 1 else ""
        self.reporter.notice(f"Continuing from {where} ({name}){workers}.")
        self.reporter.epoch(progress.history)
        if self.rank == 0:
            self.run.write_history(map(EpochRecord.from_json, progress.history))

    def tell(self, lr: float, begun_at: int) -> None:
        progress = self.state.progress
        images, loss, hits = add(progress.sums, self.figures[:, :NORM].sum(0))
        images_per_step = self.job.images / self.steps
        self.reporter.step(
            epoch=progress.epoch,
            step=progress.step,
            steps=self.steps,
            lr=lr,
            loss=loss / max(1, images),
            top1=hits / max(1, images),
            images_per_step=images_per_step,
            images_per_second=(progress.step - begun_at) * images_per_step / (time.perf_counter() - self.entered),
        )

    def describe(self) -> None:
        """Tell what trains on what: on the screen, and in the run's record."""
        facts = {
            "parameters": sum(p.numel() for p in self.state.model.parameters()),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "precision": str(self.dtype).removeprefix("torch."),
        }
        self.reporter.about(facts)
        if self.rank == 0:
            self.run.write_json(RUN, {**self.run.read_json(RUN), **facts})


def best(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the epoch with the highest validation top-1, the first of equals."""
    return max(history, key=lambda row: row["val_top1"])


def add(sums: list[float], more: Tensor) -> list[float]:
    return [a + b for a, b in zip(sums, more.tolist(), strict=True)]
