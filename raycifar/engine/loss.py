"""The loss, what the history counts of it, and the check that it stays finite."""

import torch
from torch import Tensor

from raycifar.errors import FailureKind

CHECK_STEPS = {"cpu": 1, "cuda": 200}  # between two looks whether the loss is still finite; a GPU is waited for then


class StopTrainingError(Exception):
    """Training can't go on, and would fail again if it were tried again."""

    def __init__(self, reason: str, kind: FailureKind) -> None:
        super().__init__(reason)
        self.kind = kind


def loss_and_counts(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the summed loss, and what the history counts.

    Args:
        logits: (n, classes) float32.
        targets: (n,) int64 classes, or (n, classes) float shares.
        smoothing: share of each label spread over all classes, in the loss alone.

    Returns:
        The loss to minimize, summed over the images; and (3,) float64: their number, cross-entropy and correct answers.
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
        counts = torch.stack([num_images, cross_entropy, num_correct]).double()
    return (1 - smoothing) * cross_entropy + smoothing * uniform, counts


def check_finite(norms: Tensor, epoch: int) -> None:
    """See that all gradients of an epoch were finite, as they are not when the loss isn't.

    Gradients are averaged over workers before they are measured, so that all workers find the same step.

    Args:
        norms: (steps,) of the gradients, 0 for a step not taken yet.

    Raises:
        StopTrainingError: the message names the first step whose gradients are not.
    """
    bad = (~norms.isfinite()).nonzero()
    if len(bad):
        raise StopTrainingError(
            f"the loss is no longer finite: epoch {epoch}, step {int(bad[0]) + 1}. Try a smaller --lr, a longer "
            "--warmup, --clip-norm 1 or --precision float32",
            FailureKind.NOT_FINITE,
        )
