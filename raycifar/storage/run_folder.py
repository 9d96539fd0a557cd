"""The run folder, STORAGE/NAME/: the only room that knows its files.

    run.json            what is trained, on what, by whom
    metrics.jsonl       a line for each finished epoch
    result.json         how it ended, with the scores on the test set
    model.safetensors   the final weights
    predictions.parquet the final network's answer for each test image
    example_stats.parquet  how each training image fared over the epochs
    report.*            what the curves show, and suspects.csv, the labels to be doubted
    events.out.tfevents.raycifar  the history for TensorBoard
    best.safetensors    the weights of the epoch with the best validation top-1
    checkpoint_*        what a run resumes from; each has a manifest, written last, with a digest of each file

Every file is complete or absent. A checkpoint without a manifest, or with a file that differs from it, was
cut off in mid-upload or damaged since, and is passed over.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pyarrow import fs

from raycifar.errors import RequestError, StorageError
from raycifar.storage.files import URI, is_local, locate, write_whole
from raycifar.storage.records import EpochRecord, finite, from_lines, to_lines

RUN, METRICS, RESULT = "run.json", "metrics.jsonl", "result.json"
MODEL, BEST = "model.safetensors", "best.safetensors"
PREDICTIONS, EXAMPLE_STATS = "predictions.parquet", "example_stats.parquet"
OLD_EXAMPLE_STATS = "images.parquet"  # as earlier versions called them
EVALUATION, EVALUATION_PAGE = "evaluation.json", "evaluation.html"  # written by `evaluate`
BENCH, BENCH_CHART, PLAN_CHART = "bench.json", "bench.svg", "plan.svg"  # written by `bench`
REPORT_PAGE, REPORT, REPORT_TEXT, SUSPECTS = "report.html", "report.json", "report.md", "suspects.csv"
EVENTS = "events.out.tfevents.raycifar"
MANIFEST = "manifest.json"
STUDY, COMPARISON, COMPARISON_TABLE = "study.json", "comparison.json", "comparison.csv"  # of a comparison's folder
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
KEPT = 3  # checkpoints; the newest may be damaged, and so may the one before


@dataclass(frozen=True)
class RunFolder:
    """A run folder, there or to be made. `storage` is a local folder or a URI."""

    storage: str
    name: str

    @classmethod
    def at(cls, place: str) -> "RunFolder":
        """Return the run whose folder, or its URI, is `place`."""
        if not URI.match(place):
            folder = Path(place).expanduser().resolve()
            return cls(str(folder.parent), folder.name)
        storage, _, name = place.rstrip("/").rpartition("/")
        return cls(storage, name)

    @cached_property
    def _place(self) -> tuple[fs.FileSystem, str]:
        filesystem, root = locate(self.storage)
        return filesystem, f"{root.rstrip('/')}/{self.name}"

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._place[0]

    @property
    def root(self) -> str:
        """The storage's path on `filesystem`."""
        return self._place[1].rpartition("/")[0]

    @property
    def folder(self) -> str:
        """The folder's path, or for remote storage its URI."""
        return self._place[1] if is_local(self.filesystem) else f"{self.storage.rstrip('/')}/{self.name}"

    # Files ------------------------------------------------------------------------------------------

    def read(self, file: str) -> bytes | None:
        """Return a file's content, or None where there is none."""
        filesystem, folder = self._place
        try:
            with filesystem.open_input_stream(f"{folder}/{file}") as stream:
                return stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, file: str, content: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            StorageError: it can't be written.
        """
        filesystem, folder = self._place
        try:
            write_whole(filesystem, f"{folder}/{file}", content)
        except OSError as error:
            raise StorageError.of(f"{self.folder}/{file}", error) from error

    def delete(self, file: str) -> None:
        """Delete a file, if it is there."""
        filesystem, folder = self._place
        if self.read(file) is not None:
            filesystem.delete_file(f"{folder}/{file}")

    def read_json(self, file: str) -> Any:
        content = self.read(file)
        return None if content is None else json.loads(content)

    def write_json(self, file: str, value: Any) -> None:
        """Write a value as JSON, with null for each number that isn't finite."""
        self.write(file, json.dumps(finite(value), indent=2, allow_nan=False).encode() + b"\n")

    def history(self) -> list[EpochRecord]:
        """Return the records of the finished epochs, in order."""
        return from_lines(self.read(METRICS) or b"")

    def write_history(self, history: Iterable[EpochRecord]) -> None:
        self.write(METRICS, to_lines(history))

    def runs(self) -> list["RunFolder"]:
        """Return the runs whose folders lie in this one, a comparison's, by name."""
        filesystem, folder = self._place
        entries = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        names = sorted(entry.base_name for entry in entries if entry.type == fs.FileType.Directory)
        return [run for name in names if (run := RunFolder(self.folder, name)).read(RUN) is not None]

    @contextmanager
    def marker(self) -> Iterator[str | None]:
        """Leave an empty file where the folder is to be, for other machines to look for; None on a remote storage.

        Raises:
            RequestError: nothing can be written there.
        """
        if not is_local(self.filesystem):
            yield None
            return
        place = next(path for path in (Path(self.root), *Path(self.root).parents) if path.is_dir())
        marker = place / f".raycifar-{uuid.uuid4().hex}"
        try:
            marker.touch()
        except OSError as error:
            raise RequestError(f"{self.folder} can't be written: {error}. Give another --storage.") from error
        try:
            yield str(marker)
        finally:
            marker.unlink()

    # Checkpoints ------------------------------------------------------------------------------------

    def write_checkpoint(self, files: Mapping[str, bytes], name: str) -> str:
        """Write the files of the checkpoint `name`, the manifest last, and return its path on the file system."""
        filesystem, folder = self._place
        if is_local(filesystem):
            filesystem.create_dir(f"{folder}/{name}")
        for file, content in files.items():
            self.write(f"{name}/{file}", content)
        self.write_json(f"{name}/{MANIFEST}", {file: digest(content) for file, content in files.items()})
        return f"{folder}/{name}"

    def checkpoint_names(self) -> list[str]:
        """Return the names of all checkpoints, the newest first; some may be damaged."""
        filesystem, folder = self._place
        entries = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        names = (entry.base_name for entry in entries if entry.type == fs.FileType.Directory)
        return sorted((name for name in names if name.startswith("checkpoint_")), reverse=True)

    def read_checkpoint(self, name: str) -> dict[str, bytes]:
        """Return the checkpoint's files by name.

        Raises:
            ValueError: it is incomplete or damaged; the message says which file.
        """
        manifest = self.read(f"{name}/{MANIFEST}")
        if manifest is None:
            raise ValueError("it was not written to its end")
        try:
            digests = json.loads(manifest)
        except ValueError as error:
            raise ValueError(f"{MANIFEST} is damaged") from error
        contents = {}
        for file, expected in digests.items():
            content = self.read(f"{name}/{file}")
            if content is None or digest(content) != expected:
                raise ValueError(f"{file} is {'missing' if content is None else 'damaged'}")
            contents[file] = content
        return contents

    def sound_checkpoints(self, passed_over: Callable[[str], None]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield the checkpoints that can be read, the newest first; say which are passed over, and why."""
        for name in self.checkpoint_names():
            try:
                yield name, self.read_checkpoint(name)
            except ValueError as error:
                passed_over(f"{name} is passed over: {error}.")

    def delete_checkpoints(self, names: list[str]) -> None:
        filesystem, folder = self._place
        for name in names:
            filesystem.delete_dir(f"{folder}/{name}")

    def mend_snapshot(self) -> None:
        """Drop Ray Train's list of checkpoints where it is damaged or names one that is gone.

        Ray would refuse to start. Nothing is lost: a run resumes from the checkpoints themselves.
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
