"""Training one model, from the request to its result; `train` is the whole story.

The trials of a comparison take the same three steps with other inputs: begin, fit, finish. So does `raycifar bench`,
which has nothing to finish.
"""

# Ray and PyTorch take seconds to import, so functions import what needs them.

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from raycifar.cluster.status import Phase, StatusStore, WorkerStatus
from raycifar.data.dataset import Source, Splits, split
from raycifar.data.sources import load
from raycifar.errors import RequestError, WorkError, in_a_line
from raycifar.machine import available_cpus
from raycifar.models.initial_weights import load_initial_weights
from raycifar.models.recipe import Recipe
from raycifar.storage.lock import delete_stale_locks, locked
from raycifar.storage.run_folder import BEST, EXAMPLE_STATS, METRICS, MODEL, PREDICTIONS, RESULT, RUN, RunFolder
from raycifar.terminal import Screen
from raycifar.words import count
from raycifar.workflows.background import Follow, run_in_thread
from raycifar.workflows.datasets import warn_of_leaks
from raycifar.workflows.duplicates import copied_images
from raycifar.workflows.estimate import warn_of_hours
from raycifar.workflows.reporting import Refresher, forgiving, keep_pictures, show_profile, show_report, write_run
from raycifar.workflows.requests import TrainingRequest, WorkerCount, WorkerSettings, check_batch_size
from raycifar.workflows.tracking import Tracking
from raycifar.workflows.training_run import Inputs, TrainingRun, earlier_result, identify, overview, write_run_json

SCORES = {"top1": "top-1", "top5": "top-5", "superclass_top1": "superclass", "loss": "loss", "ece": "calibration error"}
STOP_SECONDS, MAX_STOP_SECONDS = 10, 60  # for a run that is interrupted to save what it has trained

if TYPE_CHECKING:
    from raycifar.cluster.sizing import Workers
    from raycifar.engine.config import Outcome


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
    folder, inputs = RunFolder(request.storage, request.name), read_inputs(request, screen)
    warn_of_leaks(inputs.source, screen)
    if result := earlier_result(folder, identify(request, inputs)):
        delete_stale_locks(folder)
        screen.say(f"{folder.location} is finished; nothing is trained again.")
        screen.lines(summary(folder, inputs.source, result))
        return result
    with ExitStack() as until_end:
        folder = lock(folder, screen, until_end, lambda: filter(None, [folder.comparison]))
        workers = allocate_workers(request, folder, screen, connection, debug=debug)
        run = TrainingRun(request, folder, inputs, workers, debug=debug)
        begin(run, screen)
        screen.lines(warn_of_hours([(request.recipe, inputs.initial)], inputs.splits, workers, screen))
        tracking = until_end.enter_context(Tracking(request.track, screen.say))
        try:
            outcome = fit(run, follower(run, screen, tracking))
            result = finish(run, outcome)
        except WorkError:
            report(run, screen)
            raise
        finally:
            # A run in this process that was interrupted may still check whether it is to stop.
            if workers.count or not run.status_store.stop_requested():
                run.status_store.delete()
        screen.lines(summary(folder, inputs.source, result))
        if request.profile:
            show_profile(folder, screen)
        report(run, screen)
        return result


# The three steps ------------------------------------------------------------------------------------


def begin(run: TrainingRun, screen: Screen) -> None:
    """Show the plan, and write `run.json`."""
    identity = identify(run.request, run.inputs)
    screen.facts(run.request.name, overview(identity, run.workers, run.folder.location))
    write_run_json(run.folder, run.request, identity, run.workers)
    if not run.workers.count:  # there are none to be started
        run.status_store.put_worker(WorkerStatus(phase=Phase.LOADING_IMAGES))


def fit(run: TrainingRun, follow: Follow, loop: Callable[[dict[str, Any]], Any] | None = None, **options: Any) -> Any:
    """Train while `follow` shows progress, and return the result of the first worker's training function.

    What `follow` raises, as KeyboardInterrupt, stops the run, which leaves a checkpoint, and is raised again.

    Args:
        loop: another training function for the workers. options: fields that its configuration adds.

    Raises:
        WorkError: training failed.
    """
    from raycifar.engine.train_loop import train_loop_per_worker
    from raycifar.workflows.ray_train import build_trainer, fit_with_restarts

    trainer = build_trainer(run, loop or train_loop_per_worker, options)

    def stop(thread: Thread) -> None:
        run.status_store.request_stop()
        status = run.status_store.worker() or WorkerStatus()
        if status.phase == Phase.TRAINING and not loop:
            thread.join(seconds_to_stop([run.status_store]))
        if thread.is_alive():
            trainer.abort()

    return run_in_thread(lambda: fit_with_restarts(trainer, run.status_store, run.request.max_failures), follow, stop)


def seconds_to_stop(stores: Iterable[StatusStore]) -> float:
    """Return how long to wait until interrupted runs have saved: a step, or the scoring after an epoch, can be long."""
    steps = [status.step for store in stores if (status := store.worker())]
    epochs = [step.seconds_of_epoch for step in steps if step]
    return min(MAX_STOP_SECONDS, max([STOP_SECONDS, *epochs]))


def finish(run: TrainingRun, outcome: "Outcome") -> dict[str, Any]:
    """Write `result.json` and return its content; an interrupted run has no such file.

    Raises:
        WorkError: training failed; the result contains the reason.
    """
    history, folder = outcome.history, run.folder
    result: dict[str, Any] = {"status": outcome.status, "epochs": len(history)}
    if outcome.status == "interrupted":
        return result
    if outcome.status == "finished":
        training_seconds = sum(record.training_seconds for record in history)
        num_images = sum(record.images_per_second * record.training_seconds for record in history)
        result |= {
            "best_epoch": outcome.best_epoch,
            "train_seconds": sum(record.seconds for record in history),
            "images_per_second": num_images / training_seconds,
            **({"test": outcome.test} if outcome.test else {}),
        }
    elif outcome.status == "failed":
        result |= {"reason": outcome.reason, "failure": outcome.failure}
    folder.write_json(RESULT, result)
    folder.manifest.seal(RUN, METRICS, RESULT, MODEL, BEST, PREDICTIONS, EXAMPLE_STATS)
    if outcome.status == "failed":
        raise WorkError(f"{outcome.reason}. The last checkpoint and the history are kept in {folder.location}.")
    return result


# Preparation ----------------------------------------------------------------------------------------


def read_inputs(request: TrainingRequest, screen: Screen) -> Inputs:
    """Return the images and the initial weights, and print notes about the weights."""
    with screen.waiting(f"Reading {request.data}{and_weights([request.recipe])}"):
        source, splits = read_images(request)
        initial = load_initial_weights(request.model, request.recipe, source)
    screen.lines(initial.notes)
    return Inputs(source, splits, initial)


def and_weights(recipes: Iterable[Recipe]) -> str:
    weights = sorted({recipe.pretrained for recipe in recipes} - {"none"})
    return f" and weights ({', '.join(weights)})" if weights else ""


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


def lock(folder: RunFolder, screen: Screen, until: ExitStack, also: Callable[[], Iterable[RunFolder]]) -> RunFolder:
    """Lock a folder for as long as `until` is open, and return it to be written to.

    Args:
        also: returns other folders that no other process may hold.

    Raises:
        RequestError: another process holds one of them, or the folder can't be written.
    """
    if "runtime_resources" in Path(folder.location).parts:  # where Ray unpacks a job's --working-dir
        screen.say(
            "Note: a job's working directory is temporary, so this run will be lost. "
            "Give --storage an absolute path or a URI."
        )
    try:
        return until.enter_context(locked(folder, screen.say, also=also()))
    except OSError as error:
        reason = in_a_line(error.__cause__ or error)  # a `StorageError` names the file, too
        raise RequestError(f"{folder.location} can't be written: {reason}. Give another --storage.") from error


def allocate_workers(
    request: TrainingRequest, folder: RunFolder, screen: Screen, connection: ExitStack, *, debug: bool
) -> "Workers":
    """Choose the workers and check that every node can take part; connects to Ray, unless this process trains."""
    with screen.waiting("Starting Ray" if request.workers != 0 else "Loading PyTorch"):
        workers = connect(request, request.workers, connection, debug=debug, name=request.name)
        if workers.count:
            from raycifar.cluster.nodes import check_nodes

            check_batch_size(request.recipe, workers.count)
            with folder.marker() as file:
                check_nodes(workers, file, request.wait)
    return workers


def connect(
    settings: WorkerSettings, count: WorkerCount, connection: ExitStack, *, debug: bool, name: str | None = None
) -> "Workers":
    """Connect to Ray, and return `count` workers, sized to it; 0 is this process, for which Ray isn't started."""
    from raycifar.cluster.connection import connected, quiet
    from raycifar.cluster.sizing import Workers, size_workers

    if count == 0:
        from raycifar.engine.hardware import find_device

        connection.enter_context(quiet(debug=debug))
        device = find_device(settings.device).type
        cpus = settings.cpus_per_worker or available_cpus()
        return Workers(0, cpus, gpus=int(device == "cuda"), mps=device == "mps")
    connection.enter_context(connected(debug=debug, name=name))
    return size_workers(count, *settings.sizing)


# Progress and results -------------------------------------------------------------------------------


def follower(run: TrainingRun, screen: Screen, tracking: Tracking) -> Follow:
    """Return a function that shows and tracks progress, and updates the report from time to time, until the end."""
    from raycifar.cluster.waiting import Waiting

    waiting = Waiting(run.workers, run.request.wait)
    redraw = Refresher(lambda: write_run(run.folder, run.inputs.source)) if run.request.report else lambda: None

    def refresh() -> None:
        tracking.log(run.folder, run.status_store.history())
        redraw()

    tracking.log(run.folder)
    return lambda running: screen.follow(run.status_store, running, run.request.recipe.epochs, waiting, refresh)


def summary(folder: RunFolder, source: Source, result: dict[str, Any]) -> list[str]:
    """Return the scores and the costs of a finished run, in words."""
    from raycifar.analysis.prose import without_near_duplicates

    lines = []
    if test := result.get("test"):
        scores = (f"{word} {test[name]:.4f}" for name, word in SCORES.items() if test.get(name) is not None)
        lines.append(f"Test, {test['images']:,} images: {'  '.join(scores)}")
        if without := without_near_duplicates(test):
            lines.append(f"Top-1 is {without}.")
        if source.name.startswith("synthetic"):
            lines.append("These are synthetic images: the accuracy says nothing about CIFAR-100.")
    best = f"; best validation at epoch {result['best_epoch']}" if result.get("best_epoch") else ""
    lines.append(
        f"Trained {count(result['epochs'], 'epoch')} in {result['train_seconds']:.0f} s, "
        f"{result['images_per_second']:,.0f} images/s{best}"
    )
    return [*lines, f"Run folder: {folder.location}"]


def report(run: TrainingRun, screen: Screen) -> None:
    """Write the report, or keep what a later one shows."""
    if run.request.report:
        show_report(lambda: write_run(run.folder, run.inputs.source), screen)
    else:
        with forgiving():
            keep_pictures(run.folder, run.inputs.source)
