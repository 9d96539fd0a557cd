"""A data set as Arrow tables of images: making, checking and splitting them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from raycifar.data import CIFAR100
from raycifar.data.labels import to_labels
from raycifar.errors import RequestError


@dataclass(frozen=True)
class Source:
    """A data set: `train` and `test` have the columns image, fine and coarse."""

    name: str
    train: pa.Table
    test: pa.Table

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all images and labels, in their order."""
        digest = hashlib.blake2b(digest_size=16)
        for table in (self.train, self.test):
            for chunk in table["image"].chunks:
                digest.update(to_images(chunk).data)
            for column in ("fine", "coarse"):
                digest.update(table[column].to_numpy().data)
        return digest.hexdigest()

    def superclass_of(self) -> tuple[int, ...]:
        """Return the superclass of each class by the training images, or by the test images if there are no others.

        A class that has no images keeps CIFAR-100's; RequestError is raised if one has several.
        """
        table = self.train if len(self.train) else self.test
        fine, coarse = (table[column].to_numpy() for column in ("fine", "coarse"))
        superclasses = np.array(CIFAR100.superclass_of)
        superclasses[fine] = coarse
        if not np.array_equal(superclasses[fine], coarse):
            raise RequestError(f"{self.name}: images of one class have different superclasses.")
        return tuple(superclasses.tolist())


@dataclass(frozen=True)
class Splits:
    """The images that a run trains, validates and tests on, with an index column; `val` may be empty."""

    train: pa.Table
    val: pa.Table
    test: pa.Table

    def tables(self) -> dict[str, pa.Table]:
        """Return the splits that hold images, by name."""
        return {name: table for name, table in vars(self).items() if len(table)}


def to_table(pixels: np.ndarray, values: Mapping[str, np.ndarray | Sequence[Any]], origin: str) -> pa.Table:
    """Return a table of images and their labels.

    Args:
        pixels: (N, 3, H, W) or (N, 3 * H * W) uint8.
        values: the labels "fine" and, unless they follow from these, "coarse", as `to_labels` takes them.
        origin: the start of an error's message.

    Raises:
        RequestError: there are no images, or more or fewer labels, or one is of no class.
    """
    labels = {level: to_labels(given, level, origin) for level, given in values.items()}
    if not len(pixels):
        raise RequestError(f"{origin} holds no images.")
    for level, given in labels.items():
        if len(given) != len(pixels):
            raise RequestError(f"{origin} has {len(pixels):,} images and {len(given):,} {level} labels.")
    coarse = labels.get("coarse", np.array(CIFAR100.superclass_of)[labels["fine"]])
    buffer = pa.py_buffer(np.ascontiguousarray(pixels, np.uint8))
    images = pa.FixedSizeBinaryArray.from_buffers(pa.binary(CIFAR100.image_bytes), len(pixels), [None, buffer])
    return pa.table({"image": images, "fine": labels["fine"], "coarse": coarse})


def to_images(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return a column of images as (N, 3, H, W) uint8; a single chunk is not copied."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    first, last = (row * CIFAR100.image_bytes for row in (array.offset, array.offset + len(array)))
    return np.frombuffer(array.buffers()[1], np.uint8)[first:last].reshape(-1, *CIFAR100.image_shape)


def hashes(images: np.ndarray) -> list[int]:
    """Return a hash of each image's pixels, of 64 bits: 60,000 take a fraction of a second.

    The chance that two of a million different images share one is below 1 in 10 million.
    """
    return [hash(image.tobytes()) for image in images]


def split(source: Source, val_size: int, limit: int | None, seed: int, copied: np.ndarray | None = None) -> Splits:
    """Return the splits of a run; see `split_rows`."""
    train, val = split_rows(source, val_size, limit, seed, copied)
    return Splits(
        train=take(source.train, train),
        val=take(source.train, val),
        test=take(source.test, np.arange(len(source.test))),
    )


def split_rows(
    source: Source, val_size: int, limit: int | None, seed: int, copied: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the training set that are trained and validated on; none of the test set are.

    Args:
        val_size: training images held out, equally many of each class; 0 holds out none.
        limit: training images used, equally many of each class; None uses all that remain.
        seed: selects the images that are held out and used, and the order of the training images.
        copied: rows of training images that have copies among the others: they are not held out.

    Raises:
        RequestError: there are too few images, or `val_size` or `limit` is not a multiple of the number of classes.
    """
    num_classes = CIFAR100.num_classes
    fine = source.train["fine"].to_numpy()
    smallest = int(np.bincount(fine, minlength=num_classes).min())
    for option, size in (("--val-size", val_size), ("--limit", limit)):
        if size is not None and size % num_classes:
            less = max(0, size // num_classes) * num_classes
            near = f"{less} or " * (less > 0) + str(less + num_classes)
            raise RequestError(f"{option} {size} can't be divided among {num_classes} classes: give {near}.")
    if val_size < 0 or (val_size and val_size // num_classes >= smallest):
        raise RequestError(
            f"--val-size {val_size} leaves nothing to train on: the smallest class has {smallest} training images."
        )
    if limit is not None and not 0 < limit // num_classes <= smallest - val_size // num_classes:
        raise RequestError(
            f"--limit {limit} is not possible: with --val-size {val_size} and equally many images of each class, "
            f"{num_classes * smallest - val_size} training images remain."
        )

    # Sources may be sorted by class. In the seeded order, consecutive rows, and so each worker's shard, are a random
    # sample of all classes.
    order = np.random.default_rng(seed).permutation(len(fine))
    unique = order if copied is None else order[~np.isin(order, copied)]
    fewest = int(np.bincount(fine[unique], minlength=num_classes).min())
    if fewest < val_size // num_classes:
        raise RequestError(
            f"--val-size {val_size} is not possible with --separate-copies: of one class only {fewest} training "
            "images have no copy."
        )
    val = first_of_each_class(unique, fine, val_size // num_classes)
    train = order[~np.isin(order, val)]
    if limit is not None:
        train = first_of_each_class(train, fine, limit // num_classes)
    return train, np.sort(val)


def first_of_each_class(rows: np.ndarray, fine: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` rows of each class, in their order; `fine` has the class of every row."""
    import pandas as pd  # here: reading a data set does without it

    return pd.Series(rows).groupby(fine[rows]).head(count).to_numpy()


def take(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Return rows of a table, contiguous in memory, with their numbers as the column `index`."""
    return table.take(rows).append_column("index", pa.array(rows))
