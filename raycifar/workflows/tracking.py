"""Trackers, which record a run in addition to its folder: MLflow, and Weights & Biases.

A tracker takes three calls: `start`, `epoch` for each finished epoch, and `finish`. The driver makes them in a separate
thread: a slow tracker delays nothing, and a tracker that fails is dropped with a notice.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, Self

from raycifar.errors import RequestError, in_a_line
from raycifar.storage.run_folder import COMPARISON, MODEL, REPORT_PAGE, RESULT, RUN, STUDY, RunFolder
from raycifar.storage.schemas import EpochRecord

TRACKING = "tracking.json"  # what a tracker calls the run
PROJECT = "raycifar"  # unless the tracker's own environment variable says otherwise
MAX_PARAMS = 100  # that MLflow takes at a time
FINISH_SECONDS = 60  # that trackers may take once a run has ended
ARTIFACTS = (RUN, REPORT_PAGE, MODEL, COMPARISON)


class Tracker(Protocol):
    """Tracks one run. An exception that it raises ends the tracking, but not the run.

    Its attribute `where`, if it has one, is shown once it has started.
    """

    def start(self, name: str, config: dict[str, Any], known: str | None, parent: str | None) -> str:
        """Begin a run, or continue the one that is `known`, and return the tracker's ID of it.

        Args:
            config: the content of `run.json`, flat. parent: what the tracker calls the comparison.
        """

    def epoch(self, record: EpochRecord) -> None:
        """Log a finished epoch."""

    def finish(self, status: str, scores: dict[str, float], files: Iterable[Path]) -> None:
        """Log the result: finished, failed or interrupted, the scores on the test set, and files to keep."""


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME."""

    def start(self, name: str, config: dict[str, Any], known: str | None, parent: str | None) -> str:
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        import mlflow
        from mlflow.entities import Param
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME

        self.client = mlflow.MlflowClient()
        title = MLFLOW_EXPERIMENT_NAME.get() or PROJECT
        self.where = f"{mlflow.get_tracking_uri()}, experiment {title}"
        if known:
            self.run = known
            self.client.update_run(known, status="RUNNING")
            return known
        found = self.client.get_experiment_by_name(title)
        experiment = found.experiment_id if found else self.client.create_experiment(title)
        tags = {"mlflow.parentRunId": parent} if parent else {}
        self.run = self.client.create_run(experiment, run_name=name, tags=tags).info.run_id
        params = [Param(key, str(value)) for key, value in config.items()]
        for first in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(self.run, params=params[first : first + MAX_PARAMS])
        return self.run

    def epoch(self, record: EpochRecord) -> None:
        from mlflow.entities import Metric

        moment = int(1000 * (record.time or 0))
        metrics = [Metric(key, value, moment, record.epoch) for key, value in to_metrics(record).items()]
        self.client.log_batch(self.run, metrics=metrics)

    def finish(self, status: str, scores: dict[str, float], files: Iterable[Path]) -> None:
        for key, value in scores.items():
            self.client.log_metric(self.run, key, value)
        for file in files:
            self.client.log_artifact(self.run, str(file))
        ends = {"finished": "FINISHED", "interrupted": "KILLED"}
        self.client.set_terminated(self.run, ends.get(status, "FAILED"))


class WeightsAndBiases:
    """A run of Weights & Biases, in the project WANDB_PROJECT; also offline (WANDB_MODE=offline)."""

    def start(self, name: str, config: dict[str, Any], known: str | None, parent: str | None) -> str:
        import wandb

        self.run = wandb.init(
            project=wandb.setup().settings.project or PROJECT,
            id=known,
            resume="allow",
            name=name,
            group=parent,
            config=config,
            reinit="create_new",  # a comparison has several at once
            settings=wandb.Settings(console="off", silent=True),
        )
        self.where = self.run.url or self.run.dir
        return self.run.id

    def epoch(self, record: EpochRecord) -> None:
        self.run.log(to_metrics(record), step=record.epoch)

    def finish(self, status: str, scores: dict[str, float], files: Iterable[Path]) -> None:
        import wandb

        self.run.summary.update(scores)
        artifact = wandb.Artifact(f"run-{self.run.id}", "run")
        for file in files:
            artifact.add_file(str(file))
        if artifact.manifest.entries:
            self.run.log_artifact(artifact)
        self.run.finish(0 if status == "finished" else 1)


TRACKERS: dict[str, Callable[[], Tracker]] = {"mlflow": MLflow, "wandb": WeightsAndBiases}


def check_tracker(track: str | None) -> None:
    """Raise RequestError if a tracker isn't known, or its package is missing."""
    if track and track not in TRACKERS:
        raise RequestError(f"--track {track}: choose from {', '.join(TRACKERS)}.")
    if track and not find_spec(track):
        raise RequestError(f"--track {track} needs a package that is not installed: pip install 'raycifar[{track}]'.")


@dataclass
class Tracked:
    folder: RunFolder
    tracker: Tracker
    identity: str
    epoch: int  # the last one that is logged


@dataclass
class Tracking:
    """Tells a tracker about the runs of a command, until the end of a `with` block.

    Args:
        track: the tracker's name, or None for none.
        say: called with a line that says where it logs, and with the notice, at most once, that tracking has failed.
    """

    track: str | None
    say: Callable[[str], None]
    runs: dict[str, Tracked] = field(default_factory=dict)  # by location
    calls: SimpleQueue[Callable[[], None] | None] = field(default_factory=SimpleQueue)

    def __enter__(self) -> Self:
        self.thread = Thread(target=self._work, daemon=True)
        self.thread.start()
        return self

    def log(self, folder: RunFolder, history: Sequence[EpochRecord] = (), parent: RunFolder | None = None) -> None:
        """Log the finished epochs of a run that aren't logged yet; the first call begins or continues the run there.

        Args:
            parent: the comparison that the run is part of.
        """
        if self.track:
            self.calls.put(lambda: self._log(folder, history, parent))

    def __exit__(self, *error: object) -> None:
        """Log the results, and wait for what is left to be logged, but not for long."""
        self.calls.put(self._finish)
        self.calls.put(None)
        self.thread.join(FINISH_SECONDS)
        if self.thread.is_alive():
            self.say(f"{self.track} takes longer than {FINISH_SECONDS} s: what is left is not logged there.")

    def _log(self, folder: RunFolder, history: Sequence[EpochRecord], parent: RunFolder | None) -> None:
        run = self.runs.get(folder.location) or self._start(folder, parent)
        for record in history[run.epoch :]:
            run.tracker.epoch(record)
            run.epoch = record.epoch
            self._remember(run)

    def _start(self, folder: RunFolder, parent: RunFolder | None) -> Tracked:
        assert self.track
        known = (folder.read_json(TRACKING) or {}).get(self.track, {})
        above = self.runs[parent.location].identity if parent else None
        config = folder.read_json(RUN) or folder.read_json(STUDY) or {}
        tracker = TRACKERS[self.track]()
        identity = tracker.start(folder.name, flat(config), known.get("id"), above)
        if not self.runs and (where := getattr(tracker, "where", None)):
            self.say(f"{self.track} logs to {where}.")
        run = self.runs[folder.location] = Tracked(folder, tracker, identity, known.get("epoch", 0))
        self._remember(run)
        return run

    def _remember(self, run: Tracked) -> None:
        known = run.folder.read_json(TRACKING) or {}
        run.folder.write_json(TRACKING, {**known, self.track: {"id": run.identity, "epoch": run.epoch}})

    def _finish(self) -> None:
        for run in reversed(self.runs.values()):
            result = run.folder.read_json(RESULT) or {}
            done = run.folder.exists(COMPARISON)
            status = result.get("status", "finished" if done else "interrupted")
            scores = {f"test_{name}": value for name, value in (result.get("test") or {}).items() if is_number(value)}
            with tempfile.TemporaryDirectory() as folder:
                files = []
                for name in ARTIFACTS if status == "finished" else ():
                    if (content := run.folder.read(name)) is not None:
                        files.append(Path(folder, name))
                        files[-1].write_bytes(content)
                run.tracker.finish(status, scores, files)

    def _work(self) -> None:
        while call := self.calls.get():
            try:
                call()
            except Exception as error:  # a tracker's may be any
                self.say(f"{self.track} is given up, and the run goes on without it: {in_a_line(error)}.")
                return


def to_metrics(record: EpochRecord) -> dict[str, float]:
    return {name: value for name, value in vars(record).items() if name != "time" and is_number(value)}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values with names like `recipe.lr`; a recipe's fields have no prefix."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, "" if name == "recipe" else f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
