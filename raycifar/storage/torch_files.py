"""Files of `torch.save`, read without running what they name: only tensors are built, from their bytes."""

import io
import zipfile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raycifar.errors import RequestError
from raycifar.storage.pickles import Call, Dissector, to_array

STATE_DICT_KEYS = (  # under which training scripts save a state dict
    "state_dict", "model", "model_state_dict", "net", "params", "ema_state_dict",
)  # fmt: skip
LEGACY = 0x1950A86A20F9469CFC6C  # the first number in a file of PyTorch before 1.6
TYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    # Of what isn't read, and may stand beside weights: complex, quantized and later kinds of numbers.
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.QUInt8Storage": torch.uint8,
    "torch.QInt8Storage": torch.int8,
    "torch.QInt32Storage": torch.int32,
    "torch.storage.UntypedStorage": torch.uint8,
}


class Storage(NamedTuple):
    """Where a tensor's numbers are in a file."""

    key: str
    dtype: torch.dtype


def read_state_dict(content: bytes, name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a training script's checkpoint by name, and the names of what else is among them.

    Raises:
        RequestError: the file, which `--pretrained` has named, is damaged, or holds no state dict.
    """
    origin = f"--pretrained {name}"
    try:
        file = TorchFile(content)
    except Exception as error:  # a damaged file may cause any
        raise RequestError(f"{origin} is not a PyTorch or safetensors file, or is damaged.") from error
    found, where = file.content, ""
    for key in STATE_DICT_KEYS:
        if isinstance(found, dict) and (isinstance(found.get(key), dict) or is_module(found.get(key))):
            found, where = found[key], f"{where}[{key!r}]"
    if is_module(found):
        raise RequestError(
            f"{origin} holds a whole model, {found.name}, whose code would have to be run; if you trust it, save its "
            f'weights: torch.save(torch.load({name!r}, weights_only=False){where}.state_dict(), "weights.pth").'
        )
    items = found.items() if isinstance(found, dict) else ()
    try:
        tensors = {str(name): file.tensor(value) for name, value in items}
    except Exception as error:
        raise RequestError(f"{origin} is damaged: its tensors don't fit in their numbers.") from error
    if not any(tensor is not None for tensor in tensors.values()):
        raise RequestError(f"{origin} holds {kind_of(found)}, not a state dict of tensors by name.")
    others = [name for name, tensor in tensors.items() if tensor is None]
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}, others


def checked_key(key: Any) -> str:
    """Return the key of a storage; to hash a nested tuple takes as much of the stack as it is deep."""
    if not isinstance(key, str):
        raise TypeError("a storage's key is no text")
    return key


def is_module(value: Any) -> bool:
    return isinstance(value, Call) and isinstance(value.state, dict) and "_modules" in value.state


def kind_of(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a{'n' * (name_of(content)[0] in 'aeiou')} {name_of(content)}"
    return f"a dictionary of {', '.join(sorted(set(map(name_of, content.values())))) or 'nothing'}"


def name_of(value: Any) -> str:
    if isinstance(value, Call):
        return value.name
    return "dict" if isinstance(value, dict) else type(value).__name__


class TorchFile:
    """A file of `torch.save`.

    content: containers, numbers and strings, and a `Call` for all else, of which `tensor` makes the tensors.

    Raises:
        Exception: the file is damaged, or of another kind.
    """

    def __init__(self, content: bytes) -> None:
        self.storages: dict[str, Storage] = {}
        self.numbers: dict[str, Tensor] = {}
        self.left = 2 * len(content)  # bytes of arrays, which may stand under two names
        read = self.read_zip if zipfile.is_zipfile(io.BytesIO(content)) else self.read_legacy
        self.content = read(content)

    def read_zip(self, content: bytes) -> Any:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {member.filename: member for member in archive.infolist()}
            (pickled,) = (name for name in members if name.endswith("/data.pkl"))
            folder, left = pickled.removesuffix("data.pkl"), len(content)

            def read(name: str) -> bytes:
                nonlocal left
                left -= members[name].file_size
                if members[name].compress_type != zipfile.ZIP_STORED or left < 0:
                    raise ValueError("its members are compressed or overlap, so they can be larger than the file")
                return archive.read(name)

            if f"{folder}byteorder" in members and read(f"{folder}byteorder") != b"little":
                raise ValueError("it is from a machine of another byte order")
            value = self.unpickle(io.BytesIO(read(pickled)))
            for storage in self.storages.values():
                self.add(storage, read(f"{folder}data/{storage.key}"))
        return value

    def read_legacy(self, content: bytes) -> Any:
        stream = io.BytesIO(content)
        if self.unpickle(stream) != LEGACY:
            raise ValueError("it is no file of PyTorch")
        _, _, value, keys = (self.unpickle(stream) for _ in range(4))
        for key in map(checked_key, keys):
            count = int.from_bytes(stream.read(8), "little")
            self.add(self.storages[key], stream.read(count * self.storages[key].dtype.itemsize))
        return value

    def unpickle(self, stream: io.BytesIO) -> Any:
        return Dissector(stream, self.find_storage).load()

    def find_storage(self, place: Any) -> Storage:
        kind, made_of, key, *_ = place
        storage = Storage(checked_key(key), TYPES[made_of.name])
        if kind != "storage" or self.storages.setdefault(key, storage) != storage:
            raise ValueError("a storage has two types")
        return storage

    def add(self, storage: Storage, content: bytes) -> None:
        key, dtype = storage
        self.numbers[key] = (
            torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
        )

    def tensor(self, value: Any) -> Tensor | None:
        """Return the tensor or array that a `Call` would make, or None if it would make something else.

        Raises:
            Exception: its parts don't fit each other.
        """
        if not isinstance(value, Call):
            return None
        match value.name.rpartition(".")[2], value.args:
            case (("_rebuild_parameter" | "_rebuild_parameter_with_state"), (data, *_)):
                return self.tensor(data)
            case "_rebuild_from_type_v2", (make, _, args, *_):
                return self.tensor(make(*args))
            case (("_rebuild_tensor" | "_rebuild_tensor_v2"), (Storage() as storage, offset, size, stride, *_)):
                if storage.dtype.is_complex:
                    return None
                numbers = self.numbers[storage.key]
                tensor = numbers.as_strided(size, stride, offset)  # raises if it goes beyond them
                if tensor.numel() > len(numbers):
                    raise ValueError("a tensor has more numbers than its storage")
                return tensor
            case "_reconstruct", _:
                array = to_array(value)
                self.left -= array.nbytes
                if self.left < 0:
                    raise ValueError("one array stands under many names")
                return torch.from_numpy(array.copy())
        return None
