"""Scoring a trained network on a data set, as a Ray Data job."""

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raycifar.analysis.classification import by_class, confused_pairs, confusion, intervals, reliability
from raycifar.data import CIFAR100
from raycifar.data.tables import Source, from_lists, take, to_images, to_lists
from raycifar.errors import WorkError, in_a_line
from raycifar.models.recipes import read_run
from raycifar.storage.locations import check_location
from raycifar.storage.run_folder import EVALUATION, EVALUATION_PAGE, MANIFEST, PREDICTIONS, RunFolder
from raycifar.workflows.datasets import warn_of_leaks
from raycifar.workflows.reporting import is_source_of, load_images
from raycifar.workflows.requests import WorkerSettings

if TYPE_CHECKING:
    from torch import Tensor

    from raycifar.cluster.sizing import Workers
    from raycifar.engine.trained_model import Weights
    from raycifar.terminal import Screen

WAIT_SECONDS = 1800  # for workers to find room
ATTEMPTS = 3  # at a job whose workers die
BLOCK = 1000  # images in a block of Ray Data, which are scored together


@dataclass(frozen=True)
class EvaluationRequest(WorkerSettings):
    """What to score, and how.

    network: a run's folder, or a weights file. data: of other images than the run's own. count: of workers; 0 takes
    this process. out: the folder to write to.
    """

    network: str
    data: str | None = None
    split: str = "test"
    count: int | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_workers(self.count)
        if self.out is not None:
            check_location(self.out, "--out", to_write=True)


def evaluate(
    request: EvaluationRequest, screen: "Screen", connection: ExitStack, *, debug: bool = False
) -> tuple[dict[str, Any], RunFolder]:
    """Score a network; write evaluation.json, a page of it, and predictions.parquet.

    Args:
        connection: enters the connection to Ray.

    Returns:
        The content of `evaluation.json`, and the folder that it was written to.

    Raises:
        RequestError: there is no such network, or there are no such images.
    """
    folder = RunFolder.at(request.network)
    run = None if folder.name.endswith(".safetensors") else read_run(folder)
    with screen.waiting("Loading PyTorch"):
        from raycifar.engine.trained_model import check_finite, read_weights

        weights = read_weights(request.network)
    with screen.waiting("Reading the images"):
        source = load_images(run, request.data)
    if request.split == "test":
        warn_of_leaks(source, screen)
    images = getattr(source, request.split)
    table = take(images, np.arange(len(images)))
    precision = (run or {}).get("precision", "auto")  # that of the run: its scores come out the same
    logits = ask(table, weights, precision, request, screen, connection, debug=debug)
    check_finite(logits, request.network)

    scores, predictions = score_predictions(logits, table, source)
    evaluation = {"network": request.network, "data": source.name, "split": request.split, **scores}
    folder = choose_folder(request, run, source)
    folder.write(PREDICTIONS, predictions)
    if folder.exists(MANIFEST):
        folder.seal(PREDICTIONS)
    folder.write_json(EVALUATION, evaluation)
    folder.write(EVALUATION_PAGE, to_page(evaluation, RunFolder.at(request.network).name).encode())
    return evaluation, folder


def choose_folder(request: EvaluationRequest, run: dict[str, Any] | None, source: Source) -> RunFolder:
    """Return where to write: what a run predicted of its own test set is its own, and nothing else may replace it."""
    own = request.split == "test" and is_source_of(source, run)
    return RunFolder.at(request.out or (request.network if own else "evaluation"))


# The Ray Data job -----------------------------------------------------------------------------------


@dataclass
class Scorer:
    """Asks the network, on a worker of Ray Data."""

    weights: "Weights"
    precision: Any
    device: str
    gpus: float
    threads: int

    def __post_init__(self) -> None:
        import torch

        from raycifar.engine.hardware import limit_gpu_memory
        from raycifar.engine.trained_model import Trained

        torch.set_num_threads(self.threads)
        limit_gpu_memory(self.gpus)
        self.trained = Trained(self.weights, self.device, self.precision)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return, for a batch with columns image and index, index and logits."""
        import torch

        images = torch.from_numpy(to_images(batch["image"]).copy())
        logits = self.trained.logits(images).numpy()
        return pa.table({"index": batch["index"], "logits": to_lists(logits)})


def ask(
    table: pa.Table,
    weights: "Weights",
    precision: Any,
    request: EvaluationRequest,
    screen: "Screen",
    connection: ExitStack,
    *,
    debug: bool,
) -> "Tensor":
    """Return the logits (images, classes) float32 of a split, in its order."""
    import torch

    from raycifar.cluster import sizing
    from raycifar.cluster.connection import connected, quiet
    from raycifar.cluster.waiting import make_room

    if request.count == 0:
        connection.enter_context(quiet(debug=debug))
        workers = sizing.in_process(request.device, request.cpus_per_worker)
    else:
        with screen.waiting("Starting Ray"):
            import ray.data  # noqa: F401 (it sets the level of its log, which the connection then lowers)

            connection.enter_context(connected(debug=debug))
            workers = sizing.size(
                request.count, request.device, request.cpus_per_worker, request.gpus_per_worker, request.accelerator
            )
        with screen.line() as line:
            make_room(workers, lambda text: line.show(text, None), WAIT_SECONDS)
    scorer = {
        "weights": weights,
        "precision": precision,
        "device": workers.device,
        "gpus": workers.gpus,
        "threads": workers.threads,
    }
    block = min(BLOCK, -(-len(table) // max(1, workers.count)))
    parts = [table.slice(start, block) for start in range(0, len(table), block)]
    with screen.waiting(f"Asking the {weights.architecture.model} on {workers}"):
        answers = list(map(Scorer(**scorer), parts)) if workers.count == 0 else run_job(parts, scorer, workers)
    answer = pa.concat_tables(answers).sort_by("index")
    return torch.from_numpy(from_lists(answer["logits"]).copy())


def run_job(parts: list[pa.Table], scorer: dict[str, Any], workers: "Workers") -> list[pa.Table]:
    """Return the answers of the workers; the job is run again if one of them dies.

    Raises:
        WorkError: workers died each time.
    """
    import ray.data
    from ray.exceptions import RayActorError

    ray.data.DataContext.get_current().enable_progress_bars = False
    options: dict[str, Any] = {"max_restarts": 0}  # Ray prints an error about actors that it may restart
    with warnings.catch_warnings(action="ignore"):  # the option has no name of its own
        dataset = ray.data.from_blocks([part.select(["image", "index"]) for part in parts]).map_batches(
            Scorer,
            fn_constructor_kwargs=scorer,
            batch_size=BLOCK,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers.count),
            num_cpus=workers.cpus,
            num_gpus=workers.gpus or None,
            accelerator_type=workers.accelerator,
            **options,
        )
    for left in reversed(range(ATTEMPTS)):
        try:
            return list(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
        except RayActorError as error:
            if not left:
                raise WorkError(
                    f"workers died {ATTEMPTS} times while they scored the images: {in_a_line(error)}."
                ) from error
    raise AssertionError


# Results --------------------------------------------------------------------------------------------


def score_predictions(logits: "Tensor", table: pa.Table, source: Source) -> tuple[dict[str, Any], bytes]:
    """Return the content of `evaluation.json`, and the predictions file."""
    import torch

    from raycifar.engine.evaluate import per_image, score, to_predictions_file

    labels, coarse = (torch.from_numpy(table[column].to_numpy().copy()) for column in ("fine", "coarse"))
    superclass_of = source.superclass_of()
    scores = score(logits, labels, coarse, superclass_of)
    probabilities = logits.softmax(1)
    confidence, predicted = (values.numpy() for values in probabilities.max(1))
    of_images = {name: values.numpy() for name, values in per_image(logits, labels, coarse, superclass_of).items()}
    ends = intervals({name: of_images[name] for name in ("top1", "top5", "loss")})
    matrix = confusion(labels.numpy(), predicted, CIFAR100.num_classes)
    evaluation = {
        **scores,
        "low": ends["top1"][0],
        "high": ends["top1"][1],
        "intervals": {name: {"low": low, "high": high} for name, (low, high) in ends.items()},
        "classes": by_class(matrix, CIFAR100.class_names),
        "confused": confused_pairs(matrix, CIFAR100.class_names),
        "reliability": reliability(confidence, of_images["top1"]),
        "superclasses": confusion(
            coarse.numpy(), np.array(superclass_of)[predicted], CIFAR100.num_superclasses
        ).tolist(),
    }
    return evaluation, to_predictions_file(probabilities, labels)


def to_page(evaluation: dict[str, Any], name: str) -> str:
    """Return `evaluation.html`."""
    from raycifar.analysis import charts
    from raycifar.analysis.page import render

    drawn = {
        "reliability": charts.reliability_diagram(evaluation["reliability"]),
        "superclasses": charts.confusion_chart(np.array(evaluation["superclasses"]), CIFAR100.superclass_names),
        "classes": charts.class_chart(evaluation["classes"]),
    }
    return render("evaluation.html", drawn, title=f"{name}, evaluated", evaluation=evaluation)
