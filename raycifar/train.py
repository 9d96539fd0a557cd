"""Train one model, data-parallel, on Ray Train: `python -m raycifar.train --model vgg16`."""

# Ray and PyTorch take seconds to import: what needs them is imported below, once there is something to read.

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import click

from raycifar import models
from raycifar.cluster.status import StatusStore
from raycifar.data.sources import load
from raycifar.data.tables import Source, Splits, split
from raycifar.errors import RequestError, WorkError, in_a_line
from raycifar.models.initial_weights import InitialWeights, load_initial_weights
from raycifar.models.recipes import recipe_from_json
from raycifar.options import (
    Interrupted,
    Model,
    WorkerCount,
    WorkersOption,
    check_name,
    command,
    pick_recipe,
    recipe_options,
    training_options,
)
from raycifar.recipes import Recipe
from raycifar.report import Refresher, explain, write_run
from raycifar.storage.run_folder import KEPT, REPORT_PAGE, RESULT, RUN, RunFolder
from raycifar.terminal import Screen, alongside, result_lines

RESIZE_SECONDS = 15  # between two looks whether an elastic run can grow

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from raycifar.cluster.sizing import Workers
    from raycifar.engine.trainer import Job


@dataclass(frozen=True)
class Request:
    """What is asked for. All but the last block decides the weights, and must be the same to resume a run."""

    model: str
    recipe: Recipe
    data: str
    val_size: int
    limit: int | None
    seed: int

    name: str
    storage: str
    workers: WorkerCount
    device: str
    cpus_per_worker: float | None
    compile: bool
    checkpoint_steps: int
    max_failures: int
    wait: float = 1800  # seconds
    test: bool = True  # score the test set at the end
    report: bool = True
    rungs: tuple[int, ...] = ()  # epochs after which the status store is asked whether to stop


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.option("--model", type=Model(), required=True, help=f"{', '.join(models.names())}, or timm:NAME.")
@click.option("--name", help="The run's name; the same name resumes it.  [model, seed and time]")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the split, the first weights and every epoch.")
@click.option("--workers", type=WorkersOption(), help="0: this process; 1:4 elastic.  [one for each GPU, else 1]")
@click.option("--checkpoint-steps", type=click.IntRange(min=0), default=0, help="0: at the end of each epoch alone.")
@training_options
@recipe_options
@command
def main(debug: bool, **options: Any) -> None:
    """Train one model, data-parallel, on Ray Train.

    The options from --epochs on are the recipe's: what isn't given is the model's own, and is shown at the start.
    """
    recipe = pick_recipe(options["model"], options)
    name = options["name"] or f"{models.slug(options['model'])}-s{options['seed']}-{datetime.now():%Y%m%d-%H%M%S}"
    check_name(name)
    own = {key: options[key] for key in Request.__annotations__ if key in options}
    train(Request(**{**own, "recipe": recipe, "name": name}), debug=debug)


def train(request: Request, *, debug: bool = False) -> dict[str, Any]:
    """Train, score and save a run, and show it; a finished run of the same name is only shown.

    Returns:
        The content of the run's `result.json`.

    Raises:
        RequestError: the request is wrong; nothing was started or written.
        WorkError: training failed; the run folder keeps what was reached.
    """
    screen, run = Screen(), RunFolder(request.storage, request.name)

    with screen.waiting(f"Reading {request.data}{and_weights([request.recipe])}"):
        source, splits = read(request.data, request.val_size, request.limit, request.seed)
        start = load_initial_weights(request.model, request.recipe, source)
    identity = identify(request, source, splits, start)
    if earlier := compare_with_earlier(run, identity):
        screen.say(f"{run.folder} is finished; nothing is trained again.")
        screen.lines(result_lines(earlier, run.folder, source.name))
        return earlier

    with screen.waiting("Starting Ray" if request.workers != 0 else "Loading PyTorch"):
        workers = place(request, run, debug=debug)
    screen.facts(request.name, overview(identity, workers, run.folder))
    with storing_in(run, screen):
        record(run, identity, workers)

    from raycifar.cluster.sizing import Waiting

    status_store, waiting = StatusStore(uuid.uuid4().hex), Waiting(workers, request.wait)
    refresh = Refresher(lambda: write_run(run, source)) if request.report else lambda: None
    trainer = build_trainer(request, run, status_store, source, splits, start, workers, debug=debug)
    try:
        outcome = fit(
            trainer,
            lambda running: screen.follow(status_store, running, request.recipe.epochs, waiting, refresh),
            request.max_failures,
        )
        result = conclude(run, outcome)
        screen.lines(result_lines(result, run.folder, source.name))
    except Interrupted:
        screen.say(f"To continue, give the same command with --name {request.name}")
        raise
    except WorkError:
        show_report(request, run, source, screen)
        raise
    show_report(request, run, source, screen)
    return result


def show_report(request: Request, run: RunFolder, source: Source, screen: Screen) -> None:
    if not request.report:
        return
    with screen.waiting("Drawing the report"):
        report = explain(lambda: write_run(run, source))
    screen.say(f"What the curves show: {report['headline']}. See {REPORT_PAGE}")


def read(data: str, val_size: int, limit: int | None, seed: int) -> tuple[Source, Splits]:
    """Return the images and their splits; a thread imports PyTorch and Ray Train meanwhile."""
    importing = Thread(target=import_module, args=("ray.train.torch",))
    importing.start()
    source = load(data)
    splits = split(source, val_size, limit, seed)
    importing.join()
    return source, splits


def and_weights(recipes: Iterable[Recipe]) -> str:
    places = sorted({recipe.pretrained for recipe in recipes} - {"none"})
    return f" and weights ({', '.join(places)})" if places else ""


# The run's identity and its record -----------------------------------------------------------------


def identify(request: Request, source: Source, splits: Splits, start: InitialWeights) -> dict[str, Any]:
    """Return what decides the weights: a run of the same name must agree in all of it to be resumed."""
    return {
        "name": request.name,
        "model": request.model,
        "recipe": asdict(request.recipe),
        "data": {
            "source": source.name,
            "fingerprint": source.fingerprint(),
            **{name: len(table) for name, table in vars(splits).items()},
        },
        "val_size": request.val_size,
        "limit": request.limit,
        "architecture": start.architecture.to_json(),
        "weights": start.fingerprint(),
        "seed": request.seed,
        "compile": request.compile,
    }


def compare_with_earlier(run: RunFolder, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of a finished run of the same name, or None where there is something to do.

    Raises:
        RequestError: the run of that name is another one; the message names the differences.
    """
    earlier = run.read_json(RUN)
    if earlier is None:
        return None
    recipe = asdict(recipe_from_json(earlier["model"], earlier["recipe"]))
    before, now = flatten({**earlier, "recipe": recipe}), flatten(identity)
    # The same images and the same weights may lie elsewhere today.
    differences = [
        f"{key} {before.get(key)} there, {now[key]} here"
        for key in now
        if before.get(key) != now[key] and key not in ("source", "pretrained")
    ]
    if differences:
        raise RequestError(
            f"{run.folder} is another run: {'; '.join(differences)}. Give another --name, or the options of that run."
        )
    result = run.read_json(RESULT)
    return result if result and result["status"] == "finished" else None


def flatten(identity: dict[str, Any]) -> dict[str, Any]:
    nested = {"recipe": None, "data": None, "architecture": None}  # the last follows from model, recipe and weights
    return {**identity, **identity["recipe"], **identity["data"], **nested}


def record(run: RunFolder, identity: dict[str, Any], workers: "Workers") -> None:
    """Write `run.json`; of a run that is resumed, the day it was begun stays, and a failure is forgotten."""
    from raycifar.cluster.sizing import versions

    run.delete(RESULT)
    now = f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}"
    run.write_json(
        RUN,
        {
            **identity,
            "workers": workers.count,
            **({} if workers.least is None else {"least_workers": workers.least}),
            "cpus_per_worker": workers.cpus,
            "device": "gpu" if workers.use_gpu else "cpu",
            "created": (run.read_json(RUN) or {}).get("created", now),
            "versions": versions(),
        },
    )


def overview(identity: dict[str, Any], workers: "Workers", folder: str) -> dict[str, str]:
    recipe, data = identity["recipe"], identity["data"]
    return {
        "model": f"{identity['model']}, seed {identity['seed']}",
        "data": data["source"],
        "images": f"{data['train']:,} training, {data['val']:,} validation, {data['test']:,} test",
        "workers": str(workers),
        "recipe": ", ".join(f"{name} {value}" for name, value in recipe.items() if value != 0),
        "folder": folder,
    }


def check_batch_size(recipe: Recipe, workers: int) -> None:
    if recipe.batch_size < 2 * workers:
        raise RequestError(f"--batch-size {recipe.batch_size} leaves less than 2 images for each of {workers} workers.")


@contextmanager
def storing_in(run: RunFolder, screen: Screen) -> Iterator[None]:
    """Write the first file of a folder: say if the folder is temporary, and refuse one that can't be written."""
    if "runtime_resources" in Path(run.folder).parts:  # where Ray unpacks a job's --working-dir
        screen.say("Note: this job's folder is temporary, and the run in it: give --storage a full path or a URI.")
    try:
        yield
    except OSError as error:
        raise RequestError(f"{run.folder} can't be written: {error}. Give another --storage.") from error


# The work ------------------------------------------------------------------------------------------


def place(request: Request, run: RunFolder, *, debug: bool) -> "Workers":
    """Connect to Ray, unless training in this process, size the workers to it, and see that all nodes can take part."""
    from raycifar.cluster import sizing as cluster

    if request.workers == 0:
        return cluster.in_process(request.device, request.cpus_per_worker, debug=debug)
    cluster.connect(debug=debug)
    workers = cluster.size(request.workers, request.device, request.cpus_per_worker)
    check_batch_size(request.recipe, workers.count)
    with run.marker() as file:
        cluster.check_nodes(workers, file)
    return workers


def build_trainer(
    request: Request,
    run: RunFolder,
    status_store: StatusStore,
    source: Source,
    splits: Splits,
    start: InitialWeights,
    workers: "Workers",
    *,
    debug: bool,
    plan: "Callable[[Job], tuple[Callable[[dict[str, Any]], Any], dict[str, Any]]] | None" = None,
) -> "TorchTrainer":
    """Return Ray Train's trainer for the run: the same for one process, one machine and a cluster.

    Args:
        plan: gives what the workers run, and its configuration, instead of training.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from raycifar.cluster.sizing import versions
    from raycifar.data.shards import ExactShards, to_datasets
    from raycifar.engine.reporter import EndsWithItsDriver, Failures
    from raycifar.engine.trainer import Job, train_loop_per_worker

    # Ray Train takes one report of each worker at each look, every 2 s by default: epochs of a GPU are shorter.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    if workers.least is not None:  # a node that has just died is still counted for a while: look again
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    job = Job(
        run=run,
        status_store=status_store,
        start=start,
        recipe=request.recipe,
        seed=request.seed,
        images=len(splits.train),
        val_images=len(splits.val),
        test_images=len(splits.test) if request.test else 0,
        parents=source.superclass_of(),
        use_gpu=workers.use_gpu,
        threads=workers.threads,
        in_process=workers.count == 0,
        versions=versions(),
        compile=request.compile,
        checkpoint_steps=request.checkpoint_steps,
        rungs=request.rungs,
    )
    tables = {name: table for name, table in splits.tables().items() if name != "test" or request.test}
    run.mend_snapshot()
    loop, config = plan(job) if plan else (train_loop_per_worker, {"job": job})
    return TorchTrainer(
        loop,
        train_loop_config=config,
        datasets=to_datasets(tables, range(workers.needed, workers.count + 1)),
        dataset_config=ExactShards(),
        scaling_config=ScalingConfig(
            num_workers=workers.count if workers.least is None else (workers.least, workers.count),
            use_gpu=workers.use_gpu,
            resources_per_worker=workers.resources,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            name=run.name,
            storage_path=run.root,
            storage_filesystem=run.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
            failure_config=FailureConfig(max_failures=-1),  # our callback counts
            callbacks=[Failures(status_store, request.max_failures), EndsWithItsDriver()],
            logging_config=LoggingConfig("INFO" if debug else "ERROR"),
        ),
    )


def fit(trainer: "TorchTrainer", follow: Callable[[Callable[[], bool]], None], max_failures: int = 0) -> dict[str, Any]:
    """Run the trainer while `follow` shows the run, and return what the first worker's training function returned.

    Args:
        max_failures: how often the trainer is run again after a worker that died as Ray Train launched the training
            function on it: Ray Train takes that for a failure of its own, and gives up.
    """
    from ray.exceptions import RayActorError
    from ray.train import ControllerError

    def run(left: int) -> dict[str, Any]:
        try:
            return trainer.fit().return_value
        except ControllerError as error:
            if not left or not isinstance(error.controller_failure, RayActorError):
                raise
            return run(left - 1)

    try:
        return alongside(lambda: run(max_failures), follow)
    except WorkError:
        raise
    except Exception as error:
        cause = getattr(error, "controller_failure", error)  # what `Failures` raised, which names the worker
        raise WorkError(
            f"training failed: {in_a_line(cause)}. The same command continues from the last checkpoint."
        ) from error


def conclude(run: RunFolder, outcome: dict[str, Any]) -> dict[str, Any]:
    """Write `result.json` and return it.

    Raises:
        WorkError: training stopped by itself; the result says why.
    """
    if failure := outcome.get("failure"):
        run.write_json(RESULT, {"status": "failed", "reason": failure, "epochs": len(run.history())})
        raise WorkError(f"{failure}. The last checkpoint and the history are kept in {run.folder}.")
    if epochs := outcome.get("stopped"):
        stopped = {"status": "stopped", "epochs": epochs}
        run.write_json(RESULT, stopped)
        return stopped
    history = outcome["history"]
    seconds = sum(row["seconds"] for row in history)
    images = sum(row["images_per_second"] * row["training_seconds"] for row in history)
    result = {
        "status": "finished",
        "epochs": len(history),
        "best_epoch": outcome["best_epoch"],
        "train_seconds": seconds,
        "images_per_second": images / sum(row["training_seconds"] for row in history),
        **({"test": outcome["test"]} if outcome["test"] else {}),
    }
    run.write_json(RESULT, result)
    return result


if __name__ == "__main__":
    main()
