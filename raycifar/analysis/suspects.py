"""Training images that are probably mislabeled, or hard: those with the smallest area under the margin.

A correct label is learned from other images of its class, so its margin grows early. A wrong one is learned against
all others, late or never (Pleiss et al., 2020, arXiv:2001.10528).
"""

import csv
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from raycifar.data import CIFAR100, DatasetInfo
from raycifar.storage.parquet import read_parquet

COLUMNS = {"index": "integers", "label": "integers", "rival": "integers", "margin": "real numbers", "seen": "integers"}


@dataclass(frozen=True)
class Suspects:
    """Training images, the most suspect first.

    index: (n,) rows in the source's training set. label: (n,). suggested: (n,) the class that most often ranked
    highest besides the label. score: (n,) from 1 for the most suspect towards 0.
    """

    index: np.ndarray
    label: np.ndarray
    suggested: np.ndarray
    score: np.ndarray

    def to_csv(self, info: DatasetInfo = CIFAR100) -> str:
        """Return a line for each image: index, label, suggested, score."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["index", "label", "suggested", "score"])
        for row in zip(self.index, self.label, self.suggested, self.score, strict=True):
            writer.writerow([int(row[0]), info.class_names[row[1]], info.class_names[row[2]], f"{row[3]:.6f}"])
        return text.getvalue()


def rank_suspects(example_stats: bytes) -> Suspects | None:
    """Return all images of a run's `example_stats.parquet` in order, or None where none was seen unblended.

    The score is the fraction of images with a margin that is at least as large.
    """
    table: Any = read_parquet(example_stats, COLUMNS)
    columns = {name: table[name].to_numpy() for name in COLUMNS}
    known = columns["seen"] > 0
    if not known.any():
        return None
    columns = {name: values[known] for name, values in columns.items()}
    order = np.argsort(columns["margin"], kind="stable")
    margin = columns["margin"][order]
    score = 1 - np.searchsorted(margin, margin, side="left") / len(margin)
    return Suspects(columns["index"][order], columns["label"][order], columns["rival"][order], score)
