"""Checkpoints on their way: written while training goes on, by Ray Train or, without workers, by ourselves."""

import hashlib
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from raycifar.runs import KEPT, Run


class Checkpointer:
    """Saves this worker's files without waiting for the storage.

    With workers, Ray Train uploads in its own thread, keeps the last few and knows them after a restart.
    Without (`--workers 0`), Ray Train's report keeps nothing, so a thread here does the same.
    """

    def __init__(self, run: Run, *, in_process: bool) -> None:
        self.run = run
        self.uploads = ThreadPoolExecutor(max_workers=1) if in_process else None
        self.pending: list[Future[None]] = []
        self.prefix = f"raycifar-{hashlib.sha256(run.folder.encode()).hexdigest()[:12]}-"
        for left in Path(tempfile.gettempdir()).glob(f"{self.prefix}*"):  # by a worker that was killed
            shutil.rmtree(left, ignore_errors=True)

    def save(self, metrics: dict[str, Any], files: dict[str, bytes] | None, *, wait: bool = False) -> None:
        """Report metrics and, on the worker that gives files, a checkpoint; all workers call it together.

        Args:
            wait: until it is stored.
        """
        mode = CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC  # SYNC waits to be looked at
        if files is None:
            ray.train.report(metrics, checkpoint_upload_mode=mode)
            return
        folder = Path(tempfile.mkdtemp(prefix=self.prefix))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if self.uploads:
            name = f"checkpoint_{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"
            while self.pending and self.pending[0].done():
                self.pending.pop(0).result()
            self.pending.append(self.uploads.submit(self._upload_and_prune, folder, name))
            ray.train.report(metrics)
        else:
            ray.train.report(
                metrics,
                Checkpoint.from_directory(folder),
                checkpoint_upload_mode=mode,
                checkpoint_upload_fn=self._upload,
            )

    def wait(self) -> None:
        """Wait for what is still on its way; raise what went wrong, as `save` does with what went wrong before."""
        while self.pending:
            self.pending.pop(0).result()

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        filesystem, path = self.run.upload_checkpoint(Path(checkpoint.path), name)
        return Checkpoint(path, filesystem)

    def _upload_and_prune(self, folder: Path, name: str) -> None:
        try:
            self.run.upload_checkpoint(folder, name)
            self.run.delete_checkpoints(self.run.checkpoint_names()[KEPT:])
        finally:
            shutil.rmtree(folder)
