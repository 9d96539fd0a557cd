"""A run's files, and what they say about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raycifar.analysis.classification import confusion
from raycifar.analysis.diagnosis import diagnose
from raycifar.analysis.findings import FIT, Finding
from raycifar.analysis.history import RunHistory
from raycifar.analysis.mismatch import find_mismatch
from raycifar.analysis.suspects import Suspects, rank_suspects
from raycifar.storage.parquet import from_lists
from raycifar.storage.schemas import PicturesFile


@dataclass
class RunFiles:
    """What a run's folder holds; what isn't there is None, and the report says so."""

    name: str
    history: RunHistory
    predictions: pa.Table | None = None
    example_stats: pa.Table | None = None
    pictures: PicturesFile | None = None  # may be set later: they are chosen by the rest
    storage: str = "results"  # where the folder stands
    notes: Sequence[str] = ()  # sentences about what is damaged, has changed or is missing
    copies: np.ndarray | None = None  # (n, 2): near duplicates among the training images, by rows in the source
    host: str | None = None  # on which the run is being trained

    @cached_property
    def shown_by_curves(self) -> list[Finding]:
        return diagnose(self.history)

    @property
    def findings(self) -> list[Finding]:
        """What the run shows, the most important first."""
        differs = find_mismatch(self.history, self.predictions, self.pictures)
        return differs + [found for found in self.shown_by_curves if not (differs and found.kind == "healthy")]

    @cached_property
    def answers(self) -> "Answers | None":
        """What the network predicts for the test images."""
        if self.predictions is None:
            return None
        labels, probabilities = self.predictions["label"].to_numpy(), from_lists(self.predictions["probabilities"])
        predicted = from_lists(self.predictions["top5"])[:, 0]
        return Answers(labels, predicted, probabilities.max(1), confusion(labels, predicted))

    @cached_property
    def suspects(self) -> Suspects | None:
        """The training images, those with the most suspect labels first."""
        return None if self.example_stats is None else rank_suspects(self.example_stats, self.copies)

    @property
    def mature(self) -> bool:
        """Whether the network has learned enough for its doubts about labels to mean anything."""
        return bool(self.history.records) and self.history.fit >= FIT


class Answers(NamedTuple):
    """Of each test image its label, its likeliest class and the probability of this; and the confusion matrix."""

    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    matrix: np.ndarray
