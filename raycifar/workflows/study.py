"""Training and comparing models: prepare, run, finish."""

# Ray and PyTorch take seconds to import: see `training`.

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any

from raycifar import models
from raycifar.data.dataset import Source, Splits
from raycifar.errors import RequestError, ResumableError, WorkError
from raycifar.models.initial_weights import InitialWeights, load_initial_weights
from raycifar.models.recipe import changes, describe_changes
from raycifar.models.recipes import recipe_from_json
from raycifar.redaction import redact
from raycifar.storage.run_folder import RESULT, RUN, STUDY, RunFolder
from raycifar.terminal import Screen
from raycifar.words import count
from raycifar.workflows.background import run_in_thread
from raycifar.workflows.comparing import Show, conclude, read_finished
from raycifar.workflows.datasets import warn_of_leaks
from raycifar.workflows.duplicates import find_duplicates
from raycifar.workflows.estimate import warn_of_hours
from raycifar.workflows.reporting import Refresher, forgiving, keep_pictures, show_report, write_comparison, write_run
from raycifar.workflows.requests import ComparisonRequest
from raycifar.workflows.tracking import Tracking
from raycifar.workflows.training import and_weights, lock, read_images, seconds_to_stop

if TYPE_CHECKING:
    from raycifar.cluster.sizing import Workers
    from raycifar.workflows.tuning import StudySearcher


def train_and_compare(
    request: ComparisonRequest, screen: Screen, connection: ExitStack, show: Show, *, debug: bool = False
) -> None:
    """Train each model with each seed, compare them, and write the report.

    Args:
        connection: holds the connection to Ray.
        show: called with the content of `comparison.json` if any trial finished.

    Raises:
        RequestError: the request is wrong; nothing was started or written.
        WorkError: trials failed; the others are compared.
    """
    with ExitStack() as until_end:
        searcher, source, workers = prepare(request, screen, connection, until_end, debug=debug)
        run_trials(searcher, source, workers, screen, until_end.enter_context(Tracking(request.track, screen.say)))
        finish(searcher, source, screen, show)


# The three steps ------------------------------------------------------------------------------------


def prepare(
    request: ComparisonRequest, screen: Screen, connection: ExitStack, until_end: ExitStack, *, debug: bool = False
) -> tuple["StudySearcher", Source, "Workers"]:
    """Load the trials' inputs, lock the folder, connect to Ray, choose the workers, and write `study.json`.

    Args:
        until_end: holds the lock of the folder and of all runs in it.

    Returns:
        The trials to come, the images, and the workers of each trial.

    Raises:
        RequestError: the request is wrong; nothing was started or written.
    """
    recipes, folder = request.recipes, RunFolder(request.storage, request.name)
    spaces = build_spaces(request)
    source, splits, initial_by_model = read_inputs(request, screen)
    check_spaces(request, spaces, initial_by_model)
    warn_of_leaks(source, screen)
    if request.without_near_duplicates:
        find_duplicates(source, screen)  # for the trials, which take them from the cache
    identity = check_same_study(folder, request, identify_study(request, spaces, source, initial_by_model))
    folder = lock(folder, screen, until_end, folder.runs)

    with screen.waiting("Starting Ray"):
        from raycifar.cluster import sizing
        from raycifar.cluster.connection import connected
        from raycifar.cluster.nodes import check_nodes
        from raycifar.workflows.tuning import Study, StudySearcher

        connection.enter_context(connected(debug=debug, name=request.name))
        trials = len(recipes) * (request.search + request.seeds)
        workers, fit = sizing.size_trials(request.workers, *request.sizing, trials)
        held = sizing.trials_on_head()
        most = request.max_trials or min(fit, held)
        with folder.marker() as file:
            check_nodes(workers, file, request.wait)
    at_once = f"{count(most, 'trial')}, each with {workers}"
    at_once += "; the head's memory holds no more" * (most == held < fit)
    screen.facts(request.name, overview(request, source, splits, at_once, folder))
    runs = [(recipe, initial_by_model[model]) for model, recipe in recipes.items()]
    screen.lines(warn_of_hours(runs, splits, workers, screen, repeats=request.search + request.seeds, at_once=most))
    folder.delete_leftovers()
    folder.manifest.delete()
    folder.write_json(STUDY, identity)

    # The costliest models come first, so that short trials fill the cluster at the end.
    cost = {model: models.flops(initial.architecture) for model, initial in initial_by_model.items()}.__getitem__
    costly_first = sorted(recipes, key=cost, reverse=True)
    ordered = {model: initial_by_model[model].resolve(recipes[model]) for model in costly_first}
    study = Study(request, folder, ordered, initial_by_model, spaces)
    return StudySearcher(study, most), source, workers


def run_trials(
    searcher: "StudySearcher", source: Source, workers: "Workers", screen: Screen, tracking: Tracking
) -> None:
    """Run the trials that aren't over, and show and track their progress; the searcher then has their status.

    KeyboardInterrupt stops running trials, which leave checkpoints, and is raised again.
    """
    from raycifar.workflows.tuning import orchestrate

    study, request, folder = searcher.study, searcher.request, searcher.study.folder
    order = list(request.recipes)
    if done := sum(trial.over for trial in searcher.trials):
        screen.say(f"Already over, and not run again: {count(done, 'trial')}.")

    def stop(thread: Thread) -> None:
        thread.join(seconds_to_stop(searcher.stop()))

    redraw = Refresher(lambda: write_comparison(folder)) if request.report else lambda: None

    def refresh() -> None:
        for trial in searcher.trials if request.track else ():
            if history := trial.status_store.history():
                tracking.log(study.folder_of(trial), history, folder)
        redraw()

    tracking.log(folder)
    run_in_thread(
        lambda: orchestrate(searcher, source, workers),
        lambda running: screen.follow_trials(
            lambda: sorted(searcher.trials, key=lambda trial: order.index(trial.model)),
            running,
            refresh,
            searcher.seconds_left,
        ),
        stop,
    )
    for trial in searcher.trials:
        trial.status_store.delete()


def finish(searcher: "StudySearcher", source: Source, screen: Screen, show: Show) -> None:
    """Compare the finished runs, write and show the comparison, and write the reports.

    Raises:
        WorkError: trials failed; the message lists them with their reasons.
    """
    study, request, folder = searcher.study, searcher.request, searcher.study.folder
    finals = [trial for model in request.recipes for trial in searcher.finals.get(model, [])]
    finished = [read_finished(study.folder_of(trial).location) for trial in finals if trial.status == "finished"]
    draw, doing = (write_run, "Drawing the reports") if request.report else (keep_pictures, "Keeping the pictures")
    with screen.waiting(f"{doing} of the runs"):
        for run in finished:
            with forgiving():
                draw(RunFolder.at(run.folder), source)
    if finished:
        more = {
            "search": {model: describe_search(searcher, model) for model in request.recipes if request.search},
            "failed": [{"run": t.name, "reason": t.reason} for t in searcher.trials if t.status == "failed"],
        }
        show(conclude(finished, folder, request, more))
    if request.report:
        show_report(lambda: write_comparison(folder), screen)
    if missing := [trial for trial in finals if trial.status != "finished"]:
        reasons = "; ".join(f"{trial.name}: {(trial.reason or 'it did not end').rstrip('.')}" for trial in missing)
        # One whose result says that it failed would fail again.
        again = not all(study.folder_of(trial).exists(RESULT) for trial in missing)
        kind = ResumableError if again else WorkError
        raise kind(f"{len(missing)} of {len(finals)} trials failed: {reasons}.")


# Preparation ----------------------------------------------------------------------------------------


def read_inputs(request: ComparisonRequest, screen: Screen) -> tuple[Source, Splits, dict[str, InitialWeights]]:
    """Return the images, the splits, and each model's initial weights."""
    recipes = request.recipes
    with screen.waiting(f"Reading {request.data}{and_weights(recipes.values())}"):
        source, splits = read_images(request.training(next(iter(recipes))))
        initial_by_model = {model: load_initial_weights(model, recipe, source) for model, recipe in recipes.items()}
    screen.lines(note for initial in initial_by_model.values() for note in initial.notes)
    return source, splits, initial_by_model


def overview(
    request: ComparisonRequest, source: Source, splits: Splits, at_once: str, folder: RunFolder
) -> dict[str, str]:
    return {
        "models": ", ".join(request.recipes),
        "trials": f"{request.seeds} of each" + f", after {request.search} to search" * bool(request.search),
        "data": source.name,
        "images": f"{len(splits.train):,} training, {len(splits.val):,} validation, {len(splits.test):,} test",
        "at once": at_once,
        "folder": folder.location,
    }


def build_spaces(request: ComparisonRequest) -> dict[str, Any]:
    """Return each model's search space, without fields that are given as options; none where nothing is searched."""
    if not request.search:
        return {}
    from raycifar.workflows.search_space import default_space, read_space

    spaces = {}
    for model, recipe in request.recipes.items():
        space = read_space(request.space, model) if request.space else default_space(recipe, request.workers)
        spaces[model] = {field: where for field, where in space.items() if field not in request.fixed}
    if not all(spaces.values()):
        raise RequestError("--search has nothing to vary: every field of its space is given as an option.")
    return spaces


def check_spaces(
    request: ComparisonRequest, spaces: Mapping[str, Any], initial_by_model: Mapping[str, InitialWeights]
) -> None:
    """Raise RequestError if almost no recipe in a search space can be trained."""
    for model, space in spaces.items():
        from raycifar.workflows.search_space import PastTrial, check_trainable, suggest

        base, check = request.recipes[model], partial(check_trainable, request, initial_by_model[model])
        suggest(space, base, [PastTrial(base, "failed", [])], request.seed, check)


def identify_study(
    request: ComparisonRequest,
    spaces: Mapping[str, Any],
    source: Source,
    initial_by_model: Mapping[str, InitialWeights],
) -> dict[str, Any]:
    """Return everything that must be the same for a comparison to be continued; models and seeds may be added."""
    from raycifar.workflows.search_space import space_to_json

    identity: dict[str, Any] = {
        "data": source.fingerprint,
        **{key: getattr(request, key) for key in ("val_size", "limit", "compile", "seed", "search")},
    }
    for model, recipe in request.recipes.items():
        resolved = initial_by_model[model].resolve(recipe)
        identity[model] = asdict(replace(resolved, pretrained=redact(recipe.pretrained)))
        identity[f"{model} weights"] = initial_by_model[model].fingerprint()
        if request.search:
            identity[f"{model} space"] = space_to_json(spaces[model])
    return identity


def check_same_study(folder: RunFolder, request: ComparisonRequest, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the identity, with the models that only the folder's earlier comparison has.

    Raises:
        RequestError: the comparison of that name differs; the message names the difference.
    """
    folder.check_holds_none(RUN)
    earlier = folder.read_json(STUDY) or {}
    for key in identity.keys() & earlier.keys():
        there, here = earlier[key], identity[key]
        is_recipe = key in request.recipes and isinstance(there, dict)
        if is_recipe:  # one of an earlier version has other fields
            there, here = recipe_from_json(key, there), recipe_from_json(key, here)
        if there != here:
            says = (describe_changes(there, here), describe_changes(here, there)) if is_recipe else (there, here)
            what = f"{key} {says[0]} there, {says[1]} here"
            raise RequestError(f"{folder.location} is another comparison: {what}. Give another --name, or its options.")
    return {**earlier, **identity}


def describe_search(searcher: "StudySearcher", model: str) -> dict[str, Any]:
    """Return the trials of the search for a model's recipe, and its result."""
    base = searcher.study.recipes[model]
    trials = [
        {
            "run": trial.name,
            "status": trial.status,
            "changes": changes(trial.recipe, base),
            "epochs": len(top1 := searcher.val_top1(trial)),
            "val_top1": top1[-1] if top1 else None,
        }
        for trial in searcher.searches[model]
    ]
    best, recipe = searcher.best(model), trials[0]["val_top1"]
    found = searcher.val_top1(best)[-1] if best else None
    if best is None:
        sentence = f"The search for {model} failed in every trial; its recipe was kept."
    elif best.recipe == base:
        sentence = (
            f"The search for {model} found nothing better than its recipe in {len(trials)} trials: validation top-1 "
            f"{found:.4f}."
        )
    else:
        against = "which failed" if recipe is None else f"{recipe:.4f}"
        sentence = (
            f"The search for {model} found {describe_changes(best.recipe, base)}: validation top-1 "
            f"{found:.4f}, against its recipe's {against} (one run each, the best of "
            f"{len(trials)})."
        )
    return {"trials": trials, "best": best and best.name, "sentence": sentence}
