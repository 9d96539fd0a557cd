"""Access to paths and URIs: local disks, object stores and web servers."""

import os
import re
from pathlib import Path

import fsspec
import pyarrow as pa
from pyarrow import fs

from raycifar.errors import RequestError

URI = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def locate(location: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """Return a location's file system, and its path there.

    Args:
        location: a local path, or a URI known to pyarrow (file, s3, gs, hdfs, …) or fsspec (http, hf, abfs, …).

    Raises:
        RequestError: the URI's file system is unknown, can't be reached, or lacks its driver.
    """
    text = os.fspath(location)
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
        raise RequestError(f"{text} is on an unknown file system: {error}.") from error
    return fs.PyFileSystem(fs.FSSpecHandler(remote)), path


def read_file(location: str | os.PathLike[str]) -> bytes:
    """Return a file's content.

    Raises:
        RequestError: see `locate`.
        OSError: the file can't be read.
    """
    filesystem, path = locate(location)
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def is_local(filesystem: fs.FileSystem) -> bool:
    return isinstance(filesystem, fs.LocalFileSystem)


def write_whole(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a file so that it is complete or absent: by a rename on a disk, by one upload in an object store."""
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
