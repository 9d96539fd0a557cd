"""Write a trained network for other programs: `python -m raycifar.export results/cnn-a --to onnx`."""

import click

from raycifar.options import Command
from raycifar.terminal import Screen
from raycifar.workflows.exporting import SUFFIXES, export


@click.command(cls=Command, example="raycifar export results/first --to onnx")
@click.argument("network", metavar="RUN|WEIGHTS")
@click.option("--to", "kind", type=click.Choice(list(SUFFIXES)), required=True, help="Format to write.")
@click.option("--out", help="File or URI to write.  [the model's name, in the current folder]")
@click.option("--data", help="Test images for the check.  [the run's; else RAYCIFAR_DATA or cifar100]")
def main(debug: bool, network: str, kind: str, out: str | None, data: str | None) -> None:
    """Write a trained network for other programs.

    All formats except safetensors, which holds only the weights, include the preprocessing: they map images
    (n, 3, 32, 32) uint8, channels first, to logits (n, classes) float32. The file is kept only if it predicts the same
    classes as the network for 1,000 test images.
    """
    screen = Screen()
    if kind == "torchscript":
        screen.say("PyTorch has deprecated TorchScript: --to torch-export replaces it.")
    done = export(network, kind, screen, out=out, data=data)
    screen.say(
        f"{done.file}: {done.num_bytes / 1e6:.1f} MB. The same class for each of {done.num_images:,} test images; "
        f"logits differ by at most {done.difference:.1g}."
    )


if __name__ == "__main__":
    main()
