"""The loss, and the counts for the history."""

import torch
from torch import Tensor

from raycifar.engine.hardware import WIDEST


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
        counts = torch.stack([num_images, cross_entropy, num_correct]).to(WIDEST[logits.device.type])
    return (1 - smoothing) * cross_entropy + smoothing * uniform, counts
