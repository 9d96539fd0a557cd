"""What raycifar adds to Ray Train's controller, the process that starts and watches the workers."""

import os
import time
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray import cloudpickle

from raycifar.cluster import ray_internals
from raycifar.cluster.status import Failure, FailureCause, Phase, StatusStore, WorkerStatus
from raycifar.engine.interruption import PreemptedError
from raycifar.errors import StorageError, WorkError, in_a_line

LOOK_SECONDS = 0.05  # between two looks for a node's death
NODE_DEATH_SECONDS = 15  # from a node's death until Ray knows of it
DRIVER_DEATH_SECONDS = 1  # from a driver's death until its job is over


class FailureCounter(ray.train.UserCallback):
    """Counts how often workers failed, tells the driver, and ends the run where trying again is in vain.

    A failure counts against `max_failures` unless a node went away under the workers: on a cluster of spot nodes that
    is the order of the day. Ray Train itself excuses only what was announced.
    """

    def __init__(self, status_store: StatusStore, max_failures: int) -> None:
        self.status_store, self.max_failures = status_store, max_failures
        self.nodes: list[list[str | None]] = []  # those under each failure
        self.last: tuple[int | None, str] | None = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        time.sleep(DRIVER_DEATH_SECONDS)  # it may have taken its workers along: see `TiedToDriver`
        rank, kind, error = decisive(worker_exceptions)
        reason, status = in_a_line(error), self.status_store.worker() or WorkerStatus()
        if status.attempt and (status.attempt, reason) == self.last:
            return  # Ray Train looks again and again while a node is on its way out
        self.last = status.attempt, reason
        if kind != FailureCause.PREEMPTED:
            self.nodes.append(status.nodes)
            if kind == FailureCause.STORAGE or self.exceeded():
                raise WorkError(f"on worker {rank}, {reason}")
        self.status_store.add_failure(Failure(kind, reason, sorted(worker_exceptions)))
        self.status_store.put_worker(replace(status, phase=Phase.STARTING, detail="", step=None))

    def exceeded(self) -> bool:
        """Return whether there were too many failures; a node's death is known later than its workers'."""
        deadline = time.monotonic() + NODE_DEATH_SECONDS
        while (exceeded := self.count() > self.max_failures) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        return exceeded

    def count(self) -> int:
        """Return the number of failures under which no node has died."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return sum(alive.issuperset(nodes) for nodes in self.nodes)


def decisive(worker_exceptions: dict[int, Exception]) -> tuple[int, FailureCause, Exception]:
    """Return the rank, the kind and the error by which it is decided how a run goes on.

    What a worker reported about itself comes before what the others then died of.
    """
    failures = [(rank, *classify(error)) for rank, error in sorted(worker_exceptions.items())]
    order = (FailureCause.STORAGE, FailureCause.PREEMPTED, FailureCause.WORKER)
    return min(failures, key=lambda failure: order.index(failure[1]))


def classify(error: Exception) -> tuple[FailureCause, Exception]:
    """Return the kind of a worker's failure, and what the worker raised or died of."""
    cause = ray_internals.cause_of(error)
    if isinstance(cause, PreemptedError):
        return FailureCause.PREEMPTED, cause
    permanent = isinstance(cause, StorageError) and cause.permanent
    return FailureCause.STORAGE if permanent else FailureCause.WORKER, cause


class TiedToDriver(ray_internals.controller_callback_class()):  # type: ignore[misc]
    """Lets its driver end Ray Train's controller, and ends it where the driver is gone.

    When a driver ends, Ray gives back what its job has reserved or asked for, and ends the job's processes one by
    one. A controller that learns of the first before its own turn comes would ask anew, for the workers that it has
    lost or was still waiting for, and nobody would ever free that.
    """

    def __init__(self, key: str) -> None:
        self.key = key  # by which the driver finds the controller

    def after_controller_start(self, train_run_context: Any) -> None:
        context = ray.get_runtime_context()
        ray_internals.kv_put(self.key, cloudpickle.dumps((context.get_actor_id(), context.current_actor)))

    def on_controller_start_worker_group(self, **size: Any) -> None:
        if ray_internals.is_job_over():
            os._exit(1)
