"""Weights files: safetensors with their architecture. Reading one runs no code, and builds nothing that doesn't fit."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from raycifar.errors import RequestError, first_few
from raycifar.models import Architecture

KEY = "raycifar"  # only one: safetensors writes several keys in an order that differs between processes
DIGEST = "digest"  # of the rest, in the same key; earlier versions wrote none
MAX_TENSORS = 2**14  # of a file; each could mean a layer


def to_file(tensors: Mapping[str, Tensor], architecture: Architecture) -> bytes:
    """Return the weights file of a state dict; equal weights give equal bytes."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = architecture.to_json()
    sealed = {**about, DIGEST: digest(contiguous, about)}
    return safetensors.torch.save(contiguous, metadata={KEY: json.dumps(sealed)})


def digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """Return a digest of what a weights file holds."""
    found = hashlib.blake2b(json.dumps(about).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def from_file(content: bytes, origin: str) -> tuple[dict[str, Tensor], Architecture | None]:
    """Return a safetensors file's tensors by name, and their architecture, which they fit, if raycifar wrote the file.

    Raises:
        RequestError: the file is damaged, or of another kind; the message begins with `origin`.
    """
    try:
        tensors = dict(sorted(safetensors.torch.load(content).items()))  # their order differs between processes
    except safetensors.SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing: ")
        raise RequestError(f"{origin} is not a safetensors file, or is damaged: {reason}.") from error
    try:
        if len(tensors) > MAX_TENSORS:
            raise ValueError(f"it holds {len(tensors):,} tensors, more than any network has")
        # The header is JSON, after 8 bytes that hold its length.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about: Any = header.get("__metadata__", {}).get(KEY)
        about = json.loads(about) if about else None
        if about and not isinstance(about, dict):
            raise ValueError("its description is no dictionary")
        if about and (expected := about.pop(DIGEST, None)) and digest(tensors, about) != expected:
            raise ValueError("it has changed since it was written")
        architecture = Architecture.from_json(about) if about else None
        if architecture:
            check_fit(tensors, architecture)
    except KeyError as error:
        raise RequestError(f"{origin} is refused: its description lacks {error}.") from error
    except (RequestError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{origin} is refused: {str(error).rstrip('.')}.") from error
    return tensors, architecture


def check_fit(tensors: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Raise ValueError unless tensors are the weights of an architecture, before it takes time or memory."""
    for name, value in {"num_classes": architecture.num_classes, **architecture.options}.items():
        if value > max([len(tensors), *(tensor.shape[0] for tensor in tensors.values() if tensor.ndim)]):
            raise ValueError(f"its {name} is {value:,}, for which its tensors are too few or too small")
    if differences := compare(tensors, architecture.build_on_meta().state_dict()):
        raise ValueError(f"these are not the weights of {architecture.model}: {differences}")
    check_finite(tensors)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all weights are finite numbers."""
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"it has weights that aren't finite numbers: {first_few(broken)}")


def compare(tensors: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return in words how tensors differ from those of a network, by name and shape, or the empty string."""
    shapes, expected = ({name: list(value.shape) for name, value in each.items()} for each in (tensors, wanted))
    differences = {
        # Early versions didn't save batch norm's num_batches_tracked, which is never used.
        "missing": [n for n in expected if n not in shapes and not n.endswith("num_batches_tracked")],
        "unknown": [n for n in shapes if n not in expected],
        "of another shape": [
            f"{n} {shapes[n]} instead of {expected[n]}" for n in expected if n in shapes and shapes[n] != expected[n]
        ],
    }
    return "; ".join(f"{len(names)} {what}: {first_few(names)}" for what, names in differences.items() if names)
