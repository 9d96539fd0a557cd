"""Labels, given as numbers or names, of whatever type a file has for them."""

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from raycifar.data import CIFAR100 as INFO
from raycifar.errors import RequestError

NAMES = {"fine": INFO.class_names, "coarse": INFO.superclass_names}


def to_labels(values: np.ndarray | Sequence[Any], level: str, origin: str) -> np.ndarray:
    """Return labels as (N,) int64, each of a class of this level.

    Args:
        values: (N,) or (N, 1) integers, or a list of integers or names.
        level: "fine" or "coarse".
        origin: the start of an error's message.

    Raises:
        RequestError: a label is of another type, or of no class.
    """
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "iu" or values.shape not in ((len(values),), (len(values), 1)):
            raise RequestError(
                f"{origin}: the {level} labels are {values.dtype} of shape {values.shape}, not one integer an image."
            )
        if not len(values) or 0 <= values.min() <= values.max() < len(NAMES[level]):
            return values.ravel().astype(np.int64)
        values = values.ravel().tolist()
    known = {simple(name): number for number, name in enumerate(NAMES[level])}
    known |= {str(number): number for number in known.values()}
    labels = np.empty(len(values), np.int64)
    for row, value in enumerate(values):
        if type(value) is int and 0 <= value < len(NAMES[level]):
            labels[row] = value
        elif isinstance(value, str) and simple(value) in known:
            labels[row] = known[simple(value)]
        else:
            raise RequestError(f"{origin}: the {level} label of image {row} is {describe(value, level)}.")
    return labels


def simple(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def describe(value: Any, level: str) -> str:
    """Return what is wrong with a label."""
    names = NAMES[level]
    if type(value) is int:
        shown = str(value) if abs(value) < 2**64 else "a number of more than 64 bits"
        return f"{shown}; CIFAR-100's range from 0 to {len(names) - 1}"
    if isinstance(value, str):
        near = difflib.get_close_matches(simple(value[:40]), names, 1)
        return f"{value[:40]!r}, which is none of CIFAR-100's" + (f"; the nearest is {near[0]!r}" if near else "")
    return f"a {type(value).__name__}, not a number or a class's name"
