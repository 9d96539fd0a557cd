"""What a request would train, on what and for how long, without starting anything."""

from contextlib import ExitStack
from math import isfinite

from raycifar.cluster.connection import cluster_address
from raycifar.cluster.sizing import Workers
from raycifar.data.dataset import Splits
from raycifar.engine.hardware import find_device
from raycifar.engine.order import steps_per_epoch
from raycifar.machine import available_cpus
from raycifar.models.initial_weights import InitialWeights
from raycifar.models.recipe import Recipe
from raycifar.storage.run_folder import RunFolder
from raycifar.terminal import Screen
from raycifar.words import count, duration
from raycifar.workflows import study
from raycifar.workflows.estimate import LONGEST_SECONDS, cpu_seconds, if_soon
from raycifar.workflows.requests import ComparisonRequest, TrainingRequest
from raycifar.workflows.training import allocate_workers, read_inputs
from raycifar.workflows.training_run import describe_recipe, earlier_result, identify, overview


def preview(request: TrainingRequest, screen: Screen, connection: ExitStack, *, debug: bool = False) -> None:
    """Show recipe, data, split, workers and an estimate of the time; write nothing, and start no Ray.

    Raises:
        RequestError: the request is wrong. WorkError: the cluster can't be reached.
    """
    folder = RunFolder(request.storage, request.name)
    inputs = read_inputs(request, screen)
    identity = identify(request, inputs)
    finished = earlier_result(folder, identity)
    with folder.marker():  # it can be written
        pass
    if request.workers == 0 or cluster_address():
        workers = allocate_workers(request, folder, screen, connection, debug=debug)
        told = str(workers)
    else:
        workers = expected_workers(request)
        unchecked = f"; whether it has {request.accelerator} can't be told before" if request.accelerator else ""
        told = f"{number_of_workers(request)}, in a Ray that is started on this machine{unchecked}"
    num_steps = steps_per_epoch(len(inputs.splits.train), request.recipe.batch_size)
    facts = {**overview(identity, told, folder.location), "steps": f"{num_steps:,} in each epoch"}
    seconds = estimate(workers, request.recipe, inputs.initial, inputs.splits, screen)
    screen.facts(request.name, facts | {"time": in_words(seconds)})
    screen.say("This run is finished: nothing would be trained." if finished else "Nothing was started.")


def preview_comparison(request: ComparisonRequest, screen: Screen) -> None:
    """Show the trials of a comparison, and an estimate of their time; write nothing, and start no Ray.

    Raises:
        RequestError: the request is wrong.
    """
    folder, spaces = RunFolder(request.storage, request.name), study.build_spaces(request)
    source, splits, initial_by_model = study.read_inputs(request, screen)
    study.check_spaces(request, spaces, initial_by_model)
    with folder.marker():
        pass
    study.check_same_study(folder, request, study.identify_study(request, spaces, source, initial_by_model))
    workers = expected_workers(request)
    told = f"as many as fit, each with {count(request.workers, 'worker')}"
    facts = study.overview(request, source, splits, told, folder)
    number, last = request.search + request.seeds, request.seed + request.seeds - 1
    seeds = f"seeds {request.seed} to {last}" if request.seeds > 1 else f"seed {last}"
    total = 0.0
    for model, recipe in request.recipes.items():
        seconds = estimate(workers, recipe, initial_by_model[model], splits, screen)
        total += number * (seconds or 0)
        searched = f"{request.search} search trials, then " if request.search else ""
        each = f", {duration(seconds)} each" if seconds and isfinite(seconds) else ""
        facts[model] = f"{searched}{seeds}{each}; {describe_recipe(model, recipe)}"
    fit = max(1, int(available_cpus() / (workers.count * workers.cpus)))
    total /= min(fit, request.max_trials or fit, number * len(request.recipes))
    facts["time"] = in_words(total or None) + "; a search stops trials that fall behind" * bool(request.search)
    screen.facts(request.name, facts)
    screen.say("Nothing was started.")


def number_of_workers(request: TrainingRequest) -> str:
    """Return how many workers a run would have, in words."""
    if isinstance(request.workers, tuple):
        return f"{request.workers[0]} to {request.workers[1]}"
    return str(request.workers or ("one" if request.device == "cpu" else "one for each GPU, else one"))


def expected_workers(request: TrainingRequest | ComparisonRequest) -> Workers:
    """Return about what the workers would have in a Ray of this machine, which isn't started for it."""
    count = request.workers[1] if isinstance(request.workers, tuple) else request.workers or 1
    asks_for_gpu = request.device == "gpu" or request.accelerator or request.gpus_per_worker != 1
    on_gpu = request.device != "cpu" and (asks_for_gpu or find_device("auto").type == "cuda")
    return Workers(count, request.cpus_per_worker or available_cpus() / count, gpus=1 if on_gpu else 0)


def estimate(workers: Workers, recipe: Recipe, initial: InitialWeights, splits: Splits, screen: Screen) -> float | None:
    """Return about how long training takes on the workers' CPUs, in seconds; None where it would be on a GPU."""
    if workers.device != "cpu":
        return None
    with screen.waiting("Timing a few steps"):
        cpus = max(1, workers.count) * workers.cpus
        return if_soon(lambda: cpu_seconds(recipe, initial, splits) * available_cpus() / cpus)


def in_words(seconds: float | None) -> str:
    """Return an estimate and its basis, in words."""
    if seconds is None:
        return "on a GPU: raycifar bench measures it"
    if not isfinite(seconds):
        return f"unknown: a few steps take over {LONGEST_SECONDS} s on this machine's CPU"
    return f"about {duration(seconds)}, by the time of a few steps on this machine's CPU"
