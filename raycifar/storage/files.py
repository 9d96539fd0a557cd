"""Access to paths and URIs: local disks, object stores and web servers."""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import fsspec
import pyarrow as pa
from pyarrow import fs

from raycifar.errors import RequestError

URI = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)
MOST_BYTES = 2**32  # of a file: weights of a thousand million parameters


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
        OSError: the file can't be read; see `open_file`.
    """
    with open_file(*locate(location)) as file:
        return file.read()


def open_file(
    filesystem: fs.FileSystem, path: str, *, inside: str | None = None, most_bytes: int = MOST_BYTES
) -> IO[bytes]:
    """Open a file to be read. Nothing else than a file is waited for: no fifo, device or socket.

    Args:
        inside: a folder that the file must be in, links followed.

    Raises:
        OSError: it can't be opened, is not a file, is too large, or is outside the folder.
    """
    if not is_local(filesystem):
        file = filesystem.open_input_file(path)
        size = file.size()
    else:
        if inside and not Path(path).resolve().is_relative_to(Path(inside).resolve()):
            raise PermissionError(errno.EACCES, "it is a link to a place outside the folder", path)
        file = open(path, "rb", opener=open_regular)  # noqa: SIM115 (the caller closes it)
        size = os.fstat(file.fileno()).st_size
    if size > most_bytes:
        file.close()
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, and {most_bytes:,} are read at most", path)
    return file


def open_regular(path: str, flags: int) -> int:
    """Return a descriptor of a regular file; a fifo without a writer would otherwise be waited for."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "it is a device, a pipe or a socket, not a file", path)


def list_files(filesystem: fs.FileSystem, folder: str) -> Iterator[str]:
    """Yield the paths of the files in a folder and its subfolders; a link to a folder is not followed."""
    if is_local(filesystem):
        for path, _, names in os.walk(folder):
            yield from (f"{path}/{name}" for name in names)
        return
    entries = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    yield from (entry.path for entry in entries if entry.is_file)


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
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    file = part.open("xb")  # not through a link: it fails if anything is there
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
