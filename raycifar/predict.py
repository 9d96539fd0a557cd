"""Ask a trained network what images show: `python -m raycifar.predict results/cnn-a photos/`."""

import json
from typing import Any

import click
import numpy as np
from rich import box
from rich.table import Table

from raycifar.data.names import FINE
from raycifar.data.pictures import find_images, read_image
from raycifar.errors import WorkError
from raycifar.options import command
from raycifar.terminal import Screen

TOP = 5


@click.command(context_settings={"show_default": True})
@click.argument("network", metavar="RUN|WEIGHTS")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
@click.option("--device", type=click.Choice(["auto", "gpu", "cpu"]), default="auto")
@command
def main(debug: bool, network: str, images: tuple[str, ...], as_json: bool, device: str) -> None:
    """Ask a trained network what images show: its five likeliest classes for each.

    RUN is the folder of a finished run, WEIGHTS a weights file that raycifar wrote. IMAGES are files, folders or
    URIs, of any size and mode. An image that can't be read is named, the rest go on, and the exit code is 1.
    """
    # Before PyTorch is loaded: a typing error shows at once.
    files = [file for place in images for file in find_images(place)]
    import torch

    from raycifar.engine.trained_model import Trained, read_weights

    trained = Trained(read_weights(network), device, "float32")
    answers: list[dict[str, Any]] = []
    pixels = []
    for name, filesystem, path in files:
        try:
            pixels.append(read_image(filesystem, path))
            answers.append({"image": name})
        except (ValueError, OSError) as error:
            answers.append({"image": name, "error": str(error)})
    if pixels:
        probabilities = iter(trained.logits(torch.from_numpy(np.stack(pixels))).softmax(1).numpy())
        for answer in answers:
            if "error" not in answer:
                answer["top5"] = likeliest(next(probabilities))

    if as_json:
        click.echo(json.dumps(answers, indent=2))
    else:
        Screen().console.print(to_table(answers))
    if broken := [answer for answer in answers if "error" in answer]:
        raise WorkError(
            f"{len(broken)} of {len(answers)} images can't be read: "
            + "; ".join(f"{answer['image']}: {answer['error']}" for answer in broken)
            + "."
        )


def likeliest(probabilities: np.ndarray) -> list[dict[str, Any]]:
    """Return the classes with the highest probabilities (classes,), the highest first."""
    order = np.argsort(-probabilities, kind="stable")[:TOP]
    return [{"class": FINE[label], "probability": float(probabilities[label])} for label in order]


def to_table(answers: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("image", "top 5"):
        table.add_column(heading, overflow="fold")
    for answer in answers:
        guesses = ", ".join(f"{guess['class']} {guess['probability']:.2f}" for guess in answer.get("top5", []))
        table.add_row(answer["image"], guesses or f"can't be read: {answer['error']}")
    return table


if __name__ == "__main__":
    main()
