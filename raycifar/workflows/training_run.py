"""A run that is under way."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from raycifar.cluster.status import StatusStore
from raycifar.data.tables import Source, Splits
from raycifar.models.initial_weights import InitialWeights
from raycifar.storage.run_folder import RunFolder
from raycifar.workflows.duplicates import known_duplicates
from raycifar.workflows.requests import TrainingRequest

if TYPE_CHECKING:
    from raycifar.cluster.sizing import Workers


@dataclass(frozen=True)
class Inputs:
    """A run's data set, its splits, and the initial weights."""

    source: Source
    splits: Splits
    initial: InitialWeights

    def near_duplicates(self) -> np.ndarray | None:
        """Return the rows of test images whose photograph is among the training images, or None if it isn't known."""
        found = known_duplicates(self.source)
        return None if found is None else found.test_copies(self.splits.train["index"].to_numpy())


@dataclass(frozen=True)
class TrainingRun:
    """What is asked for, where it is kept, what it trains on, and with which workers."""

    request: TrainingRequest
    folder: RunFolder
    inputs: Inputs
    workers: "Workers"
    status_store: StatusStore = field(default_factory=StatusStore)
    debug: bool = False  # show Ray's log
