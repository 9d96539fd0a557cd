"""The loss, what the history counts of it, and the watch that it stays finite."""

import torch
from torch import Tensor

GPU_CHECK_STEPS = 50  # between two waits for the GPU to ask whether the loss is still finite


class StopTrainingError(Exception):
    """Training can't go on, and would fail again if it were tried again."""


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
