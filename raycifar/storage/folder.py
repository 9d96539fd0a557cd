"""A folder on a disk or in an object store, in which every file is complete or absent.

Others may have made it: files outside it aren't read, sizes are limited, and contents are checked.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import filterfalse
from pathlib import Path, PurePath
from tempfile import NamedTemporaryFile
from typing import Any, Self

from pyarrow import fs

from raycifar.errors import DamagedFileError, RequestError, StorageError, in_a_line, notice
from raycifar.redaction import redact, redact_html
from raycifar.storage.files import MAX_BYTES, append_to, ask, file_type, is_local, locate, open_file, write_whole
from raycifar.storage.locations import Location, check_location, is_utf8, join, parent_and_name
from raycifar.storage.schemas import finite, parse

# These may name where something lies, and never a secret.
TEXTS = {".json": redact, ".html": redact_html, ".md": redact, ".csv": redact}
MAX_BYTES_BY_SUFFIX = {".json": 2**24, ".jsonl": 2**27, ".parquet": 2**28}


@dataclass(frozen=True, repr=False)
class Folder:
    """A folder, which may not exist yet."""

    storage: str  # a local folder or a URI
    name: str
    claim: str | None = None  # a file's path on its file system; once it is gone, nothing more is written

    @classmethod
    def at(cls, location: Location) -> Self:
        """Return the folder at a path or URI."""
        return cls(*parent_and_name(check_location(location)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({redact(join(self.storage, self.name))!r})"

    @cached_property
    def _location(self) -> tuple[fs.FileSystem, str]:
        return locate(join(self.storage, self.name))

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._location[0]

    @property
    def is_remote(self) -> bool:
        return not is_local(self.filesystem)

    @property
    def location(self) -> str:
        """The folder's path, or its URI if the storage is remote."""
        return join(self.storage, self.name) if self.is_remote else self.path()

    def path(self, file: str = "") -> str:
        """Return the path of a file, or of the folder, on `filesystem`."""
        return f"{self._location[1]}/{file}".rstrip("/") or self._location[1]

    # Reading ----------------------------------------------------------------------------------------

    def exists(self, file: str) -> bool:
        """Return whether a file exists, or raise StorageError if that can't be told."""
        try:
            return file_type(self.filesystem, self.path(file)) != fs.FileType.NotFound
        except OSError as error:
            raise StorageError.of(join(self.location, file), error, "read") from error

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
            notice(f"{folder}/{name} is ignored: its name isn't UTF-8.")
        return sorted(filter(is_utf8, names))

    def folders_with(self, *files: str) -> list[Self]:
        """Return the folders in this one that hold one of these files, sorted by name."""
        folders = self.file_names(fs.FileType.Directory)
        paths = {self.path(f"{name}/{file}"): name for name in folders for file in files}
        found = ask(self.filesystem, lambda: self.filesystem.get_file_info([*paths]))
        names = [paths[entry.path] for entry in found if entry.type != fs.FileType.NotFound]
        return [type(self)(self.location, name) for name in dict.fromkeys(names)]

    def read(self, file: str) -> bytes | None:
        """Return a file's content, None if it doesn't exist, or raise StorageError if it can't be read."""
        most = MAX_BYTES_BY_SUFFIX.get(PurePath(file).suffix, MAX_BYTES)
        try:
            with open_file(self.filesystem, self.path(file), inside=self.path(), max_bytes=most) as opened:
                return opened.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError.of(join(self.location, file), error, "read") from error

    @contextmanager
    def reading(self, file: str) -> Iterator[None]:
        """Turn a StorageError or a ValueError about a file's content into a DamagedFileError that names the file."""
        try:
            yield
        except StorageError as error:
            raise DamagedFileError(f"{error}.") from error
        except ValueError as error:
            raise DamagedFileError(f"{self.location}/{file} is damaged: {error}.") from error

    def read_as(self, file: str, kind: Any) -> Any:
        """Return the content of a JSON file as `kind`, see `schemas.parse`, or None if it doesn't exist.

        Raises:
            DamagedFileError: it can't be read, or doesn't hold what it should.
        """
        with self.reading(file):
            content = self.read(file)
            return None if content is None else parse(content, kind)

    # Writing ----------------------------------------------------------------------------------------

    def write(self, file: str, content: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            StorageError: the file can't be written, or another process has taken over the run.
        """
        if redact := TEXTS.get(PurePath(file).suffix):
            content = redact(content.decode()).encode()
        with self._writing(file):
            write_whole(self.filesystem, self.path(file), content)

    def write_json(self, file: str, value: Any) -> None:
        """Write a value as JSON, with null for each number that isn't finite."""
        self.write(file, json.dumps(finite(value), indent=2, allow_nan=False).encode() + b"\n")

    def append(self, file: str, content: bytes, added: bytes) -> None:
        """Append to a file that begins with `content`: in place on a disk, by a new file in an object store."""
        if self.is_remote:
            self.write(file, content + added)
            return
        with self._writing(file):
            append_to(Path(self.path(file)), content, added)

    @contextmanager
    def _writing(self, file: str) -> Iterator[None]:
        try:
            if self.claim and file_type(self.filesystem, self.claim) == fs.FileType.NotFound:
                raise PermissionError(errno.EPERM, "another process has taken over this run")
            yield
        except OSError as error:
            raise StorageError.of(join(self.location, file), error) from error

    def delete(self, file: str) -> None:
        """Delete a file if it exists."""
        with self._writing(file), suppress(FileNotFoundError):  # another process's deletion, or an earlier try's
            ask(self.filesystem, lambda: self.filesystem.delete_file(self.path(file)))

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
        try:
            marker = NamedTemporaryFile(prefix=".raycifar-", dir=existing)  # noqa: SIM115 (closed below)
        except OSError as error:
            reason = in_a_line(error) if existing.is_dir() else f"{existing} is not a folder"
            raise RequestError(f"{self.location} can't be written: {reason}. Give another {option}.") from error
        with marker:
            yield marker.name
