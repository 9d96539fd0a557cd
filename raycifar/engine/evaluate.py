"""Scores of a whole split: each image counted exactly once, whatever the number of workers."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from raycifar.data.shards import Shard
from raycifar.engine.augment import normalise

BATCH = 250  # images scored at a time
BINS = 15  # of confidence, for the calibration error: Guo et al. (2017), arXiv:1706.04599
SCORES = ("images", "loss", "top1", "top5", "superclass_top1")


@torch.inference_mode()
def evaluate(model: nn.Module, shard: Shard, parents: Sequence[int], autocast: torch.autocast) -> dict[str, float]:
    """Return the scores of `model` over all workers' shards; all workers must call it together.

    Args:
        model: maps normalised images to logits; it is left in evaluation mode.
        shard: this worker's images.
        parents: the superclass of each class.
        autocast: the precision to compute in.

    Returns:
        images, loss (natural-log cross-entropy), top1, top5, superclass_top1 (the predicted class's
        superclass is right), ece (expected calibration error over 15 bins of equal width).
    """
    model.eval()
    device = shard.images.device
    parent = torch.tensor(parents, device=device)
    totals = torch.zeros(len(SCORES), dtype=torch.float64, device=device)
    bins = torch.zeros((3, BINS), dtype=torch.float64, device=device)  # images, confidence, correct
    for start in range(0, len(shard), BATCH):
        rows = slice(start, start + BATCH)
        labels = shard.labels[rows]
        with autocast:
            logits = model(normalise(shard.images[rows]))
        logits = logits.float()
        ranked = logits.topk(5).indices
        right = ranked == labels[:, None]
        superclass_right = parent[ranked[:, 0]] == shard.coarse[rows]
        totals += torch.stack(
            [
                torch.tensor(float(len(labels)), device=device),
                F.cross_entropy(logits, labels, reduction="sum"),
                right[:, 0].sum(),
                right.any(1).sum(),
                superclass_right.sum(),
            ]
        )
        confidence = logits.softmax(1).amax(1).double()
        bin_of = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        for row, values in enumerate((torch.ones_like(confidence), confidence, right[:, 0].double())):
            bins[row].scatter_add_(0, bin_of, values)
    reduce_sum(totals, bins)
    images = totals[0].item()
    scores = dict(zip(SCORES, [int(images), *(totals[1:] / images).tolist()], strict=True))
    scores["ece"] = ((bins[1] - bins[2]).abs().sum() / images).item()
    return scores


def reduce_sum(*tensors: Tensor) -> None:
    """Add each tensor up over all workers, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
