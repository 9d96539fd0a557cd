"""Arrow tables of images: made, checked, told apart, split."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raycifar.data import BYTES, CLASSES, SHAPE, SUPERCLASSES
from raycifar.errors import RequestError


@dataclass(frozen=True)
class Source:
    """A data set as it was found: `train` and `test` have the columns image, fine and coarse."""

    name: str
    train: pa.Table
    test: pa.Table

    def fingerprint(self) -> str:
        """Return a digest of every image and label, equal for the same images in the same order."""
        digest = hashlib.blake2b(digest_size=16)
        for table in (self.train, self.test):
            for column in ("image", "fine", "coarse"):
                for chunk in table[column].chunks:
                    digest.update(np.ascontiguousarray(to_numpy(chunk, column)).data)
        return digest.hexdigest()

    def superclasses(self) -> tuple[int, ...]:
        """Return the superclass of each class, -1 for a class that no training image has."""
        parents = np.full(CLASSES, -1)
        parents[self.train["fine"].to_numpy()] = self.train["coarse"].to_numpy()
        if not np.array_equal(parents[self.train["fine"].to_numpy()], self.train["coarse"].to_numpy()):
            raise RequestError(f"{self.name}: images of one class stand under several superclasses.")
        return tuple(int(parent) for parent in parents)


@dataclass(frozen=True)
class Splits:
    """What a run trains on, chooses by and is scored on: `val` may be empty. All have an index column."""

    train: pa.Table
    val: pa.Table
    test: pa.Table

    def tables(self) -> dict[str, pa.Table]:
        """Return the splits that hold images, by name."""
        return {name: table for name, table in vars(self).items() if len(table)}


def to_table(images: np.ndarray, fine: np.ndarray, coarse: np.ndarray, origin: str) -> pa.Table:
    """Return a table of `images` (N, 3, 32, 32) or (N, 3072) uint8 and their labels (N,).

    Raises:
        RequestError: there are none, or a label is out of range; the message begins with `origin`.
    """
    if not len(images):
        raise RequestError(f"{origin} holds no image.")
    for name, labels, count in (("fine", fine, CLASSES), ("coarse", coarse, SUPERCLASSES)):
        if not 0 <= labels.min() <= labels.max() < count:
            row = int(np.flatnonzero((labels < 0) | (labels >= count))[0])
            raise RequestError(
                f"{origin}: the {name} label of image {row} is {labels[row]}; CIFAR-100's go from 0 to {count - 1}."
            )
    pixels = pa.py_buffer(np.ascontiguousarray(images, np.uint8))
    return pa.table(
        {
            "image": pa.FixedSizeBinaryArray.from_buffers(pa.binary(BYTES), len(images), [None, pixels]),
            "fine": pa.array(fine.astype(np.int64)),
            "coarse": pa.array(coarse.astype(np.int64)),
        }
    )


def to_numpy(array: pa.Array, column: str) -> np.ndarray:
    """Return a column without copying: (N, 3, 32, 32) uint8 for images, (N,) int64 for all others."""
    if column != "image":
        return array.to_numpy(zero_copy_only=False)
    pixels = np.frombuffer(array.buffers()[1], np.uint8)
    return pixels[array.offset * BYTES : (array.offset + len(array)) * BYTES].reshape(-1, *SHAPE)


def to_lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    """Return the rows of (n, k) as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def from_lists(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of `to_lists` as (n, k)."""
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)


def split(source: Source, val_size: int, limit: int | None, seed: int) -> Splits:
    """Return the splits of a run: validation images never come from the test set.

    Args:
        val_size: training images held out, the same number of each class; 0 holds out none.
        limit: training images used, the same number of each class; None uses all that are left.
        seed: which images are held out and used, and in which order the training images stand.

    Raises:
        RequestError: the classes can't share `val_size` or `limit` equally.
    """
    fine = source.train["fine"].to_numpy()
    smallest = int(np.bincount(fine, minlength=CLASSES).min())
    for option, size in (("--val-size", val_size), ("--limit", limit)):
        if size is not None and size % CLASSES:
            raise RequestError(f"{option} {size} can't be shared by {CLASSES} classes: take a multiple of {CLASSES}.")
    if val_size < 0 or (val_size and val_size // CLASSES >= smallest):
        raise RequestError(
            f"--val-size {val_size} leaves nothing to train on: the smallest class has {smallest} training images."
        )
    if limit is not None and not 0 < limit // CLASSES <= smallest - val_size // CLASSES:
        raise RequestError(
            f"--limit {limit} can't be met: {CLASSES * smallest - val_size} training images are left "
            f"when each class gives the same number and --val-size {val_size} are held out."
        )

    order = np.random.default_rng(seed).permutation(len(fine))
    by_class = order[np.argsort(fine[order], kind="stable")]
    counts = np.bincount(fine, minlength=CLASSES)
    place = np.arange(len(fine)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the class
    held_out = val_size // CLASSES
    used = place >= held_out if limit is None else (place >= held_out) & (place < held_out + limit // CLASSES)
    # Sources may be sorted by class: the training rows go back into the seeded order, so that any run of
    # consecutive rows, so any worker's shard, is a random sample of all classes.
    chosen = np.zeros(len(fine), bool)
    chosen[by_class[used]] = True
    return Splits(
        train=take(source.train, order[chosen[order]]),
        val=take(source.train, np.sort(by_class[place < held_out])),
        test=take(source.test, np.arange(len(source.test))),
    )


def take(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Return these rows, contiguous, with the row numbers as the column `index`."""
    images = to_numpy(table["image"].combine_chunks(), "image")[rows]
    pixels = pa.FixedSizeBinaryArray.from_buffers(pa.binary(BYTES), len(rows), [None, pa.py_buffer(images)])
    labels = {name: pa.array(table[name].to_numpy()[rows]) for name in ("fine", "coarse")}
    return pa.table({"image": pixels, **labels, "index": pa.array(rows.astype(np.int64))})
