"""Where the time goes, compared with the bare compute limit: `python -m raycifar.bench --model cnn`."""

from typing import Any

import click

from raycifar import models
from raycifar.command import UNTIL_EXIT
from raycifar.options import Command, recipe_options, request_options
from raycifar.terminal import Screen
from raycifar.terminal_tables import bench_table, plan_table
from raycifar.workflows.benchmark import STAGES, WAYS, BenchRequest, bench, sentences
from raycifar.workflows.planning import INTERCONNECTS
from raycifar.workflows.requests import MAX_TRIALS, MAX_WORKERS, TrainingRequest

UNUSED = ("name", "storage", "checkpoint_steps", "report", "profile", "track", "max_failures", "workers")
# Fields of the recipe that don't change how long a step takes.
OF_NO_COST = (
    "lr", "norm_lr", "momentum", "schedule", "warmup", "weight_decay", "label_smoothing", "head_epochs", "layer_decay",
)  # fmt: skip


@click.command(cls=Command, example="raycifar bench --model vgg16 --against dataloader")
@click.option("--model", required=True, help=f"{', '.join(models.names())}, or timm:NAME.")
@click.option("--rounds", type=click.IntRange(1, MAX_TRIALS), default=5, help="Rounds of timing, at most.")
@click.option(
    "--against",
    default="",
    show_default=False,
    help=f"Alternatives to time as well, comma-separated: {', '.join(WAYS)}.",
)
@click.option(
    "--plan", default=None, metavar="N,N,…", help="Predict training time for these numbers of workers, such as 1,2,4,8."
)
@click.option(
    "--interconnect",
    type=click.Choice(list(INTERCONNECTS)),
    metavar="LINK",
    help=f"Link between workers, for --plan: {', '.join(INTERCONNECTS)}.  [as measured here]",
)
@click.option("--price-per-hour", type=float, default=None, help="Price of one device per hour, for --plan.")
@click.option("--startup", is_flag=True, help="Also time the start, and that of an empty trainer.")
@click.option(
    "--workers",
    type=click.IntRange(0, MAX_WORKERS),
    help="Number of workers; 0 runs in this process.  [one per GPU, else 1]",
)
@click.option("--storage", help="Folder or URI that all nodes see, for temporary runs.  [a temporary folder here]")
@click.option("--out", default="bench", help="Folder or URI for bench.json and charts.")
@request_options(TrainingRequest, without=UNUSED)
@recipe_options(without=OF_NO_COST)
def main(debug: bool, model: str, **options: Any) -> None:
    """Time a model's training on this machine or cluster, and say where the time goes.

    It is compared with the bare step: training on random tensors that are already on the device.

    The measurement ends within five minutes, and uses as many images of the data set, or of --limit, as fit. Figures
    are medians over rounds. Shares are relative to the bare step of the same round, so a machine that slows down slows
    both.
    """
    names = ("rounds", "plan", "interconnect", "price_per_hour", "startup", "storage", "out")
    own = {name: options.pop(name) for name in names}
    ways = [name.strip() for name in options.pop("against").split(",") if name.strip()]
    screen, request = Screen(), BenchRequest(TrainingRequest.of(model, **options), against=ways, **own)

    def show(found: dict[str, Any]) -> None:
        if "stages" in found:
            screen.console.print(bench_table(found, STAGES))
            screen.lines(sentences(found))
        if "plan" in found:
            screen.console.print(plan_table(found["plan"]["workers"]))
            screen.lines([*found["plan"]["sentences"], *found["plan"]["assumptions"]])

    bench(request, screen, UNTIL_EXIT, show, debug=debug)


if __name__ == "__main__":
    main()
