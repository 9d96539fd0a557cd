"""The console script: `raycifar train` is `python -m raycifar.train`, and so for each command."""

import importlib
from typing import Any

import click

from raycifar import __version__

DOORS = {
    "data": "Fetch, describe and convert the data set.",
    "train": "Train one model, data-parallel, on Ray Train.",
    "compare": "Train several models and seeds, orchestrated by Ray Tune, and say which is better.",
    "report": "Draw and explain a run or a comparison.",
    "bench": "Where the time goes on this machine or cluster, beside the bare compute limit.",
    "evaluate": "Score a trained network on a data set, as a Ray Data job.",
    "export": "Write a trained network as ONNX, TorchScript or safetensors.",
    "recipes": "The recipes there are, or one in full.",
    "predict": "The five likeliest classes of image files, or of a folder of them.",
}


class Doors(click.Group):
    """Imports a command when it is opened, so that asking for help doesn't wait for the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(DOORS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Any:
        if cmd_name not in DOORS:
            return None
        module = "raycifar.data.__main__" if cmd_name == "data" else f"raycifar.{cmd_name}"  # `data` is a folder
        return importlib.import_module(module).main

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(DOORS.items()))


@click.group(cls=Doors)
@click.version_option(__version__, prog_name="raycifar")
def main() -> None:
    """The CIFAR-100 study, trained data-parallel on Ray."""


if __name__ == "__main__":
    main()
