"""Fetch, describe and convert the data set: `python -m raycifar.data describe`."""

import hashlib
import io
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raycifar.data import CLASSES
from raycifar.data.names import COARSE, FINE
from raycifar.data.sources import fetch, load
from raycifar.data.tables import Source, to_numpy
from raycifar.errors import RequestError
from raycifar.options import command
from raycifar.storage.files import locate, write_whole
from raycifar.terminal import Screen

data_option = click.option(
    "--data", envvar="RAYCIFAR_DATA", default="cifar100", show_default=True, help="cifar100, synthetic, a path or URI."
)


@click.group()
def main() -> None:
    """Fetch, describe and convert the data set."""


@main.command("fetch")
@command
def fetch_archive(debug: bool) -> None:
    """Fetch CIFAR-100 into the cache, once, and say where it is."""
    Screen().say(str(fetch()))


@main.command()
@data_option
@command
def describe(debug: bool, data: str) -> None:
    """Read a data set whole, check it, and say what it holds."""
    screen = Screen()
    with screen.waiting(f"Reading {data}"):
        source = load(data)
        fingerprint = source.fingerprint()
    splits = {"training": source.train, "test": source.test}
    pixels = to_numpy(source.train["image"].combine_chunks(), "image") / np.float32(255)
    facts = {
        "fingerprint": fingerprint,
        **{f"{name} images": count(table) for name, table in splits.items()},
        "pixels": " ".join(
            f"{channel} {mean:.4f} ± {std:.4f}"
            for channel, mean, std in zip(
                ("red", "green", "blue"), pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)), strict=True
            )
        )
        + " of the training images, from 0 to 1",
        "repeated": repeated(source),
    }
    screen.facts(source.name, facts)


@main.command()
@click.argument("destination")
@data_option
@command
def prepare(debug: bool, destination: str, data: str) -> None:
    """Write a data set as Parquet to DESTINATION, a folder or a URI, for --data to read on any machine.

    The layout is that of the Hugging Face hub: img.bytes (PNG), fine_label, coarse_label.
    """
    screen = Screen()
    with screen.waiting(f"Reading {data}"):
        source = load(data)
    filesystem, path = locate(destination)
    for split in ("train", "test"):
        with screen.waiting(f"Writing {split}"):
            try:
                write_whole(filesystem, f"{path}/{split}.parquet", to_parquet(getattr(source, split)))
            except OSError as error:
                raise RequestError(f"{destination} can't be written: {error}.") from error
    with screen.waiting("Reading it back"):
        same = load(destination).fingerprint() == source.fingerprint()
    if not same:
        raise RequestError(f"{destination} doesn't hold what was written: is something else in that folder?")
    screen.say(f"{destination} holds the same images and labels: --data {destination}")


def count(table: pa.Table) -> str:
    each = np.bincount(table["fine"].to_numpy(), minlength=CLASSES)
    spread = f"{each.min()} to {each.max()}" if each.min() < each.max() else str(each.max())
    return f"{len(table):,}, {spread} of each of {len(FINE)} classes in {len(COARSE)} superclasses"


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


if __name__ == "__main__":
    main()
