"""A node that is about to be taken away, as spot machines are: known in time to save what was trained."""

import time

import ray.train
import ray.train.collective

LOOK_SECONDS = 2  # between two looks for a notice; clouds give 30 to 120 s


class PreemptedError(Exception):
    """Ends a worker whose run is to go on elsewhere; Ray Train doesn't count it as a failure."""

    sentence = "A node of this run is being taken away"


class PreemptionWatch:
    """Looks for a notice from time to time; all workers look after the same step, as they have to."""

    def __init__(self, *, in_process: bool) -> None:
        self.off = in_process
        self.steps, self.next = 0, 2
        self.begun = time.perf_counter()

    def announced(self) -> bool:
        """Return whether a node of this run is being taken away; to be called after each step, on each worker."""
        self.steps += 1
        if self.off or self.steps < self.next:
            return False
        pace = self.steps / (time.perf_counter() - self.begun)
        self.next += max(1, round(ray.train.collective.broadcast_from_rank_zero(pace) * LOOK_SECONDS))
        return ray.train.get_preemption_info() is not None
