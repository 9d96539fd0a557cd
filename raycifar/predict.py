"""Predict the classes of images: `python -m raycifar.predict results/cnn-a photos/`."""

import json
from typing import get_args

import click

from raycifar.errors import WorkError
from raycifar.options import Command
from raycifar.terminal import Screen
from raycifar.terminal_tables import predictions_table
from raycifar.words import count
from raycifar.workflows.prediction import predict_files, warn_of_chance
from raycifar.workflows.requests import Device


@click.command(cls=Command, example="raycifar predict results/first photos/ cat.jpg")
@click.argument("network", metavar="RUN|WEIGHTS")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
@click.option("--device", type=click.Choice(get_args(Device)), default="auto", help="Device to compute on.")
def main(debug: bool, network: str, images: tuple[str, ...], as_json: bool, device: str) -> None:
    """Print the five likeliest classes of each image.

    RUN is the folder of a finished run, WEIGHTS a weights file that raycifar wrote. IMAGES are files, folders or
    URIs; images may have any size and color mode. In a folder, hidden files and files that are not images are skipped.
    If an image can't be read, the others are still classified, and the exit code is 1.
    """
    answers, others = predict_files(network, images, device)
    if as_json:
        click.echo(json.dumps(answers, indent=2))
    else:
        Screen().console.print(predictions_table(answers))
    if warning := warn_of_chance(network):
        click.echo(warning, err=True)
    if others:
        click.echo(f"{count(others, 'file')} skipped: not an image.", err=True)
    if broken := [f"{answer['image']}: {answer['error']}" for answer in answers if "error" in answer]:
        raise WorkError(f"{len(broken)} of {len(answers)} images can't be read: {'; '.join(broken)}.")


if __name__ == "__main__":
    main()
