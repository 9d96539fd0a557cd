"""Scores of a whole split; each image counts once, whatever the number of workers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycifar.engine.distributed import all_reduce_sum
from raycifar.engine.hardware import SUM_DTYPE
from raycifar.models import CIFAR, Preprocessing
from raycifar.models.preprocess import preprocess
from raycifar.storage.parquet import to_lists, to_parquet

# Images of CIFAR-100's size scored at a time: few on a CPU, to save memory; more on a GPU, to keep it busy.
BATCH_SIZE = {"cpu": 250, "cuda": 1000, "mps": 1000}
BINS = 15  # of confidence, for the calibration error: Guo et al. (2017), arXiv:1706.04599


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: Tensor,
    autocast: torch.autocast,
    preprocessing: Preprocessing = CIFAR,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Return the logits (n, classes) float32 of `images` (n, 3, H, W) uint8, on the model's device.

    Args:
        model: stays in evaluation mode. autocast: the precision to compute in. preprocessing: the model's.
        progress: called with the number of images that are done, now and then.
    """
    model.eval()
    count = max(1, BATCH_SIZE[images.device.type] * CIFAR.size**2 // preprocessing.size**2)
    logits = []
    for batch in images.split(count):
        with autocast:
            logits.append(model(preprocess(batch, preprocessing)).float())
        progress(min(count * len(logits), len(images)))
    return torch.cat(logits)


def likeliest(logits: Tensor) -> Tensor:
    """Return the five likeliest classes of each image, (n, 5), in order; ties are decided as by `argmax`."""
    return logits.sort(descending=True, stable=True).indices[:, :5]


@torch.inference_mode()
def per_image(logits: Tensor, labels: Tensor, coarse: Tensor, superclass_of: Sequence[int]) -> dict[str, Tensor]:
    """Return each image's loss, top1, top5 and superclass_top1, and the confidence in its predicted class, (n,) each.

    Args:
        logits: (n, classes) float32. labels, coarse: (n,) int64, the classes and superclasses.
        superclass_of: the superclass of each class.
    """
    ranked = likeliest(logits)
    correct = ranked == labels[:, None]
    return {
        "loss": F.cross_entropy(logits, labels, reduction="none"),
        "top1": correct[:, 0],
        "top5": correct.any(1),
        "superclass_top1": torch.tensor(superclass_of, device=logits.device)[ranked[:, 0]] == coarse,
        "confidence": logits.softmax(1).amax(1),
    }


@torch.inference_mode()
def score(images: dict[str, Tensor]) -> dict[str, Any]:
    """Return the scores over all workers' images, from `per_image` of this one's; all workers call it together.

    Returns:
        images, loss (natural-log cross-entropy), top1, top5, superclass_top1 (of the predicted classes' superclasses),
        ece (expected calibration error over 15 bins of equal width).
    """
    dtype = SUM_DTYPE[images["loss"].device.type]
    images = {name: values.to(dtype) for name, values in images.items()}
    confidence, correct = images.pop("confidence"), images["top1"]
    sums = torch.stack([torch.ones_like(confidence).sum(), *(values.sum() for values in images.values())])
    bin_of = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    bins = confidence.new_zeros(2, BINS).scatter_add_(1, bin_of.expand(2, -1), torch.stack([confidence, correct]))
    all_reduce_sum(sums, bins)
    num_images = sums[0].item()
    return {
        "images": int(num_images),
        **dict(zip(images, (sums[1:] / num_images).tolist(), strict=True)),
        "ece": ((bins[0] - bins[1]).abs().sum() / num_images).item(),
    }


def score_without(near_duplicates: np.ndarray, correct: np.ndarray) -> dict[str, int | float | None]:
    """Return how many images are near duplicates of training images, and the accuracy on the others.

    Args:
        near_duplicates: their rows. correct: (images,) bool.
    """
    others = np.delete(correct, near_duplicates)
    return {
        "near_duplicates": len(near_duplicates),
        "top1_without_near_duplicates": float(others.mean()) if len(others) else None,
    }


def to_predictions_file(logits: Tensor, labels: Tensor, near_duplicates: np.ndarray | None = None) -> bytes:
    """Return a Parquet file with a row for each image of a split, in the split's order.

    Args:
        logits: (images, classes) float32. labels: (images,) int64. near_duplicates: rows of near
            duplicates of training images, if they are known.

    Returns:
        Columns index and label (int64), top5 (5 int64, the likeliest class first), probabilities (float32), and
        near_duplicate (uint8).
    """
    columns = {
        "index": np.arange(len(labels)),
        "label": labels.cpu().numpy(),
        "top5": to_lists(likeliest(logits).cpu().numpy()),
        "probabilities": to_lists(logits.softmax(1).cpu().numpy()),
    }
    if near_duplicates is not None:
        columns["near_duplicate"] = np.isin(columns["index"], near_duplicates).astype(np.uint8)
    return to_parquet(pa.table(columns))
