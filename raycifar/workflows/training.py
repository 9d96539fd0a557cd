"""Training one model, from the request to its result: prepare, fit, finish.

`raycifar train`, the trials of a comparison, `raycifar bench` and `raycifar.api` all take these three steps.
"""

# Ray and PyTorch take seconds to import, so functions import what needs them.

import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Any

from raycifar.cluster.status import Failure, FailureCause, Phase, StatusStore, WorkerStatus
from raycifar.data.sources import load
from raycifar.data.tables import Source, Splits, split
from raycifar.errors import WorkError, in_a_line
from raycifar.models.initial_weights import load_initial_weights
from raycifar.models.recipe import Recipe
from raycifar.storage.lock import delete_dead, locked
from raycifar.storage.run_folder import (
    BEST,
    EXAMPLE_STATS,
    METRICS,
    MODEL,
    PREDICTIONS,
    PROFILE,
    RESULT,
    RUN,
    RunFolder,
)
from raycifar.terminal import Screen
from raycifar.words import count
from raycifar.workflows.background import Follow, alongside
from raycifar.workflows.datasets import warn_of_leaks
from raycifar.workflows.duplicates import copied_images
from raycifar.workflows.estimate import operations_of, warn_of_hours
from raycifar.workflows.identity import Inputs, earlier_result, identify, overview, write_run_json, writing_first_file
from raycifar.workflows.reporting import Refresher, explain, keep_pictures, show_report, write_run
from raycifar.workflows.requests import TrainingRequest, check_batch_size
from raycifar.workflows.tracking import Tracking

SCORES = {"top1": "top-1", "top5": "top-5", "superclass_top1": "superclass", "loss": "loss", "ece": "calibration error"}
STOP_SECONDS = 10  # for a run that is interrupted to save what it has trained

if TYPE_CHECKING:
    from raycifar.cluster.sizing import Workers
    from raycifar.cluster.stoppable import StoppableTrainer
    from raycifar.engine.trainer import Outcome
    from raycifar.workflows.ray_train import Work


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to start; one with a `result` is finished, and has no workers or status store."""

    request: TrainingRequest
    folder: RunFolder
    inputs: Inputs
    workers: "Workers" = None  # type: ignore[assignment]
    status_store: StatusStore = None  # type: ignore[assignment]
    result: dict[str, Any] | None = None
    debug: bool = False  # show Ray's log


def train(request: TrainingRequest, screen: Screen, connection: ExitStack, *, debug: bool = False) -> dict[str, Any]:
    """Train, score and save a run; if the run of that name is finished, only print its result.

    Args:
        connection: holds the connection to Ray until the caller closes it.

    Returns:
        The content of `result.json`.

    Raises:
        RequestError: the request is wrong; nothing was started or written.
        WorkError: training failed; the run folder keeps what was reached.
    """
    with ExitStack() as until_end:
        run = prepare(request, screen, connection, lock=until_end, debug=debug)
        if run.result:
            screen.say(f"{run.folder.folder} is finished; nothing is trained again.")
            screen.lines(summary(run, run.result))
            return run.result
        splits = run.inputs.splits
        operations = operations_of(request.recipe, run.inputs.initial.architecture, splits)
        screen.lines(warn_of_hours(operations, request.recipe, len(splits.train), run.workers))
        tracking = until_end.enter_context(Tracking(request.track, screen.say))
        try:
            result = finish(run, fit(run, following(run, screen, tracking)))
        except WorkError:
            report(run, screen)
            raise
        screen.lines(summary(run, result))
        show_profile(run, screen)
        report(run, screen)
        return result


# The three steps ------------------------------------------------------------------------------------


def prepare(
    request: TrainingRequest,
    screen: Screen,
    connection: ExitStack | None = None,
    *,
    lock: ExitStack | None = None,
    folder: RunFolder | None = None,
    inputs: Inputs | None = None,
    workers: "Workers | None" = None,
    status_store: StatusStore | None = None,
    debug: bool = False,
) -> PreparedRun:
    """Load a run's inputs, lock its folder, connect to Ray, choose the workers, and write `run.json`.

    Args:
        connection: holds the connection to Ray; not needed if `workers` are given.
        lock: holds the folder's lock; not needed if the folder is locked, or nobody else's.
        folder, inputs, workers, status_store: given for a comparison's trials, else created here.

    Raises:
        RequestError: the request is wrong; nothing was started or written.
        WorkError: the cluster can't be reached.
    """
    folder = folder or RunFolder(request.storage, request.name)
    with screen.waiting(f"Reading {request.data}{and_weights([request.recipe])}"):
        loaded = inputs or read_inputs(request)
    if not inputs:
        screen.lines(loaded.initial.notes)
        warn_of_leaks(loaded.source, screen)
    identity = identify(request, loaded)
    if result := earlier_result(folder, identity):
        delete_dead(folder)
        return PreparedRun(request, folder, loaded, result=result)
    if lock:
        with writing_first_file(folder, screen):
            folder = lock.enter_context(locked(folder, screen.say, also=filter(None, [folder.comparison])))
    with screen.waiting("Starting Ray" if request.workers != 0 else "Loading PyTorch"):
        workers = workers or allocate_workers(request, folder, connection or ExitStack(), debug=debug)
    screen.facts(request.name, overview(identity, workers, folder.folder))
    write_run_json(folder, request, identity, workers)
    status_store = status_store or StatusStore(uuid.uuid4().hex)
    if not workers.count:  # there are none to be started
        status_store.put_worker(WorkerStatus(phase=Phase.LOADING_IMAGES))
    return PreparedRun(request, folder, loaded, workers, status_store, debug=debug)


def fit(run: PreparedRun, follow: Follow, work: "Work | None" = None) -> Any:
    """Train while `follow` shows progress, and return the result of the first worker's training function.

    What `follow` raises, as KeyboardInterrupt, stops the run, which leaves a checkpoint, and is raised again.

    Args:
        work: returns, given the `Job`, another function for the workers, and its configuration.

    Raises:
        WorkError: training failed.
    """
    from raycifar.cluster import ray_internals
    from raycifar.cluster.controller_callbacks import go_on_after
    from raycifar.workflows.ray_train import build_trainer

    trainer = build_trainer(run, work)

    def stop(thread: Thread) -> None:
        run.status_store.request_stop()
        status = run.status_store.worker() or WorkerStatus()
        if status.phase == Phase.TRAINING and not work:
            thread.join(STOP_SECONDS)
        if thread.is_alive():
            trainer.abort()

    def go_on(error: Exception) -> None:
        cause = FailureCause.MEMORY if ray_internals.is_out_of_memory(error) else FailureCause.CONTROLLER
        failure = Failure(cause, in_a_line(error))
        reason = f"Ray Train's controller died: {failure.reason}"
        go_on_after(failure, reason, run.status_store, run.request.max_failures)

    return fit_trainer(trainer, follow, stop, go_on)


def finish(run: PreparedRun, outcome: "Outcome") -> dict[str, Any]:
    """Write `result.json` and return its content; an interrupted run has no such file.

    Raises:
        WorkError: training failed; the result contains the reason.
    """
    history, folder = outcome.history, run.folder
    result: dict[str, Any] = {"status": outcome.ending, "epochs": len(history)}
    if outcome.ending == "interrupted":
        return result
    if outcome.ending == "finished":
        training_seconds = sum(record.training_seconds for record in history)
        num_images = sum(record.images_per_second * record.training_seconds for record in history)
        result |= {
            "best_epoch": outcome.best_epoch,
            "train_seconds": sum(record.seconds for record in history),
            "images_per_second": num_images / training_seconds,
            **({"test": outcome.test} if outcome.test else {}),
        }
    elif outcome.ending == "failed":
        result |= {"reason": outcome.reason, "failure": outcome.failure}
    folder.write_json(RESULT, result)
    folder.manifest.seal(RUN, METRICS, RESULT, MODEL, BEST, PREDICTIONS, EXAMPLE_STATS)
    if outcome.ending == "failed":
        raise WorkError(f"{outcome.reason}. The last checkpoint and the history are kept in {folder.folder}.")
    return result


# Preparation ----------------------------------------------------------------------------------------


def read_inputs(request: TrainingRequest) -> Inputs:
    source, splits = read_images(request)
    return Inputs(source, splits, load_initial_weights(request.model, request.recipe, source))


def read_images(request: TrainingRequest) -> tuple[Source, Splits]:
    """Return the images and their splits, while a thread imports PyTorch and Ray Train."""
    importing = Thread(target=import_module, args=("ray.train.torch",))
    importing.start()
    source = load(request.data)
    splits = split_images(source, request)
    importing.join()
    return source, splits


def split_images(source: Source, request: TrainingRequest) -> Splits:
    copied = copied_images(source, request.recipe)
    return split(source, request.val_size, request.limit, request.seed, copied)


def and_weights(recipes: Iterable[Recipe]) -> str:
    weights = sorted({recipe.pretrained for recipe in recipes} - {"none"})
    return f" and weights ({', '.join(weights)})" if weights else ""


def allocate_workers(request: TrainingRequest, folder: RunFolder, connection: ExitStack, *, debug: bool) -> "Workers":
    """Connect to Ray, unless training in this process, size the workers to it, and see that all nodes can take part."""
    from raycifar.cluster import sizing
    from raycifar.cluster.connection import connected, quiet
    from raycifar.cluster.nodes import check_nodes

    if request.workers == 0:
        connection.enter_context(quiet(debug=debug))
        return sizing.in_process(request.device, request.cpus_per_worker)
    connection.enter_context(connected(debug=debug, name=request.name))
    workers = sizing.size_workers(request.workers, *request.sizing)
    check_batch_size(request.recipe, workers.count)
    with folder.marker() as file:
        check_nodes(workers, file)
    return workers


def fit_trainer(
    trainer: "StoppableTrainer",
    follow: Follow,
    stop: Callable[[Thread], None],
    go_on_after: Callable[[Exception], None],
) -> Any:
    """Run the trainer in a thread while `follow` shows progress.

    Args:
        go_on_after: called when Ray Train's controller died, with its error; raises if it is not to be started again.
    """
    from ray.exceptions import OutOfMemoryError, RayActorError

    def attempt() -> Any:
        while True:
            try:
                return trainer.fit().return_value
            except Exception as error:
                # What a callback in the controller raises, and a worker's death while Ray Train starts it, is wrapped.
                cause = getattr(error, "controller_failure", error)
                if isinstance(cause, RayActorError | OutOfMemoryError):
                    try:
                        go_on_after(cause)
                        continue
                    except WorkError as end:
                        cause = end
                raise WorkError(
                    f"training failed: {in_a_line(cause)}. The same command continues from the last checkpoint."
                ) from error

    return alongside(attempt, follow, stop)


# Progress and results -------------------------------------------------------------------------------


def following(run: PreparedRun, screen: Screen, tracking: Tracking) -> Follow:
    """Return a function that shows and tracks progress, and updates the report from time to time, until the end."""
    from raycifar.cluster.waiting import Waiting

    waiting = Waiting(run.workers, run.request.wait)
    redraw = Refresher(lambda: write_run(run.folder, run.inputs.source)) if run.request.report else lambda: None

    def refresh() -> None:
        tracking.log(run.folder, run.status_store.history())
        redraw()

    tracking.log(run.folder)
    return lambda running: screen.follow(run.status_store, running, run.request.recipe.epochs, waiting, refresh)


def summary(run: PreparedRun, result: dict[str, Any]) -> list[str]:
    from raycifar.analysis.prose import without_near_duplicates

    lines = []
    if test := result.get("test"):
        scores = (f"{word} {test[name]:.4f}" for name, word in SCORES.items() if test.get(name) is not None)
        lines.append(f"Test, {test['images']:,} images: {'  '.join(scores)}")
        if without := without_near_duplicates(test):
            lines.append(f"Top-1 is {without}.")
        if run.inputs.source.name.startswith("synthetic"):
            lines.append("These are synthetic images: the accuracy says nothing about CIFAR-100.")
    best = f"; best validation at epoch {result['best_epoch']}" if result.get("best_epoch") else ""
    lines.append(
        f"Trained {count(result['epochs'], 'epoch')} in {result['train_seconds']:.0f} s, "
        f"{result['images_per_second']:,.0f} images/s{best}"
    )
    return [*lines, f"Run folder: {run.folder.folder}"]


def show_profile(run: PreparedRun, screen: Screen) -> None:
    if not run.request.profile:
        return
    if (table := run.folder.read(f"{PROFILE}/worker0.txt")) is None:
        from raycifar.engine.profile import NEEDED

        screen.say(f"Nothing is traced: --profile needs {NEEDED} steps in one go.")
        return
    screen.say(f"What takes longest in a step of worker 0; traces are in {PROFILE}/, for TensorBoard or Perfetto:")
    screen.lines(table.decode().splitlines())


def report(run: PreparedRun, screen: Screen) -> None:
    """Write the report, or keep what a later one shows."""
    if run.request.report:
        show_report(lambda: write_run(run.folder, run.inputs.source), screen)
    else:
        explain(lambda: keep_pictures(run.folder, run.inputs.source))
