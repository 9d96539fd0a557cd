"""Ray's private parts, all that raycifar uses of them: a function for each, which says what public way is missing.

`tests/test_ray_internals.py` checks each against the Ray that is installed. What a function needs beyond
`import ray` is imported inside it: workers need the key-value store alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table

# The key-value store -------------------------------------------------------------------------------


def kv_put(key: str, value: bytes) -> None:
    """Set a key for every process of the cluster.

    The public way to share a value is an actor: one more process to start, and to find again.
    """
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key, value, overwrite=True)


def kv_get(key: str) -> bytes | None:
    """Return the value of a key, or None; see `kv_put`."""
    from ray.experimental import internal_kv

    return internal_kv._internal_kv_get(key)


# Joining and leaving -------------------------------------------------------------------------------


def is_part_of_cluster() -> bool:
    """Return whether `ray start` has made this machine a part of a cluster that is up.

    `ray.init(address="auto")`, the public way, would also join the Ray that another program runs for itself, and
    die with it.
    """
    from ray._private import services

    services.find_gcs_addresses.cache_clear()
    return services.find_bootstrap_address(None) in services.find_gcs_addresses()


@contextmanager
def without_error_echo() -> Iterator[None]:
    """Keep Ray from printing cluster errors, such as a lost node's last log, to this process's output.

    `ray.init(log_to_driver=False)` silences the workers' output, but not these.
    """
    from ray._private import worker

    before = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *args, **kwargs: None
    try:
        yield
    finally:
        worker.print_to_stdstream = before


def forbid_auto_init() -> None:
    """Keep threads that still work, as this process ends, from starting Ray anew.

    Ray's calls start it where it isn't running; RAY_ENABLE_AUTO_CONNECT=0 is read only when Ray is imported.
    """
    from ray._private import auto_init_hook

    auto_init_hook.enable_auto_connect = False


# What the cluster has ------------------------------------------------------------------------------


def cluster_status() -> Any:
    """Return the nodes, with what is free on each, and those that the autoscaler is about to add.

    `ray.available_resources` knows only the sum over nodes, and `ray.util.state` asks the dashboard, which a Ray
    started by a program need not have.

    Returns:
        Ray's `ClusterStatus`: `active_nodes`, `idle_nodes`, `pending_nodes`, `pending_launches`.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status

    return get_cluster_status(ray.get_runtime_context().gcs_address, timeout=5)


def is_infeasible(group: PlacementGroup) -> bool:
    """Return whether the autoscaler has said that it can never make room for a placement group.

    `get_cluster_status` leaves what is infeasible out (a TODO in its schema).
    """
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    state = GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=5)).autoscaling_state
    return any(group.id.hex() in request.details for request in state.infeasible_gang_resource_requests)


def autoscaler_config() -> dict[str, Any] | None:
    """Return the configuration that the autoscaler on this machine was started with; empty where it has none.

    Nothing public tells which nodes an autoscaler may add. It is read from the file named on the command line of
    Ray's monitor process, on the head, where jobs run.

    Returns:
        None where there is no such process.
    """
    import psutil
    import yaml

    address, prefix = ray.get_runtime_context().gcs_address, "--autoscaling-config="
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        is_monitor = any("autoscaler" in part and part.endswith("monitor.py") for part in command)
        if is_monitor and any(address in part for part in command):
            files = [part.removeprefix(prefix) for part in command if part.startswith(prefix)]
            return yaml.safe_load(Path(files[0]).expanduser().read_text()) if files else {}
    return None


# Ray Train and Ray Tune ----------------------------------------------------------------------------


def is_job_over() -> bool:
    """Return whether the driver of this process's job has ended.

    `ray.util.state.list_jobs` asks the dashboard, which a Ray started by a program need not have.
    """
    from ray._private.state import jobs

    mine = ray.get_runtime_context().get_job_id()
    return any(job["JobID"] == mine and job["IsDead"] for job in jobs())


def controller_callback_class() -> type:
    """Return the base class of callbacks that hear when Ray Train's controller starts, and starts workers.

    `ray.train.UserCallback` hears only of reports and exceptions.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback

    return ControllerCallback


def cause_of(error: Exception) -> Exception:
    """Return what a worker raised, or died of, without what Ray Train wraps it in on the way to a callback.

    What the training function raised arrives as it is; the death of a worker in a `WorkerHealthCheckFailedError`,
    which is not exported.
    """
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

    if isinstance(error, WorkerHealthCheckFailedError):
        return error.health_check_failure
    return error._base_exc if isinstance(error, UserExceptionWithTraceback) else error


def placement_groups_of(actor_id: str) -> list[PlacementGroup]:
    """Return what an actor has reserved or asked for.

    `placement_group_table`, the public way, doesn't say whose a group is; Ray keeps an actor's groups after its
    death, as long as its job lasts.
    """
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    table = map(PlacementGroupTableData.FromString, state._connect_and_get_accessor().get_placement_group_table())
    known = placement_group_table()
    return [
        PlacementGroup(ray.PlacementGroupID(row.placement_group_id))
        for row in table
        if row.creator_actor_id.hex() == actor_id and known[row.placement_group_id.hex()]["state"] != "REMOVED"
    ]


def progress_callback_class() -> type:
    """Return the class by whose subclasses Ray Tune's own printing of trials is replaced.

    Ray Tune adds one that prints, even with `verbose=0`, unless it is given one of this class, which isn't exported.
    """
    from ray.tune.progress_reporter import TrialProgressCallback

    return TrialProgressCallback
