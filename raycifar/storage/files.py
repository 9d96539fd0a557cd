"""Where a path or URI leads: one way to reach local disks, object stores and web servers."""

import os
import re
from pathlib import Path

import fsspec
import pyarrow as pa
from pyarrow import fs

from raycifar.errors import RequestError

URI = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def locate(place: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """Return the file system that `place` is on, and its path there.

    Args:
        place: a local path, absolute or relative, or a URI that pyarrow (file, s3, gs, hdfs, …) or
            fsspec (http, hf, abfs, …) knows.

    Raises:
        RequestError: no file system is known for the URI, or its driver isn't installed.
    """
    text = os.fspath(place)
    if not URI.match(text):
        return fs.LocalFileSystem(), str(Path(text).expanduser().resolve())
    try:
        return fs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    except OSError as error:
        raise RequestError(f"{text} can't be reached: {error}.") from error
    try:
        remote, path = fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise RequestError(f"{text} is on no file system known here: {error}.") from error
    return fs.PyFileSystem(fs.FSSpecHandler(remote)), path


def is_local(filesystem: fs.FileSystem) -> bool:
    return isinstance(filesystem, fs.LocalFileSystem)


def write_whole(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a file that is complete or absent: a rename on a disk, one upload in an object store."""
    if not is_local(filesystem):
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
