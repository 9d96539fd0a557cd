"""Summarizing a data set, and writing it as Parquet."""

import hashlib

import numpy as np
import pyarrow as pa

from raycifar.data import CIFAR100
from raycifar.data.pictures import to_png
from raycifar.data.sources import load
from raycifar.data.tables import Source, to_images, to_parquet
from raycifar.errors import RequestError
from raycifar.storage.files import write_file
from raycifar.storage.locations import join


def summarize(source: Source) -> dict[str, str]:
    """Return facts about a data set, in words."""
    pixels = to_images(source.train["image"]) / np.float32(255)
    colors = zip(("red", "green", "blue"), pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)), strict=True)
    spread = " ".join(f"{name} {mean:.4f} ± {std:.4f}" for name, mean, std in colors)
    return {
        "fingerprint": source.fingerprint(),
        "training images": count(source.train),
        "test images": count(source.test),
        "pixels": f"{spread} in the training images, from 0 to 1",
        "duplicates": count_duplicates(source),
    }


def write_parquet(source: Source, destination: str) -> None:
    """Write a data set to a folder or URI, in the Hugging Face hub's layout, and read it back.

    Raises:
        RequestError: the folder holds other data.
        StorageError: it can't be written.
    """
    for split in ("train", "test"):
        write_file(join(destination, f"{split}.parquet"), to_parquet(to_hub_layout(getattr(source, split))))
    if load(destination).fingerprint() != source.fingerprint():
        raise RequestError(f"{destination} doesn't hold what was written: give an empty folder.")


def count(table: pa.Table) -> str:
    each = np.bincount(table["fine"].to_numpy(), minlength=CIFAR100.num_classes)
    spread = f"{each.min()} to {each.max()}" if each.min() < each.max() else str(each.max())
    classes = f"{CIFAR100.num_classes} classes in {CIFAR100.num_superclasses} superclasses"
    return f"{len(table):,}, {spread} of each of {classes}"


def count_duplicates(source: Source) -> str:
    """Return how many images are equal, pixel by pixel, to another."""
    train, test = (
        [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in to_images(table["image"])]
        for table in (source.train, source.test)
    )
    distinct = set(train)
    both = sum(digest in distinct for digest in test)
    within = len(train) - len(distinct)
    return f"{within} training images repeat another; {both} test images are also among the training images"


def to_hub_layout(table: pa.Table) -> pa.Table:
    files = [{"bytes": to_png(image), "path": None} for image in to_images(table["image"])]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"img": pa.array(files, kind), "fine_label": table["fine"], "coarse_label": table["coarse"]})
