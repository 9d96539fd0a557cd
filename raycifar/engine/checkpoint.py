"""Checkpoints: taken between two steps, written while training continues."""

from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from threading import Semaphore
from typing import Any

import ray.train
import safetensors.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor

from raycifar.engine.state import PROGRESS, TENSORS, TrainingState
from raycifar.storage.run_folder import BEST, KEPT, RunFolder
from raycifar.storage.weights import to_file

MAX_PENDING = 2  # checkpoints being written; training waits for a slower storage


class HostCopy:
    """Contiguous copies of tensors in host memory. A GPU makes them while it computes."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.copies = {name: t.contiguous().to("cpu", non_blocking=True, copy=True) for name, t in tensors.items()}
        self.done = torch.cuda.Event() if any(t.is_cuda for t in tensors.values()) else None
        if self.done:
            self.done.record()

    def wait(self) -> dict[str, Tensor]:
        if self.done:
            self.done.synchronize()
        return self.copies


class Snapshot:
    """A copy of the training state, to be written by another thread.

    Args:
        best: also copy the scored weights, which are the best so far.
    """

    def __init__(self, state: TrainingState, *, best: bool = False) -> None:
        self.architecture = state.architecture
        self.state, self.progress = HostCopy(state.tensors()), state.progress.to_json()
        self.best_weights = HostCopy(state.scored.state_dict()) if best else None

    def write(self, run: RunFolder, name: str) -> str:
        """Write the best weights, if any, then the checkpoint; return its path on the run's file system."""
        if self.best_weights:
            run.write(BEST, to_file(self.best_weights.wait(), self.architecture))
        files = {TENSORS: safetensors.torch.save(self.state.wait()), PROGRESS: self.progress}
        return run.write_checkpoint(files, name)


class Checkpointer:
    """Saves snapshots without waiting for the storage.

    With workers, Ray Train uploads in its own thread, and keeps the last few checkpoints. Without (`--workers 0`),
    Ray Train's report keeps nothing, so a thread here does the same.
    """

    def __init__(self, run: RunFolder, *, in_process: bool) -> None:
        self.run = run
        self.uploads = ThreadPoolExecutor(max_workers=1) if in_process else None
        self.pending: list[Future[Checkpoint]] = []
        self.room = Semaphore(MAX_PENDING)

    def save(self, metrics: dict[str, Any], snapshot: Snapshot | None, *, wait: bool = False) -> None:
        """Report metrics and a checkpoint; all workers call it together, and only one has a snapshot.

        Args:
            wait: return only once the checkpoint is stored.
        """
        mode = CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC
        if snapshot is None:
            ray.train.report(metrics, checkpoint_upload_mode=mode)
            return
        self.room.acquire()
        if self.uploads:
            name = f"checkpoint_{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"
            while self.pending and self.pending[0].done():
                self.pending.pop(0).result()
            self.pending.append(self.uploads.submit(self._store, snapshot, name))
            ray.train.report(metrics)
            if wait:
                self.wait()
        else:
            ray.train.report(
                metrics,
                Checkpoint(self.run.name, self.run.filesystem),  # Ray requires one before the upload
                checkpoint_upload_mode=mode,
                checkpoint_upload_fn=lambda _, name: self._store(snapshot, name),
                delete_local_checkpoint_after_upload=False,
            )

    def wait(self) -> None:
        """Wait for pending checkpoints, and raise any error, as the next `save` would."""
        while self.pending:
            self.pending.pop(0).result()

    def _store(self, snapshot: Snapshot, name: str) -> Checkpoint:
        try:
            path = snapshot.write(self.run, name)
            if self.uploads:
                self.run.delete_checkpoints(self.run.checkpoint_names()[KEPT:])
            return Checkpoint(path, self.run.filesystem)
        finally:
            self.room.release()
