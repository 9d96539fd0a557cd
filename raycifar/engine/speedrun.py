"""Training by the public rules of the CIFAR-100 speedrun: what may be prepared is, and then the clock runs."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from raycifar.data.shards import Shard
from raycifar.engine import hardware
from raycifar.engine.cuda import WARM_UP
from raycifar.engine.optimizers import build_optimizer, set_learning_rate
from raycifar.engine.order import Batch, EpochOrder, step_seed, steps_per_epoch
from raycifar.engine.scoring import predict
from raycifar.engine.state import Progress, TrainingState
from raycifar.engine.train_step import TrainStep
from raycifar.models import Architecture
from raycifar.models.initial_weights import NUM_IMAGES, compute_weights
from raycifar.models.recipe import Recipe

TIMED = (
    "the network, its optimizer and its random numbers are reset",
    "the training images are copied to the device",
    "the whitening is computed",
    "all steps are taken",
)
UNTIMED = (
    "the program starts, and reads the data set into memory",
    "kernels are compiled and chosen, and steps captured as graphs, on random images",
    "the images are scored",
)


@dataclass(frozen=True)
class Work:
    """What a run computes, counted from the operations on tensors."""

    parameters: int
    steps: int
    images: int
    multiply_adds: dict[int, int]  # of one image's forward pass, by side of the images in pixels
    multiply_adds_mean: float  # over the images of all steps
    petaflop: float  # of all steps, forward, backward and optimizer; a multiply-add is two operations


class SpeedRun:
    """A network that is trained again for each seed, with the same memory and so the same captured steps.

    Args:
        train_set, test_set: in the CPU's memory; the second is scored.
    """

    def __init__(
        self,
        architecture: Architecture,
        recipe: Recipe,
        train_set: Shard,
        test_set: Shard,
        device: torch.device,
        threads: int,
        *,
        compile: bool = False,  # noqa: A002 (torch's own word)
    ) -> None:
        hardware.set_up(device, threads)
        hardware.retain_malloc_pages(device)
        self.architecture, self.recipe, self.device, self.compile = architecture, recipe, device, compile
        pin = Tensor.pin_memory if device.type == "cuda" else Tensor.contiguous
        self.source = train_set.map(pin)
        self.train_set = train_set.map(partial(torch.empty_like, device=device))
        self.test_set = test_set.map(lambda values: values.to(device))
        self.steps_per_epoch = steps_per_epoch(len(train_set), recipe.batch_size)
        self.state = TrainingState(architecture, None, recipe, 0, device)
        self.step = TrainStep(self.state, self.train_set, None, exchange=False, compile=compile)

    def prepare(self) -> None:
        """Take steps of each size on random images, until all that they need is loaded, chosen and captured."""
        self.train_set.images.random_(0, 256)
        self.train_set.labels.random_(0, self.architecture.num_classes)
        self.train_set.index.copy_(torch.arange(len(self.train_set)))
        calls = WARM_UP + 1 if self.device.type == "cuda" else int(self.compile)
        self.state.train_mode()
        batches = {(len(batch.rows), size): batch for _, batch, size in self.batches(0)}
        for (_, size), batch in batches.items():
            for _ in range(calls):
                self.step(batch, size)
        hardware.synchronize(self.device)

    def run(self, seed: int, progress: Callable[[float], None]) -> dict[str, Any]:
        """Train with a seed and score the network; return the times in seconds, and the scores.

        Args:
            progress: called after each step with the fraction of steps that are taken.

        Returns:
            seed, seconds (by the public clock), whole_seconds (scoring included), top1 (one view of each image),
            top1_flip (each image and its mirror image), train_loss (of the last epoch).
        """
        hardware.synchronize(self.device)
        began = time.perf_counter()
        self.reset(seed)
        loss = self.train(seed, progress)
        hardware.synchronize(self.device)
        seconds = time.perf_counter() - began
        scores = self.score()
        whole = time.perf_counter() - began
        return {"seed": seed, "seconds": seconds, "whole_seconds": whole, **scores, "train_loss": loss.item()}

    def reset(self, seed: int) -> None:
        """Begin with the initial weights of a seed, as `TrainingState` does, and with the images on the device."""
        torch.manual_seed(seed)
        with self.device:
            network = self.architecture.build(self.recipe.dropout)
        for own, value in zip(vars(self.train_set).values(), vars(self.source).values(), strict=True):
            own.copy_(value, non_blocking=True)
        first = self.train_set.index.argsort()[:NUM_IMAGES]
        images, pixels = self.train_set.images[first], self.architecture.preprocessing
        weights = compute_weights(self.architecture.model, self.recipe, images, pixels)
        self.state.model.load_state_dict({**network.state_dict(), **weights})
        for slots in self.state.optimizer.state.values():
            for value in slots.values():
                value.zero_()
        if self.state.ema:
            self.state.ema.n_averaged.zero_()
        hardware.synchronize(self.device)  # other streams read the images

    def train(self, seed: int, progress: Callable[[float], None]) -> Tensor:
        """Take all steps; return the mean loss of the last epoch's."""
        self.state.train_mode()
        last = []
        num_steps = self.recipe.epochs * self.steps_per_epoch
        for done, (epoch, batch, size) in enumerate(self.batches(seed), start=1):
            self.state.progress = Progress(epoch)
            lr = self.recipe.learning_rate(epoch, batch.step, self.steps_per_epoch)
            set_learning_rate(self.state.optimizer, lr)
            with hardware.seeded(step_seed(seed, epoch, batch.step, 1, 0), self.device):
                metrics = self.step(batch, size)
            if epoch == self.recipe.epochs:
                last.append(metrics.clone())  # the next step overwrites it
            progress(done / num_steps)
        num_images, loss = torch.stack(last).sum(0)[:2]
        return loss / num_images

    def batches(self, seed: int) -> Iterator[tuple[int, Batch, int | None]]:
        """Yield the epoch, images and size of each step of a seed."""
        for epoch in range(1, self.recipe.epochs + 1):
            order = EpochOrder(seed, epoch, len(self.train_set), self.steps_per_epoch)
            for batch in order.batches([], 1, 0):
                yield epoch, batch, self.recipe.image_size_at(epoch, batch.step, self.steps_per_epoch)

    def score(self) -> dict[str, float]:
        """Return the accuracies with one view of each image, and with its mirror image too."""
        one, other = (
            predict(self.state.eval_model, view, self.state.autocast, self.architecture.preprocessing)
            for view in (self.test_set.images, self.test_set.images.flip(3))
        )
        top1, top1_flip = (
            (logits.argmax(1) == self.test_set.labels).double().mean().item() for logits in (one, one + other)
        )
        return {"top1": top1, "top1_flip": top1_flip}

    def work(self) -> Work:
        """Count what a run computes."""
        network, full = self.architecture.build(), self.architecture.preprocessing.size
        optimizer = build_optimizer(network, self.architecture.layers(network), self.recipe)
        images = Counter[int]()
        for _, batch, size in self.batches(0):
            images[size or full] += len(batch.rows)
        forward, backward = {}, {}
        for size in images:
            with FlopCounterMode(display=False) as counter:
                logits = network(torch.zeros(2, len(self.architecture.preprocessing.mean), size, size))
            forward[size] = counter.get_total_flops() // 2
            with counter:
                logits.sum().backward()
            backward[size] = counter.get_total_flops() // 2
        with counter:
            optimizer.step()
        steps = self.recipe.epochs * self.steps_per_epoch
        flops = sum(count * (forward[size] + backward[size]) for size, count in images.items())
        return Work(
            parameters=sum(p.numel() for p in network.parameters()),
            steps=steps,
            images=images.total(),
            multiply_adds={size: forward[size] // 2 for size in sorted(images)},
            multiply_adds_mean=sum(count * forward[size] // 2 for size, count in images.items()) / images.total(),
            petaflop=(flops + steps * counter.get_total_flops()) / 1e15,
        )
