"""Statistics of each training image over the epochs: a few tensor operations per step, a megabyte per checkpoint.

They are a row for each image, (images, 6) float32:

    loss    cross-entropy of the augmented image in the current epoch; -1 before it is seen
    before  the same in the previous epoch
    margin  the label's logit minus the highest other logit, summed over epochs; divided by `seen`, it is the area under
            the margin of Pleiss et al. (2020, arXiv:2001.10528)
    seen    epochs in which the image was not blended with another
    rival   the class that was most often the likeliest besides the label, by the vote of Boyer and Moore (1981)
    votes   the vote's counter
"""

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raycifar.engine.hardware import SUM_DTYPE
from raycifar.storage.parquet import to_parquet
from raycifar.storage.schemas import Rise

LOSS, BEFORE, MARGIN, SEEN, RIVAL, VOTES = COLUMNS = range(6)
UNSEEN = -1.0  # in place of a cross-entropy, which is never negative
MAX_INDICES = 12  # images listed with a rise of the loss
TOP_FRACTION = 0.01  # of images, whose part in a rise is recorded


def blank_stats(images: int, device: torch.device) -> Tensor:
    stats = torch.zeros(images, len(COLUMNS), device=device)
    stats[:, [LOSS, BEFORE]] = UNSEEN
    return stats


@torch.no_grad()
def update_stats(stats: Tensor, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Add the logits of one step, in place.

    Args:
        rows: (n,) int64, distinct. logits: (n, classes) float32. labels: (n,) int64.
    """
    values, classes = logits.topk(2)
    correct = classes[:, 0] == labels
    rival = torch.where(correct, classes[:, 1], classes[:, 0])
    own = logits.gather(1, labels[:, None])[:, 0]
    margin = own - torch.where(correct, values[:, 1], values[:, 0])
    old = stats[rows]
    votes = old[:, VOTES] + torch.where(old[:, RIVAL] == rival, 1.0, -1.0)
    beaten = votes < 0
    stats[rows] = torch.stack(
        [
            logits.logsumexp(1) - own,
            old[:, BEFORE],
            old[:, MARGIN] + margin,
            old[:, SEEN] + 1,
            torch.where(beaten, rival, old[:, RIVAL]),
            torch.where(beaten, 1.0, votes),
        ],
        dim=1,
    )


def end_epoch(stats: Tensor) -> None:
    """Move this epoch's losses to `before`, in place."""
    stats[:, BEFORE] = stats[:, LOSS]
    stats[:, LOSS] = UNSEEN


def describe_rise(stats: Tensor, index: Tensor) -> Rise | None:
    """Return how concentrated the training loss's rise since the previous epoch is, or None if no loss rises.

    Args:
        stats: (images, 6), at the end of an epoch. index: (images,) their rows in the source.

    Returns:
        fraction: of the sum of all rises, due to the 1 % of images that rise most; indices: the first 12 of these.
    """
    seen = (stats[:, [LOSS, BEFORE]] != UNSEEN).all(1)
    rise = torch.where(seen, stats[:, LOSS] - stats[:, BEFORE], 0.0).clamp(min=0).to(SUM_DTYPE[stats.device.type])
    total = rise.sum()
    if not total > 0:
        return None
    top = rise.topk(max(1, int(len(rise) * TOP_FRACTION)))
    return {"fraction": (top.values.sum() / total).item(), "indices": index[top.indices[:MAX_INDICES]].tolist()}


def to_example_stats_file(stats: Tensor, index: Tensor, labels: Tensor) -> bytes:
    """Return a Parquet file with a row for each training image, in the source's order.

    Returns:
        Columns index, label, rival (int64), margin (mean over epochs, float32), loss (of the last epoch), seen.
    """
    order = index.argsort().cpu()
    stats = stats.cpu()[order]
    columns = {
        "index": index.cpu()[order].numpy(),
        "label": labels.cpu()[order].numpy(),
        "rival": stats[:, RIVAL].long().numpy(),
        "margin": (stats[:, MARGIN] / stats[:, SEEN]).numpy(),
        "loss": torch.where(stats[:, BEFORE] == UNSEEN, torch.nan, stats[:, BEFORE]).numpy(),
        "seen": stats[:, SEEN].numpy().astype(np.int32),
    }
    return to_parquet(pa.table(columns))
