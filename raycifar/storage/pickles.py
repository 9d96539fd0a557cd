"""Pickles, taken apart: nothing that one names is imported, built or called."""

import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar, Self

MOST_STEPS = 2**21  # of a pickle; they take seconds, and half a gigabyte
MOST_NAMES = 2**12
REFUSED = (pickle.FRAME, pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4)  # as PyTorch itself refuses them


class Call:
    """What a pickle would call: the callable's name, its arguments, and the state that the result would be given."""

    __slots__ = ("args", "state")
    name: ClassVar[str]
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Self:
        call = object.__new__(cls)
        call.args, call.state = args, None
        return call

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Pass over what a mapping of an unknown kind holds."""

    def append(self, items: Any) -> None:
        """Pass over what a list or a set of an unknown kind holds."""

    add = extend = append


class Items(dict[Any, Any]):
    """What stands for an `OrderedDict`."""

    def __setstate__(self, state: Any) -> None:
        """Pass over its attributes."""


class Dissector(pickle._Unpickler):
    """Unpickles containers, numbers and strings; a `Call` stands for all else.

    It is pickle's own in Python: the one in C takes as much memory as a file of 20 bytes asks for.

    Args:
        content: `load` reads one pickle of it, and may raise any exception if that is damaged.
        persistent: returns what stands for an object that is kept outside the pickle.
    """

    dispatch: ClassVar = {k: step for k, step in pickle._Unpickler.dispatch.items() if bytes([k]) not in REFUSED}

    def __init__(self, content: io.BytesIO, persistent: Callable[[Any], Any]) -> None:
        super().__init__(content)
        self.content, self.persistent, self.left = content, persistent, MOST_STEPS
        self._file_read = self.read_some
        self.named: dict[str, type] = {"collections.OrderedDict": Items}

    def read_some(self, size: int) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"the pickle has more than {MOST_STEPS:,} steps")
        return self.content.read(size)

    def persistent_load(self, pid: Any) -> Any:
        return self.persistent(pid)

    def find_class(self, module: str, name: str) -> Any:
        name = f"{module}.{name}"
        if name not in self.named:
            self.named[name] = type("Call", (Call,), {"__slots__": (), "name": name})
        if len(self.named) > MOST_NAMES:
            raise pickle.UnpicklingError(f"the pickle has more than {MOST_NAMES:,} names")
        return self.named[name]
