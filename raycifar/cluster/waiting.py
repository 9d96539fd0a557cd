"""Waiting for the workers' resources: for nodes to start, or for CPUs and GPUs to be free."""

import math
import time
from collections.abc import Callable

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from raycifar.cluster import ray_internals
from raycifar.cluster.sizing import LOOK_SECONDS, Workers, alive_nodes, describe, placeable
from raycifar.cluster.watch import answered
from raycifar.errors import ResumableError
from raycifar.words import count


class Waiting:
    """Returns what the workers of a run wait for, and raises ResumableError after `seconds` without room."""

    def __init__(self, workers: Workers, seconds: float) -> None:
        self.workers, self.seconds = workers, seconds
        self.started = self.checked = -math.inf
        self.text: str | None = None

    def __call__(self) -> str | None:
        """Return what the workers wait for, or None if there is room; call this while no worker has started."""
        now = time.monotonic()
        if now - self.checked < LOOK_SECONDS:
            return self.text
        if now - self.checked > 10 * LOOK_SECONDS:
            self.started = now  # workers ran in between
        self.checked, missing = now, answered(lambda: lacking(self.workers))
        if missing is None:
            self.started = now
        elif now - self.started > self.seconds:
            raise ResumableError(f"after {self.seconds:g} s (--wait) there was still no room: {missing}.")
        self.text = missing and f"{missing}; for at most {self.seconds:g} s (--wait)"
        return self.text


def make_room(workers: Workers, show: Callable[[str], None], seconds: float) -> None:
    """Wait until there is room for the workers, which the autoscaler may add, and `show` what they wait for.

    Raises:
        ResumableError: there was no room for `seconds`.
    """
    waiting = Waiting(workers, seconds)
    group = placement_group([workers.resources] * workers.count)
    try:
        while not group.wait(LOOK_SECONDS):
            show(waiting() or "reserving room")
    finally:
        remove_placement_group(group)


def lacking(workers: Workers) -> str | None:
    """Return what the workers wait for, or None if there is room for as many as are needed."""
    if workers.count == 0 or reserved(workers):
        return None
    status = ray_internals.cluster_status()
    free = [node.available_resources() for node in (*status.active_nodes, *status.idle_nodes)]
    fit = placeable(free, workers.resources)
    if fit >= workers.needed:
        return None
    nodes = alive_nodes()
    capacity = placeable(nodes, workers.resources)
    used = f", {capacity - fit} in use" if capacity > fit else ""
    coming = len(status.pending_nodes) + sum(launch.count for launch in status.pending_launches)
    arriving = f"; {count(coming, 'node')} on the way" if coming else ""
    return (
        f"waiting for {count(workers.needed, 'worker')} of {describe(workers.resources)}: "
        f"room for {capacity}{used}, on {count(len(nodes), 'node')}{arriving}"
    )


def reserved(workers: Workers) -> bool:
    """Return whether such workers of this job have their resources, and only need to start."""
    job = ray.get_runtime_context().get_job_id()  # a placement group's identifier ends with its job's
    return any(
        group["state"] == "CREATED" and group["placement_group_id"].endswith(job)
        for group in placement_group_table().values()
        if any(workers.resources.items() <= bundle.items() for bundle in group["bundles"].values())
    )
