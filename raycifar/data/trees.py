"""The files of a folder, a tar or a zip, before anything is known of what they hold. Nothing is unpacked to disk."""

import bz2
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, Self

from pyarrow import fs

from raycifar.data import CIFAR100
from raycifar.data.pictures import SUFFIXES
from raycifar.errors import RequestError, in_a_line
from raycifar.storage.files import list_files, open_file
from raycifar.storage.run_folder import COMPARISON, EVALUATION, RUN

MAX_IMAGES = 200_000  # of a split: four times CIFAR-100's
MAX_BYTES = 2**30  # of a file, and of all that an archive holds
MAX_MEMBERS = 100_000  # of an archive
MAX_EXTENDED = 2**16  # bytes of a tar's long names and attributes
RECORD = 2 + CIFAR100.image_bytes  # of the official binary files: coarse label, fine label, pixels
READABLE = (
    "CIFAR-100 is read as the official binary archive or cifar-100-python; as folders of pictures, train/CLASS and "
    "test/CLASS; and as Parquet, Arrow, CSV or NumPy files whose names say train and test; each in a folder, a tar or "
    "a zip."
)
GZIP = b"\x1f\x8b"
CHUNK = 2**24  # bytes to decompress at a time, so that other threads rarely wait


@dataclass(frozen=True)
class Tree:
    """Files by their paths in a folder or archive."""

    name: str  # as the user knows it
    paths: list[PurePosixPath]  # without hidden files and files of runs
    read: Callable[[PurePosixPath], bytes]  # returns a file's content

    @classmethod
    def of(cls, name: str, paths: list[PurePosixPath], read: Callable[[PurePosixPath], bytes]) -> Self:
        shown = [path for path in paths if not any(part.startswith((".", "__")) for part in path.parts)]
        # What lies around all files is the data set's, even where something was evaluated into it.
        top = PurePosixPath(os.path.commonpath(shown)) if shown else None
        runs = {path.parent for path in shown if path.name in (RUN, COMPARISON, EVALUATION)} - {top}
        return cls(name, [path for path in shown if runs.isdisjoint(path.parents)], read)


def check_count(images: int, origin: str) -> None:
    """Refuse more images than are read; the message begins with `origin`."""
    if images > MAX_IMAGES:
        raise RequestError(f"{origin} holds more than {MAX_IMAGES:,} images, the most that are read.")


def max_bytes(path: PurePosixPath) -> int:
    """Return how large a file of that name may be."""
    return {".bin": MAX_IMAGES * RECORD, **dict.fromkeys(SUFFIXES, 2**20)}.get(path.suffix.lower(), MAX_BYTES)


def open_folder(name: str, filesystem: fs.FileSystem, folder: str) -> Tree:
    """Return the files of a folder and its subfolders; links to folders aren't followed."""
    root = f"{folder.rstrip('/')}/"
    paths = [PurePosixPath(file[len(root) :]) for file in list_files(filesystem, folder)]

    def read(path: PurePosixPath) -> bytes:
        try:
            with open_file(filesystem, f"{root}{path}", max_bytes=max_bytes(path)) as file:
                return file.read()
        except OSError as error:
            raise RequestError(f"{name}: {path} can't be read: {in_a_line(error)}.") from error

    return Tree.of(name, paths, read)


def open_zip(name: str, file: IO[bytes]) -> Tree:
    """Return the files of a zip, each of which is decompressed when it is read.

    Raises:
        RequestError: it is damaged, too large, or has a member outside its folder.
    """
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # a damaged one may cause any
        raise RequestError(f"{name} is not a readable zip archive: {in_a_line(error)}.") from error
    files: dict[PurePosixPath, zipfile.ZipInfo] = {}
    total = 0
    for member in archive.infolist():
        path = PurePosixPath(member.filename)
        total += member.file_size
        check_member(name, path, member.file_size, len(files), total)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile inflates others whole
            raise RequestError(f"{name} is refused: its member {path} isn't compressed by deflate: zip it that way.")
        if not member.is_dir():
            files[path] = member

    def read(path: PurePosixPath) -> bytes:
        try:
            with archive.open(files[path]) as member:
                return member.read(files[path].file_size)  # without a limit, zipfile inflates 1 GiB at a time
        except Exception as error:
            raise RequestError(f"{name} is damaged: its member {path} can't be read: {in_a_line(error)}.") from error

    return Tree.of(name, [*files], read)


def open_tar(name: str, stream: IO[bytes]) -> Tree:
    """Return the files of a tar, which is read in one pass.

    Raises:
        RequestError: it is not a tar, truncated, too large, or has a member outside its folder.
    """
    contents: dict[PurePosixPath, bytes] = {}
    total = 0
    try:
        with tarfile.open(fileobj=decompress(stream), mode="r|", bufsize=2**16, tarinfo=Member) as archive:
            for count, member in enumerate(archive):
                path = PurePosixPath(member.name)
                total += member.size
                if member.issym() or member.islnk():
                    raise RequestError(
                        f"{name} is refused: its member {path} is a link: make the archive with "
                        "tar -h --hard-dereference."
                    )
                check_member(name, path, member.size, count, total, inside=member.isfile() or member.isdir())
                if file := archive.extractfile(member):
                    contents[path] = file.read()
                    if len(contents[path]) < member.size:
                        raise EOFError
                archive.members.clear()  # type: ignore[attr-defined]
                archive.pax_headers = {}
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise RequestError(f"{name} is truncated: fetch it again.") from error
    except (OSError, RequestError):
        raise
    except Exception as error:  # a damaged one may cause any
        if not contents and isinstance(error, tarfile.ReadError) and "unexpected end" not in str(error):
            raise RequestError(f"{name} is not a tar or zip archive. {READABLE}") from error
        raise RequestError(f"{name} is truncated or damaged ({in_a_line(error)}): fetch it again.") from error
    return Tree.of(name, [*contents], contents.pop)


def decompress(stream: IO[bytes]) -> IO[bytes]:
    """Return the content of a stream in gzip, bzip2 or xz; `tarfile` would copy all it has for each member."""
    head = stream.read(6)
    stream.seek(0)
    if head.startswith(GZIP):
        return io.BufferedReader(Gunzipped(stream), CHUNK)
    if head.startswith(b"BZh"):
        return bz2.open(stream)
    return lzma.open(stream) if head.startswith(b"\xfd7zXZ") else stream


class Gunzipped(io.RawIOBase):
    """The content of a gzip stream, decompressed in pieces of `CHUNK`: other threads run while it is."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.rest, self.zlib = stream, b"", zlib.decompressobj(wbits=31)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self.zlib.eof:  # another gzip stream may follow
                self.rest = self.zlib.unused_data
                while len(self.rest) < len(GZIP) and (more := self.stream.read(CHUNK)):
                    self.rest += more
                if not self.rest.startswith(GZIP):
                    return 0
                self.zlib = zlib.decompressobj(wbits=31)
            data = self.rest or self.stream.read(CHUNK)
            if not data:
                raise EOFError
            out = self.zlib.decompress(data, len(buffer))
            self.rest = self.zlib.unconsumed_tail
            if out:
                buffer[: len(out)] = out
                return len(out)


class Member(tarfile.TarInfo):
    """A header of a tar, looked at before what belongs to it is read with it: long names, parts of sparse files."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it has no end mark") from error
        except tarfile.HeaderError as error:  # tarfile takes it for the end, unless it is the first
            raise tarfile.ReadError(str(error)) from error
        if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) and header.size > MAX_EXTENDED:
            raise ValueError(f"a header of {header.size:,} bytes")
        if header.type == tarfile.GNUTYPE_SPARSE:
            header._proc_gnusparse_10()
        return header

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise ValueError("a sparse file")  # the list of its parts has no limit


def check_member(name: str, path: PurePosixPath, size: int, count: int, total: int, *, inside: bool = True) -> None:
    """Refuse an archive by a member, before it is read: it has `count` members and `total` bytes up to this one."""
    if path.is_absolute() or ".." in path.parts or not inside:
        raise RequestError(f"{name} is refused: its member {str(path)!r} points outside the archive's folder.")
    if count >= MAX_MEMBERS:
        raise RequestError(f"{name} is refused: it has more than {MAX_MEMBERS:,} members, and CIFAR-100 60,000 images.")
    if size > max_bytes(path) or total > MAX_BYTES:
        raise RequestError(
            f"{name} is refused: its member {path} has {size:,} bytes, {total:,} with those before it, which is more "
            "than any copy of CIFAR-100."
        )
