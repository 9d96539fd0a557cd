"""Why a run is left between two steps: a node is about to be taken away, or its driver asks it to stop."""

import time
from enum import StrEnum

import ray.train
import ray.train.collective

from raycifar.engine.reporter import Reporter

LOOK_SECONDS = 2  # between two looks; clouds announce that they take a spot node 30 to 120 s before


class Interruption(StrEnum):
    """What a run is left for."""

    PREEMPTION = "a node is being taken away"
    STOP = "the run is to stop"


class PreemptedError(Exception):
    """Ends a worker whose run is to go on elsewhere; Ray Train doesn't count it as a failure."""

    def __init__(self, reason: str = "a node of this run is being taken away") -> None:  # given when it is unpickled
        super().__init__(reason)


class InterruptionWatch:
    """Looks for a reason to leave from time to time; all workers look after the same step, as they have to.

    Args:
        in_process: training is in the driver's own process, which no cloud takes away.
    """

    def __init__(self, reporter: Reporter, *, in_process: bool) -> None:
        self.reporter, self.in_process = reporter, in_process
        self.num_steps, self.next_look = 0, 2
        self.began = time.perf_counter()

    def look(self) -> Interruption | None:
        """Return why to leave the run now, or None; to be called after each step, on each worker."""
        if self.in_process:
            return Interruption.STOP if self.reporter.stop_requested() else None
        self.num_steps += 1
        if self.num_steps < self.next_look:
            return None
        rate = self.num_steps / (time.perf_counter() - self.began)
        rate, stop = ray.train.collective.broadcast_from_rank_zero((rate, self.reporter.stop_requested()))
        self.next_look += max(1, round(rate * LOOK_SECONDS))
        if stop:
            return Interruption.STOP
        return Interruption.PREEMPTION if ray.train.get_preemption_info() is not None else None
