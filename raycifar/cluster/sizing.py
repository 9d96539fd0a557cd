"""Connecting to Ray, and sizing a run to what it holds: the only room that asks Ray what there is."""

import logging
import math
import os
import platform
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._private import services, worker
from ray._private.state import available_resources_per_node
from ray.core.generated import autoscaler_pb2
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycifar.cluster import WorkerCount
from raycifar.errors import RequestError, WorkError, in_a_line

GPU_WORKER_CPUS = 4  # a GPU's worker computes nothing on the CPU but its bookkeeping
SMALLEST_SHARE = 0.25  # of a CPU; below, Ray's own processes starve and time out
MOST_NODES = 1000  # of one type that an autoscaler may add, where it sets no limit
CONNECT_SECONDS = 10
LOOK_SECONDS = 1  # between two looks at what is free
NODE_SECONDS = 60  # for every node to answer a question
VERDICT_SECONDS = 30  # for the autoscaler to say whether it can help

MUST_AGREE = ("python", "ray", "torch", "raycifar")

Resources = dict[str, float]


@dataclass(frozen=True)
class Workers:
    """What is asked of the cluster. A `count` of 0 is training in this process."""

    count: int
    use_gpu: bool
    cpus: float  # of each worker
    least: int | None = None  # of an elastic run, which takes up to `count`

    @property
    def needed(self) -> int:
        """How many there must be for the run to begin."""
        return self.count if self.least is None else self.least

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    @property
    def resources(self) -> Resources:
        """Return what each worker reserves, in Ray's words."""
        return {"CPU": self.cpus, **({"GPU": 1} if self.use_gpu else {})}

    def __str__(self) -> str:
        if self.count == 0:
            return "this process"
        span = "" if self.least is None else f"{self.least} to "
        return f"{span}{self.count} worker{'s' * (self.count > 1)} of {describe(self.resources)}"


def describe(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in resources.items())


def connect(*, debug: bool, dashboard: bool = False) -> None:
    """Join the cluster that is there (RAY_ADDRESS, or `ray start` on this machine), else start one here.

    Args:
        dashboard: run it in a Ray that is started here: it takes time, but only by what it knows does Ray Train
            put away the workers of a training driver that died.

    Raises:
        WorkError: the cluster refuses, or can't be reached.
    """
    quieten(debug=debug)
    if ray.is_initialized():
        return
    quiet = {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if not address and not started_here():
        init(address="local", include_dashboard=dashboard, _node_ip_address="127.0.0.1", **quiet)
        return
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard then shows the run
    where = f"{address} (RAY_ADDRESS)" if address else "this machine"
    try:
        if address and (match := re.fullmatch(r"([^/]+):(\d+)", address)):  # Ray itself would try for ten minutes
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=CONNECT_SECONDS).close()
        init(address="auto", **quiet)
    except (OSError, ray.exceptions.AuthenticationError) as error:  # Ray's ConnectionError is an OSError
        if "authentication token" in "".join(traceback.format_exception(error)).lower():
            raise WorkError(
                f"the Ray cluster at {where} asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH to the cluster's own."
            ) from error
        raise WorkError(f"the Ray cluster at {where} can't be reached: {error}.") from error
    except RuntimeError as error:  # other versions of Ray or Python
        reason = " ".join(str(error).split())
        raise WorkError(f"the Ray cluster at {where} can't be joined: {reason.rstrip('.')}.") from error


def init(**options: Any) -> None:
    """Call `ray.init`, and keep this process's own answer to SIGTERM: Ray's writes a stack and aborts."""
    answer = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, answer)


def started_here() -> bool:
    """Return whether `ray start` has made this machine a part of a cluster that is up.

    `ray.init(address="auto")` alone would also join the Ray that another program runs for itself, and die with it.
    """
    return services.find_bootstrap_address(None) in services.find_gcs_addresses()


def quieten(*, debug: bool) -> None:
    """Leave what Ray says in this process to its log files."""
    if not debug:
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's failure is ours to report
        worker.print_to_stdstream = lambda *args, **kwargs: None  # else a lost node's last log appears on the screen


def in_process(device: str, cpus: float | None, *, debug: bool) -> Workers:
    """Return the sizing of a run without worker actors, for which Ray isn't started."""
    import torch

    quieten(debug=debug)

    if device == "gpu" and not torch.cuda.is_available():
        raise RequestError("--device gpu: this machine has no GPU that PyTorch can use.")
    return Workers(0, device != "cpu" and torch.cuda.is_available(), cpus or torch.get_num_threads())


# Sizing: what to ask for, and whether it can ever be met -------------------------------------------


def size(wanted: WorkerCount, device: str, cpus: float | None) -> Workers:
    """Return the sizing of a run on the connected cluster, with the nodes that its autoscaler may add.

    Args:
        wanted: workers, or from how many to how many; None takes one for each GPU that is there, or one.
        device: auto, gpu or cpu.
        cpus: CPUs of each worker; None takes 4 on GPUs, and else what the nodes have, shared equally.

    Raises:
        RequestError: the cluster can never hold that; the message names the most that it can.
    """
    there, groups = alive_nodes(), growth()
    nodes = there + [resources for resources, extra in groups or () for _ in range(extra)]
    use_gpu = device == "gpu" or (device == "auto" and any(node.get("GPU", 0) >= 1 for node in nodes))
    least, count = wanted if isinstance(wanted, tuple) else (None, wanted)
    count = count or (max(1, sum(int(node.get("GPU", 0)) for node in there)) if use_gpu else 1)
    workers = Workers(count, use_gpu, cpus or share(nodes, count, use_gpu=use_gpu), least)
    most = placeable(nodes, workers.resources)
    if most >= workers.needed:
        return workers
    if groups is None and autoscaler_can([workers.resources] * workers.needed):
        return workers
    raise RequestError(
        f"{workers.needed} worker{'s' * (workers.needed > 1)} of {describe(workers.resources)} each can't be placed: "
        f"this cluster {'can have' if groups else 'has'} {total(nodes)}, room for at most {most} of them. "
        f"Take fewer --workers or --cpus-per-worker{', or --device cpu' if use_gpu else ''}."
    )


def share(nodes: Sequence[Resources], count: int, *, use_gpu: bool) -> float:
    """Return the CPUs of each of `count` workers.

    Raises:
        RequestError: there are too few for so many.
    """
    if use_gpu:
        ratios = [int(node.get("CPU", 0) / node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1]
        return max(1, min([GPU_WORKER_CPUS, *ratios]))
    free = [usable_cpus(node.get("CPU", 0)) for node in nodes]
    each = largest_share(free, count)
    if each < SMALLEST_SHARE:
        fit = int(sum(free) / SMALLEST_SHARE)
        raise RequestError(f"{count} workers can't share {sum(free):g} CPUs: take --workers of at most {fit}.")
    return each


def size_trials(count: int | None, device: str, cpus: float | None, trials: int) -> tuple[Workers, int]:
    """Return the sizing of each of several runs, and how many of them the cluster holds at once.

    By default a run takes one GPU, or on CPUs as much of a node as lets every node work.
    """
    nodes = alive_nodes() + [resources for resources, extra in growth() or () for _ in range(extra)]
    count = count or 1
    if not cpus and (device == "cpu" or not any(node.get("GPU") for node in nodes)):
        free = [usable_cpus(node.get("CPU", 0)) for node in nodes]
        cpus = largest_share(free, count * max(1, min(trials, sum(amount > 0 for amount in free)))) or None
    workers = size(count, device, cpus)
    return workers, max(1, placeable(nodes, workers.resources) // count)


def placeable(nodes: Iterable[Resources], each: Resources) -> int:
    """Return how many workers that take `each` fit on the nodes."""
    return sum(int(min(node.get(name, 0) / amount for name, amount in each.items()) + 1e-9) for node in nodes)


def total(nodes: Iterable[Resources]) -> str:
    nodes = list(nodes)
    return describe({name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")})


def alive_nodes() -> list[Resources]:
    """Return the resources of each node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def growth() -> list[tuple[Resources, int]] | None:
    """Return what the autoscaler may add: a node's resources, and how many more of such nodes.

    Read from the configuration that the autoscaler was started with, on the head, where jobs run.

    Returns:
        None where that can't be seen from here.
    """
    monitors = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if any("autoscaler" in part and part.endswith("monitor.py") for part in process.info["cmdline"] or ())
        and any(ray.get_runtime_context().gcs_address in part for part in process.info["cmdline"])
    ]
    if not monitors:
        return None
    prefix = "--autoscaling-config="
    files = [part.removeprefix(prefix) for part in monitors[0] if part.startswith(prefix)]
    if not files:
        return []
    config = yaml.safe_load(Path(files[0]).expanduser().read_text())
    there = alive_nodes()
    groups = []
    for name, kind in config["available_node_types"].items():
        resources = {key: float(kind["resources"].get(key, 0)) for key in ("CPU", "GPU")}
        like_it = sum(all(node.get(key, 0) == amount for key, amount in resources.items()) for node in there)
        most = kind.get("max_workers", config.get("max_workers", MOST_NODES))
        if name != config.get("head_node_type", "ray.head.default"):
            groups.append((resources, max(0, min(most, MOST_NODES) - like_it)))
    return groups


def autoscaler_can(bundles: list[Resources]) -> bool:
    """Ask the autoscaler, by a reservation that is taken back, whether it can make room for these bundles."""
    group = placement_group(bundles)
    try:
        deadline = time.monotonic() + VERDICT_SECONDS
        while time.monotonic() < deadline:
            if group.wait(LOOK_SECONDS):
                return True
            state = autoscaling_state()
            if any(group.id.hex() in request.details for request in state.infeasible_gang_resource_requests):
                return False
            if state.pending_instance_requests or state.pending_instances:
                return True
        return False
    finally:
        remove_placement_group(group)


def autoscaling_state() -> Any:
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    return autoscaler_pb2.GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=5)).autoscaling_state


def usable_cpus(cpus: float) -> float:
    """Return a node's CPUs less what Ray needs: its processes are idle enough to share a small node's."""
    return cpus if cpus <= 4 else cpus - 1


def largest_share(free: list[float], count: int) -> float:
    """Return the most CPUs that `count` workers can each have, of nodes with so many free."""
    shares = sorted({cpus / k for cpus in free if cpus for k in range(1, count + 1)}, reverse=True)
    fitting = (share for share in shares if sum(int(cpus / share + 1e-9) for cpus in free) >= count)
    share = next(fitting, 0.0)
    return float(int(share)) if share >= 1 else math.floor(share * 1e4) / 1e4


# Waiting: nodes that are to come, CPUs and GPUs that others use ------------------------------------


class Waiting:
    """Says what the workers that are to start wait for; gives up after so many seconds."""

    def __init__(self, workers: Workers, seconds: float) -> None:
        self.workers, self.seconds = workers, seconds
        self.began = self.looked = -math.inf
        self.text: str | None = None

    def __call__(self) -> str | None:
        """Return what is waited for, or None where there is room; to be called while no worker has begun.

        Raises:
            WorkError: it has been waited for too long.
        """
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return self.text
        if now - self.looked > 10 * LOOK_SECONDS:
            self.began = now  # workers ran in between
        self.looked, self.text = now, lacking(self.workers)
        if self.text is None:
            self.began = now
        elif now - self.began > self.seconds:
            raise WorkError(f"after {self.seconds:g} s (--wait) there was still no room: {self.text}.")
        return self.text


def make_room(workers: Workers, show: Callable[[str], None], seconds: float) -> None:
    """Wait until there is room for the workers, and `show` what is waited for; the autoscaler adds what is missing.

    Raises:
        WorkError: it has been waited for too long.
    """
    waiting = Waiting(workers, seconds)
    group = placement_group([workers.resources] * workers.count)
    try:
        while not group.wait(LOOK_SECONDS):
            show(waiting() or "reserving room")
    finally:
        remove_placement_group(group)


def lacking(workers: Workers) -> str | None:
    """Return what the workers wait for, or None where there is room for as many as are needed."""
    if workers.count == 0 or reserved():
        return None
    fit = placeable(available_resources_per_node().values(), workers.resources)
    if fit >= workers.needed:
        return None
    nodes = alive_nodes()
    there = placeable(nodes, workers.resources)
    used = f", {there - fit} in use" if there > fit else ""
    state = autoscaling_state()
    coming = len(state.pending_instances) + sum(request.count for request in state.pending_instance_requests)
    arriving = f"; {coming} node{'s' * (coming > 1)} on the way" if coming else ""
    return (
        f"waiting for {workers.needed} worker{'s' * (workers.needed > 1)} of {describe(workers.resources)}: "
        f"room for {there}{used}, on {len(nodes)} node{'s' * (len(nodes) > 1)}{arriving}"
    )


def reserved() -> bool:
    """Return whether this job's workers have their room, and only have to start."""
    job = ray.get_runtime_context().get_job_id()  # a placement group's identifier ends with its job's
    return any(
        group["state"] == "CREATED" and group["placement_group_id"].endswith(job)
        for group in placement_group_table().values()
    )


# What the nodes must have in common ----------------------------------------------------------------


def versions() -> dict[str, str]:
    """Return the versions of Python, and of the packages by which a run's results are decided."""
    packages = ("raycifar", "ray", "torch", "torchvision", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def objection(file: str | None, expected: dict[str, str]) -> str | None:
    """Return why this node can't take part in a run, or None.

    Args:
        file: one that the driver has left where the run is to be.
        expected: the driver's `versions`.
    """
    own = versions()
    different = [f"{name} {own[name]}, not {expected[name]}" for name in MUST_AGREE if own[name] != expected[name]]
    if different:
        return f"it has {'; '.join(different)} as the driver: give all nodes the same"
    if file and not Path(file).exists():
        return f"it can't see {Path(file).parent}: give --storage a URI, such as s3://bucket/runs, or a shared folder"
    return None


def check_nodes(workers: Workers, file: str | None) -> None:
    """Ask each other node that could hold a worker whether it can take part.

    Raises:
        RequestError: one can't; the message says which, why, and what to do.
    """
    here = ray.get_runtime_context().get_node_id()
    asked = {
        ray.remote(objection)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(file, versions()): node
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and placeable([node["Resources"]], workers.resources)
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS) if asked else ([], [])
    for question, node in asked.items():
        try:
            complaint = ray.get(question, timeout=0) if question in answered else "it doesn't answer"
        except Exception as error:
            complaint = f"it can't run raycifar ({in_a_line(error)}): submit the job with its code, or install it there"
        if complaint:
            raise RequestError(f"Node {node['NodeManagerAddress']} can't take part: {complaint}.")
