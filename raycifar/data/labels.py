"""Labels, given as numbers or names, of whatever type a file has for them."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from raycifar.data import CIFAR100
from raycifar.errors import RequestError

MAX_MISSPELT = 3  # names of a numbering
NAMES = {"fine": CIFAR100.class_names, "coarse": CIFAR100.superclass_names}


def normalize(name: str) -> str:
    """Return a class's name as `names` spells it."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


NUMBERS = {level: {normalize(name): number for number, name in enumerate(names)} for level, names in NAMES.items()}


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
        if values.dtype.kind not in "iu" or not values.ndim or values.shape[1:] not in ((), (1,)):
            raise RequestError(
                f"{origin}: the {level} labels are {values.dtype} of shape {values.shape}, not one integer an image."
            )
        if not len(values) or 0 <= values.min() <= values.max() < len(NAMES[level]):
            return values.ravel().astype(np.int64)
        values = values.ravel().tolist()
    known: dict[Any, int] = {key: number for number in range(len(NAMES[level])) for key in (number, str(number))}
    known |= NUMBERS[level]
    labels = np.empty(len(values), np.int64)
    for row, value in enumerate(values):
        key: Any = value if type(value) is int else None
        if isinstance(value, str):
            key = re.sub(r"^0+(?=\d)", "", normalize(value))
        if key not in known:
            raise RequestError(f"{origin}: the {level} label of image {row} is {describe(value, level)}.")
        labels[row] = known[key]
    return labels


def numbers_of(names: Sequence[str], level: str, origin: str) -> np.ndarray:
    """Return CIFAR-100's number for each class of another numbering; without names, the numbering is the same.

    A few unknown names keep their numbers: the hub's copy of CIFAR-100 calls its crabs "cra".

    Raises:
        RequestError: these are names of other classes.
    """
    own, known = NAMES[level], NUMBERS[level]
    numbers = np.array([known.get(normalize(name), place) for place, name in enumerate(names)], np.int64)
    others = [name for name in names if normalize(name) not in known]
    if not names:
        return np.arange(len(own))
    if len(others) > MAX_MISSPELT or sorted(numbers) != list(range(len(own))):
        reason = f"such as {others[0][:40]!r}" if others else f"{len(names)} instead of {len(own)}"
        raise RequestError(f"{origin} names other {level} classes than CIFAR-100's, {reason}.")
    return numbers


def describe(value: Any, level: str) -> str:
    """Return what is wrong with a label."""
    names = NAMES[level]
    if type(value) is int:
        shown = str(value) if abs(value) < 2**64 else "a number of more than 64 bits"
        return f"{shown}; CIFAR-100's range from 0 to {len(names) - 1}"
    if isinstance(value, str):
        near = difflib.get_close_matches(normalize(value[:40]), names, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"{value[:40]!r}, which is not one of CIFAR-100's{hint}"
    return f"a {type(value).__name__}, not a number or a class's name"
