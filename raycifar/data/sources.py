"""Where a data set comes from: the network, a path or URI, or nowhere."""

import os
import re
import tempfile
from pathlib import Path, PurePosixPath

import platformdirs
import pooch
import requests
from pyarrow import fs

from raycifar.data import CIFAR100
from raycifar.data.dataset import Source
from raycifar.data.layouts import SPLITS
from raycifar.data.layouts.detect import find, read_tree
from raycifar.data.synthetic import SYNTHETIC, synthetic
from raycifar.data.trees import MAX_BYTES, Tree, open_folder, open_tar, open_zip
from raycifar.errors import RequestError, in_a_line
from raycifar.machine import private_folder
from raycifar.storage.files import file_type, locate, open_file
from raycifar.storage.locations import join, to_path
from raycifar.storage.remote import plain

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
MD5 = "03b5dce01913d631647c71ecec9e9cb8"

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".tar.bz2", ".tar.xz", ".zip", ".npz")
# Formats whose files hold one split, by how a file begins.
ONE_SPLIT = {b"PAR1": "Parquet", b"ARROW1": "Arrow", b"\xff\xff\xff\xff": "Arrow", b"\x93NUMPY": "NumPy"}
SYNTHETIC_SIZE = re.compile(rf"{SYNTHETIC}:(.*)")
MAX_SYNTHETIC = 1_000_000  # images, 3 GB


def load(name: str, *, test_alone: bool = False) -> Source:
    """Return the data set that `--data` names: cifar100, synthetic, a path or a URI.

    Args:
        test_alone: take a test set without training images, too.

    Raises:
        RequestError: the data set can't be read, or isn't CIFAR-100.
    """
    if name == SYNTHETIC:
        return synthetic()
    if match := SYNTHETIC_SIZE.fullmatch(name):
        count = int(match[1]) if re.fullmatch(r"\d{1,9}", match[1]) else 0
        if not 0 < count <= MAX_SYNTHETIC or count % CIFAR100.num_classes:
            raise RequestError(
                f"{name}: write {SYNTHETIC}:N, where N is a multiple of {CIFAR100.num_classes}, for equally many "
                f"images of each class, and at most {MAX_SYNTHETIC:,}."
            )
        return synthetic(count)
    filesystem, path = locate(official_archive() if name == "cifar100" else name)
    try:
        kind = file_type(filesystem, path)
        if kind == fs.FileType.NotFound:
            raise RequestError(f"{name} does not exist: give --data a path, a URI, cifar100 or synthetic.")
        if kind == fs.FileType.Directory:
            return read_folder(name, filesystem, path, test_alone=test_alone)
        return read_file(name, filesystem, path, test_alone=test_alone)
    except OSError as error:
        inside = str(error.filename or "").removeprefix(path).lstrip("/")
        raise RequestError(f"{join(name, inside) if inside else name} can't be read: {in_a_line(error)}.") from error


def absolute_name(name: str) -> str:
    """Return a name that is valid in any working directory: local paths become absolute."""
    return (to_path(name) or name) if is_location(name) else name


def is_location(name: str) -> bool:
    """Return whether `--data` is a path or a URI."""
    return name not in ("cifar100", SYNTHETIC) and not SYNTHETIC_SIZE.fullmatch(name)


def cache_folder(file: str | None = None) -> Path:
    """Return this user's folder of downloads, or a private one if that can't be written and doesn't hold `file`."""
    if given := os.environ.get("RAYCIFAR_CACHE"):
        return Path(given)
    folder = platformdirs.user_cache_path("raycifar")
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if (file and (folder / file).exists()) or os.access(nearest, os.W_OK):
        return folder
    return private_folder("raycifar", tempfile.gettempdir())


def official_archive() -> Path:
    """Return the path of the archive in the cache, for a command that could read another copy."""
    try:
        return fetch()
    except RequestError as error:
        raise RequestError(
            f"{error} Or give a copy with --data PATH or RAYCIFAR_DATA=PATH, or use --data synthetic."
        ) from error


def fetch(url: str = URL, md5: str = MD5) -> Path:
    """Return the path of the archive in the cache, into which it is downloaded once, and checked.

    Raises:
        RequestError: it can't be downloaded, or the cache can't be written.
    """
    name = PurePosixPath(url).name
    folder = cache_folder(name)
    store = pooch.create(folder, url.removesuffix(name), registry={name: f"md5:{md5}"}, retry_if_failed=2)
    pooch.get_logger().setLevel("ERROR")
    try:
        return Path(store.fetch(name, downloader=pooch.HTTPDownloader(progressbar=True, timeout=30)))
    except (requests.RequestException, ValueError) as error:
        reason = plain(error) if isinstance(error, requests.RequestException) else "its md5 differs"
        raise RequestError(
            f"CIFAR-100 can't be downloaded from {url} ({reason}): download it where that is possible, and copy it to "
            f"{folder / name}."
        ) from error
    except OSError as error:
        raise RequestError(
            f"CIFAR-100 can't be kept in {folder} ({in_a_line(error)}): set RAYCIFAR_CACHE to another folder."
        ) from error


def read_file(name: str, filesystem: fs.FileSystem, path: str, *, test_alone: bool) -> Source:
    """Return the data set in a single file: an archive, or a file of test images."""
    with open_file(filesystem, path, max_bytes=MAX_BYTES) as file:
        head = file.read(8)
        file.seek(0)
        kind = next((kind for magic, kind in ONE_SPLIT.items() if head.startswith(magic)), None)
        file_name = PurePosixPath(PurePosixPath(path).name)
        if test_alone and any("test" in splits for splits in find([file_name]).values()):
            tree = Tree.of(name, [file_name], lambda _: file.read())
            return read_tree(tree, test_alone=True)
        if kind or path.endswith(".csv"):
            needed = "its name must say test" if test_alone else "give the folder of train and test files"
            raise RequestError(f"{name} is a single {kind or 'CSV'} file, so one split: {needed}.")
        opened = open_zip if head.startswith(b"PK") else open_tar
        return read_tree(opened(name, file), test_alone=test_alone)


def read_folder(name: str, filesystem: fs.FileSystem, path: str, *, test_alone: bool) -> Source:
    """Return the data set in a folder: its files, or the one archive that it holds."""
    tree = open_folder(name, filesystem, path)
    archives = [file for file in tree.paths if file.name.endswith(ARCHIVES)]
    if not any(len(splits) == len(SPLITS) for splits in find(tree.paths).values()) and archives:
        if len(archives) > 1:
            raise RequestError(
                f"{name} holds more than one archive, {archives[0]} and {archives[1]}: give one of them."
            )
        archive = str(archives[0])
        return read_file(join(name, archive), filesystem, f"{path.rstrip('/')}/{archive}", test_alone=test_alone)
    return read_tree(tree, test_alone=test_alone)
