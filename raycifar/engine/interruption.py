"""Interruptions of a run between two steps: a node is preempted, or the driver asks the run to stop."""

import time
from enum import StrEnum

import ray.train
import ray.train.collective

from raycifar.engine.reporter import Reporter

CHECK_SECONDS = 2  # between two checks; clouds announce preemptions 30 to 120 s ahead


class Interruption(StrEnum):
    """Why a run is interrupted."""

    PREEMPTION = "a node is being preempted"
    STOP = "the run was asked to stop"


class InterruptionWatch:
    """Checks for interruptions from time to time, on all workers after the same step.

    A run in the driver's own process (`in_process`) isn't preempted.
    """

    def __init__(self, reporter: Reporter, *, in_process: bool) -> None:
        self.reporter, self.in_process = reporter, in_process
        self.num_calls, self.next_check = 0, 2
        self.began = time.perf_counter()

    def check(self) -> Interruption | None:
        """Return why the run is interrupted now, or None; each worker calls this after the same steps."""
        if self.in_process:
            return Interruption.STOP if self.reporter.stop_requested() else None
        self.num_calls += 1
        if self.num_calls < self.next_check:
            return None
        rate = self.num_calls / (time.perf_counter() - self.began)
        rate, stop = ray.train.collective.broadcast_from_rank_zero((rate, self.reporter.stop_requested()))
        self.next_check += max(1, round(rate * CHECK_SECONDS))
        if stop:
            return Interruption.STOP
        return Interruption.PREEMPTION if ray.train.get_preemption_info() is not None else None
