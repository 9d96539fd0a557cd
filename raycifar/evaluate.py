"""Score a trained network on a data set: `python -m raycifar.evaluate results/cnn-a`."""

import click

from raycifar.analysis.prose import without_near_duplicates
from raycifar.command import UNTIL_EXIT
from raycifar.options import Command, request_options
from raycifar.storage.run_folder import EVALUATION, EVALUATION_PAGE, PREDICTIONS
from raycifar.terminal import Screen
from raycifar.terminal_tables import corruption_table, evaluation_table
from raycifar.words import count
from raycifar.workflows.evaluation import EvaluationRequest, evaluate
from raycifar.workflows.requests import MAX_WORKERS, WorkerSettings


@click.command(cls=Command, example="raycifar evaluate results/first --split train")
@click.argument("network", metavar="RUN|WEIGHTS")
@click.option("--data", help="cifar100, synthetic, a path or a URI.  [the run's; else RAYCIFAR_DATA or cifar100]")
@click.option("--split", type=click.Choice(["test", "train"]), default="test", help="Images to score.")
@click.option(
    "--workers",
    "count",
    type=click.IntRange(0, MAX_WORKERS),
    help="Number of workers; 0 scores in this process.  [one per GPU, else 1]",
)
@request_options(WorkerSettings)
@click.option("--out", help="Folder or URI to write to.  [the run's, for its test set; else evaluation]")
def main(debug: bool, **options: object) -> None:
    """Score a trained network on a data set, as a Ray Data job.

    RUN is the folder of a finished run, WEIGHTS a weights file that raycifar wrote. Writes evaluation.json, its page
    evaluation.html, and predictions.parquet with the predictions for each image. --data may hold only a test set, or
    be the folder of CIFAR-100-C, which is scored by corruption and severity.
    """
    screen = Screen()
    found, folder = evaluate(EvaluationRequest(**options), screen, UNTIL_EXIT, debug=debug)  # type: ignore[arg-type]
    if "corruptions" in found:
        screen.console.print(corruption_table(found))
        over = count(len(found["counted"]), "corruption")
        screen.say(f"Mean error {found['mean_error']:.4f} over {over}, with five severities each")
        screen.say(f"Written to {folder.location}: {EVALUATION_PAGE}, {EVALUATION}")
        return
    ends = found["intervals"]["top1"]
    screen.say(
        f"{found['images']:,} images: top-1 {found['top1']:.4f} (95% interval {ends['low']:.4f} to "
        f"{ends['high']:.4f})  top-5 {found['top5']:.4f}  superclass {found['superclass_top1']:.4f}  "
        f"loss {found['loss']:.4f}  calibration error {found['ece']:.4f}"
    )
    if without := without_near_duplicates(found, found["intervals"]):
        screen.say(f"Top-1 is {without}.")
    screen.lines(f"WARNING: {finding['evidence']} {finding['advice']}" for finding in found.get("findings", ()))
    screen.console.print(evaluation_table(found))
    screen.say(f"Written to {folder.location}: {EVALUATION_PAGE}, {EVALUATION}, {PREDICTIONS}")


if __name__ == "__main__":
    main()
