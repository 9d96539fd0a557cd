"""Seconds to a mean top-1 of 0.75, by the public clock: `python -m raycifar.speedrun --runs 20`."""

from typing import Any

import click

from raycifar import models
from raycifar.options import Command, recipe_options, request_options
from raycifar.terminal import Screen
from raycifar.terminal_tables import speedrun_table
from raycifar.workflows.requests import MAX_TRIALS, TrainingRequest, settings_of
from raycifar.workflows.speedrun import facts, speedrun

KEPT = {"device", "cpus_per_worker", "seed", "data", "limit", "compile"}
OTHERS = [setting.name for setting in settings_of(TrainingRequest) if setting.name not in KEPT]


@click.command(cls=Command, example="raycifar speedrun --runs 20")
@click.option("--runs", type=click.IntRange(1, MAX_TRIALS), default=20, help="Runs, with seeds from --seed on.")
@click.option("--model", default="speedrun", help=f"{', '.join(models.names())}, or timm:NAME.")
@click.option("--val-size", default=0, help="Images held out, and scored instead of the test set.")
@click.option("--out", default="speedrun", help="Folder or URI for speedrun.json.")
@request_options(TrainingRequest, without=OTHERS)
@recipe_options(without=("tta_flip",))
def main(debug: bool, runs: int, model: str, out: str, **options: Any) -> None:
    """Train many times in this process, and time it by the public rules of the CIFAR-100 speedrun.

    The clock runs while the network is reset, the images are copied to the device, the whitening is computed and all
    steps are taken. It doesn't run during the start of the program, the preparation of the steps on random images, and
    scoring. The test accuracy is that of one view of each image. The accuracy with the mirror image as a second view,
    which the rules don't allow, is shown for comparison.
    """
    screen, request = Screen(), TrainingRequest.of(model, workers=0, **options)

    def show(found: dict[str, Any]) -> None:
        screen.console.print(speedrun_table(found))
        screen.facts("These runs", facts(found))

    speedrun(request, screen, show, runs=runs, out=out)


if __name__ == "__main__":
    main()
