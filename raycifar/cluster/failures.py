"""What follows from the workers' failures: a restart or, if a retry is bound to fail, the end of the run."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.train

from raycifar.cluster import ray_internals
from raycifar.cluster.status import Failure, FailureCause, Phase, StatusStore, WorkerStatus
from raycifar.errors import PreemptedError, StorageError, WorkError, in_a_line

LOOK_SECONDS = 0.05  # between two checks for a node's death
NODE_DEATH_SECONDS = 15  # until Ray notices a node's death
DRIVER_DEATH_SECONDS = 1  # until a dead driver's job ends
MEMORY_SECONDS = 600  # for memory that ran short to be free again
ROOM = 0.1  # of a node's memory, below the limit at which Ray ends processes, for the workers to start again


class FailureCounter(ray.train.UserCallback):
    """Counts the workers' failures in Ray Train's controller, and reports them to the driver.

    A failure counts against `max_failures` unless it comes from the loss of a node, which is normal on spot nodes. Ray
    Train makes this exception only for announced preemptions.
    """

    def __init__(self, status_store: StatusStore, max_failures: int) -> None:
        self.status_store, self.max_failures = status_store, max_failures
        self.last: tuple[int | None, str] | None = None
        self.counted = -math.inf  # when that was

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        time.sleep(DRIVER_DEATH_SECONDS)  # a dead driver ends its workers: see `TiedToDriver`
        rank, cause, error = decisive(worker_exceptions)
        reason, status = in_a_line(error), self.status_store.worker() or WorkerStatus()
        now, this = time.monotonic(), (status.attempt, reason)
        if status.attempt and this == self.last and now - self.counted < NODE_DEATH_SECONDS:
            return  # while a node is being removed, Ray Train reports the same failure repeatedly
        self.last, self.counted = this, now
        failure = Failure(cause, reason, sorted(worker_exceptions), status.nodes)
        end_or_restart(failure, f"on worker {rank}, {reason}", self.status_store, self.max_failures)


class StartFailureCounter(ray_internals.controller_callback_class()):  # type: ignore[misc]
    """Counts, as `FailureCounter` does, the failures of workers that Ray Train is starting."""

    def __init__(self, status_store: StatusStore, max_failures: int) -> None:
        self.status_store, self.max_failures = status_store, max_failures
        self.nodes: list[str | None] = []

    def on_controller_start_worker_group(self, **size: Any) -> None:
        self.nodes = [*alive_nodes()]  # the workers may be on any of them

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if current_state is previous_state:  # while there is no room for a restart
            return
        if error := ray_internals.start_failure(current_state):
            cause, error = classify(error)
            failure = Failure(cause, in_a_line(error), nodes=self.nodes)
            reason = f"a worker died while it started: {failure.reason}"
            end_or_restart(failure, reason, self.status_store, self.max_failures)


def end_or_restart(failure: Failure, reason: str, status_store: StatusStore, max_failures: int) -> None:
    """Prepare a restart, or raise WorkError where none helps; see `reason_to_end`."""
    if end := reason_to_end(failure, reason, status_store, max_failures):
        raise WorkError(end)
    prepare_restart(failure, status_store)


def reason_to_end(failure: Failure, reason: str, status_store: StatusStore, max_failures: int) -> str | None:
    """Return why the run ends if the failure is permanent or there were too many, else None.

    Args:
        reason: the failure in words.
    """
    if failure.cause == FailureCause.STORAGE:
        return reason
    if failure.cause == FailureCause.PREEMPTED or not too_many([*status_store.failures(), failure], max_failures):
        return None
    if failure.cause == FailureCause.MEMORY:
        return "a node's memory ran short, and Ray ended the workers: fewer workers or more memory help"
    return reason


def prepare_restart(failure: Failure, status_store: StatusStore) -> None:
    """Report a failure to the driver, and wait until memory is free if it ran short."""
    status_store.add_failure(failure)
    status = replace(status_store.worker() or WorkerStatus(), phase=Phase.STARTING, detail="", step=None, part=None)
    if failure.cause == FailureCause.MEMORY:
        deadline, limit = time.monotonic() + MEMORY_SECONDS, ray_internals.memory_limit() - ROOM
        while (used := ray_internals.memory_used()) > limit and time.monotonic() < deadline:
            status_store.put_worker(replace(status, detail=f"once memory is free: {used:.0%} is in use"))
            time.sleep(1)
    status_store.put_worker(status)


def too_many(failures: Sequence[Failure], max_failures: int) -> bool:
    """Return whether there were too many failures; Ray notices a node's death later than its workers'."""
    deadline = time.monotonic() + NODE_DEATH_SECONDS
    while (exceeded := count(failures) > max_failures) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    return exceeded


def count(failures: Iterable[Failure]) -> int:
    """Return the number of failures during which no node died or was preempted."""
    alive = alive_nodes()
    return sum(alive.issuperset(failure.nodes) for failure in failures if failure.cause != FailureCause.PREEMPTED)


def alive_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def decisive(worker_exceptions: dict[int, Exception]) -> tuple[int, FailureCause, Exception]:
    """Return the rank, cause and error of the failure that decides how the run continues.

    A worker's own report takes precedence over the errors that it causes on others.
    """
    failures = [(rank, *classify(error)) for rank, error in sorted(worker_exceptions.items())]
    order = (FailureCause.STORAGE, FailureCause.PREEMPTED, FailureCause.MEMORY, FailureCause.WORKER)
    return min(failures, key=lambda failure: order.index(failure[1]))


def classify(error: Exception) -> tuple[FailureCause, Exception]:
    """Return the cause of a worker's failure, and its error."""
    cause = ray_internals.cause_of(error)
    if isinstance(cause, PreemptedError):
        return FailureCause.PREEMPTED, cause
    if ray_internals.is_out_of_memory(cause):
        return FailureCause.MEMORY, cause
    permanent = isinstance(cause, StorageError) and cause.permanent
    return FailureCause.STORAGE if permanent else FailureCause.WORKER, cause
