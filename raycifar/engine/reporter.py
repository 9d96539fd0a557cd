"""What the workers tell the driver while a run is under way."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raycifar.cluster.status import ModelFacts, Phase, StatusStore, StepStatus, WorkerStatus
from raycifar.engine.ray_metrics import Gauges
from raycifar.storage.records import EpochRecord

SHOW_SECONDS = 0.5  # between two looks at a step's metrics
STOP_SECONDS = 0.5  # between two looks for a request to stop
VERDICT_SECONDS = 0.05  # between two looks for a verdict


class Reporter:
    """Tells the driver, by the status store, how the run stands; only the first worker, the leader, speaks."""

    def __init__(self, status_store: StatusStore, gauges: Gauges, *, leader: bool) -> None:
        self.status_store, self.gauges, self.leader = status_store, gauges, leader
        self.status = WorkerStatus(attempt=os.getpid())
        self.shown = self.looked = 0.0
        self.stop = False

    def phase(self, phase: Phase, detail: str = "") -> None:
        self._put(phase=phase, detail=detail)

    def notice(self, sentence: str) -> None:
        """Say a sentence, once."""
        if sentence not in self.status.notices:
            self._put(notices=[*self.status.notices, sentence])

    def about(self, model: ModelFacts) -> None:
        self._put(model=model)

    def nodes(self, ids: list[str | None]) -> None:
        self._put(nodes=ids)

    def epoch(self, history: Sequence[EpochRecord]) -> None:
        """Tell the records of all finished epochs."""
        if self.leader:
            self.status_store.put_history(history)
            self._put(step=None)
            if history:
                self.gauges.show(vars(history[-1]))

    def timings(self, rates: dict[str, list[float]]) -> None:
        if self.leader:
            self.status_store.put_timings(rates)

    def verdict(self, epoch: int) -> bool:
        """Wait until the search has said whether the run stops after `epoch`."""
        self.phase(Phase.COMPARING)
        while (stop := self.status_store.verdict(epoch)) is None:
            time.sleep(VERDICT_SECONDS)
        self.phase(Phase.TRAINING)
        return stop

    def stop_requested(self) -> bool:
        """Return whether the driver has asked the run to stop; the leader alone looks, twice a second at most."""
        now = time.perf_counter()
        if self.leader and not self.stop and now - self.looked >= STOP_SECONDS:
            self.looked = now
            self.stop = self.status_store.stop_requested()
        return self.stop

    def due(self) -> bool:
        """Return whether it is time to show a step again."""
        return self.leader and time.perf_counter() - self.shown >= SHOW_SECONDS

    def step(self, **values: Any) -> None:
        """Tell how the epoch under way stands: the fields of `StepStatus`."""
        self.shown = time.perf_counter()
        self._put(step=StepStatus(**values))
        self.gauges.show(values)

    def _put(self, **changes: Any) -> None:
        self.status = replace(self.status, **changes)
        if self.leader:
            self.status_store.put_worker(self.status)
