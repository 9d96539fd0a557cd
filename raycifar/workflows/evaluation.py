"""Scoring a trained network on a data set, as a Ray Data job."""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raycifar.analysis.classification import by_class, confused_pairs, confusion, reliability
from raycifar.analysis.statistics import accuracy_interval, accuracy_intervals, mean_interval
from raycifar.data import CIFAR100
from raycifar.data.corruptions import Corruptions, benchmark, find_corruptions
from raycifar.data.dataset import Source, split_rows, to_images
from raycifar.data.sources import is_location
from raycifar.errors import DamagedFileError, RequestError, WorkError, in_a_line, notice
from raycifar.models.recipe import Precision
from raycifar.models.recipes import recipe_from_json
from raycifar.redaction import redact
from raycifar.storage.parquet import from_lists, to_lists
from raycifar.storage.run_folder import EVALUATION, EVALUATION_PAGE, PICTURES, PREDICTIONS, RunFolder
from raycifar.terminal import Screen
from raycifar.workflows.datasets import warn_of_leaks
from raycifar.workflows.duplicates import copied_images, find_duplicates
from raycifar.workflows.prediction import Model, Weights, check_finite, read_weights
from raycifar.workflows.reporting import is_source_of, load_images
from raycifar.workflows.requests import WorkerSettings
from raycifar.workflows.training import connect
from raycifar.workflows.training_run import read_run

if TYPE_CHECKING:
    from torch import Tensor

    from raycifar.cluster.sizing import Workers

ATTEMPTS = 3  # at a job whose workers die
BLOCK = 1000  # images in a block of Ray Data, which are scored together


@dataclass(frozen=True)
class EvaluationRequest(WorkerSettings):
    """What to score, and how."""

    network: str  # a run's folder, or a weights file
    data: str | None = None  # of other images than the run's own
    split: str = "test"
    count: int | None = None  # of workers; 0: this process
    out: str | None = None  # the folder to write to

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_workers(self.count)


def evaluate(
    request: EvaluationRequest, screen: Screen, connection: ExitStack, *, debug: bool = False
) -> tuple[dict[str, Any], RunFolder]:
    """Score a network; write evaluation.json, a page of it, and predictions.parquet.

    Args:
        connection: enters the connection to Ray.

    Returns:
        The content of `evaluation.json`, and the folder that it was written to.

    Raises:
        RequestError: there is no such network, or there are no such images.
    """
    folder, predictions = RunFolder.at(request.network), None
    out = RunFolder.for_output(request.out, folder) if request.out is not None else None
    if request.out and request.data and is_location(request.data) and place_of(request.out) == place_of(request.data):
        raise RequestError(f"--out {request.out} is the data set: give another folder.")
    # A run's predictions for its own test set stay: nothing else may replace them.
    taken = RequestError(f"--out {request.out} holds the run's predictions for its own test set: give another folder.")
    run = None if folder.name.endswith(".safetensors") else read_run(folder)
    with screen.waiting("Loading PyTorch"):
        weights = read_weights(request.network)
    precision = (run or {}).get("precision", "auto")  # that of the run: its scores come out the same
    allocate = partial(allocate_workers, request, screen, connection, debug=debug)
    if request.data and is_location(request.data) and (corruptions := find_corruptions(request.data)):
        if request.split != "test":
            raise RequestError(f"--split {request.split}: {request.data} holds test images alone.")
        if out == folder:
            raise taken
        out, asked = out or RunFolder.for_output("evaluation"), identify(request, request.data)
        check_replaces_no_other(out, asked)
        job = ScoringJob(request.network, weights, precision, allocate())
        scores = score_corruptions(corruptions, job, screen)
        evaluation = {**asked, **scores}
    else:
        with screen.waiting("Reading the images"):
            source = load_images(run, request.data, test_alone=request.split == "test")
        own = request.split == "test" and is_source_of(source, run)
        if out == folder and not own:
            raise taken
        out = out or RunFolder.for_output(request.network if own else "evaluation", folder)
        asked = identify(request, source.name)
        if out != folder:
            check_replaces_no_other(out, asked)
        copies = find_copies(run, source, screen) if run and own else None
        if request.split == "test" and len(source.train):
            warn_of_leaks(source, screen)
        table = getattr(source, request.split)
        job = ScoringJob(request.network, weights, precision, allocate())
        with screen.waiting(f"Asking the {weights.architecture.model} on {job.workers}"):
            (logits,) = job.logits([table])
        scores, predictions = score_predictions(logits, table, source, copies)
        evaluation = {**asked, **scores}
        if run and request.split == "test":
            evaluation["findings"] = compare_with_validation(folder, run, scores, logits, table)
    page = to_page(evaluation, folder.name).encode()  # before anything is written
    if predictions is not None:
        out.write(PREDICTIONS, predictions)
        out.manifest.renew(PREDICTIONS)
    out.write_json(EVALUATION, evaluation)
    out.write(EVALUATION_PAGE, page)
    return evaluation, out


def identify(request: EvaluationRequest, data: str) -> dict[str, str]:
    """Return the network and the images of an evaluation, as `evaluation.json` names them."""
    network = redact(RunFolder.at(request.network).location)
    return {"network": network, "data": redact(data), "split": request.split}


def check_replaces_no_other(out: RunFolder, asked: dict[str, str]) -> None:
    """Raise RequestError if a folder holds the evaluation of another network, or on other images."""
    before = out.read_json(EVALUATION)
    if before and any(place_of(before.get(name, "")) != place_of(value) for name, value in asked.items()):
        what = f"{before.get('network')} on the {before.get('split')} images of {before.get('data')}"
        raise RequestError(f"{out.location} holds the evaluation of {what}: give another --out.")


def place_of(name: str) -> str:
    """Return a network or data set by its whole path, which earlier versions didn't write."""
    return RunFolder.at(name).location if is_location(name) else name


def find_copies(run: dict[str, Any], source: Source, screen: Screen) -> np.ndarray:
    """Return the rows of test images that are near duplicates of a run's training images."""
    recipe = recipe_from_json(run["model"], run["recipe"])
    found = find_duplicates(source, screen)
    rows, _ = split_rows(source, run["val_size"], run["limit"], run["seed"], copied_images(source, recipe))
    return found.test_copies(rows)


def compare_with_validation(
    folder: RunFolder, run: dict[str, Any], scores: dict[str, Any], logits: "Tensor", table: pa.Table
) -> list[dict[str, Any]]:
    """Return findings about how these images differ from the run's validation images."""
    from raycifar.analysis.gallery import measure_pixels
    from raycifar.analysis.history import RunHistory
    from raycifar.analysis.mismatch import find_mismatch
    from raycifar.engine.scoring import likeliest

    try:
        records, pictures = folder.history(notice), folder.read_json(PICTURES)
    except DamagedFileError as error:
        notice(str(error))
        return []
    history = RunHistory(run, records, {"status": "finished", "test": scores})
    answers = pa.table({"label": table["fine"], "top5": to_lists(likeliest(logits).numpy())})
    if pictures and "train" in pictures["pixels"]:
        pictures = {**pictures, "pixels": {"train": pictures["pixels"]["train"], "test": measure_pixels(table)}}
    return [finding.to_json() for finding in find_mismatch(history, answers, pictures)]


# The Ray Data job -----------------------------------------------------------------------------------


class Scorer:
    """Computes the network's outputs, on a worker of Ray Data."""

    def __init__(self, job: "ScoringJob") -> None:
        import torch

        from raycifar.engine.hardware import limit_gpu_memory

        workers = job.workers
        torch.set_num_threads(workers.threads)
        limit_gpu_memory(workers.gpus)
        self.model = Model(job.location, workers.device, precision=job.precision, weights=job.weights)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return, for a batch with columns image and index, index and logits."""
        logits = self.model.logits(to_images(batch["image"]).copy()).numpy()
        return pa.table({"index": batch["index"], "logits": to_lists(logits)})


@dataclass
class ScoringJob:
    """A trained network, and the workers that compute with it."""

    location: str  # a run's folder, or a weights file
    weights: Weights
    precision: Precision
    workers: "Workers"

    def logits(self, tables: Sequence[pa.Table]) -> list["Tensor"]:
        """Return the logits (images, classes) float32 of each table, which has a column image.

        Raises:
            WorkError: some aren't finite numbers.
        """
        import torch

        table = pa.concat_tables(table.select(["image"]) for table in tables)
        table = table.append_column("index", pa.array(np.arange(len(table))))
        block = min(BLOCK, -(-len(table) // max(1, self.workers.count)))
        parts = [table.slice(start, block) for start in range(0, len(table), block)]
        answers = run_job(parts, self) if self.workers.count else list(map(Scorer(self), parts))
        logits = from_lists(pa.concat_tables(answers).sort_by("index")["logits"])
        by_table = np.split(logits, np.cumsum([*map(len, tables)])[:-1])
        return [check_finite(torch.from_numpy(part.copy()), self.location) for part in by_table]


def allocate_workers(request: EvaluationRequest, screen: Screen, connection: ExitStack, *, debug: bool) -> "Workers":
    """Connect to Ray, unless the images are scored in this process, and wait for room for the workers."""
    if request.count == 0:
        return connect(request, 0, connection, debug=debug)
    with screen.waiting("Starting Ray"):
        import ray.data  # noqa: F401 (it sets the level of its log, which the connection then lowers)

        from raycifar.cluster.waiting import make_room

        workers = connect(request, request.count, connection, debug=debug)
    with screen.line() as line:
        make_room(workers, lambda text: line.show(text, None), request.wait)
    return workers


def run_job(parts: list[pa.Table], job: ScoringJob) -> list[pa.Table]:
    """Return the answers of the workers; the job is run again if one of them dies.

    Raises:
        WorkError: workers died each time.
    """
    import ray.data
    from ray.exceptions import RayActorError

    ray.data.DataContext.get_current().enable_progress_bars = False
    workers = job.workers
    with warnings.catch_warnings(action="ignore"):  # the option has no name of its own
        dataset = ray.data.from_blocks(parts).map_batches(
            Scorer,
            fn_constructor_args=(job,),
            batch_size=BLOCK,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers.count),
            num_cpus=workers.cpus,
            num_gpus=workers.gpus or None,
            accelerator_type=workers.accelerator,
            max_restarts=0,  # Ray prints an error about actors that it may restart
        )
    for _ in range(ATTEMPTS):
        try:
            return list(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
        except RayActorError as error:
            death = error
    raise WorkError(f"workers died {ATTEMPTS} times while they scored the images: {in_a_line(death)}.") from death


# Results --------------------------------------------------------------------------------------------


def score_predictions(
    logits: "Tensor", table: pa.Table, source: Source, near_duplicates: np.ndarray | None = None
) -> tuple[dict[str, Any], bytes]:
    """Return the content of `evaluation.json`, and the predictions file."""
    import torch

    from raycifar.engine.scoring import per_image, score, score_without, to_predictions_file

    labels, coarse = (torch.from_numpy(table[column].to_numpy().copy()) for column in ("fine", "coarse"))
    superclass_of = source.superclass_of()
    images = per_image(logits, labels, coarse, superclass_of)
    scores = score(images)
    predicted = logits.argmax(1).numpy()
    correct = images["top1"].numpy()
    if near_duplicates is not None:
        scores |= score_without(near_duplicates, correct)
    intervals = accuracy_intervals(scores)
    if (loss := mean_interval(images["loss"].tolist()))["n"] > 1:
        intervals["loss"] = {end: loss[end] for end in ("low", "high")}
    matrix = confusion(labels.numpy(), predicted)
    evaluation = {
        **scores,
        **intervals["top1"],
        "intervals": intervals,
        "classes": by_class(matrix, CIFAR100.class_names),
        "confused": confused_pairs(matrix, CIFAR100.class_names),
        "reliability": reliability(images["confidence"].numpy(), correct),
        "superclasses": confusion(
            coarse.numpy(), np.array(superclass_of)[predicted], CIFAR100.num_superclasses
        ).tolist(),
    }
    return evaluation, to_predictions_file(logits, labels, near_duplicates)


def score_corruptions(corruptions: Corruptions, job: ScoringJob, screen: Screen) -> dict[str, Any]:
    """Return the scores by corruption and severity, and the mean error over the benchmark's corruptions."""
    of_each = {}
    with screen.progress("Scoring the corrupted images") as progress:
        for done, name in enumerate(corruptions.names):
            tables = corruptions.read(name)
            rows = []
            for logits, table in zip(job.logits(tables), tables, strict=True):
                correct = logits.numpy().argmax(1) == table["fine"].to_numpy()
                top1 = float(correct.mean())
                rows.append({"top1": top1, **accuracy_interval(top1, len(correct))})
            of_each[name] = {"severities": rows, "error": 1 - float(np.mean([row["top1"] for row in rows]))}
            progress((done + 1) / len(corruptions.names))
    counted = benchmark(corruptions.names)
    return {
        "images": len(corruptions.labels) * len(of_each),
        "corruptions": of_each,
        "counted": counted,
        "mean_error": float(np.mean([of_each[name]["error"] for name in counted])),
    }


def to_page(evaluation: dict[str, Any], name: str) -> str:
    from raycifar.analysis import charts
    from raycifar.analysis.page import render
    from raycifar.analysis.prose import without_near_duplicates

    if "corruptions" in evaluation:
        drawn = {"corruptions": charts.corruption_chart(evaluation["corruptions"])}
        return render("corruptions.html", drawn, title=f"{name}, on corrupted images", evaluation=evaluation)
    drawn = {
        "reliability": charts.reliability_diagram(evaluation["reliability"]),
        "superclasses": charts.confusion_chart(np.array(evaluation["superclasses"]), CIFAR100.superclass_names),
        "classes": charts.class_chart(evaluation["classes"]),
    }
    evaluation = {"findings": [], **evaluation}
    without = without_near_duplicates(evaluation, evaluation["intervals"])
    return render("evaluation.html", drawn, title=f"{name}, evaluated", evaluation=evaluation, without=without)
