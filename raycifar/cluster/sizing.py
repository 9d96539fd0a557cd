"""Sizing a run to what the cluster holds, and may come to hold."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from raycifar.cluster import ray_internals
from raycifar.errors import RequestError

GPU_WORKER_CPUS = 4  # a GPU's worker computes nothing on the CPU but its bookkeeping
SMALLEST_SHARE = 0.25  # of a CPU; below, Ray's own processes starve and time out
MOST_NODES = 1000  # of one type that an autoscaler may add, where it sets no limit
LOOK_SECONDS = 1  # between two looks at what is free
VERDICT_SECONDS = 30  # for the autoscaler to say whether it can help

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


def in_process(device: str, cpus: float | None) -> Workers:
    """Return the sizing of a run without worker actors, for which Ray isn't started."""
    import torch

    if device == "gpu" and not torch.cuda.is_available():
        raise RequestError("--device gpu: this machine has no GPU that PyTorch can use.")
    return Workers(0, device != "cpu" and torch.cuda.is_available(), cpus or torch.get_num_threads())


def size(wanted: int | tuple[int, int] | None, device: str, cpus: float | None) -> Workers:
    """Return the sizing of a run on the connected cluster, counting the nodes that its autoscaler may add.

    Args:
        wanted: number of workers, or its least and most; None takes one for each GPU that is there, or one.
        device: auto, gpu or cpu.
        cpus: CPUs of each worker; None takes 4 on GPUs, else an equal share of what the nodes have.

    Raises:
        RequestError: the cluster can never hold that; the message names the most that fit.
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
        f"Ask for fewer --workers or --cpus-per-worker{', or --device cpu' if use_gpu else ''}."
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
        raise RequestError(f"{count} workers can't share {sum(free):g} CPUs: ask for at most {fit} --workers.")
    return each


def size_trials(count: int | None, device: str, cpus: float | None, trials: int) -> tuple[Workers, int]:
    """Return the sizing of each of several runs, and how many of them the cluster holds at once.

    By default a run takes one GPU, or on CPUs as much of a node as keeps every node busy.
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

    Returns:
        None where that can't be seen from this machine.
    """
    config = ray_internals.autoscaler_config()
    if not config:
        return None if config is None else []
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
            if ray_internals.is_infeasible(group):
                return False
            status = ray_internals.cluster_status()
            if status.pending_launches or status.pending_nodes:
                return True
        return False
    finally:
        remove_placement_group(group)


def usable_cpus(cpus: float) -> float:
    """Return a node's CPUs less one for Ray; on a small node Ray's processes, mostly idle, share them."""
    return cpus if cpus <= 4 else cpus - 1


def largest_share(free: list[float], count: int) -> float:
    """Return the most CPUs that `count` workers can each have, of nodes with so many free."""
    shares = sorted({cpus / k for cpus in free if cpus for k in range(1, count + 1)}, reverse=True)
    fitting = (share for share in shares if sum(int(cpus / share + 1e-9) for cpus in free) >= count)
    share = next(fitting, 0.0)
    return float(int(share)) if share >= 1 else math.floor(share * 1e4) / 1e4
