"""The trials of a comparison, orchestrated by Ray Tune: each trains as `raycifar train` does, in a run folder."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raycifar.cluster.sizing import Waiting, Workers
from raycifar.cluster.status import StatusStore
from raycifar.data.tables import Source, split
from raycifar.errors import WorkError
from raycifar.models import slug
from raycifar.models.initial_weights import InitialWeights
from raycifar.models.recipes import recipe_from_json
from raycifar.recipes import Recipe, describe_changes
from raycifar.storage.run_folder import RESULT, RUN, RunFolder
from raycifar.terminal import POLL_SECONDS
from raycifar.train import Request, build_trainer, conclude, fit, identify, record
from raycifar.workflows.search_space import PastTrial, Space, suggest
from raycifar.workflows.trial import Trial

REDUCTION = 3  # ASHA (Li et al., 2020) goes on with one trial of so many at each rung
RETRIES = 1  # of a trial whose driver failed; the death of a worker is Ray Train's to mend
# Where a trial's driver runs: on the head, which spot prices don't take away. It reserves no CPU, so that
# workers that hold every CPU can't starve it.
DRIVER = {"node:__internal_head__": 0.001}


@dataclass(frozen=True)
class Study:
    """What is compared. Each task's request is `base` with its own model, seed, recipe and name."""

    base: Request
    folder: str
    recipes: Mapping[str, Recipe]  # by model, in the order of the trials
    starts: Mapping[str, InitialWeights]
    seeds: Sequence[int]
    searches: int  # search trials of each model
    spaces: Mapping[str, Space]

    def run(self, task: Trial) -> RunFolder:
        return RunFolder(self.folder, task.name)

    def request(self, task: Trial) -> Request:
        return replace(
            self.base,
            storage=self.folder,
            name=task.name,
            model=task.model,
            seed=task.seed,
            recipe=task.recipe,
            test=not task.search,
            rungs=rungs(task.recipe.epochs) if task.search else (),
        )


def rungs(epochs: int) -> tuple[int, ...]:
    """Return the epochs after which ASHA compares the trials of a search that lasts so long."""
    least = max(1, epochs // REDUCTION**2)
    return tuple(rung for k in range(epochs) if (rung := least * REDUCTION**k) < epochs)


class Plan(Searcher):
    """What to try next, in Ray Tune's words, and how each trial stands.

    What was done before, by a driver that was killed, is read from the run folders: a finished trial is not
    run again, and one that was under way is run with the recipe it had, so that it resumes.
    """

    def __init__(self, study: Study, most_at_once: int, stopper: "AshaByModel") -> None:
        super().__init__()
        self.study, self.most_at_once, self.stopper = study, most_at_once, stopper
        self.searches: dict[str, list[Trial]] = {model: [] for model in study.recipes}
        self.finals: dict[str, list[Trial]] = {}
        self.by_trial: dict[str, Trial] = {}
        self._advance()

    @property
    def tasks(self) -> list[Trial]:
        return [task for group in (self.searches, self.finals) for tasks in group.values() for task in tasks]

    # Ray Tune asks ---------------------------------------------------------------------------------

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        running = sum(task.status == "running" for task in self.tasks)
        if running >= self.most_at_once:
            return None
        task = next((task for task in self.tasks if task.status == "waiting"), None) or self._next_search()
        if task is None:
            return None if running else Searcher.FINISHED
        task.status = "running"
        self.by_trial[trial_id] = task
        return {"task": asdict(task)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        task = self.by_trial.pop(trial_id, None)
        if task is None:
            return
        run = self.study.run(task)
        ending = run.read_json(RESULT)
        if error or ending is None:
            ending = {"status": "failed", "reason": task.status_store.get("reason") or "its driver died."}
        task.reason, task.status = ending.get("reason"), ending["status"]
        self._advance()

    def save(self, checkpoint_path: str) -> None:
        """Nothing is Tune's to keep: the run folders hold all that is known."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""

    # What follows from what is known ---------------------------------------------------------------

    def _advance(self) -> None:
        """Add the final runs of each model whose best recipe is known."""
        for model in self.study.recipes:
            while (known := self._restored(model)) is not None:
                self.searches[model].append(known)
            if model in self.finals or not self._searched(model):
                continue
            best = self.best(model)
            recipe = best.recipe if best else self.study.recipes[model]
            setting = describe_changes(recipe, self.study.recipes[model])
            self.finals[model] = [
                self._with_status(Trial(f"{slug(model)}-s{seed}", model, seed, recipe, search=False, setting=setting))
                for seed in self.study.seeds
            ]

    def _searched(self, model: str) -> bool:
        tasks = self.searches[model]
        return len(tasks) == self.study.searches and all(task.over for task in tasks)

    def best(self, model: str) -> Trial | None:
        """Return the search trial that ended with the highest validation top-1, the first of equals."""
        finished = [task for task in self.searches[model] if task.status == "finished"]
        return max(finished, key=lambda task: self.val_top1(task)[-1], default=None)

    def val_top1(self, task: Trial) -> list[float]:
        return [row["val_top1"] for row in self.study.run(task).history()]

    def _next_search(self) -> Trial | None:
        for model, tasks in self.searches.items():
            if len(tasks) < self.study.searches:
                known = [PastTrial(task.recipe, task.status, self.val_top1(task)) for task in tasks]
                recipe = suggest(self.study.spaces[model], self.study.recipes[model], known, self.study.seeds[0])
                tasks.append(self._search_trial(model, recipe))
                return tasks[-1]
        return None

    def _search_trial(self, model: str, recipe: Recipe) -> Trial:
        name = f"{slug(model)}-search-{len(self.searches[model]) + 1:02}"
        setting = describe_changes(recipe, self.study.recipes[model]) or "the recipe itself"
        return Trial(name, model, self.study.seeds[0], recipe, search=True, setting=setting)

    def _restored(self, model: str) -> Trial | None:
        """Return the model's next search trial if it was begun before."""
        if len(self.searches[model]) == self.study.searches:
            return None
        run = self.study.run(self._search_trial(model, self.study.recipes[model])).read_json(RUN)
        if run is None:
            return None
        task = self._with_status(self._search_trial(model, recipe_from_json(model, run["recipe"])))
        if task.over:
            self.stopper.remember(task, self.val_top1(task))
        return task

    def _with_status(self, task: Trial) -> Trial:
        ending = self.study.run(task).read_json(RESULT)
        if ending and (ending["status"] == "finished" or task.search):
            task.status, task.reason = ending["status"], ending.get("reason")
        return task


class AshaByModel(FIFOScheduler):
    """Stops search trials that fall behind others of their model; final runs are never stopped.

    Ray Tune ends a trial by ending its driver, over the head of a Ray Train that has workers to put away. So a
    trial that ASHA would stop is told so, by its status_store, and ends by itself.
    """

    def __init__(self, epochs: Mapping[str, int]) -> None:
        super().__init__()
        self.stoppers = {
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

    def remember(self, task: Trial, val_top1: Sequence[float]) -> None:
        """Take a trial into account that was over before this driver began."""
        if stopper := self.stoppers.get(task.model):
            past = SimpleNamespace(trial_id=task.name)
            stopper.on_trial_add(None, past)
            for epoch, top1 in enumerate(val_top1, start=1):
                if epoch in rungs(task.recipe.epochs):
                    stopper.on_trial_result(None, past, {"epoch": epoch, "val_top1": top1})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        task = trial.config["task"]
        if task["search"] and (stopper := self.stoppers.get(task["model"])):
            stopper.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        task = trial.config["task"]
        if "val_top1" in result:
            decision = self.stoppers[task["model"]].on_trial_result(tune_controller, trial, result)
            StatusStore(**task["status_store"]).put(f"stop after {result['epoch']}", decision == TrialScheduler.STOP)
        return TrialScheduler.CONTINUE


def orchestrate(study: Study, plan: Plan, source: Source, workers: Workers) -> None:
    """Run all that the plan holds; how each trial ended is then in the plan."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # they write what the run folders hold already
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the other prints even when it is told to be quiet
    trainable = tune.with_parameters(run_trial, study=study, source=source, workers=workers)
    place = RunFolder(study.folder, "tune")
    tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([DRIVER])),
        tune_config=tune.TuneConfig(
            search_alg=plan, scheduler=plan.stopper, num_samples=-1, trial_dirname_creator=directory
        ),
        run_config=tune.RunConfig(
            name=place.name,
            storage_path=place.root,
            storage_filesystem=place.filesystem,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[Notices()],
            verbose=0,
        ),
    ).fit()
    place.filesystem.delete_dir(place.folder)


class Notices(TrialProgressCallback):
    """Tells, by a trial's status_store, that it is tried again; prints nothing, as Ray Tune's own callback would."""

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        status_store = StatusStore(**trial.config["task"]["status_store"])
        notice = f"Its driver failed ({status_store.get('reason') or 'it died'}); it is tried again."
        status_store.put("failures", [*(status_store.get("failures") or []), notice])

    def on_trial_complete(self, *args: Any, **kwargs: Any) -> None: ...

    def on_trial_error(self, *args: Any, **kwargs: Any) -> None: ...


def directory(trial: Any) -> str:
    return f"{trial.config['task']['name']}-{trial.trial_id}"


def run_trial(config: dict[str, Any], study: Study, source: Source, workers: Workers) -> None:
    """Train one task, in a process of its own that Ray Tune has started; raise what Ray Tune should retry."""
    values = config["task"]
    status_store = StatusStore(**values["status_store"])
    task = Trial(
        **{**values, "recipe": recipe_from_json(values["model"], values["recipe"]), "status_store": status_store}
    )
    request, run = study.request(task), study.run(task)
    try:
        splits = split(source, request.val_size, request.limit, request.seed)
        start = study.starts[task.model]
        record(run, identify(request, source, splits, start), workers)
        trainer = build_trainer(request, run, status_store, source, splits, start, workers, debug=False)
        waiting = Waiting(workers, request.wait)
        conclude(run, fit(trainer, lambda running: report_epochs(task, running, waiting), request.max_failures))
    except WorkError as error:
        if (run.read_json(RESULT) or {}).get("status") == "failed":
            return  # it would fail again
        status_store.put("reason", error.message)
        raise
    except Exception as error:
        status_store.put("reason", f"{type(error).__name__}: {error}")
        raise


def report_epochs(task: Trial, running: Callable[[], bool], waiting: Callable[[], str | None]) -> None:
    """Report a search trial to Ray Tune at each rung, those before it was resumed included.

    Args:
        waiting: says what workers that have yet to start wait for.
    """
    reported = 0
    while running():
        time.sleep(POLL_SECONDS)
        if not task.status_store.get("worker") and (text := waiting()):
            task.status_store.put("waiting", text)
        if not task.search:
            continue
        history = (task.status_store.get("worker") or {}).get("history", [])
        for row in history[reported:]:
            reported = row["epoch"]
            if reported in rungs(task.recipe.epochs):
                tune.report(row)
