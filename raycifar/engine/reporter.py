"""What the workers, and Ray Train's controller, tell the driver while a run is under way."""

import os
import time
from typing import Any

import ray
import ray.train
from ray._private.state import jobs
from ray.train.v2._internal.execution.callback import ControllerCallback

from raycifar.cluster.status import STARTING, StatusStore
from raycifar.engine.ray_metrics import Gauges
from raycifar.errors import StorageError, in_a_line

SHOW_SECONDS = 0.5  # between two looks at a step's figures
VERDICT_SECONDS = 0.05  # between two looks for a verdict
NODE_DEATH_SECONDS = 15  # from a node's death until Ray knows of it
DRIVER_DEATH_SECONDS = 1  # from a driver's death until its job is over


class Reporter:
    """Tells the driver, by the status store, how the run stands; only the first worker speaks."""

    def __init__(self, status_store: StatusStore, gauges: Gauges, *, leader: bool) -> None:
        self.status_store, self.gauges, self.leader = status_store, gauges, leader
        self.content: dict[str, Any] = {
            "attempt": os.getpid(),
            "history": [],
            "notices": [],
            "step": None,
            "about": {},
            "nodes": [],
        }
        self.last = 0.0

    def phase(self, name: str) -> None:
        self._put(phase=name)

    def notice(self, sentence: str) -> None:
        self._put(notices=[*self.content["notices"], sentence])

    def about(self, facts: dict[str, Any]) -> None:
        self._put(about=facts)

    def nodes(self, ids: list[str | None]) -> None:
        self._put(nodes=ids)

    def epoch(self, history: list[Any]) -> None:
        self._put(history=[record.to_json() for record in history], step=None)
        if self.leader and history:
            self.gauges.show(history[-1].to_json())

    def verdict(self, epoch: int) -> bool:
        """Wait until the search has said whether the run stops after `epoch`."""
        self.phase("comparing with other trials")
        while (stop := self.status_store.get(f"stop after {epoch}")) is None:
            time.sleep(VERDICT_SECONDS)
        self.phase("training")
        return stop

    def stop_requested(self) -> bool:
        return False

    def due(self) -> bool:
        return self.leader and time.perf_counter() - self.last >= SHOW_SECONDS

    def step(self, **figures: Any) -> None:
        self.last = time.perf_counter()
        self._put(step=figures)
        self.gauges.show(figures)

    def _put(self, **changes: Any) -> None:
        self.content |= changes
        if self.leader:
            self.status_store.put("worker", self.content)


class Failures(ray.train.UserCallback):
    """Counts, in Ray Train's controller, how often workers failed, and tells the driver.

    A failure counts against `most` unless a node went away under the workers: on a cluster of spot nodes that is
    the order of the day. Ray Train itself excuses only what was announced.
    """

    def __init__(self, status_store: StatusStore, most: int) -> None:
        self.status_store, self.most = status_store, most
        self.told: list[str] = []
        self.places: list[list[str]] = []  # the nodes under each failure
        self.last: tuple[Any, str] = None, ""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        time.sleep(DRIVER_DEATH_SECONDS)  # it may have taken its workers along: see `EndsWithItsDriver`
        rank, error = min(worker_exceptions.items())
        reason = in_a_line(getattr(error, "health_check_failure", error))
        content = self.status_store.get("worker") or {}
        attempt = content.get("attempt")
        if attempt and (attempt, reason) == self.last:
            return  # Ray Train looks again and again while a node is on its way out
        self.last = attempt, reason
        if "being taken away" in reason:
            self.tell("A node of this run is being taken away; the run goes on from a checkpoint made just now.")
            return
        self.places.append(content.get("nodes", []))
        counted = self.count()
        deadline = time.monotonic() + NODE_DEATH_SECONDS
        while counted > self.most and time.monotonic() < deadline:  # a node's death is known later than its workers'
            time.sleep(VERDICT_SECONDS)
            counted = self.count()
        if counted > self.most or (isinstance(error, StorageError) and error.permanent):
            raise RuntimeError(f"on worker {rank}, {reason}")
        ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
        self.tell(f"Worker {ranks} failed ({reason}); the workers are restarted from the last checkpoint.")

    def count(self) -> int:
        """Return the number of failures under which no node has died."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return sum(alive.issuperset(nodes) for nodes in self.places)

    def tell(self, sentence: str) -> None:
        self.told.append(sentence)
        self.status_store.put("failures", self.told)
        self.status_store.put("worker", {**(self.status_store.get("worker") or {}), "phase": STARTING, "step": None})


class EndsWithItsDriver(ControllerCallback):
    """Ends Ray Train's controller, rather than let it reserve CPUs and GPUs for a job that is over.

    When a driver ends, Ray gives back what its job has reserved or asked for, and ends the job's processes one by
    one. A controller that learns of the first before its own turn comes would ask anew, for the workers that it has
    lost or was still waiting for, and nobody would ever free that.
    """

    def on_controller_start_worker_group(self, **size: Any) -> None:
        mine = ray.get_runtime_context().get_job_id()
        if any(job["JobID"] == mine and job["IsDead"] for job in jobs()):
            os._exit(1)
