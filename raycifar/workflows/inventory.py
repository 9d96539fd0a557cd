"""What a folder of runs holds, and what can be removed from it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from pyarrow.fs import FileType

from raycifar.errors import DamagedFileError, RequestError
from raycifar.storage.checkpoints import Checkpoints
from raycifar.storage.files import file_type
from raycifar.storage.lock import Claim, living_claim
from raycifar.storage.run_folder import COMPARISON, RESULT, RUN, STUDY, RunFolder

AT_ONCE = 16  # runs that are read at a time: a storage may be far away


class State(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"  # without a result: the same command continues
    FINISHED = "finished"
    STOPPED_BY_SEARCH = "stopped by search"  # because other trials are better
    FAILED = "failed"
    DAMAGED = "damaged"


OVER = (State.FINISHED, State.STOPPED_BY_SEARCH)  # for good: no command continues them
STATES = {"finished": State.FINISHED, "stopped": State.STOPPED_BY_SEARCH, "failed": State.FAILED}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run, or a comparison with its `trials`, as it is listed."""

    name: str
    folder: str
    state: State
    models: list[str] = field(default_factory=list)  # of a comparison, in the order in which they were given
    host: str | None = None  # on which it, or its comparison, is being trained
    epochs: int | None = None
    of_epochs: int | None = None  # of the recipe
    val_top1: float | None = None  # after the last epoch
    test_top1: list[float] = field(default_factory=list)  # of each of the `models`, a mean over its runs
    seconds: float = 0.0  # of training
    created: str = ""
    reason: str | None = None  # why it failed, or what is damaged
    trials: list["Entry"] | None = None

    @property
    def is_over(self) -> bool:
        """Return whether it is over: nothing trains it any more, now or later."""
        return self.state in OVER and not self.host


def find_runs(location: str) -> list[Entry]:
    """Return the runs and comparisons in a folder, or the run in it, the newest first; for a comparison, its trials.

    Raises:
        RequestError: there is no such folder.
    """
    folder = RunFolder.at(location)
    if folder.exists(RUN):  # one run
        return [list_run(folder, folder.comparison)]
    if file_type(folder.filesystem, folder.path()) in (FileType.File, FileType.Unknown):
        raise RequestError(f"{folder.location} is not a folder: give the folder or URI that runs are kept in.")
    if not folder.exists(""):
        raise RequestError(f"{folder.location} does not exist: give the folder or URI that runs are kept in.")
    around = folder if folder.exists(STUDY) else None
    comparisons = [] if around else folder.folders_with(STUDY, COMPARISON)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = pool.map(lambda run: list_run(run, around), folder.runs())
        return newest_first([*runs, *pool.map(list_comparison, comparisons)])


def newest_first(entries: list[Entry]) -> list[Entry]:
    def created(entry: Entry) -> tuple[float, str]:
        try:
            return -datetime.fromisoformat(entry.created).timestamp(), entry.name
        except ValueError:  # of an earlier version
            return 0.0, entry.name

    return sorted(entries, key=created)


def list_run(run: RunFolder, comparison: RunFolder | None = None) -> Entry:
    """Return what is known of a run.

    Args:
        comparison: whose trial it is.
    """
    try:
        if (about := run.read_json(RUN, ignore)) is None:  # removed since it was found
            raise DamagedFileError(f"{run.location} holds no {RUN}.")
        result = run.read_json(RESULT, ignore) or {}
        history, claim = run.history(ignore), claim_of(run, comparison)
    except DamagedFileError as error:
        return Entry(name=run.name, folder=run.location, state=State.DAMAGED, reason=str(error))
    state = STATES.get(result.get("status", ""), State.RUNNING if claim else State.STOPPED)
    return Entry(
        name=run.name,
        folder=run.location,
        state=state,
        models=[about["model"]] if "model" in about else [],
        host=claim.host if claim else None,
        epochs=len(history),
        of_epochs=about.get("recipe", {}).get("epochs"),
        val_top1=history[-1].val_top1 if history else None,
        test_top1=[result["test"]["top1"]] if "test" in result else [],
        seconds=sum(record.seconds for record in history),
        created=about.get("created", ""),
        reason=result.get("reason"),
    )


def claim_of(run: RunFolder, comparison: RunFolder | None) -> Claim | None:
    """Return the claim of the process that trains a run, or the comparison whose trial it is."""
    return living_claim(run) or (living_claim(comparison) if comparison else None)


def list_comparison(folder: RunFolder) -> Entry:
    try:
        comparison, claim = folder.read_json(COMPARISON, ignore) or {}, living_claim(folder)
        study = folder.read_json(STUDY, ignore) or {}
    except DamagedFileError as error:
        return Entry(name=folder.name, folder=folder.location, state=State.DAMAGED, reason=str(error), trials=[])
    trials = newest_first([list_run(run, folder) for run in folder.runs()])
    results = comparison.get("models", {})
    given = [key for key, value in study.items() if isinstance(value, dict) and f"{key} weights" in study]
    return Entry(
        name=folder.name,
        folder=folder.location,
        state=State.RUNNING if claim else State.FINISHED if results else State.STOPPED,
        models=list(results) or given,
        host=claim.host if claim else None,
        test_top1=[model["top1"]["mean"] for model in results.values()],
        seconds=sum(trial.seconds for trial in trials),
        created=trials[0].created if trials else "",
        trials=trials,
    )


def ignore(sentence: str) -> None:
    """Drop a warning about a run's files from a list of runs: the run's report has it."""


# Checkpoints that nothing needs ---------------------------------------------------------------------


@dataclass(frozen=True)
class Removable:
    """The checkpoints of a run that is over, and their size."""

    run: RunFolder
    names: list[str]
    num_bytes: int


def removable(location: str) -> Iterator[Removable]:
    """Yield what can be removed of the runs in a folder: nothing of runs, or comparisons, that are under way."""
    for entry in find_runs(location):
        for each in entry.trials if entry.trials is not None else [entry]:
            run = RunFolder.at(each.folder)
            checkpoints = Checkpoints(run)
            if each.is_over and (names := checkpoints.names()):
                yield Removable(run, names, checkpoints.size(names))


def remove(what: Removable, say: Callable[[str], None]) -> bool:
    """Remove checkpoints, unless their run is no longer finished; return whether they were removed."""
    if not list_run(what.run, what.run.comparison).is_over:
        say(f"{what.run.location} is no longer finished, and is left alone.")
        return False
    Checkpoints(what.run).delete(what.names)
    return True
