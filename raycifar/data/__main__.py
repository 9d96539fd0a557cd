"""Fetch, check, describe and convert the data set, and find duplicates: `python -m raycifar.data describe`."""

import click

from raycifar.data.sources import fetch, load
from raycifar.options import Command
from raycifar.storage.run_folder import RunFolder
from raycifar.terminal import Screen
from raycifar.workflows.datasets import summarize, write_parquet
from raycifar.workflows.duplicates import DUPLICATES, DUPLICATES_PAGE, DUPLICATES_PICTURE, list_duplicates

data_option = click.option(
    "--data",
    envvar="RAYCIFAR_DATA",
    default="cifar100",
    show_default=True,
    help="cifar100, synthetic, a path or a URI.",
)


@click.group()
def main() -> None:
    """Fetch, check, describe and convert the data set, and find duplicates."""


@main.command("fetch", cls=Command, example="raycifar data fetch")
def fetch_archive(debug: bool) -> None:
    """Download CIFAR-100 into the cache if needed; print its path."""
    Screen().say(str(fetch()))


@main.command(cls=Command, example="raycifar data describe --data s3://bucket/cifar100")
@data_option
def describe(debug: bool, data: str) -> None:
    """Read and check a data set, and summarize it."""
    screen = Screen()
    with screen.waiting(f"Reading {data}"):
        source = load(data)
        facts = summarize(source)
    screen.facts(source.name, facts)


@main.command(cls=Command, example="raycifar data prepare s3://bucket/cifar100")
@click.argument("destination")
@data_option
def prepare(debug: bool, destination: str, data: str) -> None:
    """Write a data set as Parquet to DESTINATION, a folder or URI.

    --data reads the result. The columns are those of the Hugging Face hub: img.bytes (PNG), fine_label, coarse_label.
    """
    screen = Screen()
    RunFolder.for_output(destination, option="DESTINATION")
    with screen.waiting(f"Reading {data}"):
        source = load(data)
    write_parquet(source, destination, screen)
    screen.say(f"{destination} holds the same images and labels: --data {destination}")


@main.command("duplicates", cls=Command, example="raycifar data duplicates --out copies")
@data_option
@click.option("--out", default="duplicates", show_default=True, help="Folder or URI to write to.")
@click.option("--run", metavar="RUN|WEIGHTS", help="A trained network; compares the images by its features, too.")
def duplicates(debug: bool, data: str, out: str, run: str | None) -> None:
    """Find near duplicates among the training and test images.

    Writes duplicates.csv, duplicates.html with the pairs side by side, and duplicates.png with a few of them.
    """
    screen = Screen()
    found, folder = list_duplicates(data, out, screen, run)
    screen.facts("Images with a copy", found.summary())
    screen.say(f"Written to {folder.location}: {DUPLICATES}, {DUPLICATES_PAGE}, {DUPLICATES_PICTURE}")


if __name__ == "__main__":
    main()
