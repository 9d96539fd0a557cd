"""A data set described, and written as Parquet."""

import hashlib
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raycifar.data import CIFAR100
from raycifar.data.sources import load
from raycifar.data.tables import Source, to_numpy
from raycifar.errors import RequestError
from raycifar.storage.files import locate, write_whole


def describe_source(source: Source) -> dict[str, str]:
    """Return what a data set holds, in words."""
    pixels = to_numpy(source.train["image"].combine_chunks(), "image") / np.float32(255)
    colors = zip(("red", "green", "blue"), pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)), strict=True)
    spread = " ".join(f"{name} {mean:.4f} ± {std:.4f}" for name, mean, std in colors)
    return {
        "fingerprint": source.fingerprint(),
        "training images": count(source.train),
        "test images": count(source.test),
        "pixels": f"{spread} of the training images, from 0 to 1",
        "repeated": repeated(source),
    }


def write_parquet(source: Source, destination: str) -> None:
    """Write a data set to a folder or URI, in the layout of the Hugging Face hub, and read it back.

    Raises:
        RequestError: it can't be written there, or something else lies in that folder.
    """
    filesystem, path = locate(destination)
    try:
        for split in ("train", "test"):
            write_whole(filesystem, f"{path}/{split}.parquet", to_parquet(getattr(source, split)))
    except OSError as error:
        raise RequestError(f"{destination} can't be written: {error}.") from error
    if load(destination).fingerprint() != source.fingerprint():
        raise RequestError(f"{destination} doesn't hold what was written: is something else in that folder?")


def count(table: pa.Table) -> str:
    each = np.bincount(table["fine"].to_numpy(), minlength=CIFAR100.num_classes)
    spread = f"{each.min()} to {each.max()}" if each.min() < each.max() else str(each.max())
    classes = f"{CIFAR100.num_classes} classes in {CIFAR100.num_superclasses} superclasses"
    return f"{len(table):,}, {spread} of each of {classes}"


def repeated(source: Source) -> str:
    """Say how many images are equal, pixel by pixel, to another."""
    seen: dict[str, dict[str, Any]] = {}
    for split in ("train", "test"):
        images = to_numpy(getattr(source, split)["image"].combine_chunks(), "image")
        digests = [hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in images]
        seen[split] = {"all": digests, "distinct": set(digests)}
    both = sum(digest in seen["train"]["distinct"] for digest in seen["test"]["all"])
    within = len(seen["train"]["all"]) - len(seen["train"]["distinct"])
    return f"{within} training images repeat another; {both} test images are also among the training images"


def to_parquet(table: pa.Table) -> bytes:
    encoded = []
    for image in to_numpy(table["image"].combine_chunks(), "image"):
        stream = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(stream, "PNG")
        encoded.append({"bytes": stream.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"img": pa.array(encoded, kind), "fine_label": table["fine"], "coarse_label": table["coarse"]}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()
