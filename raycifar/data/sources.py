"""Reading CIFAR-100 in any of its layouts.

The layout of a path or URI is detected from its content. Nothing is unpacked to disk, and a pickle may name no class
but NumPy's arrays.
"""

import io
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import platformdirs
import pooch
import pyarrow as pa
import pyarrow.parquet as pq
import requests
from PIL import Image
from pyarrow import fs

from raycifar.data import CIFAR100 as INFO
from raycifar.data.synthetic import SYNTHETIC, synthetic
from raycifar.data.tables import Source, to_table
from raycifar.errors import RequestError, in_a_line
from raycifar.storage.files import file_type, list_files, locate, open_file
from raycifar.storage.locations import to_path

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
MD5 = "03b5dce01913d631647c71ecec9e9cb8"

CHUNK = 2**24  # bytes to decompress at a time, so that other threads rarely wait
RECORD = 2 + INFO.image_bytes  # coarse label, fine label, pixels
LAYOUTS = (
    "CIFAR-100 is read as the official binary archive or its folder, as cifar-100-python (archive or folder), "
    "or as a folder of Parquet files with the columns img.bytes, fine_label and coarse_label"
)
SYNTHETIC_SIZE = re.compile(rf"{SYNTHETIC}:(\d+)")


def load(name: str, seed: int = 0) -> Source:
    """Return the data set that `--data` names: cifar100, synthetic, a path or a URI.

    Raises:
        RequestError: the data set can't be read, or isn't CIFAR-100.
    """
    if name == SYNTHETIC:
        return synthetic(seed=seed)
    if match := SYNTHETIC_SIZE.fullmatch(name):
        if not (count := int(match[1])) or count % INFO.num_classes:
            raise RequestError(
                f"{name}: the number must be a multiple of {INFO.num_classes}, for equally many images of each class."
            )
        return synthetic(count, seed=seed)
    filesystem, path = locate(fetch() if name == "cifar100" else name)
    try:
        kind = file_type(filesystem, path)
        if kind == fs.FileType.NotFound:
            raise RequestError(f"{name} does not exist: give --data a path, a URI, cifar100 or synthetic.")
        if kind == fs.FileType.Directory:
            return read_folder(name, filesystem, path)
        return read_file(name, filesystem, path)
    except OSError as error:
        raise RequestError(f"{name} can't be read: {in_a_line(error)}.") from error


def absolute_name(name: str) -> str:
    """Return a name that is valid in any working directory: local paths become absolute."""
    if name == "cifar100" or name == SYNTHETIC or SYNTHETIC_SIZE.fullmatch(name):
        return name
    return to_path(name) or name


def cache_folder() -> Path:
    return Path(os.environ.get("RAYCIFAR_CACHE") or platformdirs.user_cache_path("raycifar"))


def fetch(url: str = URL, md5: str = MD5, *, progress: bool = True) -> Path:
    """Return the archive's path in the cache; the archive is downloaded once, checked and renamed into place.

    Raises:
        RequestError: the download failed.
    """
    file = PurePosixPath(url).name
    base = url.removesuffix(file)
    store = pooch.create(path=cache_folder(), base_url=base, registry={file: f"md5:{md5}"}, retry_if_failed=2)
    pooch.get_logger().setLevel("ERROR")
    try:
        return Path(store.fetch(file, downloader=pooch.HTTPDownloader(progressbar=progress, timeout=30)))
    except (requests.RequestException, OSError, ValueError) as error:
        reason = "its md5 differs" if isinstance(error, ValueError) else type(error).__name__
        raise RequestError(
            f"CIFAR-100 can't be downloaded from {url} ({reason}): give a copy with --data PATH or "
            "RAYCIFAR_DATA=PATH, or use --data synthetic."
        ) from error


def read_file(name: str, filesystem: fs.FileSystem, path: str) -> Source:
    with open_file(filesystem, path) as file:
        head = file.read(512)
    if head[:4] == b"PAR1":
        raise RequestError(f"{name} is a single Parquet file, so one split: give the folder of train and test files.")
    with open_file(filesystem, path) as file:
        contents = read_archive(name, file)
    return read_layout(name, contents.get, set(contents))


def read_archive(name: str, stream: IO[bytes]) -> dict[str, bytes]:
    """Return the archive's files by base name, read in one pass and never unpacked.

    Raises:
        RequestError: the archive is not a tar, is truncated, or has a member outside its folder.
    """
    contents = {}
    try:
        with tarfile.open(fileobj=stream, mode="r|*", bufsize=CHUNK) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                    raise RequestError(
                        f"{name} is refused: its member {member.name!r} points outside the archive's folder."
                    )
                if member.isfile() and (content := archive.extractfile(member)):
                    contents[path.name] = content.read()
                    if len(contents[path.name]) < member.size:
                        raise EOFError
    except (EOFError, zlib.error) as error:
        raise RequestError(f"{name} is truncated: fetch it again.") from error
    except tarfile.ReadError as error:
        if contents or "unexpected end" in str(error):
            raise RequestError(f"{name} is truncated or damaged ({error}): fetch it again.") from error
        raise RequestError(f"{name} is not a tar archive. {LAYOUTS}.") from error
    return contents


def read_folder(name: str, filesystem: fs.FileSystem, path: str) -> Source:
    files = list_files(filesystem, path)
    parquet = [file for file in files if file.endswith(".parquet")]
    if parquet:
        return read_parquet(name, filesystem, parquet)
    paths = {PurePosixPath(file).name: file for file in files}

    def read(base: str) -> bytes:
        with open_file(filesystem, paths[base]) as file:
            return file.read()

    return read_layout(name, read, set(paths))


def read_layout(name: str, read: Callable[[str], bytes | None], names: set[str]) -> Source:
    """Return the data set from files in the binary or the Python layout, told apart by their names."""
    for suffix, parse in ((".bin", parse_records), ("", parse_pickle)):
        files = {split: f"{split}{suffix}" for split in ("train", "test")}
        if names.issuperset(files.values()):
            tables = {split: parse(read(file) or b"", f"{name}: {file}") for split, file in files.items()}
            return Source(name, **tables)
    found = ", ".join(sorted(names)[:5]) or "nothing"
    raise RequestError(f"{name} is not CIFAR-100: it holds {found}. {LAYOUTS}.")


def parse_records(content: bytes, origin: str) -> pa.Table:
    """Return the records of the official binary layout: coarse label, fine label, pixels."""
    if len(content) % RECORD:
        raise RequestError(f"{origin} has {len(content):,} bytes, not a multiple of a CIFAR-100 record's {RECORD:,}.")
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    return to_table(records[:, 2:], records[:, 1], records[:, 0], origin)


class ArraysOnly(pickle.Unpickler):
    """Unpickles builtin containers and NumPy's arrays, which cifar-100-python consists of, and nothing else."""

    ADMITTED = frozenset(
        (module, name)
        for core in ("numpy.core", "numpy._core")
        for module, name in (
            (f"{core}.multiarray", "_reconstruct"),
            (f"{core}.multiarray", "scalar"),
            (f"{core}.numeric", "_frombuffer"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        )
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # bytes in protocol 2
            return lambda text, encoding: (
                text.encode("latin1") if encoding == "latin1" else self.refuse("_codecs", name)
            )
        if (module, name) not in self.ADMITTED:
            self.refuse(module, name)
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)

    def refuse(self, module: str, name: str) -> None:
        raise RequestError(f"the pickle asks for {module}.{name}, which no copy of CIFAR-100 needs")


def parse_pickle(content: bytes, origin: str) -> pa.Table:
    """Return the images of a cifar-100-python file; the pickle can't run code."""
    try:
        raw = ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except RequestError as error:
        raise RequestError(f"{origin} is refused: {error}.") from error
    except Exception as error:  # a damaged pickle may cause any
        raise RequestError(f"{origin} is not a readable pickle: {error}.") from error
    if not isinstance(raw, dict):
        raise RequestError(f"{origin} holds a {type(raw).__name__}, not the dictionary of cifar-100-python.")
    fields = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in raw.items()}
    try:
        pixels = np.asarray(fields["data"])
        fine, coarse = (np.asarray(fields[key], np.int64) for key in ("fine_labels", "coarse_labels"))
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{origin} is not from cifar-100-python: {error!s} is missing or unusable.") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != INFO.image_bytes:
        raise RequestError(
            f"{origin}: the images are {pixels.dtype} of shape {pixels.shape}, not uint8 (N, {INFO.image_bytes})."
        )
    if not len(pixels) == len(fine) == len(coarse):
        raise RequestError(f"{origin} has {len(pixels)} images, {len(fine)} fine and {len(coarse)} coarse labels.")
    return to_table(pixels, fine, coarse, origin)


def read_parquet(name: str, filesystem: fs.FileSystem, paths: list[str]) -> Source:
    """Return the data set from Parquet in the Hugging Face layout, whose splits are told apart by file or folder."""
    tables = {}
    for split in ("train", "test"):
        mine = [path for path in paths if PurePosixPath(path).name.startswith(split)]
        mine = mine or [path for path in paths if split in PurePosixPath(path).parts]
        if not mine:
            raise RequestError(f"{name} has no {split} split: no Parquet file's name begins with {split!r}.")
        parts = [parse_parquet(filesystem, path, f"{name}: {PurePosixPath(path).name}") for path in mine]
        tables[split] = pa.concat_tables(parts)
    return Source(name, **tables)


def parse_parquet(filesystem: fs.FileSystem, path: str, origin: str) -> pa.Table:
    try:
        with open_file(filesystem, path) as stream, pq.ParquetFile(stream) as parquet:
            missing = {"img", "fine_label", "coarse_label"} - set(parquet.schema_arrow.names)
            if missing:
                raise RequestError(f"{origin} lacks the columns {', '.join(sorted(missing))}. {LAYOUTS}.")
            table = parquet.read(["img.bytes", "fine_label", "coarse_label"])
    except pa.ArrowException as error:
        raise RequestError(f"{origin} is not a readable Parquet file: {error}.") from error
    files = table["img"].combine_chunks().flatten()[0]
    pixels = np.empty((len(files), *INFO.image_shape), np.uint8)
    for row, file in enumerate(files):
        try:
            pixels[row] = np.asarray(Image.open(io.BytesIO(file.as_py())).convert("RGB")).transpose(2, 0, 1)
        except (OSError, TypeError, ValueError) as error:
            size = f"{INFO.image_size}×{INFO.image_size}"
            raise RequestError(f"{origin}: image {row} is not a {size} image: {error}.") from error
    return to_table(pixels, table["fine_label"].to_numpy(), table["coarse_label"].to_numpy(), origin)
