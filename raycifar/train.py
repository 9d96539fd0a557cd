"""Train one model, data-parallel, on Ray Train: `python -m raycifar.train --model vgg16`."""

from typing import Any

import click

from raycifar import models
from raycifar.command import UNTIL_EXIT, resumable
from raycifar.options import Command, recipe_options, request_options
from raycifar.terminal import Screen
from raycifar.workflows import training
from raycifar.workflows.requests import TrainingRequest


@click.command(cls=Command, example="raycifar train --model vgg16 --epochs 30 --name first")
@click.option("--model", help=f"{', '.join(models.names())}, or timm:NAME.  [the model of --recipe]")
@click.option("--dry-run", is_flag=True, help="Show the plan and the expected time; start nothing.")
@request_options(TrainingRequest)
@recipe_options()
def main(debug: bool, model: str | None, dry_run: bool, **options: Any) -> None:
    """Train one model, data-parallel, on Ray Train.

    Recipe options override the fields of the recipe. The resulting recipe is printed at the start.
    """
    request, screen = TrainingRequest.of(model, **options), Screen()
    if dry_run:
        from raycifar.workflows import preview  # imports PyTorch, which training imports while it reads the data

        preview.preview(request, screen, UNTIL_EXIT, debug=debug)
        return
    with resumable(request.name):
        training.train(request, screen, UNTIL_EXIT, debug=debug)


if __name__ == "__main__":
    main()
