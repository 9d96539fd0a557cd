"""Where the time goes, beside the bare compute limit: `python -m raycifar.bench --model cnn --limit 5000`."""

from typing import Any

import click

from raycifar import models
from raycifar.command import UNTIL_EXIT, command
from raycifar.options import WIDE, recipe_options, request_options
from raycifar.storage.run_folder import BENCH, BENCH_CHART, RunFolder
from raycifar.tables import bench_table
from raycifar.terminal import Screen
from raycifar.workflows.benchmark import STAGES, WAYS, bench, sentences
from raycifar.workflows.requests import TrainingRequest


@click.command(context_settings=WIDE)
@click.option("--model", required=True, help=f"{', '.join(models.names())}, or timm:NAME.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Times that everything is timed, in turn.")
@click.option("--against", default="", help=f"Comma-separated ways of others to time too: {', '.join(WAYS)}.")
@click.option("--startup", is_flag=True, help="Time the way to the first step too, beside an empty trainer's.")
@click.option("--out", default="bench", help="Folder or URI for bench.json and bench.svg.")
@request_options(TrainingRequest, without=("name", "storage", "checkpoint_steps", "report"))
@recipe_options
@command
def main(debug: bool, model: str, rounds: int, against: str, startup: bool, out: str, **options: Any) -> None:
    """Time a model's training on this machine or cluster, beside the bare step, and say where the time goes.

    A round times each stage on --limit images; the figures are medians over the rounds, and shares are medians of
    what a round's own bare step made, so that a machine that slows down slows both.
    """
    screen, ways = Screen(), [name.strip() for name in against.split(",") if name.strip()]
    request = TrainingRequest.of(model, **options)
    found = bench(request, screen, UNTIL_EXIT, rounds=rounds, against=ways, startup=startup, out=out, debug=debug)
    screen.console.print(bench_table(found, STAGES))
    screen.lines(sentences(found))
    screen.say(f"Written to {RunFolder.at(out).folder}: {BENCH}, {BENCH_CHART}")


if __name__ == "__main__":
    main()
