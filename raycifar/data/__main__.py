"""Fetch, describe and convert the data set: `python -m raycifar.data describe`."""

import click

from raycifar.command import command
from raycifar.data.sources import fetch, load
from raycifar.terminal import Screen
from raycifar.workflows.datasets import describe_source, write_parquet

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
        facts = describe_source(source)
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
    with screen.waiting(f"Writing {destination}, and reading it back"):
        write_parquet(source, destination)
    screen.say(f"{destination} holds the same images and labels: --data {destination}")


if __name__ == "__main__":
    main()
