"""Statistics of each training image over the epochs: a few tensor operations per step, a megabyte per checkpoint."""

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raycifar.data.tables import to_parquet
from raycifar.engine.hardware import WIDEST
from raycifar.storage.records import Rise

LOSS, BEFORE, MARGIN, SEEN, RIVAL, VOTES = COLUMNS = range(6)
UNSEEN = -1.0  # in place of a cross-entropy, which is never negative
MOST_INDICES = 12  # images listed with a rise of the loss
TOP_FRACTION = 0.01  # of images, whose part in a rise is recorded


class ExampleStats:
    """Statistics of a worker's training images, a row for each: `values` is (images, 6) float32.

    loss: cross-entropy of the augmented image in the current epoch; -1 before it is seen
    before: the same in the previous epoch
    margin: the label's logit minus the highest other logit, summed over epochs; divided by `seen`, it is the area
        under the margin of Pleiss et al. (2020, arXiv:2001.10528)
    seen: epochs in which the image was not blended with another
    rival: the class that was most often the likeliest besides the label, by the majority vote of Boyer and Moore (1981)
    votes: the vote's counter
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def blank(cls, images: int, device: torch.device) -> "ExampleStats":
        values = torch.zeros(images, len(COLUMNS), device=device)
        values[:, [LOSS, BEFORE]] = UNSEEN
        return cls(values)

    @torch.no_grad()
    def update(self, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add the logits of one step.

        Args:
            rows: (n,) int64, distinct. logits: (n, classes) float32. labels: (n,) int64.
        """
        values, classes = logits.topk(2)
        correct = classes[:, 0] == labels
        rival = torch.where(correct, classes[:, 1], classes[:, 0])
        own = logits.gather(1, labels[:, None])[:, 0]
        margin = own - torch.where(correct, values[:, 1], values[:, 0])
        old = self.values[rows]
        votes = old[:, VOTES] + torch.where(old[:, RIVAL] == rival, 1.0, -1.0)
        beaten = votes < 0
        self.values[rows] = torch.stack(
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

    def end_epoch(self) -> None:
        """Move this epoch's losses to `before`."""
        self.values[:, BEFORE] = self.values[:, LOSS]
        self.values[:, LOSS] = UNSEEN


def describe_rise(values: Tensor, index: Tensor) -> Rise | None:
    """Return how concentrated the training loss's rise since the previous epoch is, or None if no loss rises.

    Args:
        values: (images, 6) of an `ExampleStats`, at the end of an epoch. index: (images,) their rows in the source.

    Returns:
        fraction: of the sum of all rises, due to the 1 % of images that rise most; indices: the first 12 of these.
    """
    seen = (values[:, [LOSS, BEFORE]] != UNSEEN).all(1)
    rise = torch.where(seen, values[:, LOSS] - values[:, BEFORE], 0.0).clamp(min=0).to(WIDEST[values.device.type])
    total = rise.sum()
    if not total > 0:
        return None
    top = rise.topk(max(1, int(len(rise) * TOP_FRACTION)))
    return {"fraction": (top.values.sum() / total).item(), "indices": index[top.indices[:MOST_INDICES]].tolist()}


def to_example_stats_file(values: Tensor, index: Tensor, labels: Tensor) -> bytes:
    """Return a Parquet file with a row for each training image, in the source's order.

    Returns:
        Columns index, label, rival (int64), margin (mean over epochs, float32), loss (of the last epoch), seen.
    """
    order = index.argsort().cpu()
    values, seen = values.cpu()[order], values.cpu()[order, SEEN]
    columns = {
        "index": index.cpu()[order].numpy(),
        "label": labels.cpu()[order].numpy(),
        "rival": values[:, RIVAL].long().numpy(),
        "margin": (values[:, MARGIN] / seen).numpy(),
        "loss": torch.where(values[:, BEFORE] == UNSEEN, torch.nan, values[:, BEFORE]).numpy(),
        "seen": seen.numpy().astype(np.int32),
    }
    return to_parquet(pa.table(columns))
