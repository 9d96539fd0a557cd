"""Pickles, taken apart: nothing that one names is imported, built or called."""

import io
import math
import pickle
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np

MAX_STEPS = 2**21  # of a pickle; they take seconds, and half a gigabyte
MAX_NAMES = 2**12
MAX_ARGS = 2**8  # of a call, which may be given the same ones many times
EXTENSIONS = (pickle.EXT1, pickle.EXT2, pickle.EXT4)  # names that are registered in a process
NUMBER_TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")  # of NumPy's arrays


class Call:
    """What a pickle would call: the callable's name, its arguments, and the state that the result would be given."""

    __slots__ = ("args", "state")
    name: ClassVar[str] = "set"
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Self:
        if len(args) > MAX_ARGS:
            raise pickle.UnpicklingError(f"the pickle has a call with more than {MAX_ARGS} arguments")
        call = object.__new__(cls)
        call.args, call.state = args, None
        return call

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Skip what a mapping of an unknown kind holds."""

    def append(self, items: Any) -> None:
        """Skip what a list or a set of an unknown kind holds."""

    add = extend = append


class Items(dict[Any, Any]):
    """What stands for a dictionary: items whose keys are not names or numbers are skipped.

    Hashing a nested tuple takes as much of the stack as the tuple is deep.
    """

    name: ClassVar[str] = "dictionary"

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str | bytes | int):
            super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        """Skip its attributes."""


def no_bytes() -> bytes:
    """Return b"", which Python 3 writes as a call in protocol 2; a call with arguments is damage."""
    return b""


class Dissector(pickle._Unpickler):
    """Unpickles containers, numbers and strings; a `Call` stands for all else, and for sets.

    It is pickle's unpickler in Python: the one in C takes as much memory as a file asks for, even one of 20 bytes.

    Args:
        content: `load` reads one pickle of it, and may raise any exception if that is damaged.
        persistent: returns what stands for an object that is kept outside the pickle.
        options: of pickle's Unpickler.
    """

    dispatch: ClassVar = {k: step for k, step in pickle._Unpickler.dispatch.items() if bytes([k]) not in EXTENSIONS}

    def __init__(self, content: io.BytesIO, persistent: Callable[[Any], Any] | None = None, **options: Any) -> None:
        super().__init__(content, **options)
        self.content, self.persistent, self.left = content, persistent, MAX_STEPS
        self._file_read = self.read_some
        here = content.tell()
        self.room = content.seek(0, io.SEEK_END)  # for bytes that are made of text
        content.seek(here)
        self.named: dict[str, Any] = {
            "collections.OrderedDict": self.to_items,
            "__builtin__.bytes": no_bytes,
            "_codecs.encode": self.to_bytes,
        }

    def read_some(self, size: int) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"the pickle has more than {MAX_STEPS:,} steps")
        return self.content.read(size)

    def persistent_load(self, pid: Any) -> Any:
        if not self.persistent:
            raise pickle.UnpicklingError("the pickle names an object outside it")
        return self.persistent(pid)

    def find_class(self, module: str, name: str) -> Any:
        name = f"{module}.{name}"
        if name not in self.named:
            self.named[name] = type("Call", (Call,), {"__slots__": (), "name": name})
        if len(self.named) > MAX_NAMES:
            raise pickle.UnpicklingError(f"the pickle has more than {MAX_NAMES:,} names")
        return self.named[name]

    def to_items(self, pairs: Any = ()) -> Items:
        items = Items()
        for key, value in pairs:
            self.read_some(0)  # a step: the same pairs may be given many times
            items[key] = value
        return items

    def to_bytes(self, text: str, encoding: Any) -> bytes:
        """Return the bytes that Python 3 writes as a call in protocol 2, each once."""
        self.room -= len(text)
        if self.room < 0:
            raise pickle.UnpicklingError("the pickle makes more bytes than it holds")
        return text.encode("latin1")

    # Steps of a pickle ------------------------------------------------------------------------------

    def load_frame(self: Any) -> None:
        self.read(8)  # its length, which is a hint

    def load_bytearray(self: Any) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def load_empty_dictionary(self: Any) -> None:
        self.append(Items())

    def load_dict(self: Any) -> None:
        found, items = self.pop_mark(), Items()
        for key, value in zip(found[::2], found[1::2], strict=True):
            items[key] = value
        self.append(items)

    def load_empty_set(self: Any) -> None:
        self.append(Call())

    def load_frozenset(self: Any) -> None:
        self.pop_mark()
        self.append(Call())

    dispatch[pickle.FRAME[0]] = load_frame
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray
    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dictionary
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.EMPTY_SET[0]] = load_empty_set
    dispatch[pickle.FROZENSET[0]] = load_frozenset


def is_array(value: Any) -> bool:
    """Return whether a pickle would make an array or a number of NumPy's of this."""
    return isinstance(value, Call) and value.name.rpartition(".")[2] in ("_reconstruct", "_frombuffer", "scalar")


def to_array(value: Any) -> np.ndarray:
    """Return the array that a pickle would make, made of its bytes; a number has the shape ().

    Its type is looked up in a list: a forged one makes NumPy read any memory.

    Raises:
        ValueError: it is no array of numbers, or is malformed.
    """
    if not is_array(value):
        raise ValueError(f"a {getattr(value, 'name', type(value).__name__)} stands where an array should")
    match value.name.rpartition(".")[2], value.args, value.state:
        case "_reconstruct", _, (_, shape, dtype, fortran, data):
            pass
        case "_frombuffer", (data, dtype, shape, order), _:
            fortran = order == "F"
        case "scalar", (dtype, data), _:
            shape, fortran = (), False
        case _:
            raise ValueError("an array lacks some of its parts")
    match dtype:
        case Call(args=(str() | bytes() as code, *_), state=(_, str() | bytes() as order, *_)):
            code, order = (text.decode("latin1") if isinstance(text, bytes) else text for text in (code, order))
        case _:
            raise ValueError("the type of an array is not understood")
    if code not in NUMBER_TYPES or order not in ("<", ">", "|", "="):
        raise ValueError(f"an array is of type {code[:20]!r}, not of numbers")
    made = np.dtype(order.replace("|", "=") + code)
    whole = isinstance(shape, tuple) and len(shape) <= 8 and all(type(n) is int and n >= 0 for n in shape)
    if not whole or not isinstance(data, bytes) or math.prod(shape) * made.itemsize != len(data):
        raise ValueError("an array's shape and its bytes don't fit")
    return np.frombuffer(data, made).reshape(shape, order="F" if fortran else "C")
