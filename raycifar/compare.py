"""Train and compare several models: `raycifar compare --models cnn,vgg16`."""

from typing import Any

import click

from raycifar import models
from raycifar.command import UNTIL_EXIT, resumable
from raycifar.errors import RequestError
from raycifar.options import Command, recipe_options, request_options
from raycifar.storage.run_folder import RunFolder
from raycifar.terminal import Screen
from raycifar.terminal_tables import comparison_tables
from raycifar.workflows import comparing, study
from raycifar.workflows.requests import ComparisonRequest


@click.command(cls=Command, example="raycifar compare --models cnn,vgg16 --seeds 3 --epochs 30")
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--models", "names", help=f"Comma-separated: {', '.join(models.names())}, timm:NAME.")
@click.option("--dry-run", is_flag=True, help="Show the trials and the expected time; start nothing.")
@request_options(ComparisonRequest)
@recipe_options()
def main(debug: bool, runs: tuple[str, ...], names: str | None, dry_run: bool, **options: Any) -> None:
    """Train several models and seeds, orchestrated by Ray Tune, and report which is better, with its uncertainty.

    Given the folders of finished runs, compare these instead. Recipe options change each model's recipe.
    """
    if bool(runs) == bool(names):
        raise RequestError("give either --models to train, or the folders of finished runs.")
    request, screen = ComparisonRequest.of(names.split(",") if names else (), **options), Screen()

    def show(comparison: dict[str, Any]) -> None:
        for table in comparison_tables(comparison):
            screen.console.print(table)
        screen.lines(comparing.sentences(comparison))
        screen.say(f"Comparison: {RunFolder(request.storage, request.name).location}")

    if dry_run:
        if runs:
            raise RequestError("--dry-run shows what --models would train: finished runs are compared at once.")
        from raycifar.workflows import preview  # and with it PyTorch, which training imports while it reads

        preview.preview_comparison(request, screen)
        return
    if runs:
        comparing.compare_runs(runs, request, screen, show)
        return
    with resumable(request.name):
        study.train_and_compare(request, screen, UNTIL_EXIT, show, debug=debug)


if __name__ == "__main__":
    main()
