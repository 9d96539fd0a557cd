"""All uses of Ray's private interfaces: one function for each, which says why the public ones don't suffice.

`tests/test_ray_internals.py` checks each against the installed Ray. Functions import what `import ray` doesn't load,
because workers use only the key-value store.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._common.utils import get_system_memory
from ray._private import auto_init_hook, ray_constants, services, utils, worker
from ray._private.authentication import authentication_token_setup
from ray._private.state import jobs, state
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.exceptions import OutOfMemoryError, RayActorError, RpcError
from ray.experimental.internal_kv import internal_kv_get_gcs_client
from ray.util.placement_group import PlacementGroup, placement_group_table

from raycifar.redaction import redact

KV_SECONDS = 2  # for an answer of the key-value store

# The key-value store -------------------------------------------------------------------------------


def kv_put(key: str, value: bytes) -> None:
    """Set a key for every process of the cluster; `ray.exceptions.RpcError` if Ray's control service doesn't answer.

    The public way is an actor: another process to start and to find.
    """
    internal_kv_get_gcs_client().internal_kv_put(key.encode(), value, True, None, KV_SECONDS)


def kv_get(key: str) -> bytes | None:
    """Return the value of a key, or None; see `kv_put`."""
    return internal_kv_get_gcs_client().internal_kv_get(key.encode(), None, KV_SECONDS)


def kv_delete(prefix: str) -> None:
    """Delete all keys that begin like this, if Ray's control service answers."""
    with suppress(RpcError):
        internal_kv_get_gcs_client().internal_kv_del(prefix.encode(), True, None, KV_SECONDS)


# Ray's own processes --------------------------------------------------------------------------------


def control_processes() -> dict[str, tuple[str, int]]:
    """Return the host and port of each process of Ray that this process can't do without, by name.

    When one dies, Ray itself ends this process after a minute, in its own words.
    """
    node_id = ray.get_runtime_context().get_node_id()
    here = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    raylet = "process on this node (raylet)", (here["NodeManagerAddress"], here["NodeManagerPort"])
    return dict([control_service(), raylet])


def control_service() -> tuple[str, tuple[str, int]]:
    """Return the name of the process that knows the cluster's state, and its host and port."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return "control service (GCS)", (host.strip("[]"), int(port))


def memory_used() -> float:
    """Return the share of this node's or container's memory that is in use, as Ray's memory monitor counts it."""
    return utils.get_used_memory() / get_system_memory()


def memory_limit() -> float:
    """Return the share of a node's memory in use at which Ray's memory monitor ends processes."""
    return float(os.environ.get("RAY_memory_usage_threshold") or 0.95)  # noqa: SIM112 (Ray's own name)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether Ray's memory monitor ended a process; for an actor, only Ray's wording says so."""
    return isinstance(error, OutOfMemoryError) or (
        isinstance(error, RayActorError) and "due to the node running low on memory" in str(error)
    )


# Joining and leaving -------------------------------------------------------------------------------


def own_cluster() -> str | None:
    """Return the address of the running cluster that this user's `ray start` has made this machine part of, or None.

    `ray.init(address="auto")`, the public way, would also join another program's own Ray, and die with it, or a
    Ray that another user has announced in the temporary folder.
    """
    announced, user = services.find_bootstrap_address(None), psutil.Process().username()
    for process in psutil.process_iter(["cmdline", "username"]) if announced else ():
        if process.info["username"] == user and f"--gcs-address={announced}" in (process.info["cmdline"] or []):
            return announced
    return None


def use_own_token() -> None:
    """Show the user's token, if there is one, to the cluster that is joined next.

    `ray.init` does so only for a cluster that it has found by itself.
    """
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def is_answered(address: str, seconds: float) -> bool:
    """Return whether Ray's control service answers at an address within a time.

    `ray.init` itself tries for minutes.
    """
    import grpc
    from ray._private.gcs_utils import create_gcs_channel

    channel = create_gcs_channel(address)
    try:
        grpc.channel_ready_future(channel).result(timeout=seconds)
    except grpc.FutureTimeoutError:
        return False
    finally:
        channel.close()
    return True


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Give a name of a module another value for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def loopback_alone() -> AbstractContextManager[None]:
    """Have a new Ray listen on the loopback interface alone.

    Ray replaces `_node_ip_address="127.0.0.1"` by the machine's external address where it supports clusters.
    """
    return replaced(ray_constants, "ENABLE_RAY_CLUSTER", False)


def read_token_again() -> None:
    """Have this process take its mode of authentication and its token from the environment again.

    Ray reads them once in a process.
    """
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def without_error_echo() -> AbstractContextManager[None]:
    """Keep Ray from printing cluster errors, such as a lost node's last log, to this process's output.

    `ray.init(log_to_driver=False)` silences only the workers' output.
    """
    return replaced(worker, "print_to_stdstream", lambda *args, **kwargs: None)


def entrypoint_without_secrets() -> AbstractContextManager[None]:
    """Keep passwords and signatures in this command's arguments out of what Ray records of its job.

    There is no public way to name the command otherwise.
    """
    name_of = utils.get_entrypoint_name
    return replaced(utils, "get_entrypoint_name", lambda: redact(name_of()))


def forbid_auto_init() -> None:
    """Keep running threads from starting Ray again while this process ends.

    Ray's calls start it if it isn't running; RAY_ENABLE_AUTO_CONNECT=0 is read only when Ray is imported.
    """
    auto_init_hook.enable_auto_connect = False


# What the cluster has ------------------------------------------------------------------------------


def cluster_status() -> Any:
    """Return the nodes, with the free resources of each, and those that the autoscaler is adding.

    `ray.available_resources` returns only the sum over nodes, and `ray.util.state` asks the dashboard, which may not
    run.

    Returns:
        Ray's `ClusterStatus`: `active_nodes`, `idle_nodes`, `pending_nodes`, `pending_launches`.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status

    return get_cluster_status(ray.get_runtime_context().gcs_address, timeout=5)


def is_infeasible(group: PlacementGroup) -> bool:
    """Return whether the autoscaler has reported that a placement group is infeasible.

    `get_cluster_status` omits this: its schema has no field for it.
    """
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    found = GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=5)).autoscaling_state
    return any(group.id.hex() in request.details for request in found.infeasible_gang_resource_requests)


def autoscaler_config() -> dict[str, Any] | None:
    """Return the configuration of the autoscaler on this machine; empty if it has none, None without an autoscaler.

    No public interface returns the nodes that an autoscaler may add. The file is named on the command line of Ray's
    monitor process, on the head node, where jobs run.
    """
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

    `ray.util.state.list_jobs` asks the dashboard, which may not run.
    """
    mine = ray.get_runtime_context().get_job_id()
    return any(job["JobID"] == mine and job["IsDead"] for job in jobs())


def without_cleaner(callbacks: list[Any]) -> list[Any]:
    """Return a trainer's `_create_default_callbacks` without the one that starts a PlacementGroupCleaner.

    Each run would have one on the head, a process that needs the dashboard to release what a dead controller has
    reserved (ray issue 65443). `StoppableTrainer` does that itself, without a process.
    """
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def controller_callback_class() -> type:
    """Return the base class of callbacks for the start of Ray Train's controller and of its workers.

    `ray.train.UserCallback` is called only for reports and exceptions.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback

    return ControllerCallback


def cause_of(error: Exception) -> Exception:
    """Return a worker's own error, without the wrappers that Ray Train passes to a callback.

    A worker's death arrives in a `WorkerHealthCheckFailedError`, which isn't exported.
    """
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

    if isinstance(error, WorkerHealthCheckFailedError):
        return error.health_check_failure
    return error._base_exc if isinstance(error, UserExceptionWithTraceback) else error


def placement_groups_of(actor_id: str) -> list[PlacementGroup]:
    """Return the placement groups that an actor has created.

    `placement_group_table`, the public way, doesn't return the creators; Ray keeps a dead actor's groups until its job
    ends.
    """
    table = map(PlacementGroupTableData.FromString, state._connect_and_get_accessor().get_placement_group_table())
    known = placement_group_table()
    return [
        PlacementGroup(ray.PlacementGroupID(row.placement_group_id))
        for row in table
        if row.creator_actor_id.hex() == actor_id and known[row.placement_group_id.hex()]["state"] != "REMOVED"
    ]


def start_failure(state: Any) -> Exception | None:
    """Return the error of a worker that died while it started, if that is why Ray Train's controller is in `state`.

    No public callback is called then, and `FailureConfig` can't limit these restarts without limiting an elastic run's
    attempts to find room.
    """
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
    from ray.train.v2._internal.execution.controller.state import ReschedulingState

    failed = state.training_failed_error if isinstance(state, ReschedulingState) else None
    error: Any = getattr(failed, "controller_failure", None)
    return error.__cause__ or error if isinstance(error, WorkerGroupStartupFailedError) else None


def progress_callback_class() -> type:
    """Return the base class of callbacks that replace Ray Tune's printing of trials.

    Without such a callback, Ray Tune adds one that prints, even with `verbose=0`. The class isn't exported.
    """
    from ray.tune.progress_reporter import TrialProgressCallback

    return TrialProgressCallback
