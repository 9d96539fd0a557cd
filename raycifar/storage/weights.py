"""Weights files: safetensors with their architecture. Reading one runs no code."""

import json
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from raycifar.errors import RequestError
from raycifar.models import Architecture

KEY = "raycifar"  # only one: safetensors writes several keys in an order that differs between processes


def to_file(tensors: Mapping[str, Tensor], architecture: Architecture) -> bytes:
    """Return the weights file of a state dict; equal weights give equal bytes."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, metadata={KEY: json.dumps(architecture.to_json())})


def from_file(content: bytes, origin: str) -> tuple[dict[str, Tensor], Architecture | None]:
    """Return a safetensors file's tensors by name, and their architecture if raycifar wrote the file.

    Raises:
        RequestError: the file is damaged, or of another kind; the message begins with `origin`.
    """
    try:
        tensors = safetensors.torch.load(content)
        # The header is JSON, after 8 bytes that hold its length.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about: Any = header.get("__metadata__", {}).get(KEY)
        return tensors, Architecture.from_json(json.loads(about)) if about else None
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{origin} is not a safetensors file, or is damaged: {error}.") from error
