"""What the training function takes, and what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raycifar.cluster.status import StatusStore
from raycifar.errors import FailureKind
from raycifar.models.initial_weights import InitialWeights
from raycifar.models.recipe import Recipe
from raycifar.storage.run_folder import RunFolder
from raycifar.storage.schemas import EpochRecord

Status = Literal["finished", "stopped", "interrupted", "failed"]  # stopped by a search, interrupted by the driver


@dataclass(frozen=True)
class TrainLoopConfig:
    """The configuration of the training function, the same for all workers."""

    folder: RunFolder
    status_store: StatusStore
    initial: InitialWeights
    recipe: Recipe
    seed: int
    superclass_of: Sequence[int]  # of each class
    num_train_images: int
    num_val_images: int  # 0: none are scored
    num_test_images: int  # 0: none are scored
    gpus: float  # of each worker; a share of one GPU, or 0
    device: str  # cpu or mps, of workers without `gpus`
    threads: int  # of each worker
    in_process: bool  # without worker actors
    versions: dict[str, str]  # the driver's
    compile: bool
    track_examples: bool  # follow each training image and the gradient's norm
    checkpoint_steps: int  # between two checkpoints; 0: only at the end of each epoch
    profile: bool  # trace some steps
    rungs: Sequence[int]  # epochs after which the driver says whether to stop
    near_duplicates: np.ndarray | None  # rows of the test images; None: unknown


@dataclass(frozen=True)
class Outcome:
    """The training function's result."""

    status: Status
    history: Sequence[EpochRecord]
    best_epoch: int | None = None  # with the highest validation top-1
    test: dict[str, Any] | None = None  # the scores on the test set
    failure: FailureKind | None = None  # why training failed
    reason: str | None = None  # the same in words
