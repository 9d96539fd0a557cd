"""The run folder, STORAGE/NAME/, and its files.

    run.json            the request: model, recipe, data, hardware and versions
    metrics.jsonl       a line for each finished epoch
    result.json         the run's status, with the scores on the test set
    model.safetensors   the final weights
    predictions.parquet the final network's predictions for each test image
    example_stats.parquet  statistics of each training image over the epochs
    report.*            what the curves show; suspects.csv ranks the labels that are probably wrong
    events.out.tfevents.raycifar*  the history for TensorBoard
    best.safetensors    the weights of the epoch with the best validation top-1
    checkpoint_*        what a run resumes from; each has a manifest, written last, with a digest of each file

Every file is complete or absent. A checkpoint that lacks its manifest, or differs from it, is incomplete or damaged,
and is skipped.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pyarrow import fs

from raycifar.errors import RequestError, StorageError, in_a_line
from raycifar.redaction import shown
from raycifar.storage.files import append_to, ask, is_local, locate, open_file, write_whole
from raycifar.storage.locations import check_location, join, parent_and_name
from raycifar.storage.records import EpochRecord, finite

RUN, METRICS, RESULT = "run.json", "metrics.jsonl", "result.json"
MODEL, BEST = "model.safetensors", "best.safetensors"
PREDICTIONS, EXAMPLE_STATS = "predictions.parquet", "example_stats.parquet"
OLD_EXAMPLE_STATS = "images.parquet"  # their name in earlier versions
EVALUATION, EVALUATION_PAGE = "evaluation.json", "evaluation.html"  # written by `evaluate`
BENCH, BENCH_CHART, PLAN_CHART = "bench.json", "bench.svg", "plan.svg"  # written by `bench`
REPORT_PAGE, REPORT, REPORT_TEXT, SUSPECTS = "report.html", "report.json", "report.md", "suspects.csv"
EVENTS = "events.out.tfevents.raycifar"
MANIFEST = "manifest.json"
STUDY, COMPARISON, COMPARISON_TABLE = "study.json", "comparison.json", "comparison.csv"  # of a comparison's folder
TEXTS = (".json", ".html", ".md", ".csv")  # which may name where something lies, and never a secret
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
KEPT = 3  # checkpoints: the newest two may be damaged


@dataclass(frozen=True, repr=False)
class RunFolder:
    """A run folder, which may not exist yet. `storage` is a local folder or a URI."""

    storage: str
    name: str

    @classmethod
    def at(cls, location: str) -> "RunFolder":
        """Return the run folder at a path or URI."""
        return cls(*parent_and_name(check_location(location)))

    def __repr__(self) -> str:
        return f"RunFolder({shown(join(self.storage, self.name))!r})"

    @cached_property
    def _location(self) -> tuple[fs.FileSystem, str]:
        return locate(join(self.storage, self.name))

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._location[0]

    @property
    def root(self) -> str:
        """The storage's path on `filesystem`."""
        return self._location[1].rpartition("/")[0]

    @property
    def folder(self) -> str:
        """The folder's path, or its URI if the storage is remote."""
        return self._location[1] if is_local(self.filesystem) else join(self.storage, self.name)

    # Files ------------------------------------------------------------------------------------------

    def read(self, file: str) -> bytes | None:
        """Return a file's content, or None if it doesn't exist.

        Raises:
            StorageError: the file can't be read.
        """
        filesystem, folder = self._location
        try:
            with open_file(filesystem, f"{folder}/{file}", inside=folder) as opened:
                return opened.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError.of(join(self.folder, file), error, "read") from error

    def write(self, file: str, content: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            StorageError: the file can't be written.
        """
        filesystem, folder = self._location
        if file.endswith(TEXTS):
            content = shown(content.decode()).encode()
        try:
            write_whole(filesystem, f"{folder}/{file}", content)
        except OSError as error:
            raise StorageError.of(join(self.folder, file), error) from error

    def append(self, file: str, content: bytes, added: bytes) -> None:
        """Append to a file that begins with `content`: in place on a disk, by a longer file in an object store.

        Raises:
            StorageError: the file can't be written.
        """
        filesystem, folder = self._location
        if not is_local(filesystem):
            self.write(file, content + added)
            return
        try:
            append_to(Path(folder) / file, len(content), added)
        except OSError as error:
            raise StorageError.of(join(self.folder, file), error) from error

    def delete(self, file: str) -> None:
        """Delete a file if it exists."""
        filesystem, folder = self._location
        if self.read(file) is not None:
            ask(filesystem, lambda: filesystem.delete_file(f"{folder}/{file}"))

    def read_json(self, file: str) -> Any:
        content = self.read(file)
        return None if content is None else json.loads(content)

    def write_json(self, file: str, value: Any) -> None:
        """Write a value as JSON, with null for each number that isn't finite."""
        self.write(file, json.dumps(finite(value), indent=2, allow_nan=False).encode() + b"\n")

    def history(self) -> list[EpochRecord]:
        """Return the records of the finished epochs, in order."""
        return [EpochRecord.from_json(json.loads(line)) for line in (self.read(METRICS) or b"").splitlines()]

    def write_history(self, history: Iterable[EpochRecord]) -> None:
        self.write(METRICS, "".join(json.dumps(record.to_json()) + "\n" for record in history).encode())

    def file_names(self, kind: fs.FileType = fs.FileType.File) -> list[str]:
        """Return the names of the files, or of the folders, directly in this one, sorted."""
        filesystem, folder = self._location
        entries = ask(filesystem, lambda: filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True)))
        return sorted(entry.base_name for entry in entries if entry.type == kind)

    def _subfolders(self) -> list[str]:
        return self.file_names(fs.FileType.Directory)

    def runs(self) -> list["RunFolder"]:
        """Return the runs inside this folder, which is a comparison's, sorted by name."""
        runs = (RunFolder(self.folder, name) for name in self._subfolders())
        return [run for run in runs if run.read(RUN) is not None]

    @contextmanager
    def marker(self) -> Iterator[str | None]:
        """Create an empty file beside the folder for other nodes to look for; yield its path, None if remote.

        Raises:
            RequestError: the storage can't be written.
        """
        if not is_local(self.filesystem):
            yield None
            return
        existing = next(path for path in (Path(self.root), *Path(self.root).parents) if path.is_dir())
        marker = existing / f".raycifar-{uuid.uuid4().hex}"
        try:
            marker.touch()
        except OSError as error:
            raise RequestError(
                f"{self.folder} can't be written: {in_a_line(error)}. Give another --storage."
            ) from error
        try:
            yield str(marker)
        finally:
            marker.unlink()

    # Checkpoints ------------------------------------------------------------------------------------

    def write_checkpoint(self, files: Mapping[str, bytes], name: str) -> str:
        """Write the files of the checkpoint `name`, the manifest last, and return its path on the file system."""
        filesystem, folder = self._location
        if is_local(filesystem):
            filesystem.create_dir(f"{folder}/{name}")
        for file, content in files.items():
            self.write(f"{name}/{file}", content)
        self.write_json(f"{name}/{MANIFEST}", {file: digest(content) for file, content in files.items()})
        return f"{folder}/{name}"

    def checkpoint_names(self) -> list[str]:
        """Return the names of all checkpoints, the newest first; some may be damaged."""
        return [name for name in reversed(self._subfolders()) if name.startswith("checkpoint_")]

    def read_checkpoint(self, name: str) -> dict[str, bytes]:
        """Return the checkpoint's files by name.

        Raises:
            ValueError: the checkpoint is incomplete or damaged; the message names the file.
        """
        try:
            digests = self.read_json(f"{name}/{MANIFEST}")
        except ValueError as error:
            raise ValueError(f"{MANIFEST} is damaged") from error
        if digests is None:
            raise ValueError("it is incomplete")
        contents = {}
        for file, expected in digests.items():
            content = self.read(f"{name}/{file}")
            if content is None or digest(content) != expected:
                raise ValueError(f"{file} is {'missing' if content is None else 'damaged'}")
            contents[file] = content
        return contents

    def sound_checkpoints(self, warn: Callable[[str], None]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield the checkpoints that can be read, the newest first; `warn` of each that is skipped."""
        for name in self.checkpoint_names():
            try:
                yield name, self.read_checkpoint(name)
            except ValueError as error:
                warn(f"{name} is skipped: {error}.")

    def delete_checkpoints(self, names: list[str]) -> None:
        filesystem, folder = self._location
        for path in [f"{folder}/{name}" for name in names]:
            ask(filesystem, partial(filesystem.delete_dir, path))

    def mend_snapshot(self) -> None:
        """Delete Ray Train's list of checkpoints if it is damaged or names one that no longer exists.

        Ray Train refuses to start with such a list. A run resumes from the checkpoints themselves.
        """
        content = self.read(RAY_SNAPSHOT)
        if content is None:
            return
        try:
            listed = {entry["checkpoint_dir_name"] for entry in json.loads(content)["checkpoint_results"]}
        except (ValueError, KeyError, TypeError):
            listed = None
        if listed is None or not listed <= set(self.checkpoint_names()):
            self.delete(RAY_SNAPSHOT)


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
