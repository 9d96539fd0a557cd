"""The run folder, STORAGE/NAME/, and its files.

    run.json            the request: model, recipe, data, hardware and versions
    metrics.jsonl       a line for each finished epoch
    result.json         the run's status, with the scores on the test set
    model.safetensors   the final weights
    predictions.parquet the final network's predictions for each test image
    example_stats.parquet  statistics of each training image over the epochs
    report.*            what the curves show; suspects.csv ranks the labels that are probably wrong
    events.out.tfevents.raycifar*  the history for TensorBoard
    profile/            of each worker, what takes longest in a step: a trace and a table, where asked for
    best.safetensors    the weights of the epoch with the best validation top-1
    checkpoint_EPOCH_STEP  what a run resumes from; each has a manifest, written last, with a digest of each file
    pictures.json       the few images that the report shows
    manifest.json       of a finished run or comparison: a digest of each file that is read again
    .lock-*             the claim of the process that trains the run: see `lock`

Every file is complete or absent. A checkpoint that lacks its manifest, or differs from it, is incomplete or damaged,
and is skipped. A folder may have been made by others: what is read lies in it, is no larger than such a file can be,
and has the types and ranges of `records`.
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import filterfalse
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from raycifar.data import CIFAR100
from raycifar.errors import DamagedFileError, RequestError, StorageError, in_a_line, notice
from raycifar.redaction import shown
from raycifar.storage.files import MAX_BYTES, append_to, ask, file_type, is_local, locate, open_file, write_whole
from raycifar.storage.locations import check_location, is_utf8, join, parent_and_name
from raycifar.storage.parquet import read_parquet, read_schema
from raycifar.storage.records import (
    RENAMED,
    ComparisonFile,
    EpochRecord,
    PicturesFile,
    ResultFile,
    RunFile,
    checked,
    finite,
    parse,
    unknown_fields,
)

RUN, METRICS, RESULT = "run.json", "metrics.jsonl", "result.json"
MODEL, BEST = "model.safetensors", "best.safetensors"
PREDICTIONS, EXAMPLE_STATS = "predictions.parquet", "example_stats.parquet"
OLD_EXAMPLE_STATS = "images.parquet"  # their name in earlier versions
EVALUATION, EVALUATION_PAGE = "evaluation.json", "evaluation.html"  # written by `evaluate`
SPEEDRUN = "speedrun.json"  # written by `speedrun`
BENCH, BENCH_CHART, PLAN_CHART = "bench.json", "bench.svg", "plan.svg"  # written by `bench`
REPORT_PAGE, REPORT, REPORT_TEXT, SUSPECTS = "report.html", "report.json", "report.md", "suspects.csv"
PICTURES = "pictures.json"
EVENTS = "events.out.tfevents.raycifar"
PROFILE = "profile"  # a folder
MANIFEST, PROGRESS = "manifest.json", "progress.json"  # of a checkpoint
STUDY, COMPARISON, COMPARISON_TABLE = "study.json", "comparison.json", "comparison.csv"  # of a comparison's folder
TEXTS = (".json", ".html", ".md", ".csv")  # which may name where something lies, and never a secret
RAY_FILES = ("checkpoint_manager_snapshot.json", ".validate_storage_marker")  # Ray Train's, left by earlier versions
DOCUMENTS: dict[str, Any] = {
    RUN: RunFile,
    RESULT: ResultFile,
    COMPARISON: ComparisonFile,
    STUDY: dict[str, Any],
    PICTURES: PicturesFile,
    MANIFEST: dict[str, str],
}
# What a `run.json` of the first versions, or of other programs, lacks.
RUN_DEFAULTS = {"seed": 0, "val_size": 5000, "limit": None, "workers": 1, "device": None}
TABLES = {
    PREDICTIONS: {"label": "integers", "top5": "lists of integers", "probabilities": "lists of real numbers"},
    EXAMPLE_STATS: {
        "index": "integers",
        "label": "integers",
        "rival": "integers",
        "margin": "real numbers",
        "seen": "integers",
    },
}
TABLES[OLD_EXAMPLE_STATS] = TABLES[EXAMPLE_STATS]
OPTIONAL = {"near_duplicate": "integers"}  # columns that earlier versions lack
RANGES = {
    **dict.fromkeys(("label", "top5", "rival"), (0, CIFAR100.num_classes - 1)),
    **dict.fromkeys(("index", "seen"), (0, math.inf)),
    "near_duplicate": (0, 1),
    "probabilities": (0, 1.001),
}
MAX_BYTES_BY_SUFFIX = {".json": 2**24, ".jsonl": 2**27, ".parquet": 2**28}
MAX_LINE_BYTES, MAX_LINES = 2**20, 200_000  # of `metrics.jsonl`, which has a line for each epoch
KEPT = 3  # checkpoints: the newest two may be damaged


@dataclass(frozen=True, repr=False)
class RunFolder:
    """A run folder, which may not exist yet."""

    storage: str  # a local folder or a URI
    name: str
    claim: str | None = None  # a file's path on its file system; once it is gone, nothing more is written

    @classmethod
    def at(cls, location: str) -> "RunFolder":
        """Return the run folder at a path or URI."""
        return cls(*parent_and_name(check_location(location)))

    @classmethod
    def for_output(cls, location: str) -> "RunFolder":
        """Return the folder that --out names for results, before the work that has them.

        Raises:
            RequestError: it can't be written; of a remote one, that shows only at the end.
        """
        check_location(location, "--out", to_write=True)
        folder = cls.at(location)
        with folder.marker("--out"):
            return folder

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

    @property
    def is_remote(self) -> bool:
        return not is_local(self.filesystem)

    @property
    def comparison(self) -> "RunFolder | None":
        """The comparison that this folder lies in, if any."""
        if self.is_remote and "/" not in self.root.strip("/"):
            return None  # a bucket
        around = RunFolder.at(self.storage)
        return around if around.exists(STUDY) else None

    def check_holds_none(self, *files: str, option: str = "--name") -> None:
        """Raise RequestError if one of these files of another run, or of a comparison, is in the folder."""
        if found := next(filter(self.exists, files), None):
            whose = "run" if found == RUN else "comparison"
            raise RequestError(f"{self.folder} is the folder of a {whose}: give another {option}.")

    def path(self, file: str = "") -> str:
        """Return the path of a file, or of the folder, on `filesystem`."""
        return f"{self._location[1]}/{file}".rstrip("/") or self._location[1]

    # Files ------------------------------------------------------------------------------------------

    def read(self, file: str) -> bytes | None:
        """Return a file's content, None if it doesn't exist, or raise StorageError if it can't be read."""
        most = MAX_BYTES_BY_SUFFIX.get(PurePath(file).suffix, MAX_BYTES)
        try:
            with open_file(self.filesystem, self.path(file), inside=self.path(), max_bytes=most) as opened:
                return opened.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError.of(join(self.folder, file), error, "read") from error

    def exists(self, file: str) -> bool:
        """Return whether a file exists, or raise StorageError if that can't be told."""
        try:
            return file_type(self.filesystem, self.path(file)) != fs.FileType.NotFound
        except OSError as error:
            raise StorageError.of(join(self.folder, file), error, "read") from error

    def write(self, file: str, content: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            StorageError: the file can't be written, or another process has taken over the run.
        """
        if file.endswith(TEXTS):
            content = shown(content.decode()).encode()
        with self._writing(file):
            write_whole(self.filesystem, self.path(file), content)

    def append(self, file: str, content: bytes, added: bytes) -> None:
        """Append to a file that begins with `content`: in place on a disk, by a new file in an object store."""
        if self.is_remote:
            self.write(file, content + added)
            return
        with self._writing(file):
            append_to(Path(self.path(file)), len(content), added)

    @contextmanager
    def _writing(self, file: str) -> Iterator[None]:
        try:
            if self.claim and file_type(self.filesystem, self.claim) == fs.FileType.NotFound:
                raise PermissionError(errno.EPERM, "another process has taken over this run")
            yield
        except OSError as error:
            raise StorageError.of(join(self.folder, file), error) from error

    def seconds_since_written(self, file: str) -> float:
        """Return a file's age by the clocks of this machine and of the storage; infinity if it doesn't exist."""
        written = ask(self.filesystem, lambda: self.filesystem.get_file_info(self.path(file)).mtime)
        return (datetime.now(UTC) - written).total_seconds() if written else math.inf

    def delete(self, file: str) -> None:
        """Delete a file if it exists."""
        if self.exists(file):
            ask(self.filesystem, lambda: self.filesystem.delete_file(self.path(file)))

    def delete_leftovers(self) -> None:
        """Delete what killed processes have left: files that they were writing, and those of Ray Train."""
        for file in self.file_names():
            if file in RAY_FILES or re.fullmatch(r"\..*\.part", file):
                self.delete(file)

    def _read(self, file: str) -> bytes | None:
        try:
            return self.read(file)
        except OSError as error:
            raise DamagedFileError(f"{self.folder}/{file} can't be read: {in_a_line(error)}.") from error

    def _damaged(self, file: str, why: object) -> DamagedFileError:
        return DamagedFileError(f"{self.folder}/{file} is damaged: {why}.")

    def read_json(self, file: str, warn: Callable[[str], None] = notice) -> Any:
        """Return the content of a JSON file, checked against `DOCUMENTS`, or None if it doesn't exist.

        Args:
            warn: called with a sentence if the file has changed, or has fields that this version doesn't know.

        Raises:
            DamagedFileError: it can't be read, or doesn't hold what it should.
        """
        content = self._read(file)
        if content is None:
            return None
        kind = DOCUMENTS.get(PurePath(file).name, Any)
        try:
            value = checked(kind, finite(parse(content)))
        except ValueError as error:
            raise self._damaged(file, error) from error
        if file in DOCUMENTS and file != MANIFEST:
            self._warn_of_change(file, content, warn)
        self._warn_of_fields(file, unknown_fields(kind, value), warn)
        return {**RUN_DEFAULTS, "name": self.name, **value} if file == RUN else value

    def write_json(self, file: str, value: Any) -> None:
        """Write a value as JSON, with null for each number that isn't finite."""
        self.write(file, json.dumps(finite(value), indent=2, allow_nan=False).encode() + b"\n")

    def history(self, warn: Callable[[str], None] | None = None) -> list[EpochRecord]:
        """Return the records of the finished epochs, in order.

        Args:
            warn: called with a sentence if a row is damaged; the rows before it are returned.

        Raises:
            DamagedFileError: a row is damaged, and there is no `warn`.
        """
        records: list[EpochRecord] = []
        unknown: set[str] = set()
        content = self._read(METRICS)
        if content is None:
            return []
        try:
            for line in io.BytesIO(content):
                if len(records) == MAX_LINES:
                    raise ValueError(f"at most {MAX_LINES:,} epochs are read")
                values = checked(dict, parse(line) if len(line) <= MAX_LINE_BYTES else None)
                record = EpochRecord.from_json(values)
                if record.epoch != len(records) + 1:
                    raise ValueError(f"epoch {record.epoch} follows epoch {len(records)}")
                records.append(record)
                unknown |= values.keys() - EpochRecord.__dataclass_fields__.keys() - RENAMED.keys()
        except ValueError as error:
            problem = self._damaged(METRICS, f"line {len(records) + 1}, {error}")
            if warn is None:
                raise problem from error
            warn(f"{problem} The lines before it are used.")
        else:
            self._warn_of_change(METRICS, content, warn or notice)
        self._warn_of_fields(METRICS, unknown, warn or notice)
        return records

    def read_table(self, file: str) -> pa.Table | None:
        """Return the columns of `TABLES` in predictions.parquet or example_stats.parquet; see `read_json`."""
        content = self._read(file)
        if content is None:
            return self.read_table(OLD_EXAMPLE_STATS) if file == EXAMPLE_STATS else None
        self.check_digest(file, content)
        try:
            optional = {name: kind for name, kind in OPTIONAL.items() if name in read_schema(content).names}
            table = read_parquet(content, TABLES[file] | optional)
            check_ranges(table)
        except ValueError as error:
            raise self._damaged(file, error) from error
        return table

    def write_history(self, history: Iterable[EpochRecord]) -> None:
        self.write(METRICS, "".join(json.dumps(record.to_json()) + "\n" for record in history).encode())

    def file_names(self, kind: fs.FileType = fs.FileType.File) -> list[str]:
        """Return the names of the files, or of the folders, directly in this one, sorted.

        On a disk, links are left out, and names that aren't UTF-8, as no run's is.
        """
        filesystem, folder = self._location
        if self.is_remote:
            entries = ask(filesystem, lambda: filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True)))
            return sorted(entry.base_name for entry in entries if entry.type == kind)
        is_one = Path.is_file if kind == fs.FileType.File else Path.is_dir
        entries = Path(folder).iterdir() if Path(folder).is_dir() else ()
        names = [path.name for path in entries if is_one(path) and not path.is_symlink()]
        for name in filterfalse(is_utf8, names):
            notice(f"{folder}/{name} is passed over: its name isn't UTF-8.")
        return sorted(filter(is_utf8, names))

    def runs(self) -> list["RunFolder"]:
        """Return the runs inside this folder, sorted by name."""
        return self.folders_with(RUN)

    def folders_with(self, *files: str) -> list["RunFolder"]:
        """Return the folders in this one that hold one of these files, sorted by name."""
        folders = self.file_names(fs.FileType.Directory)
        paths = {self.path(f"{name}/{file}"): name for name in folders for file in files}
        found = ask(self.filesystem, lambda: self.filesystem.get_file_info([*paths]))
        names = [paths[entry.path] for entry in found if entry.type != fs.FileType.NotFound]
        return [RunFolder(self.folder, name) for name in dict.fromkeys(names)]

    @contextmanager
    def marker(self, option: str = "--storage") -> Iterator[str | None]:
        """Create an empty file where the folder is, or is to be, for other nodes to look for.

        Args:
            option: that names the folder.

        Yields:
            The file's path; None if the folder is remote, which isn't tried.

        Raises:
            RequestError: the folder can't be written.
        """
        if self.is_remote:
            yield None
            return
        path = Path(self.path())
        existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
        marker = existing / f".raycifar-{uuid.uuid4().hex}"
        try:
            marker.touch()
        except OSError as error:
            reason = in_a_line(error) if existing.is_dir() else f"{existing} is not a folder"
            raise RequestError(f"{self.folder} can't be written: {reason}. Give another {option}.") from error
        try:
            yield str(marker)
        finally:
            marker.unlink()

    # The manifest of a finished run -----------------------------------------------------------------

    def seal(self, *files: str) -> None:
        """Record digests of files as they are now, so that a change is noticed."""
        contents = {file: self.read(file) for file in files}
        digests = {file: digest(content) for file, content in contents.items() if content is not None}
        self._read_digests_again()
        self.write_json(MANIFEST, {**self._digests, **digests})
        self._read_digests_again()

    def lost(self, *files: str) -> list[str]:
        """Return those of `files` that no longer exist."""
        return [file for file in files if file in self._digests and not self.exists(file)]

    def check_digest(self, file: str, content: bytes) -> None:
        """Raise DamagedFileError if what was read has changed since the manifest was written."""
        if self._has_changed(file, content):
            raise self._damaged(file, f"it has changed since {MANIFEST} was written")

    @cached_property
    def _digests(self) -> dict[str, str]:
        try:
            return self.read_json(MANIFEST) or {}
        except DamagedFileError as error:
            notice(f"{error} Whether other files have changed can't be told.")
            return {}

    def _read_digests_again(self) -> None:
        vars(self).pop("_digests", None)  # another process may have written the manifest since

    def _has_changed(self, file: str, content: bytes) -> bool:
        if file not in self._digests or self._digests[file] == (found := digest(content)):
            return False
        self._read_digests_again()
        return self._digests.get(file, found) != found

    def _warn_of_change(self, file: str, content: bytes, warn: Callable[[str], None]) -> None:
        if self._has_changed(file, content):
            warn(f"{self.folder}/{file} has changed since {MANIFEST} was written: what it says may be wrong.")

    def _warn_of_fields(self, file: str, unknown: Iterable[str], warn: Callable[[str], None]) -> None:
        if fields := ", ".join(sorted(unknown)):
            warn(f"{self.folder}/{file} has fields that this version doesn't know and passes over: {fields[:200]}.")

    # Checkpoints ------------------------------------------------------------------------------------

    def write_checkpoint(self, files: Mapping[str, bytes], name: str) -> None:
        """Write the files of the checkpoint `name`, the manifest last."""
        if not self.is_remote:
            self.filesystem.create_dir(self.path(name))
        for file, content in files.items():
            self.write(f"{name}/{file}", content)
        self.write_json(f"{name}/{MANIFEST}", {file: digest(content) for file, content in files.items()})

    def checkpoint_names(self) -> list[str]:
        """Return the names of all checkpoints, the one that has been trained furthest first; some may be damaged."""
        names = [name for name in self.file_names(fs.FileType.Directory) if name.startswith("checkpoint_")]
        return sorted(names, key=lambda name: (self._position(name), name), reverse=True)

    def _position(self, checkpoint: str) -> tuple[int, int]:
        """Return a checkpoint's epoch and step; earlier versions named it by the local time, which goes back and forth.

        One that doesn't tell comes last.
        """
        if match := re.fullmatch(r"checkpoint_(\d+)_(\d+)", checkpoint):
            return int(match[1]), int(match[2])
        try:
            progress = self.read_json(f"{checkpoint}/{PROGRESS}")
            return progress["epoch"], sum(segment["steps"] for segment in progress["segments"])
        except (ValueError, KeyError, TypeError):
            return 0, 0

    def read_checkpoint(self, name: str) -> dict[str, bytes]:
        """Return the checkpoint's files by name.

        Raises:
            ValueError: the checkpoint is incomplete or damaged; the message names the file.
        """
        try:
            digests = self.read_json(f"{name}/{MANIFEST}")
        except DamagedFileError as error:
            raise ValueError(f"{MANIFEST} is damaged") from error
        if digests is None:
            raise ValueError("it is incomplete")
        contents = {}
        for file, expected in digests.items():
            if file != PurePath(file).name:
                raise ValueError(f"{MANIFEST} names {file}, which isn't in it")
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

    def size_of(self, names: Iterable[str]) -> int:
        """Return the bytes of folders directly in this one."""
        selectors = [fs.FileSelector(self.path(name), recursive=True) for name in names]
        found = ask(self.filesystem, lambda: [self.filesystem.get_file_info(selector) for selector in selectors])
        return sum(entry.size or 0 for entries in found for entry in entries)

    def delete_checkpoints(self, names: list[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):  # a try before this one, whose answer was lost
                ask(self.filesystem, partial(self.filesystem.delete_dir, self.path(name)))


def checkpoint_name(epoch: int, step: int) -> str:
    """Return the name of the checkpoint after `step` steps of an epoch, from 1."""
    return f"checkpoint_{epoch:04}_{step:06}"


def check_ranges(table: pa.Table) -> None:
    """Raise ValueError if a column holds what it can't: a class that there isn't, or no probability."""
    for name in filter(RANGES.__contains__, table.column_names):
        column, (low, high) = table[name].combine_chunks(), RANGES[name]
        values = (column.flatten() if pa.types.is_fixed_size_list(column.type) else column).to_numpy()
        if not low <= values.min() <= values.max() <= high:
            wanted = f"{low} to {high}" if math.isfinite(high) else f"{low} or more"
            raise ValueError(f"the column {name} has values from {values.min()} to {values.max()}, not {wanted}")
        if name == "probabilities" and column.type.list_size != CIFAR100.num_classes:
            raise ValueError(f"the column {name} has no probabilities of {CIFAR100.num_classes} classes")


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
