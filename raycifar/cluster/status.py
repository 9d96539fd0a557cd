"""A run's status, which its workers, Ray Train's controller and the driver exchange.

In a cluster the status is kept in Ray's key-value store, which needs no extra process and is reachable from all nodes;
otherwise in this process. It is stored as JSON; keys of another version are ignored.
"""

import json
import sys
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from raycifar.storage.schemas import EpochRecord, checked

_here: defaultdict[str, dict[str, bytes]] = defaultdict(dict)  # by the key of a store and by topic


class Phase(StrEnum):
    """What a run is doing, as displayed."""

    STARTING = "starting the workers"  # until a worker reports another phase
    LOADING_IMAGES = "loading images"
    BUILDING_MODEL = "building the model"
    COMPILING = "compiling the model"  # during the first steps
    TRAINING = "training"
    COMPARING = "comparing with other trials"
    SCORING_TEST = "scoring the test set"
    SAVING = "saving"
    WARMING_UP = "warming up"
    TIMING = "timing"


class FailureCause(StrEnum):
    PREEMPTED = "preempted"  # a node is being preempted; the workers saved a checkpoint
    STORAGE = "storage"  # a file can't be written, and a retry is bound to fail
    MEMORY = "memory"  # Ray ended processes because a node's memory ran short
    WORKER = "worker"  # any other failure of a worker
    CONTROLLER = "controller"  # Ray Train's own process died
    DRIVER = "driver"  # of a trial: its process failed


@dataclass(frozen=True, kw_only=True)
class StepStatus:
    """The current epoch's progress."""

    epoch: int  # from 1
    step: int  # completed steps
    steps: int  # in an epoch
    lr: float
    loss: float  # mean over the epoch so far
    top1: float
    images_per_second: float  # over all workers
    seconds_of_epoch: float  # scoring included
    seconds_left: float  # to the end of the run


@dataclass(frozen=True, kw_only=True)
class PartStatus:
    """How much is done of something that has a length, such as the images of a split."""

    what: str  # is done, as displayed
    done: int
    total: int

    def __str__(self) -> str:
        return f"{self.what} {self.done:,} of {self.total:,}"


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts about the network and its hardware."""

    parameters: int
    device: str
    threads: int
    precision: str


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """The first worker's status. The history is stored separately, as it is longer and changes rarely."""

    attempt: int | None = None  # process ID, which a restart changes
    phase: Phase = Phase.STARTING
    detail: str = ""  # of the phase
    notices: list[str] = field(default_factory=list)
    step: StepStatus | None = None
    part: PartStatus | None = None
    model: ModelFacts | None = None
    nodes: list[str | None] = field(default_factory=list)  # the node of each worker

    @property
    def doing(self) -> str:
        return f"{self.phase}, {self.detail}" if self.detail else self.phase


@dataclass(frozen=True)
class Failure:
    """A failure after which the run continues."""

    cause: FailureCause
    reason: str
    ranks: list[int] = field(default_factory=list)  # of the workers that failed
    nodes: list[str | None] = field(default_factory=list)  # of all workers

    def __str__(self) -> str:
        if self.cause == FailureCause.PREEMPTED:
            return "A node of this run is being preempted; the run continues elsewhere from a new checkpoint."
        if self.cause == FailureCause.DRIVER:
            return f"Its driver failed ({self.reason}) and is restarted."
        if self.cause == FailureCause.MEMORY:
            return "Memory ran short, and Ray ended the workers; they are restarted from the last checkpoint."
        if self.cause == FailureCause.CONTROLLER:
            return "Ray Train's controller died; it and the workers are restarted from the last checkpoint."
        who = f"Worker {', '.join(map(str, self.ranks))}" if self.ranks else "A worker that was starting"
        return f"{who} failed ({self.reason}); the workers are restarted from the last checkpoint."


@dataclass(frozen=True)
class StatusStore:
    """The status of one execution of a run; `key` is unique to it."""

    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def worker(self) -> WorkerStatus | None:
        """Return the first worker's last status, or None if there is none yet."""
        values = self._get("worker")
        return None if values is None else checked(WorkerStatus, values)

    def put_worker(self, status: WorkerStatus) -> None:
        self._put("worker", asdict(status))

    def history(self) -> list[EpochRecord]:
        """Return the records of the finished epochs."""
        return [EpochRecord.from_json(row) for row in self._get("history") or []]

    def put_history(self, history: Iterable[EpochRecord]) -> None:
        self._put("history", [record.to_json() for record in history])

    def failures(self) -> list[Failure]:
        """Return the failures so far, the oldest first."""
        return [checked(Failure, values) for values in self._get("failures") or []]

    def add_failure(self, failure: Failure) -> None:
        self._put("failures", [*(self._get("failures") or []), asdict(failure)])

    def stop_decision(self, epoch: int) -> bool | None:
        """Return whether the trial stops after an epoch, or None if that is not decided yet."""
        return self._get(f"stop after {epoch}")

    def put_stop_decision(self, epoch: int, *, stop: bool) -> None:
        self._put(f"stop after {epoch}", stop)

    def timings(self) -> dict[str, list[float]]:
        """Return what `bench` has timed so far: a figure for each round, by stage."""
        return self._get("timings") or {}

    def put_timings(self, rates: dict[str, list[float]]) -> None:
        self._put("timings", rates)

    def waiting(self) -> str | None:
        """Return what the workers of a trial wait for while they start."""
        return self._get("waiting")

    def put_waiting(self, text: str | None) -> None:
        self._put("waiting", text)

    def reason(self) -> str | None:
        """Return why a trial's driver failed."""
        return self._get("reason")

    def put_reason(self, reason: str) -> None:
        self._put("reason", reason)

    def stop_requested(self) -> bool:
        return self._get("stop") is not None

    def request_stop(self) -> None:
        """Ask the workers to save and stop."""
        self._put("stop", True)

    def delete(self) -> None:
        """Delete everything, so that a long-lived cluster doesn't keep it."""
        _here.pop(self.key, None)
        if in_a_cluster():
            from raycifar.cluster import ray_internals

            ray_internals.kv_delete(f"raycifar/{self.key}/")

    def _put(self, topic: str, value: Any) -> None:
        content = json.dumps(value).encode()
        if in_a_cluster():
            from raycifar.cluster import ray_internals, watch

            watch.answered(lambda: ray_internals.kv_put(f"raycifar/{self.key}/{topic}", content))
        else:
            _here[self.key][topic] = content

    def _get(self, topic: str) -> Any:
        if in_a_cluster():
            from raycifar.cluster import ray_internals, watch

            content = watch.answered(lambda: ray_internals.kv_get(f"raycifar/{self.key}/{topic}"))
        else:
            content = _here[self.key].get(topic)
        return None if content is None else json.loads(content)


def in_a_cluster() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()
