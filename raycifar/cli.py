"""The console script: `raycifar train` is `python -m raycifar.train`, and so for each command."""

import importlib
from typing import Any

import click

from raycifar import __version__

COMMANDS = {
    "data": "Fetch, check, describe and convert the data set, and find duplicates.",
    "train": "Train one model, data-parallel, on Ray Train.",
    "compare": "Train several models and seeds, orchestrated by Ray Tune, and say which is better.",
    "report": "Draw and explain a run, a comparison, or several runs side by side.",
    "bench": "Measure where training time goes, against the bare compute limit.",
    "runs": "List the runs of a folder or URI.",
    "clean": "Remove the checkpoints of finished runs.",
    "speedrun": "Time training to a mean top-1 of 0.75, by the public rules.",
    "evaluate": "Score a trained network on a data set, as a Ray Data job.",
    "export": "Write a trained network as ONNX, PyTorch or safetensors.",
    "recipes": "List the recipes, or print one in full.",
    "predict": "Print the five likeliest classes of image files.",
}


class LazyCommands(click.Group):
    """Imports a command only when it is used."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = dict.fromkeys(COMMANDS)  # type: ignore[assignment]  # among which click finds the nearest

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = "raycifar.data.__main__" if cmd_name == "data" else f"raycifar.{cmd_name}"  # `data` is a folder
        return importlib.import_module(module).main

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyCommands)
@click.version_option(__version__, prog_name="raycifar")
def main() -> None:
    """Train and compare image classifiers on CIFAR-100 with Ray."""
