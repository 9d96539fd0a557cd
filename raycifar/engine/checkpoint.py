"""Checkpoints on their way: written while training goes on, by Ray Train or, without workers, by ourselves."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from threading import Semaphore
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from raycifar.storage.run_folder import KEPT, RunFolder

UNDER_WAY = 2  # checkpoints being written, at most: a storage that is slower than training is waited for


class Checkpointer:
    """Saves this worker's files without waiting for the storage.

    With workers, Ray Train uploads in its own thread, keeps the last few and knows them after a restart.
    Without (`--workers 0`), Ray Train's report keeps nothing, so a thread here does the same.
    """

    def __init__(self, run: RunFolder, *, in_process: bool) -> None:
        self.run = run
        self.uploads = ThreadPoolExecutor(max_workers=1) if in_process else None
        self.pending: list[Future[Checkpoint]] = []
        self.room = Semaphore(UNDER_WAY)

    def save(
        self, metrics: dict[str, Any], files: Callable[[], dict[str, bytes]] | None, *, wait: bool = False
    ) -> None:
        """Report metrics and, on the worker that gives files, a checkpoint; all workers call it together.

        Args:
            files: gives them by name; called in another thread. wait: until it is stored.
        """
        mode = CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC  # SYNC waits to be looked at
        if files is None:
            ray.train.report(metrics, checkpoint_upload_mode=mode)
            return
        self.room.acquire()
        if self.uploads:
            name = f"checkpoint_{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"
            while self.pending and self.pending[0].done():
                self.pending.pop(0).result()
            self.pending.append(self.uploads.submit(self._store, files, name, prune=True))
            ray.train.report(metrics)
        else:
            ray.train.report(
                metrics,
                Checkpoint(self.run.name, self.run.filesystem),  # Ray asks for one before there is any
                checkpoint_upload_mode=mode,
                checkpoint_upload_fn=lambda _, name: self._store(files, name),
                delete_local_checkpoint_after_upload=False,
            )

    def wait(self) -> None:
        """Wait for what is still on its way; raise what went wrong, as `save` does with what went wrong before."""
        while self.pending:
            self.pending.pop(0).result()

    def _store(self, files: Callable[[], dict[str, bytes]], name: str, *, prune: bool = False) -> Checkpoint:
        try:
            path = self.run.write_checkpoint(files(), name)
            if prune:
                self.run.delete_checkpoints(self.run.checkpoint_names()[KEPT:])
            return Checkpoint(path, self.run.filesystem)
        finally:
            self.room.release()
