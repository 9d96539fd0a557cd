"""cifar-100-python: the pickles train and test. Nothing that a pickle names is ever called or made."""

import io
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from raycifar.data.dataset import to_table
from raycifar.data.layouts.arrays import to_channels_first
from raycifar.data.trees import Tree, check_count
from raycifar.errors import RequestError, in_a_line
from raycifar.storage.pickles import Dissector, is_array, to_array

NUMPY = ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
NAMES = {  # in copies of CIFAR-100
    *("numpy.ndarray", "numpy.dtype", "_codecs.encode", "collections.OrderedDict", "__builtin__.bytes"),
    *(f"{core}.{name}" for core in ("numpy.core", "numpy._core") for name in NUMPY),
}
MAX_NAMES, MAX_NAME = 1000, 100  # of classes, and characters of one


def read(tree: Tree, paths: list[PurePosixPath], origin: str) -> pa.Table:
    dissector = Dissector(io.BytesIO(tree.read(paths[0])), encoding="bytes")
    try:
        found = dissector.load()
    except Exception as error:  # a damaged pickle may cause any
        raise RequestError(f"{origin} is not a readable pickle: {in_a_line(error)}.") from error
    if others := sorted(dissector.named.keys() - NAMES):
        raise RequestError(f"{origin} is refused: the pickle asks for {others[0]}, which no copy of CIFAR-100 needs.")
    if not isinstance(found, dict):
        raise RequestError(f"{origin} holds a {type(found).__name__}, not the dictionary of cifar-100-python.")
    fields = {to_text(key): value for key, value in found.items()}
    if missing := [name for name in ("data", "fine_labels") if fields.get(name) is None]:
        raise RequestError(f"{origin} is not from cifar-100-python: it lacks {' and '.join(missing)}.")
    try:
        pixels = to_channels_first(to_array(fields["data"]), f"{origin}: data")
        names = {level: f"{level}_labels" for level in ("fine", "coarse")}
        given = {level: read_labels(fields[name]) for level, name in names.items() if fields.get(name) is not None}
    except (ValueError, TypeError) as error:
        raise RequestError(f"{origin} is not from cifar-100-python: {error}.") from error
    check_count(len(pixels), origin)
    return to_table(pixels, given, origin)


def read_names(content: bytes) -> dict[str, list[str]]:
    """Return the names in the pickle `meta`, by level; none if it is damaged: the images can be read without."""
    try:
        found = Dissector(io.BytesIO(content), encoding="bytes").load()
        fields = {to_text(key): value for key, value in found.items()}
        names = {level: fields.get(f"{level}_label_names") for level in ("fine", "coarse")}
        return {level: list(map(to_name, each[:MAX_NAMES])) for level, each in names.items() if isinstance(each, list)}
    except Exception:  # a damaged pickle may cause any
        return {}


def to_name(value: Any) -> str:
    """Return the beginning of a class's name; a pickle may hold one of any length many times, or anything else."""
    if not isinstance(value, str | bytes):
        raise TypeError
    return to_text(value[:MAX_NAME])


def to_text(value: Any) -> Any:
    """Return text that Python 2 pickled, as bytes, and all else as it is."""
    return value.decode("latin1") if isinstance(value, bytes) else value


def read_labels(value: Any) -> Any:
    """Return labels as an array or a list of integers."""
    if isinstance(value, list):
        return [int(to_array(label)) if is_array(label) else label for label in value]
    return to_array(value)
