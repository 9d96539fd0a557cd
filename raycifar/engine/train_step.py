"""One optimizer step, from the rows of a batch to new weights."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raycifar.data import CIFAR100
from raycifar.data.shards import Shard
from raycifar.engine.augment import alternating_flips, augment, erase, mix
from raycifar.engine.cuda import SideStream, cuda_graphed, prefetched
from raycifar.engine.distributed import GradientExchange
from raycifar.engine.example_stats import blank_stats, update_stats
from raycifar.engine.hardware import SUM_DTYPE
from raycifar.engine.optimizers import set_learning_rate
from raycifar.engine.order import Batch
from raycifar.engine.state import TrainingState
from raycifar.engine.torch_internals import compiled
from raycifar.models.initial_weights import InitialWeights
from raycifar.models.preprocess import preprocess
from raycifar.models.recipe import Recipe

UNCAPTURED = "Steps run without CUDA graphs, kernel by kernel"
SHARED_GPU = "workers that may share a GPU exchange gradients over gloo, which a graph can't capture"


class TrainStep:
    """A worker's optimizer step; the network, its optimizer and its running average are those of `state`.

    On a GPU, batches are prepared while the steps before them are under way, and both the preparation of inputs and
    `update` are captured as CUDA graphs: their kernels take less time than Python takes to launch them. Where nothing
    is recorded and nothing blended, and a step can be captured, all of it is one graph.

    Args:
        train_set: the worker's own training images. example_stats: their statistics, brought up to date; None follows
            neither them nor the gradient's norm, unless it is clipped.
        exchange: sum the gradients over the workers of the process group. compile: the network and its loss, once for
            each shape of their inputs.
        notice: called with the reason, in a sentence, if `update` isn't captured on a GPU.
    """

    def __init__(
        self,
        state: TrainingState,
        train_set: Shard,
        example_stats: Tensor | None,
        *,
        exchange: bool,
        compile: bool = False,  # noqa: A002 (torch's own word)
        notice: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.state, self.train_set, self.example_stats = state, train_set, example_stats
        self.recipe, self.architecture, self.autocast = state.recipe, state.architecture, state.autocast
        self.device = train_set.images.device
        self.parameters = [p for p in state.model.parameters() if p.requires_grad]
        self.exchange = GradientExchange(self.parameters) if exchange else None
        # A function, for `compiled` passes over a plain nn.Sequential.
        self.forward: Callable[[Tensor], Tensor] = lambda inputs: self.state.model(inputs)
        self.loss_and_counts = loss_and_counts
        if compile:
            self.forward, self.loss_and_counts = compiled(self.forward), compiled(loss_and_counts)
        self.side_stream = SideStream(self.device)
        self.prepare = prefetched(self.prepare_batch, self.device)
        self.run_inputs = cuda_graphed(self.make_inputs, self.device)
        self.obstacle = SHARED_GPU if self.exchange and dist.get_backend() == "gloo" else None
        self.is_one_graph = example_stats is None and not (self.recipe.mixup + self.recipe.cutmix or self.obstacle)
        self.run_update = cuda_graphed(
            self.prepare_and_update if self.is_one_graph else self.update,
            self.device,
            self.obstacle,
            lambda why: notice(f"{UNCAPTURED}: {why}."),
        )

    def __call__(self, batch: Batch, image_size: int | None = None) -> Tensor:
        """Take the step, and return its metrics, (4,) float64: see `EpochMeter`.

        Args:
            image_size: side to which the images are scaled; None is that of the network.
        """
        counts = len(batch.rows), batch.num_images
        if self.is_one_graph:
            metrics = self.run_update(*self.on_device(batch.rows), image_size, *counts)
        else:
            metrics = self.run_update(*self.prepare(batch.rows, image_size), *counts)
        if self.state.ema:
            self.state.ema.update_parameters(self.state.model)
        return metrics

    def prepare_batch(self, batch_rows: np.ndarray, image_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows (n,) int64, inputs (n, 3, size, size) float32 and targets, (n,) int64 or (n, classes) float32.

        Args:
            batch_rows: (n,) int64, rows of this worker's training images.
        """
        rows, epoch = self.on_device(batch_rows)
        inputs = self.run_inputs(rows, epoch, image_size)
        if self.device.type == "cuda":
            inputs = inputs.clone()  # the graph writes the next batch to the same place
        return rows, *mix(inputs, self.train_set.labels[rows], self.recipe, self.architecture.num_classes)

    def on_device(self, batch_rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the rows of a batch (n,) int64, and the epoch () int64."""
        rows = torch.from_numpy(batch_rows).to(self.device, non_blocking=True)
        if len(rows) < 2:  # an elastic worker can run out of images; batch norm needs two, which the loss ignores
            rows = torch.cat([rows, torch.arange(2, device=self.device) % len(self.train_set)])
        return rows, torch.full((), self.state.progress.epoch, device=self.device)

    def make_inputs(self, rows: Tensor, epoch: Tensor, image_size: int | None) -> Tensor:
        alternate = self.recipe.augment == "alternate"
        flipped = alternating_flips(self.train_set.index[rows], epoch) if alternate else None
        return self.augment_and_normalize(self.train_set.images[rows], flipped, image_size)

    def augment_and_normalize(
        self, pixels: Tensor, flipped: Tensor | None = None, image_size: int | None = None
    ) -> Tensor:
        """Return inputs (n, 3, size, size) float32 of pixels (n, 3, H, W) uint8; see `augment`."""
        preprocessing = self.architecture.preprocessing
        preprocessing = replace(preprocessing, size=image_size or preprocessing.size)
        return erase(preprocess(augment(pixels, self.recipe.augment, flipped), preprocessing), self.recipe.erasing)

    def close(self) -> None:
        """Let another step take over the network."""
        if self.exchange:
            self.exchange.close()

    def prepare_and_update(
        self, rows: Tensor, epoch: Tensor, image_size: int | None, count: int, num_images: int
    ) -> Tensor:
        """Prepare a batch, and take the step; see `prepare_batch` and `update`."""
        inputs = self.make_inputs(rows, epoch, image_size)
        return self.update(rows, inputs, self.train_set.labels[rows], count, num_images)

    def update(self, rows: Tensor, inputs: Tensor, targets: Tensor, count: int, num_images: int) -> Tensor:
        """Update the weights by the mean gradient over all workers, and return the metrics.

        Args:
            rows, inputs, targets: as `prepare_batch` returns them. count: how many of them count.
            num_images: of the step, over all workers.
        """
        with self.autocast:
            logits = self.forward(inputs)  # (n, classes)
        logits, rows, targets = logits[:count].float(), rows[:count], targets[:count]
        loss, counts = self.loss_and_counts(logits, targets, self.recipe.label_smoothing)  # summed over the images
        if self.example_stats is not None and targets.ndim == 1:  # a blended image's loss is not its own
            with self.side_stream.beside():
                update_stats(self.example_stats, rows, logits.detach(), targets)

        (loss * (1 / num_images)).backward()
        if self.exchange:
            self.exchange.wait()
        if self.example_stats is not None or self.recipe.clip_norm:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        else:
            # 0, or NaN where the loss isn't finite: the same on all workers, since gradients are exchanged.
            norm = next(p.grad for p in reversed(self.parameters) if p.grad is not None).sum() * 0
        if self.recipe.clip_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.recipe.clip_norm, norm)

        with self.autocast:
            self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        self.side_stream.join()
        return torch.cat([counts, norm.to(counts.dtype)[None]])


def loss_and_counts(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the summed loss, and the counts for the history.

    Args:
        logits: (n, classes) float32.
        targets: (n,) int64 classes, or (n, classes) float probabilities.
        smoothing: fraction of each label spread over all classes, in the loss only.

    Returns:
        The loss to minimize, summed over the images; and (3,) float64: the number of images, their summed
        cross-entropy, and how many are classified correctly.
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
        num_correct = (logits.argmax(1) == labels).sum()
        num_images = torch.full((), float(len(logits)), device=logits.device)
        counts = torch.stack([num_images, cross_entropy, num_correct]).to(SUM_DTYPE[logits.device.type])
    return (1 - smoothing) * cross_entropy + smoothing * uniform, counts


def step_of_random_images(
    initial: InitialWeights,
    recipe: Recipe,
    num_images: int,
    device: torch.device,
    *,
    exchange: bool = False,
    compile: bool = False,  # noqa: A002
) -> Callable[[], Tensor]:
    """Return a function that takes a step of the whole network, with images that teach nothing: to be timed."""
    if recipe.head_epochs < recipe.epochs:
        recipe = replace(recipe, head_epochs=0)
    pixels = torch.randint(0, 256, (num_images, *CIFAR100.image_shape), dtype=torch.uint8, device=device)
    labels = torch.randint(0, initial.architecture.num_classes, (num_images,), device=device)
    state = TrainingState(initial.architecture, initial.weights, recipe, 0, device)
    set_learning_rate(state.optimizer, 1e-6)
    state.train_mode()
    images = Shard(pixels, labels, labels, torch.arange(num_images, device=device))
    step = TrainStep(state, images, blank_stats(num_images, device), exchange=exchange, compile=compile)
    return lambda: step(Batch(0, np.arange(num_images), num_images))
