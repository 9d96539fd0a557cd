"""cifar-100-python: the pickles train and test. Nothing that a pickle names is ever called or made."""

import io
import math
import pickle
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from raycifar.data import CIFAR100 as INFO
from raycifar.data.labels import to_labels
from raycifar.data.tables import to_table
from raycifar.data.trees import MOST_IMAGES, Tree
from raycifar.errors import RequestError, in_a_line

NUMBER_TYPES = {f"{kind}{size}" for kind in "ui" for size in (1, 2, 4, 8)}


class StandIn:
    """What a pickle asks for in place of NumPy's functions and types: it only keeps what it is given."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Dtype(StandIn): ...


class Scalar(StandIn): ...


class Array(StandIn): ...


class ArrayType(StandIn): ...


class FrombufferArray(StandIn): ...


class Encoded(StandIn):
    """Bytes in a pickle of protocol 2 that Python 3 wrote: text, and its encoding."""


class Fields(dict[Any, Any]):
    """A dictionary of which the keys are names: to hash others may take all of the stack."""

    def __setitem__(self, key: Any, value: Any) -> None:
        name = to_bytes(key)
        super().__setitem__(name.decode("latin1") if isinstance(name, bytes) else str(name), value)


class InertUnpickler(pickle._Unpickler):
    """Unpickles what cifar-100-python consists of, with inert objects in place of NumPy's.

    It is Python's own implementation in Python: the faster one gives memory to whatever size a pickle claims.
    """

    STAND_INS = {  # noqa: RUF012
        **{
            (f"{core}.{module}", name): stand_in
            for core in ("numpy.core", "numpy._core")
            for module, name, stand_in in (
                ("multiarray", "_reconstruct", Array),
                ("multiarray", "scalar", Scalar),
                ("numeric", "_frombuffer", FrombufferArray),
            )
        },
        ("numpy", "ndarray"): ArrayType,
        ("numpy", "dtype"): Dtype,
        ("_codecs", "encode"): Encoded,
    }
    dispatch = {  # noqa: RUF012
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.DICT)
    }

    def find_class(self, module: str, name: str) -> type[StandIn]:
        if (module, name) not in self.STAND_INS:
            raise RequestError(f"the pickle asks for {module[:80]}.{name[:80]}, which no copy of CIFAR-100 needs")
        return self.STAND_INS[module, name]

    def load_fields(self: Any) -> None:
        self.append(Fields())

    def load_bytearray(self: Any) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch[pickle.EMPTY_DICT[0]] = load_fields
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray


def read(tree: Tree, paths: list[PurePosixPath], origin: str) -> pa.Table:
    content = tree.read(paths[0])
    try:
        fields = InertUnpickler(io.BytesIO(content), encoding="bytes").load()
    except RequestError as error:
        raise RequestError(f"{origin} is refused: {error}.") from error
    except Exception as error:  # a damaged pickle may cause any
        raise RequestError(f"{origin} is not a readable pickle: {in_a_line(error)}.") from error
    if not isinstance(fields, Fields):
        raise RequestError(f"{origin} holds a {type(fields).__name__}, not the dictionary of cifar-100-python.")
    if missing := [name for name in ("data", "fine_labels") if name not in fields]:
        raise RequestError(f"{origin} is not from cifar-100-python: {' and '.join(missing)} is missing.")
    try:
        pixels = to_array(fields["data"])
        fine, coarse = (read_labels(fields.get(f"{level}_labels")) for level in ("fine", "coarse"))
    except ValueError as error:
        raise RequestError(f"{origin} is not from cifar-100-python: {error}.") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != INFO.image_bytes:
        raise RequestError(
            f"{origin}: the images are {pixels.dtype} of shape {pixels.shape}, not uint8 (N, {INFO.image_bytes})."
        )
    counts = [len(labels) for labels in (fine, coarse) if labels is not None]
    if set(counts) != {len(pixels)} or len(pixels) > MOST_IMAGES:
        raise RequestError(f"{origin} has {len(pixels):,} images and {' and '.join(f'{n:,}' for n in counts)} labels.")
    fine = to_labels(fine, "fine", origin)
    return to_table(pixels, fine, None if coarse is None else to_labels(coarse, "coarse", origin), origin)


def read_labels(value: Any) -> Any:
    """Return labels as an array or a list of integers; None where there are none."""
    if isinstance(value, list):
        return [int(to_array(label)) if isinstance(label, Scalar) else label for label in value]
    return None if value is None else to_array(value)


def to_array(value: Any) -> np.ndarray:
    """Return the array that a stand-in describes, made from its bytes with a type of our own.

    Raises:
        ValueError: it isn't an array of integers, or is malformed.
    """
    match value:
        case Array(state=(_, shape, dtype, fortran, data)):
            pass
        case FrombufferArray(args=(data, dtype, shape, order)):
            fortran = order == "F"
        case Scalar(args=(dtype, data)):
            shape, fortran = (), False
        case _:
            raise ValueError(f"a {type(value).__name__} stands where an array should")
    data = to_bytes(data)
    match dtype:
        case Dtype(args=(str() | bytes() as code, *_), state=(_, str() | bytes() as order, *_)):
            code, order = (text.decode("latin1") if isinstance(text, bytes) else text for text in (code, order))
        case _:
            raise ValueError("the type of an array is not understood")
    sizes = shape if isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape) else None
    if code not in NUMBER_TYPES or order not in "<>|=" or sizes is None or len(sizes) > 4:
        raise ValueError(f"an array is of type {code[:20]!r}, not of integers")
    made = np.dtype(code).newbyteorder({"|": "=", "": "="}.get(order, order))  # type: ignore[arg-type]
    if not isinstance(data, bytes | bytearray) or math.prod(sizes) * made.itemsize != len(data):
        raise ValueError(f"an array of shape {sizes} doesn't have its bytes")
    return np.frombuffer(data, made).reshape(sizes, order="F" if fortran else "C")


def to_bytes(value: Any) -> Any:
    """Return the bytes that `Encoded` stands for, and anything else as it is."""
    match value:
        case Encoded(args=(str() as text, "latin1" | b"latin1")):
            return text.encode("latin1")
    return value
