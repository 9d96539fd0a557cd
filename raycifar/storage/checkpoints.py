"""What a run resumes from: `checkpoint_EPOCH_STEP`, each with a manifest, written last, with a digest of each file.

A checkpoint that lacks its manifest, or differs from it, is incomplete or damaged, and is skipped.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath

from pyarrow import fs

from raycifar.storage.files import ask
from raycifar.storage.folder import Folder
from raycifar.storage.manifest import MANIFEST, digest
from raycifar.storage.schemas import parse

KEPT = 3  # checkpoints: the newest two may be damaged
PROGRESS = "progress.json"  # how far a checkpoint was trained


def checkpoint_name(epoch: int, step: int) -> str:
    """Return the name of the checkpoint after `step` steps of an epoch, from 1."""
    return f"checkpoint_{epoch:04}_{step:06}"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a run folder."""

    folder: Folder

    def write(self, name: str, files: Mapping[str, bytes]) -> None:
        """Write the files of a checkpoint, the manifest last."""
        for file, content in files.items():
            self.folder.write(f"{name}/{file}", content)
        self.folder.write_json(f"{name}/{MANIFEST}", {file: digest(content) for file, content in files.items()})

    def names(self) -> list[str]:
        """Return the names of all checkpoints, the one that was trained furthest first; some may be damaged."""
        names = [name for name in self.folder.file_names(fs.FileType.Directory) if name.startswith("checkpoint_")]
        return sorted(names, key=lambda name: (self._position(name), name), reverse=True)

    def _position(self, name: str) -> tuple[int, int]:
        """Return a checkpoint's epoch and step, or zeros if they can't be told.

        Earlier versions named checkpoints by the local time, which goes back and forth.
        """
        if match := re.fullmatch(r"checkpoint_(\d+)_(\d+)", name):
            return int(match[1]), int(match[2])
        try:
            progress = parse(self.folder.read(f"{name}/{PROGRESS}") or b"", dict)
            return progress["epoch"], sum(segment["steps"] for segment in progress["segments"])
        except (ValueError, KeyError, TypeError):
            return 0, 0

    def read(self, name: str) -> dict[str, bytes]:
        """Return a checkpoint's files by name.

        Raises:
            ValueError: the checkpoint is incomplete or damaged; the message names the file.
        """
        manifest = self.folder.read(f"{name}/{MANIFEST}")
        if manifest is None:
            raise ValueError("it is incomplete")
        try:
            digests = parse(manifest, dict[str, str])
        except ValueError as error:
            raise ValueError(f"{MANIFEST} is damaged") from error
        contents = {}
        for file, expected in digests.items():
            if file != PurePath(file).name:
                raise ValueError(f"{MANIFEST} names {file}, which isn't in it")
            content = self.folder.read(f"{name}/{file}")
            if content is None or digest(content) != expected:
                raise ValueError(f"{file} is {'missing' if content is None else 'damaged'}")
            contents[file] = content
        return contents

    def sound(self, warn: Callable[[str], None]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield the name and the files of each checkpoint that can be read, the newest first; `warn` of the others."""
        for name in self.names():
            try:
                yield name, self.read(name)
            except ValueError as error:
                warn(f"{name} is skipped: {error}.")

    def size(self, names: Iterable[str]) -> int:
        """Return how many bytes checkpoints take."""
        selectors = [fs.FileSelector(self.folder.path(name), recursive=True) for name in names]
        found = ask(self.folder.filesystem, lambda: [*map(self.folder.filesystem.get_file_info, selectors)])
        return sum(entry.size or 0 for entries in found for entry in entries)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):  # a try before this one, whose answer was lost
                ask(self.folder.filesystem, partial(self.folder.filesystem.delete_dir, self.folder.path(name)))
