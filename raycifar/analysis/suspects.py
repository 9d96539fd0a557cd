"""Training images that are probably mislabeled, or hard.

Near duplicates with different labels come first: one of the labels is wrong, or the image shows both classes. The
others follow by their area under the margin: a correct label is learned from other images of its class, so its margin
grows early, and a wrong one is learned against all others, late or never (Pleiss et al., 2020, arXiv:2001.10528). A
copy with the same label supports it: the image then counts as if the network were undecided.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raycifar.data import CIFAR100
from raycifar.storage.spreadsheets import to_csv


@dataclass(frozen=True)
class Suspects:
    """Training images, the most suspect first.

    index: (n,) rows in the source's training set. label: (n,). suggested: (n,) the label of the near duplicate if it
    differs, else the class that most often ranked highest besides the label. says: (n,) what the network said on
    average, the label or the class that it ranked above the label. copy: (n,) the row of a near duplicate in the
    training set, -1 if there is none. copy_label: (n,). score: (n,) from 1 for the most suspect towards 0.
    """

    index: np.ndarray
    label: np.ndarray
    suggested: np.ndarray
    says: np.ndarray
    copy: np.ndarray
    copy_label: np.ndarray
    score: np.ndarray

    def contradicted(self) -> np.ndarray:
        """Return whether each image's near duplicate has another label, (n,) bool."""
        return (self.copy >= 0) & (self.copy_label != self.label)

    def confirmed(self) -> np.ndarray:
        """Return whether each image's near duplicate has the same label, against the network, (n,) bool."""
        return (self.copy >= 0) & (self.copy_label == self.label) & (self.says != self.label)

    def to_csv(self) -> str:
        """Return a line for each image: index, label, suggested, score, network, copy, copy_label."""
        names = CIFAR100.class_names
        columns = (self.index, self.label, self.suggested, self.score, self.says, self.copy, self.copy_label)
        return to_csv(
            ["index", "label", "suggested", "score", "network", "copy", "copy_label"],
            (
                [int(index), names[label], names[rival], f"{score:.6f}", names[says]]
                + ([int(copy), names[other]] if copy >= 0 else ["", ""])
                for index, label, rival, score, says, copy, other in zip(*columns, strict=True)
            ),
        )


def rank_suspects(example_stats: pa.Table, pairs: np.ndarray | None = None) -> Suspects | None:
    """Return all images of a run's `example_stats.parquet` in order, or None if none was seen unblended.

    The score is the fraction of images that come no earlier.

    Args:
        pairs: (m, 2) int64, near duplicates among the training images, the most alike first, by rows in the source.
    """
    columns = {name: example_stats[name].to_numpy() for name in ("index", "label", "rival", "margin", "seen")}
    known = columns["seen"] > 0
    if not known.any():
        return None
    index, label, rival, margin, _ = (values[known] for values in columns.values())
    copy = find_copies(index, label, [] if pairs is None else pairs.tolist())
    paired = copy >= 0
    copy_label = np.where(paired, label[copy], label)
    contradicted, confirmed = paired & (copy_label != label), paired & (copy_label == label)
    # The two images of a contradiction stand side by side: by the smaller margin of both, then by their own.
    doubt = np.select([contradicted, confirmed], [np.minimum(margin, margin[copy]), margin.clip(min=0)], margin)
    pair = np.where(contradicted, np.minimum(np.arange(len(index)), copy), 0)
    key = np.stack([~contradicted, doubt, pair, margin])
    order = np.lexsort(key[::-1])
    changed = np.any(np.diff(key[:, order], axis=1, prepend=np.nan) != 0, axis=0)
    place = np.maximum.accumulate(np.where(changed, np.arange(len(order)), 0))
    return Suspects(
        index=index[order],
        label=label[order],
        suggested=np.where(contradicted, copy_label, rival)[order],
        says=np.where(margin > 0, label, rival)[order],
        copy=np.where(paired, index[copy], -1)[order],
        copy_label=copy_label[order],
        score=1 - place / len(order),
    )


def find_copies(index: np.ndarray, label: np.ndarray, pairs: list[list[int]]) -> np.ndarray:
    """Return each image's copy, one with another label if there is any, as a place in `index` (n,); -1 for none."""
    place = dict(zip(index.tolist(), range(len(index)), strict=True))
    copy = np.full(len(index), -1)
    there = [(place[a], place[b]) for a, b in pairs if a in place and b in place]
    for a, b in sorted(there, key=lambda pair: label[pair[0]] == label[pair[1]]):  # stable: then the most alike first
        for one, other in ((a, b), (b, a)):
            if copy[one] < 0:
                copy[one] = other
    return copy
