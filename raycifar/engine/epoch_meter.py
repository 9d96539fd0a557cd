"""Metrics of an epoch: counted by each worker on its device, and summed over workers now and then."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raycifar.engine.distributed import all_reduce_sum
from raycifar.engine.hardware import SUM_DTYPE
from raycifar.errors import FailureKind, StopTrainingError

NUM_METRICS = 4  # of a step: COUNTS and GRAD_NORM
COUNTS = slice(0, 3)  # of this worker's images: how many, their summed loss, how many are classified correctly
GRAD_NORM = 3
CHECK_STEPS = {"cpu": 1, "cuda": 200, "mps": 200}  # between two checks that gradients are finite, which wait for a GPU


@dataclass
class EpochTotals:
    """Sums over all workers and the current epoch's completed steps."""

    num_images: float = 0.0
    loss: float = 0.0  # natural-log cross-entropy, summed over images
    num_correct: float = 0.0
    grad_norm: float = 0.0  # of each step's gradient, summed over steps
    grad_norm_max: float = 0.0
    grad_norm_max_step: int = 0  # from 0
    seconds: float = 0.0  # of training
    step_losses: list[float] = field(default_factory=list)  # means over the images of single steps

    def gradients(self, num_steps: int) -> dict[str, Any]:
        """Return what an epoch's record says of the gradient's norm."""
        return {
            "grad_norm": self.grad_norm / num_steps,
            "grad_norm_max": self.grad_norm_max,
            "grad_norm_max_step": self.grad_norm_max_step,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "EpochTotals":
        """Return the totals in a checkpoint's `progress.json`, whichever version wrote it."""
        if "totals" in values:
            return cls(**values["totals"])
        (num_images, loss, num_correct), (norm, norm_max, step) = values["sums"], values["norms"]
        return cls(num_images, loss, num_correct, norm, norm_max, int(step), values["seconds"])


class EpochMeter:
    """Keeps each step's metrics on the device, so that nothing waits until they are collected.

    Args:
        epoch: from 1. num_steps: of the epoch. first_step: the first step to train, from 0.
        totals: of earlier steps; updated in place. sampled: steps whose losses are kept one by one.
    """

    def __init__(
        self,
        epoch: int,
        num_steps: int,
        first_step: int,
        totals: EpochTotals,
        device: torch.device,
        sampled: Sequence[int] = (),
    ) -> None:
        self.epoch = epoch
        self.metrics = torch.zeros(num_steps, NUM_METRICS, dtype=SUM_DTYPE[device.type], device=device)
        self.totals, self.sampled = totals, list(sampled)
        self.began = time.perf_counter()
        self.seconds_before = totals.seconds
        self.timed_from = first_step, self.began  # completed steps, and the time at their end

    def add(self, step: int, metrics: Tensor) -> None:
        """Add a step's metrics, (4,) float64: see `NUM_METRICS`."""
        self.metrics[step] = metrics

    def check_finite(self) -> None:
        """Check that the gradients since the last `collect` are finite; they aren't if the loss isn't.

        Gradients are averaged over workers before they are measured, so all workers find the same step.

        Raises:
            StopTrainingError: a gradient is not finite; the message names the first such step.
        """
        bad = (~self.metrics[:, GRAD_NORM].isfinite()).nonzero()
        if len(bad):
            raise StopTrainingError(
                f"the loss is no longer finite: epoch {self.epoch}, step {int(bad[0]) + 1}. Try a smaller --lr, a "
                "longer --warmup or --clip-norm 1",
                FailureKind.NOT_FINITE,
            )

    def collect(self) -> None:
        """Add the metrics since the last call to the totals; all workers call it together."""
        self.check_finite()
        totals, norms = self.totals, self.metrics[:, GRAD_NORM]
        totals.seconds = self.seconds_before + time.perf_counter() - self.began
        counts = self.metrics[:, COUNTS].sum(0)
        all_reduce_sum(counts)
        num_images, loss, num_correct = counts.tolist()
        totals.num_images += num_images
        totals.loss += loss
        totals.num_correct += num_correct
        if self.sampled:
            taken = self.metrics[self.sampled, COUNTS]
            all_reduce_sum(taken)
            totals.step_losses += [loss / images for images, loss, _ in taken.tolist() if images]
        totals.grad_norm += norms.sum().item()
        if norms.max() > totals.grad_norm_max:
            totals.grad_norm_max, totals.grad_norm_max_step = norms.max().item(), int(norms.argmax())
        self.metrics.zero_()

    def restart_timer(self, steps_done: int) -> None:
        """Leave the steps so far out of the steps per second: they are slow, since the network warms up."""
        self.metrics.sum().item()  # waits for a GPU
        self.timed_from = steps_done, time.perf_counter()

    def running(self, steps_done: int) -> dict[str, float]:
        """Return this worker's estimate of the epoch's loss and top1, and steps per second."""
        num_images, loss, num_correct = self.metrics[:, COUNTS].sum(0).tolist()
        all_images = max(1, self.totals.num_images + num_images)
        step, since = self.timed_from
        return {
            "loss": (self.totals.loss + loss) / all_images,
            "top1": (self.totals.num_correct + num_correct) / all_images,
            "steps_per_second": (steps_done - step) / (time.perf_counter() - since),
        }
