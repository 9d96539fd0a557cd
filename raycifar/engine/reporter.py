"""Reports from the workers during a run: to the driver, and for Prometheus at each node's metrics port."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from ray.util.metrics import Gauge

from raycifar.cluster.status import PartStatus, Phase, StatusStore, StepStatus, WorkerStatus, in_a_cluster
from raycifar.storage.schemas import EpochRecord

STEP_SECONDS = 0.5  # between two reports of a step, or of how much is scored
STOP_SECONDS = 0.2  # between two checks for a request to stop
DECISION_SECONDS = 0.05  # between two checks for a decision
METRICS = {  # for Prometheus; `jobs/grafana.json` draws them
    "epoch": "The current epoch, from 1.",
    "loss": "Training loss of the current epoch, natural-log cross-entropy.",
    "top1": "Training accuracy of the current epoch, a fraction.",
    "images_per_second": "Training images per second, over all workers.",
    "lr": "Learning rate.",
    "val_loss": "Validation loss of the last epoch.",
    "val_top1": "Validation top-1 accuracy of the last epoch, a fraction.",
}


class Gauges:
    """The gauges of one run; there are none outside a cluster."""

    def __init__(self, run: str, model: str) -> None:
        self.values: dict[str, float] = {}
        self.tags = {"run": quote(run), "model": model}  # Ray takes ASCII
        tags = tuple(self.tags)
        self.gauges = {
            name: Gauge(f"raycifar_{name}", description=text, tag_keys=tags)
            for name, text in METRICS.items()
            if in_a_cluster()
        }

    def set(self, metrics: dict[str, Any]) -> None:
        """Set what is known of `metrics`, and all others again: Ray drops a gauge that isn't set for some seconds."""
        self.values |= {name: metrics[name] for name in self.gauges if metrics.get(name) is not None}
        for name, value in self.values.items():
            self.gauges[name].set(value, self.tags)


class Reporter:
    """Reports the run's status to the driver through the status store; only the first worker, the leader, reports."""

    def __init__(self, status_store: StatusStore, gauges: Gauges, *, leader: bool) -> None:
        self.status_store, self.gauges, self.leader = status_store, gauges, leader
        self.status = WorkerStatus(attempt=os.getpid())
        self.reported = self.checked = 0.0
        self.stop = False

    def put(self, **changes: Any) -> None:
        """Report changes of the status: fields of `WorkerStatus`."""
        self.status = replace(self.status, **changes)
        if self.leader:
            self.status_store.put_worker(self.status)

    def phase(self, phase: Phase, detail: str = "") -> None:
        self.put(phase=phase, detail=detail, part=None)

    def notice(self, sentence: str) -> None:
        """Say a sentence, once."""
        if sentence not in self.status.notices:
            self.put(notices=[*self.status.notices, sentence])

    def history(self, history: Sequence[EpochRecord]) -> None:
        """Report the records of all finished epochs; the leader calls it, in any thread."""
        self.status_store.put_history(history)
        if history:
            self.gauges.set(vars(history[-1]))

    def timings(self, rates: dict[str, list[float]]) -> None:
        if self.leader:
            self.status_store.put_timings(rates)

    def stop_decision(self, epoch: int) -> bool:
        """Wait for the search's decision, and return whether the run stops after `epoch`."""
        self.phase(Phase.COMPARING)
        while (stop := self.status_store.stop_decision(epoch)) is None:
            time.sleep(DECISION_SECONDS)
        self.phase(Phase.TRAINING)
        return stop

    def stop_requested(self) -> bool:
        """Return whether the driver has asked the run to stop; only the leader checks, a few times a second."""
        now = time.perf_counter()
        if self.leader and not self.stop and now - self.checked >= STOP_SECONDS:
            self.checked = now
            self.stop = self.status_store.stop_requested()
        return self.stop

    def due(self) -> bool:
        """Return whether it is time to report a step, or how much is scored; if so, not again for a while."""
        now = time.perf_counter()
        if not self.leader or now - self.reported < STEP_SECONDS:
            return False
        self.reported = now
        return True

    def step(self, **values: Any) -> None:
        """Report the current epoch's progress: the fields of `StepStatus`."""
        self.put(step=StepStatus(**values))
        self.gauges.set(values)

    def part(self, what: str, done: int, total: int) -> None:
        """Report how much is done of something that has a length."""
        self.put(part=PartStatus(what=what, done=done, total=total))
