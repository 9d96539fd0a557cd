"""Training images whose label is probably wrong, or which are hard: those with the smallest area under the margin.

A label that is right is learned from other images of its class, and its margin grows early; a wrong one is learned
against all others, late or never (Pleiss et al., 2020, arXiv:2001.10528).
"""

import csv
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycifar.data.names import FINE


@dataclass(frozen=True)
class Suspects:
    """Training images, the most suspect first.

    index: (n,) rows in the source's training set. label: (n,). suggested: (n,) the class that most often was the
    likeliest but for the label. score: (n,) from 1 for the most suspect towards 0.
    """

    index: np.ndarray
    label: np.ndarray
    suggested: np.ndarray
    score: np.ndarray

    def to_csv(self) -> str:
        """Return a line for each image: index, label, suggested, score."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["index", "label", "suggested", "score"])
        for row in zip(self.index, self.label, self.suggested, self.score, strict=True):
            writer.writerow([int(row[0]), FINE[row[1]], FINE[row[2]], f"{row[3]:.6f}"])
        return text.getvalue()


def suspects(images_file: bytes) -> Suspects | None:
    """Return all images of a run's `images.parquet` in order, or None where none was seen unblended.

    The score is the share of images with a margin that is at least as large.
    """
    table: Any = pq.read_table(pa.BufferReader(images_file))
    columns = {name: table[name].to_numpy() for name in ("index", "label", "rival", "margin", "seen")}
    known = columns["seen"] > 0
    if not known.any():
        return None
    columns = {name: values[known] for name, values in columns.items()}
    order = np.argsort(columns["margin"], kind="stable")
    margin = columns["margin"][order]
    score = 1 - np.searchsorted(margin, margin, side="left") / len(margin)
    return Suspects(columns["index"][order], columns["label"][order], columns["rival"][order], score)
