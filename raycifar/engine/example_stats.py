"""Following every training image over the epochs: a few tensor operations a step, a megabyte a checkpoint."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

COLUMNS = ("loss", "before", "margin", "seen", "rival", "votes")
LOSS, BEFORE, MARGIN, SEEN, RIVAL, VOTES = range(len(COLUMNS))
UNSEEN = -1.0  # a loss that no cross-entropy has
SHOWN = 12  # images named behind a rise of the loss
TOP = 0.01  # share of the images whose part in a rise is told


class ExampleStats:
    """What is known of a worker's own training images, a row for each: `values` is (images, 6) float32.

    loss: cross-entropy, augmented, in the epoch under way; -1 where it has not been seen yet
    before: the same in the epoch before
    margin: logit of the label less the highest other, summed over epochs: the area under the margin of Pleiss et al.
        (2020, arXiv:2001.10528) times `seen`
    seen: epochs in which it was not blended with another image
    rival: the class that most often was the likeliest but for the label, by Boyer and Moore's majority vote (1981)
    votes: by how much
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
        """Take one step's answers into account.

        Args:
            rows: (n,) int64, without repetition. logits: (n, classes) float32. labels: (n,) int64.
        """
        values, classes = logits.topk(2)
        right = classes[:, 0] == labels
        rival = torch.where(right, classes[:, 1], classes[:, 0])
        own = logits.gather(1, labels[:, None])[:, 0]
        margin = own - torch.where(right, values[:, 1], values[:, 0])
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

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Make the loss of this epoch the one before."""
        self.values[:, BEFORE] = self.values[:, LOSS]
        self.values[:, LOSS] = UNSEEN


def describe_rise(values: Tensor, index: Tensor) -> dict[str, object] | None:
    """Return how concentrated the rise of the training loss since the epoch before is; None where there is none.

    Args:
        values: (images, 6) of an `ExampleStats`, at the end of an epoch. index: (images,) their rows in the source.

    Returns:
        share: of the sum of all rises, the part of the hundredth of images that rose most; and those `images` that did.
    """
    seen = (values[:, [LOSS, BEFORE]] != UNSEEN).all(1)
    rise = torch.where(seen, values[:, LOSS] - values[:, BEFORE], 0.0).clamp(min=0).double()
    total = rise.sum()
    if not total > 0:
        return None
    top = rise.topk(max(1, int(len(rise) * TOP)))
    return {"fraction": (top.values.sum() / total).item(), "indices": index[top.indices[:SHOWN]].tolist()}


def to_example_stats_file(values: Tensor, index: Tensor, labels: Tensor) -> bytes:
    """Return a Parquet file with a row for each training image, by its row in the source's training set.

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
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue().to_pybytes()
