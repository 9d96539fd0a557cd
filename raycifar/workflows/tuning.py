"""The trials of a comparison, orchestrated by Ray Tune; each trains like `raycifar train`, in a run folder."""

import heapq
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raycifar import models
from raycifar.cluster import ray_internals
from raycifar.cluster.sizing import HEAD, Workers
from raycifar.cluster.status import Failure, FailureCause, Phase, StatusStore, StepStatus, WorkerStatus
from raycifar.cluster.stoppable import release
from raycifar.cluster.waiting import Waiting
from raycifar.data.dataset import Source
from raycifar.errors import WorkError
from raycifar.models.initial_weights import InitialWeights
from raycifar.models.recipe import Recipe, describe_changes
from raycifar.models.recipes import recipe_from_json
from raycifar.storage.files import ask
from raycifar.storage.run_folder import RESULT, RUN, RunFolder
from raycifar.terminal import Screen
from raycifar.workflows.background import Running
from raycifar.workflows.requests import ComparisonRequest, TrainingRequest
from raycifar.workflows.search_space import PastTrial, Space, check_trainable, suggest
from raycifar.workflows.training import begin, finish, fit, split_images
from raycifar.workflows.training_run import Inputs, TrainingRun, earlier_result, identify
from raycifar.workflows.trial import Trial, TrialStatus

POLL_SECONDS = 0.25  # between two checks of a trial
REDUCTION = 3  # ASHA (Li et al., 2020) continues one in `REDUCTION` trials at each rung
RETRIES = 1  # of a trial whose driver failed; Ray Train replaces workers that died
# A trial's driver runs on the head, which isn't preempted, and reserves no CPU, because workers may hold them all.
DRIVER = {HEAD: 0.001}


@dataclass(frozen=True)
class Study:
    """What to compare."""

    request: ComparisonRequest
    folder: RunFolder
    recipes: Mapping[str, Recipe]  # by model, in the order of the trials
    initial_by_model: Mapping[str, InitialWeights]
    spaces: Mapping[str, Space]

    def folder_of(self, trial: Trial) -> RunFolder:
        return RunFolder(self.folder.location, trial.name, self.folder.claim)

    def training_request(self, trial: Trial) -> TrainingRequest:
        return replace(
            self.request.training(trial.model),
            storage=self.folder.location,
            name=trial.name,
            seed=trial.seed,
            recipe=trial.recipe,
            test=not trial.search,
            search=trial.search,
            rungs=rungs(trial.recipe.epochs) if trial.search else (),
        )


def rungs(epochs: int) -> tuple[int, ...]:
    """Return the epochs after which ASHA compares a search's trials of `epochs` epochs."""
    least = max(1, epochs // REDUCTION**2)
    return tuple(rung for k in range(epochs) if (rung := least * REDUCTION**k) < epochs)


class StudySearcher(Searcher):
    """Gives Ray Tune the next trial, and tracks the status of all trials.

    The run folders hold the work of an earlier, interrupted driver: a finished trial is not repeated, and an unfinished
    one resumes with the recipe that it had.
    """

    def __init__(self, study: Study, max_concurrent: int) -> None:
        super().__init__()
        self.study, self.request, self.max_concurrent = study, study.request, max_concurrent
        self.scheduler = AshaByModel({model: recipe.epochs for model, recipe in study.recipes.items()})
        self.searches: dict[str, list[Trial]] = {model: [] for model in study.recipes}
        self.finals: dict[str, list[Trial]] = {}
        self.running: dict[str, Trial] = {}  # by the identifier of Ray Tune's trial
        self.steps: dict[str, tuple[StepStatus, float]] = {}  # the last of each trial, and its predicted end
        self.stopped = False
        self._advance()

    @property
    def trials(self) -> list[Trial]:
        by_model = [*self.searches.values(), *self.finals.values()]  # a copy, as Ray Tune's thread adds some
        return [trial for trials in by_model for trial in trials]

    def stop(self) -> list[StatusStore]:
        """Start no more trials, ask running ones to leave a checkpoint and end, and return their status stores."""
        self.stopped = True
        stores = [trial.status_store for trial in list(self.running.values())]
        for store in stores:
            store.request_stop()
        return stores

    def seconds_left(self) -> float | None:
        """Return about how long all trials take from now on, if a search stops none; None until steps are timed."""
        now, running = time.monotonic(), list(self.running.values())
        for trial in running:
            step = (trial.status_store.worker() or WorkerStatus()).step
            if step and step != self.steps.get(trial.name, (None,))[0]:
                self.steps[trial.name] = step, now + step.seconds_left
        epochs = self._seconds_of_epochs()
        if not epochs:
            return None
        slots = [
            max(0.0, self.steps[trial.name][1] - now)
            if trial.name in self.steps
            else trial.recipe.epochs * epochs[trial.model]
            for trial in running
        ]
        slots += [0.0] * (self.max_concurrent - len(slots))
        heapq.heapify(slots)
        waiting = [trial for trial in self.trials if trial.status == TrialStatus.WAITING]
        to_come = [trial.recipe.epochs * epochs[trial.model] for trial in waiting]
        for model, recipe in self.study.recipes.items():
            planned = len(self.searches[model]) + len(self.finals.get(model, []))
            to_come += [recipe.epochs * epochs[model]] * (self.request.search + self.request.seeds - planned)
        for seconds in to_come:
            heapq.heapreplace(slots, slots[0] + seconds)
        return max(slots)

    def _seconds_of_epochs(self) -> dict[str, float]:
        """Return the seconds of each model's epoch: as timed, else by its FLOPs and the pace of those that are."""
        timed: dict[str, list[float]] = {}
        for trial in self.trials:
            if trial.name in self.steps:
                timed.setdefault(trial.model, []).append(self.steps[trial.name][0].seconds_of_epoch)
        if not timed:
            return {}
        flops = {model: models.flops(initial.architecture) for model, initial in self.study.initial_by_model.items()}
        known = {model: statistics.mean(seconds) for model, seconds in timed.items()}
        pace = statistics.mean(seconds / flops[model] for model, seconds in known.items())
        return {model: known.get(model, pace * flops[model]) for model in self.study.recipes}

    # Ray Tune's interface --------------------------------------------------------------------------

    def suggest(self, trial_id: str) -> Any:
        if len(self.running) >= self.max_concurrent:
            return None
        if self.stopped:
            return None if self.running else Searcher.FINISHED
        waiting = (trial for trial in self.trials if trial.status == TrialStatus.WAITING)
        trial = next(waiting, None) or self._next_search()
        if trial is None:
            return None if self.running else Searcher.FINISHED
        trial.status = TrialStatus.RUNNING
        self.running[trial_id] = trial
        return trial.to_config()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self.running.pop(trial_id, None)
        if trial is None:
            return
        ending = self.study.folder_of(trial).read_json(RESULT)
        if error or ending is None:
            ending = {"status": TrialStatus.FAILED, "reason": trial.status_store.reason() or "its driver died."}
        trial.reason, trial.status = ending.get("reason"), TrialStatus(ending["status"])
        self._advance()

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the run folders hold all state."""

    # Planning trials -------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Add search trials of an earlier driver, and the final runs of each model whose best recipe is known."""
        for model in self.study.recipes:
            while (known := self._restored(model)) is not None:
                self.searches[model].append(known)
            trials = self.searches[model]
            if model in self.finals or len(trials) < self.request.search or not all(trial.over for trial in trials):
                continue
            best = self.best(model)
            recipe = best.recipe if best else self.study.recipes[model]
            name, setting = models.slug(model), describe_changes(recipe, self.study.recipes[model])
            seeds = range(self.request.seed, self.request.seed + self.request.seeds)
            finals = [Trial(f"{name}-s{seed}", model, seed, recipe, search=False, setting=setting) for seed in seeds]
            self.finals[model] = list(map(self._with_status, finals))

    def best(self, model: str) -> Trial | None:
        """Return the search trial that ended with the highest validation top-1, the first if several are equal."""
        finished = [trial for trial in self.searches[model] if trial.status == TrialStatus.FINISHED]
        return max(finished, key=lambda trial: self.val_top1(trial)[-1], default=None)

    def val_top1(self, trial: Trial) -> list[float]:
        return [record.val_top1 or 0.0 for record in self.study.folder_of(trial).history()]

    def _next_search(self) -> Trial | None:
        for model, trials in self.searches.items():
            if len(trials) < self.request.search:
                past = [PastTrial(trial.recipe, trial.status, self.val_top1(trial)) for trial in trials]
                check = partial(check_trainable, self.request, self.study.initial_by_model[model])
                space, base = self.study.spaces[model], self.study.recipes[model]
                recipe = suggest(space, base, past, self.request.seed, check)
                trials.append(self._search_trial(model, recipe))
                return trials[-1]
        return None

    def _search_trial(self, model: str, recipe: Recipe) -> Trial:
        name = f"{models.slug(model)}-search-{len(self.searches[model]) + 1:02}"
        setting = describe_changes(recipe, self.study.recipes[model]) or "the recipe itself"
        return Trial(name, model, self.request.seed, recipe, search=True, setting=setting)

    def _restored(self, model: str) -> Trial | None:
        """Return the model's next search trial if an earlier driver started it."""
        if len(self.searches[model]) == self.request.search:
            return None
        base = self.study.recipes[model]
        earlier = self.study.folder_of(self._search_trial(model, base)).read_json(RUN)
        if earlier is None:
            return None
        recipe = replace(recipe_from_json(model, earlier["recipe"]), pretrained=base.pretrained)  # it has no password
        trial = self._with_status(self._search_trial(model, recipe))
        if not trial.over and self.study.folder.exists(f"{models.slug(model)}-s{self.request.seed}/{RUN}"):
            # The final runs have the recipe that the other trials led to.
            trial.status, trial.reason = TrialStatus.FAILED, "it failed before the final runs began."
        if trial.over:
            self.scheduler.remember(trial, self.val_top1(trial))
        return trial

    def _with_status(self, trial: Trial) -> Trial:
        ending = self.study.folder_of(trial).read_json(RESULT)
        if ending and (ending["status"] == TrialStatus.FINISHED or trial.search):
            trial.status, trial.reason = TrialStatus(ending["status"]), ending.get("reason")
        return trial


class AshaByModel(FIFOScheduler):
    """Stops search trials that fall behind others of their model; final runs are never stopped.

    Ray Tune stops a trial by killing its driver before Ray Train can end the workers. So ASHA's decisions go to the
    trial's status store, and the trial ends by itself.
    """

    def __init__(self, epochs: Mapping[str, int]) -> None:
        super().__init__()
        self.by_model = {
            model: ASHAScheduler(
                time_attr="epoch",
                metric="val_top1",
                mode="max",
                grace_period=rungs(count)[0],
                max_t=count,
                reduction_factor=REDUCTION,
                stop_last_trials=False,
            )
            for model, count in epochs.items()
            if rungs(count)
        }

    def remember(self, trial: Trial, val_top1: Sequence[float]) -> None:
        """Add a trial that ended under an earlier driver."""
        if scheduler := self.by_model.get(trial.model):
            past = SimpleNamespace(trial_id=trial.name)
            scheduler.on_trial_add(None, past)
            for epoch, top1 in enumerate(val_top1, start=1):
                if epoch in rungs(trial.recipe.epochs):
                    scheduler.on_trial_result(None, past, {"epoch": epoch, "val_top1": top1})

    def on_trial_add(self, tune_controller: Any, tune_trial: Any) -> None:
        trial = tune_trial.config["trial"]
        if trial.search and (scheduler := self.by_model.get(trial.model)):
            scheduler.on_trial_add(tune_controller, tune_trial)

    def on_trial_result(self, tune_controller: Any, tune_trial: Any, result: dict[str, Any]) -> str:
        if "val_top1" in result:
            trial = tune_trial.config["trial"]
            decision = self.by_model[trial.model].on_trial_result(tune_controller, tune_trial, result)
            trial.status_store.put_stop_decision(result["epoch"], stop=decision == TrialScheduler.STOP)
        return TrialScheduler.CONTINUE


def orchestrate(searcher: StudySearcher, source: Source, workers: Workers) -> None:
    """Run all trials of the study; the searcher then has their status."""
    study = searcher.study
    trainable = tune.with_parameters(run_trial, study=study, source=source, workers=workers)
    folder = RunFolder(study.folder.location, "tune")
    # Ray Tune's loggers would repeat the run folders' content, and its new output prints even with verbose=0.
    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_AIR_NEW_OUTPUT="0")  # until `connected` ends
    tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([DRIVER])),
        tune_config=tune.TuneConfig(
            search_alg=searcher, scheduler=searcher.scheduler, num_samples=-1, trial_dirname_creator=str
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=study.folder.path(),
            storage_filesystem=folder.filesystem,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[FailedDrivers()],
            verbose=0,
        ),
    ).fit()
    ask(folder.filesystem, lambda: folder.filesystem.delete_dir(folder.path()))


class FailedDrivers(ray_internals.progress_callback_class()):  # type: ignore[misc]
    """Releases what a failed driver leaves, and records its retry; prints nothing, as Ray Tune by itself would."""

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        store = trial.config["trial"].status_store
        release(store.key)
        store.add_failure(Failure(FailureCause.DRIVER, store.reason() or "it died"))

    def on_trial_complete(self, *args: Any, **kwargs: Any) -> None: ...

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        release(trial.config["trial"].status_store.key)


def run_trial(config: dict[str, Trial], study: Study, source: Source, workers: Workers) -> None:
    """Train a trial in a process started by Ray Tune; errors are for Ray Tune to retry."""
    trial = config["trial"]
    folder, store = study.folder_of(trial), trial.status_store
    try:
        request, initial = study.training_request(trial), study.initial_by_model[trial.model]
        inputs = Inputs(source, split_images(source, request), initial.adapt(trial.recipe, source))
        if earlier_result(folder, identify(request, inputs)):
            return
        run = TrainingRun(request, folder, inputs, workers, store)
        begin(run, Screen(quiet=True))
        waiting = Waiting(workers, request.wait)
        finish(run, fit(run, lambda running: report_epochs(trial, running, waiting)))
    except WorkError as error:
        if (folder.read_json(RESULT) or {}).get("status") == TrialStatus.FAILED:
            return  # a retry would fail again
        store.put_reason(str(error))
        raise
    except Exception as error:
        store.put_reason(f"{type(error).__name__}: {error}")
        raise


def report_epochs(trial: Trial, running: Running, waiting: Callable[[], str | None]) -> None:
    """Report a search trial to Ray Tune at each rung, including rungs before it was resumed.

    Args:
        waiting: returns what workers that haven't started wait for.
    """
    reported, store, told = 0, trial.status_store, None
    while running():
        time.sleep(POLL_SECONDS)
        if (store.worker() or WorkerStatus()).phase == Phase.STARTING and (text := waiting()) != told:
            told = text
            store.put_waiting(text)
        for row in store.history()[reported:] if trial.search else ():
            reported = row.epoch
            if reported in rungs(trial.recipe.epochs):
                tune.report(row.to_json())
