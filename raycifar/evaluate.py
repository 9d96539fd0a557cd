"""Score a trained network on a data set: `python -m raycifar.evaluate results/cnn-a`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import pyarrow as pa
from rich import box
from rich.table import Table

from raycifar.analysis.classification import by_class, confused_pairs, confusion, intervals, reliability
from raycifar.data import CLASSES, SUPERCLASSES
from raycifar.data.names import COARSE, FINE
from raycifar.data.sources import load
from raycifar.data.tables import Source, from_lists, take, to_lists, to_numpy
from raycifar.options import command
from raycifar.storage.run_folder import EVALUATION, EVALUATION_PAGE, PREDICTIONS, RUN, RunFolder
from raycifar.terminal import Screen

if TYPE_CHECKING:
    from torch import Tensor

    from raycifar.cluster.sizing import Workers
    from raycifar.engine.trained_model import Weights

WAIT_SECONDS = 1800  # for workers to find room
BLOCK = 1000  # images in a block of Ray Data, and asked of a network at once


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.argument("network", metavar="RUN|WEIGHTS")
@click.option("--data", envvar="RAYCIFAR_DATA", default="cifar100", help="cifar100, synthetic, a path or a URI.")
@click.option("--split", type=click.Choice(["test", "train"]), default="test")
@click.option("--workers", type=click.IntRange(min=0), help="0: this process.  [one for each GPU, else 1]")
@click.option("--device", type=click.Choice(["auto", "gpu", "cpu"]), default="auto")
@click.option("--cpus-per-worker", type=click.FloatRange(min=0, min_open=True), help="CPUs, so threads.  [fair share]")
@click.option("--out", help="Folder or URI to write to.  [the run's, for its own test set; else evaluation]")
@command
def main(
    debug: bool,
    network: str,
    data: str,
    split: str,
    workers: int | None,
    device: str,
    cpus_per_worker: float | None,
    out: str | None,
) -> None:
    """Score a trained network on a data set, as a Ray Data job.

    RUN is the folder of a finished run, WEIGHTS a weights file that raycifar wrote. Writes evaluation.json, a
    page of it, and with what was predicted of each image predictions.parquet.
    """
    screen = Screen()
    with screen.waiting(f"Reading {data}"):
        source = load(data)
    with screen.waiting("Loading PyTorch"):
        from raycifar.engine.trained_model import read_weights

        weights = read_weights(network)
    run = RunFolder.at(network)
    about = None if network.endswith(".safetensors") else run.read_json(RUN)
    table = take(getattr(source, split), np.arange(len(getattr(source, split))))

    folder = choose_folder(out, network, about, source, split)
    logits = predict(table, weights, about, workers, device, cpus_per_worker, screen, debug=debug)
    evaluation, predictions = evaluate(logits, table, source)
    evaluation = {"network": network, "data": source.name, "split": split, **evaluation}
    folder.write(PREDICTIONS, predictions)
    folder.write_json(EVALUATION, evaluation)
    folder.write(EVALUATION_PAGE, to_page(evaluation, run.name).encode())
    show(evaluation, screen)
    screen.say(f"Written to {folder.folder}: {EVALUATION_PAGE}, {EVALUATION}, {PREDICTIONS}")


def choose_folder(out: str | None, network: str, about: dict[str, Any] | None, source: Source, split: str) -> RunFolder:
    """Return where to write: what a run predicted of its own test set is its own, and nothing else may replace it."""
    own = about is not None and split == "test" and about["data"]["fingerprint"] == source.fingerprint()
    return RunFolder.at(out or (network if own else "evaluation"))


# The Ray Data job -----------------------------------------------------------------------------------


@dataclass
class Scorer:
    """Asks the network, on a worker of Ray Data."""

    weights: "Weights"
    precision: Any
    device: str
    threads: int

    def __post_init__(self) -> None:
        import torch

        from raycifar.engine.trained_model import Trained

        torch.set_num_threads(self.threads)
        self.trained = Trained(self.weights, self.device, self.precision)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return, for a batch with columns image and index, index and logits."""
        import torch

        images = torch.from_numpy(to_numpy(batch["image"].combine_chunks(), "image").copy())
        logits = self.trained.logits(images).numpy()
        return pa.table({"index": batch["index"], "logits": to_lists(logits)})


def predict(
    table: pa.Table,
    weights: "Weights",
    about: dict[str, Any] | None,
    count: int | None,
    device: str,
    cpus: float | None,
    screen: Screen,
    *,
    debug: bool,
) -> "Tensor":
    """Return the logits (images, classes) float32 of a split, in its order."""
    import torch

    from raycifar.cluster import sizing as cluster

    precision = (about or {}).get("precision", "auto")  # that of the run: its scores come out the same
    if count == 0:
        workers = cluster.in_process(device, cpus, debug=debug)
    else:
        with screen.waiting("Starting Ray"):
            cluster.connect(debug=debug)
            workers = cluster.size(count, device, cpus)
        with screen.line() as line:
            cluster.make_room(workers, lambda text: line.show(text, None), WAIT_SECONDS)
    scorer = {
        "weights": weights,
        "precision": precision,
        "device": "gpu" if workers.use_gpu else "cpu",
        "threads": workers.threads,
    }
    parts = [table.slice(start, BLOCK) for start in range(0, len(table), BLOCK)]
    with screen.waiting(f"Asking the {weights.architecture.model} on {workers}"):
        answers = list(map(Scorer(**scorer), parts)) if count == 0 else run_job(parts, scorer, workers)
    answer = pa.concat_tables(answers).sort_by("index")
    return torch.from_numpy(from_lists(answer["logits"]).copy())


def run_job(parts: list[pa.Table], scorer: dict[str, Any], workers: "Workers") -> list[pa.Table]:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_blocks([part.select(["image", "index"]) for part in parts]).map_batches(
        Scorer,
        fn_constructor_kwargs=scorer,
        batch_size=BLOCK,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers.count),
        num_cpus=workers.cpus,
        num_gpus=1 if workers.use_gpu else None,
    )
    return list(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


# What came of it ------------------------------------------------------------------------------------


def evaluate(logits: "Tensor", table: pa.Table, source: Source) -> tuple[dict[str, Any], bytes]:
    """Return what `evaluation.json` holds, and the predictions file."""
    import torch

    from raycifar.engine.evaluate import per_image, score, to_predictions_file

    labels, coarse = (torch.from_numpy(table[column].to_numpy().copy()) for column in ("fine", "coarse"))
    parents = np.array(source.superclass_of())
    scores = score(logits, labels, coarse, parents.tolist())
    probabilities = logits.softmax(1)
    confidence, predicted = (values.numpy() for values in probabilities.max(1))
    counted = {name: values.numpy() for name, values in per_image(logits, labels, coarse, parents.tolist()).items()}
    ends = intervals({name: counted[name] for name in ("top1", "top5", "loss")})
    matrix = confusion(labels.numpy(), predicted, CLASSES)
    evaluation = {
        **scores,
        "low": ends["top1"][0],
        "high": ends["top1"][1],
        "intervals": {name: {"low": low, "high": high} for name, (low, high) in ends.items()},
        "classes": by_class(matrix, FINE),
        "confused": confused_pairs(matrix, FINE),
        "reliability": reliability(confidence, counted["top1"]),
        "superclasses": confusion(coarse.numpy(), parents[predicted], SUPERCLASSES).tolist(),
    }
    return evaluation, to_predictions_file(probabilities, labels)


def to_page(evaluation: dict[str, Any], name: str) -> str:
    """Return `evaluation.html`."""
    from raycifar.analysis import charts
    from raycifar.analysis.page import render

    drawn = {
        "reliability": charts.reliability_diagram(evaluation["reliability"]),
        "superclasses": charts.confusion_chart(np.array(evaluation["superclasses"]), COARSE),
        "classes": charts.class_chart(evaluation["classes"]),
    }
    return render("evaluation.html", drawn, title=f"{name}, evaluated", evaluation=evaluation)


def show(evaluation: dict[str, Any], screen: Screen) -> None:
    ends = evaluation["intervals"]
    screen.say(
        f"{evaluation['images']:,} images: top-1 {evaluation['top1']:.4f} (95 % interval {ends['top1']['low']:.4f} to "
        f"{ends['top1']['high']:.4f})  top-5 {evaluation['top5']:.4f}  superclass {evaluation['superclass_top1']:.4f}  "
        f"loss {evaluation['loss']:.4f}  calibration error {evaluation['ece']:.4f}"
    )
    classes = sorted(evaluation["classes"], key=lambda row: row["recall"] or 0.0)
    table = Table("hardest classes", "right", "easiest", "right", "most confused", "images", box=box.SIMPLE_HEAD)
    for worst, best, pair in zip(classes[:10], classes[::-1][:10], evaluation["confused"][:10], strict=False):
        table.add_row(
            worst["class"],
            f"{worst['recall'] or 0:.2f}",
            best["class"],
            f"{best['recall'] or 0:.2f}",
            f"{pair['a']}, {pair['b']}",
            str(pair["images"]),
        )
    screen.console.print(table)


if __name__ == "__main__":
    main()
