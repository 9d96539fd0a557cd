"""Summarizing a data set, and writing it as Parquet."""

from contextlib import suppress

import numpy as np
import pyarrow as pa

from raycifar.data import CIFAR100
from raycifar.data.dataset import Source, hashes, to_images
from raycifar.data.layouts import SPLITS
from raycifar.data.pictures import to_png
from raycifar.data.sources import load
from raycifar.data.trees import MAX_IMAGES
from raycifar.errors import RequestError
from raycifar.storage.files import read_file, write_file
from raycifar.storage.locations import join
from raycifar.storage.parquet import to_parquet
from raycifar.terminal import Screen

LEAKED = 0.002  # fraction of the test images


def summarize(source: Source) -> dict[str, str]:
    """Return facts about a data set, in words."""
    pixels = to_images(source.train["image"]) / np.float32(255)
    colors = zip(("red", "green", "blue"), pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)), strict=True)
    spread = " ".join(f"{name} {mean:.4f} ± {std:.4f}" for name, mean, std in colors)
    within_training, test_in_training = count_repeats(source)
    return {
        "fingerprint": source.fingerprint,
        "training images": count(source.train),
        "test images": count(source.test),
        "pixels": f"{spread} in the training images, from 0 to 1",
        "duplicates": f"{within_training} training images repeat another; {test_in_training} test images are also "
        "among the training images",
    }


def write_parquet(source: Source, destination: str, screen: Screen) -> None:
    """Write a data set to a folder or URI, unless it is there, in the Hugging Face hub's layout, and read it back.

    Raises:
        RequestError: the folder holds other data.
        StorageError: it can't be written.
    """
    if len(source.train) > MAX_IMAGES:
        raise RequestError(f"{source.name} has more than the {MAX_IMAGES:,} training images that are read from files.")
    fingerprint = source.fingerprint
    with screen.waiting(f"Looking into {destination}"):
        try:
            held = load(destination).fingerprint
        except RequestError:  # no data set, or only part of one
            held = None
    if held == fingerprint:
        return
    if held:
        raise RequestError(f"{destination} holds another data set: give another DESTINATION.")
    tables = {split: to_hub_layout(getattr(source, split)) for split in SPLITS}
    files = {join(destination, f"{split}.parquet"): to_parquet(table) for split, table in tables.items()}
    for file, content in files.items():
        with suppress(FileNotFoundError, NotADirectoryError):
            if read_file(file) != content:
                raise RequestError(f"{file} exists and isn't part of this data set: give another DESTINATION.")
    with screen.waiting(f"Writing {destination}, and reading it back"):
        for file, content in files.items():
            write_file(file, content)
        written = load(destination).fingerprint
    if written != fingerprint:
        raise RequestError(f"{destination} doesn't hold what was written: give an empty folder.")


def count(table: pa.Table) -> str:
    each = np.bincount(table["fine"].to_numpy(), minlength=CIFAR100.num_classes)
    spread = f"{each.min()} to {each.max()}" if each.min() < each.max() else str(each.max())
    classes = f"{CIFAR100.num_classes} classes in {CIFAR100.num_superclasses} superclasses"
    return f"{len(table):,}, {spread} of each of {classes}"


def count_repeats(source: Source) -> tuple[int, int]:
    """Return how many training images repeat another one, and how many test images are also among the training images.

    Images repeat others if they are equal pixel by pixel.
    """
    train, test = (hashes(to_images(table["image"])) for table in (source.train, source.test))
    distinct = set(train)
    return len(train) - len(distinct), sum(image in distinct for image in test)


def warn_of_leaks(source: Source, screen: Screen) -> None:
    """Warn if test images are among the training images: more than in CIFAR-100 itself, 10 of 10,000."""
    _, leaked = count_repeats(source)
    if leaked > LEAKED * len(source.test):
        screen.say(
            f"WARNING: {leaked:,} of the {len(source.test):,} test images are also among the training images. The test "
            "accuracy will say little about new images: check --data."
        )


def to_hub_layout(table: pa.Table) -> pa.Table:
    files = [{"bytes": to_png(image), "path": None} for image in to_images(table["image"])]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"img": pa.array(files, kind), "fine_label": table["fine"], "coarse_label": table["coarse"]})
