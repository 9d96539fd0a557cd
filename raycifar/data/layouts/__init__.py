"""The layouts of copies of CIFAR-100: each says which files belong to it, and makes a table of a split's files.

A layout is a module here, and a line in `detect.LAYOUTS`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import pyarrow as pa

from raycifar.data.trees import Tree

SPLITS = ("train", "test")
SHARD = re.compile(r"\d+(-of-(\d{1,9})(-[0-9a-f]{16})?)?$")


class Place(NamedTuple):
    """Where a file belongs: to a data set in the folder `root`, to a split of it, and there to a series of files."""

    root: PurePosixPath
    split: str
    series: str = ""


@dataclass(frozen=True)
class Layout:
    """How the files of a data set may be named and written."""

    name: str  # of its files
    suffixes: tuple[str, ...]
    hint: str  # how they are recognised
    place: Callable[[PurePosixPath], Place | None]  # where a file belongs; None: it isn't of this layout
    # Makes a table of the files of a split; the last argument is the start of an error's message.
    read: Callable[[Tree, list[PurePosixPath], str], pa.Table]


def split_in(name: str) -> str | None:
    """Return the split that a file's or folder's name says, if it says one."""
    words = re.split(r"[^a-z]+", name.lower())
    said = {split for split in SPLITS if split in words or f"{split}ing" in words}
    return said.pop() if len(said) == 1 else None


def place_named(path: PurePosixPath) -> Place | None:
    """Place files that are called train and test."""
    return Place(path.parent, path.stem) if path.stem in SPLITS else None


def place_shard(path: PurePosixPath) -> Place | None:
    """Place a file of a series, by the split that its name says, else the nearest folder's."""
    series = SHARD.sub("", path.stem)
    if split := split_in(path.stem):
        return Place(path.parent, split, series.replace(split, ""))
    for folder in path.parents:
        if split := split_in(folder.name):
            series = re.sub(r"\d+", "", series)  # Ray Data and Spark number files in the middle of their names
            return Place(folder.parent, split, str(path.relative_to(folder).with_name(series or "-")))
    return None
