"""Access to paths and URIs: local disks, object stores and web servers. All reading and writing goes through here.

A failure raises an OSError whose message says in plain words what is wrong.
"""

import errno
import io
import itertools
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from pyarrow import fs

from raycifar.errors import RequestError, StorageError, in_a_line, notice
from raycifar.storage import remote
from raycifar.storage.locations import Location, check_location, to_path

Answer = TypeVar("Answer")

MAX_BYTES = 2**32  # of a file: weights of a thousand million parameters
NO_FILE = "it is a device, a pipe or a socket, not a file"


def locate(location: Location, *, to_write: bool = False) -> tuple[fs.FileSystem, str]:
    """Return the file system of a local path or a URI, and its path there.

    Raises:
        RequestError: the URI is of a kind that isn't read, or written; or it can't be reached, or lacks its driver.
    """
    text = check_location(location, to_write=to_write)
    if path := to_path(text):
        return fs.LocalFileSystem(), path
    try:
        return remote.ask(lambda beat: remote.connect(text))
    except OSError as error:
        raise RequestError(f"{text} can't be reached: {error}.") from error


def ask(filesystem: fs.FileSystem, question: Callable[[], Answer]) -> Answer:
    """Return a file system's answer, and wait for it only for a limited time; see `remote.ask`."""
    return question() if is_local(filesystem) else remote.ask(lambda beat: question())


def file_type(filesystem: fs.FileSystem, path: str) -> fs.FileType:
    """Return what is there: `File`, `Directory`, `NotFound`, or `Unknown` for a device, a pipe or a socket."""
    return ask(filesystem, lambda: filesystem.get_file_info(path).type)


def locate_images(location: str) -> tuple[fs.FileSystem, str, fs.FileType]:
    """Return the file system of images, their path on it, and what is there; see `file_type`.

    Raises:
        RequestError: that can't be told.
    """
    filesystem, path = locate(location)
    try:
        return filesystem, path, file_type(filesystem, path)
    except OSError as error:
        raise RequestError(f"{location} can't be read: {in_a_line(error)}.") from error


def list_files(filesystem: fs.FileSystem, folder: str) -> list[str]:
    """Return the paths of all files in a folder and its subfolders, sorted; links to folders are not followed."""
    if is_local(filesystem):
        found = [
            Path(top, name) for top, *names in os.walk(folder, onerror=raise_it) for name in itertools.chain(*names)
        ]
        files = {path for path in found if path.is_file()}
        if links := [path for path in found if path not in files and path.is_symlink() and path.name[0] != "."]:
            what = "link to a folder" if links[0].is_dir() else "link that leads nowhere"
            more = f", and {len(links) - 1:,} more" if links[1:] else ""
            notice(f"{links[0]} is skipped{more}: it is a {what}.")
        return sorted(map(str, files))
    return sorted(entry.path for entry in remote.list_all(filesystem, folder) if entry.is_file)


def raise_it(error: OSError) -> None:
    raise error


def read_file(location: Location) -> bytes:
    """Return a file's content; for errors, see `locate` and `open_file`."""
    with open_file(*locate(location)) as file:
        return file.read()


def open_file(
    filesystem: fs.FileSystem, path: str, *, inside: str | None = None, max_bytes: int = MAX_BYTES
) -> IO[bytes]:
    """Open a file to be read; one that isn't local is read into memory. No fifo, device or socket is waited for.

    Args:
        inside: a folder that the file must be in, links followed.

    Raises:
        OSError: it can't be opened, is not a file, is too large, or is outside the folder.
    """
    if not is_local(filesystem):
        return io.BytesIO(remote.download(filesystem, path, max_bytes))
    if inside and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(inside)):
        raise PermissionError(errno.EACCES, "it is a link to a place outside the folder", path)
    file = open(path, "rb", opener=open_regular)  # noqa: SIM115 (the caller closes it)
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        file.close()
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {max_bytes:,} are read", path)
    return file


def open_regular(path: str, flags: int) -> int:
    """Return a descriptor of a regular file; a fifo without a writer would otherwise block."""
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, NO_FILE, path)


def is_local(filesystem: fs.FileSystem) -> bool:
    return isinstance(filesystem, fs.LocalFileSystem)


def write_file(location: Location, content: bytes) -> None:
    """Write a file, whole or not at all, with the folders above it.

    Raises:
        RequestError: see `locate`.
        StorageError: the file can't be written.
    """
    filesystem, path = locate(location, to_write=True)
    try:
        write_whole(filesystem, path, content)
    except OSError as error:
        raise StorageError.of(os.fspath(location), error) from error


def write_whole(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a file so that it is complete or absent: by a rename on a disk, by one upload in an object store."""
    if not is_local(filesystem):
        remote.upload(filesystem, path, content)
        return
    target = Path(path)
    if target.exists() and not (target.is_file() or target.is_dir()):  # the rename would replace /dev/null for everyone
        raise OSError(errno.EINVAL, NO_FILE, path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        there = next(folder for folder in target.parents if os.path.lexists(folder))
        raise NotADirectoryError(errno.ENOTDIR, f"{there} is not a folder", path) from error
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
    with suppress(OSError):  # not every system can sync a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def append_to(path: Path, content: bytes, added: bytes) -> None:
    """Append to a file on a disk that begins with `content`, or is shorter and is given that; never through a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with open(path, "r+b", opener=lambda name, _: open_regular(name, flags)) as file:
        kept = len(content) if os.fstat(file.fileno()).st_size >= len(content) else 0
        file.truncate(kept)
        file.seek(kept)
        file.write(content[kept:] + added)
        file.flush()
        os.fsync(file.fileno())
