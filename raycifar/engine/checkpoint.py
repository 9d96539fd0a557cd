"""Checkpoints: taken between two steps, written while training continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray.train
import safetensors.torch
import torch
from torch import Tensor

from raycifar.engine.state import TENSORS, TrainingState
from raycifar.storage.checkpoints import KEPT, PROGRESS, Checkpoints, checkpoint_name
from raycifar.storage.run_folder import BEST, RunFolder
from raycifar.storage.weights import to_file

MAX_PENDING = 2  # checkpoints being written; training waits for a slower storage


class HostCopy:
    """Contiguous copies of tensors in host memory. A GPU makes them while it computes."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.copies = {name: t.contiguous().to("cpu", non_blocking=t.is_cuda, copy=True) for name, t in tensors.items()}
        self.done = torch.cuda.Event() if any(t.is_cuda for t in tensors.values()) else None
        if self.done:
            self.done.record()

    def wait(self) -> dict[str, Tensor]:
        if self.done:
            self.done.synchronize()
        return self.copies


class Snapshot:
    """A copy of the training state, and of the scored weights if they are the `best` so far, to be written later."""

    def __init__(self, state: TrainingState, *, best: bool = False) -> None:
        self.architecture = state.architecture
        self.name = checkpoint_name(state.progress.epoch, state.progress.step)
        self.state, self.progress = HostCopy(state.tensors()), state.progress.to_json()
        self.best_weights = HostCopy(state.eval_model.state_dict()) if best else None

    def write(self, folder: RunFolder) -> None:
        """Write the checkpoint, then the best weights, if any: without the checkpoint, their epoch isn't finished."""
        files = {TENSORS: safetensors.torch.save(self.state.wait()), PROGRESS: self.progress}
        Checkpoints(folder).write(self.name, files)
        if self.best_weights:
            folder.write(BEST, to_file(self.best_weights.wait(), self.architecture))


class Checkpointer:
    """Writes snapshots while training continues, and keeps the last few checkpoints.

    Ray Train is told the metrics alone: it would order and delete checkpoints by when they were reported, and forgets
    those of earlier attempts.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: list[Future[None]] = []

    def save(
        self, metrics: dict[str, Any], snapshot: Snapshot | None, *, stored: Callable[[], None] = lambda: None
    ) -> None:
        """Report metrics, and save a checkpoint; all workers call it together, and only one has a snapshot.

        Another thread calls `stored` once the checkpoint is stored.
        """
        ray.train.report(metrics)
        if snapshot is None:
            return
        while self.pending and (self.pending[0].done() or len(self.pending) == MAX_PENDING):
            self.pending.pop(0).result()
        self.pending.append(self.thread.submit(self._store, snapshot, stored))

    def wait(self) -> None:
        """Wait for pending checkpoints, and raise any error, as the next `save` would."""
        while self.pending:
            self.pending.pop(0).result()

    def _store(self, snapshot: Snapshot, stored: Callable[[], None]) -> None:
        snapshot.write(self.folder)
        stored()
        checkpoints = Checkpoints(self.folder)
        checkpoints.delete(checkpoints.names()[KEPT:])
