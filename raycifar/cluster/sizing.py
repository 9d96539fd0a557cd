"""Sizing a run to what the cluster holds, and may come to hold."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from raycifar import words
from raycifar.cluster import ray_internals
from raycifar.errors import RequestError

GPU_WORKER_CPUS = 4  # a worker on a GPU does only bookkeeping on the CPU
MIN_CPU_SHARE = 0.25  # of a CPU; below, Ray's own processes starve and time out
MAX_NODES = 1000  # of one type that an autoscaler may add, where it sets no limit
LOOK_SECONDS = 1  # between checks of what is free
VERDICT_SECONDS = 30  # for the autoscaler to say whether it can help
TRIAL_MEMORY = 2e9  # bytes: what a trial's driver and Ray Train's processes for it take on the head, 1.96 GB measured
HEAD = "node:__internal_head__"  # a resource that the head alone has
ACCELERATOR = "accelerator_type:"  # and its name: the resource by which Ray tells kinds of GPUs apart
ACCELERATOR_AMOUNT = 0.001  # of the 1 that a node has: the amount that Ray itself requests for an accelerator

Resources = dict[str, float]


@dataclass(frozen=True)
class Workers:
    """What is asked of the cluster. A `count` of 0 is training in this process."""

    count: int
    cpus: float  # of each worker
    gpus: float = 0  # of each worker: a share of one GPU; 0 computes on the CPU
    accelerator: str | None = None  # the kind of GPU, in Ray's words; None takes any
    min_workers: int | None = None  # of an elastic run, which takes up to `count`
    mps: bool = False  # this process computes on Apple's GPU

    @property
    def use_gpu(self) -> bool:
        return self.gpus > 0

    @property
    def device(self) -> Literal["gpu", "cpu", "mps"]:
        return "gpu" if self.use_gpu else "mps" if self.mps else "cpu"

    @property
    def share_gpus(self) -> bool:
        """Whether two workers may be on one GPU."""
        return self.count > 1 and 0 < self.gpus <= 0.5

    @property
    def needed(self) -> int:
        """How many there must be for the run to begin."""
        return self.count if self.min_workers is None else self.min_workers

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    @property
    def resources(self) -> Resources:
        """Return what each worker reserves, in Ray's words."""
        resources = {"CPU": self.cpus}
        if self.gpus:
            resources["GPU"] = self.gpus
        if self.accelerator:
            resources[ACCELERATOR + self.accelerator] = ACCELERATOR_AMOUNT
        return resources

    def __str__(self) -> str:
        if self.count == 0:
            return "this process"
        span = "" if self.min_workers is None else f"{self.min_workers} to "
        return f"{span}{words.count(self.count, 'worker')} of {describe(self.resources)}"


def describe(resources: Resources) -> str:
    return ", ".join(
        name.removeprefix(ACCELERATOR) if name.startswith(ACCELERATOR) else f"{amount:g} {name}{'s' * (amount != 1)}"
        for name, amount in resources.items()
    )


def size_workers(
    wanted: int | tuple[int, int] | None, device: str, cpus: float | None, gpus: float, accelerator: str | None
) -> Workers:
    """Return the sizing of a run on the connected cluster, counting the nodes that its autoscaler may add.

    Args:
        wanted: number of workers, or its least and most; None takes one for each GPU, or one without a GPU. It also
            takes one if workers may share a GPU: Ray would pack them onto as few GPUs as possible.
        device: auto, gpu or cpu.
        cpus: CPUs of each worker; None takes 4 on GPUs, else an equal share of what the nodes have.
        gpus: of each worker, above 0, at most 1; a share is of one GPU, and requires a GPU as `device` gpu does.
        accelerator: the kind of GPU, such as H100, which also requires a GPU; None takes any.

    Raises:
        RequestError: the cluster can never hold that; the message names the most that fit.
    """
    alive, coming = alive_nodes(), nodes_to_come()
    everything = alive + (coming or [])
    there, nodes = (
        [node for node in some if not accelerator or ACCELERATOR + accelerator in node] for some in (alive, everything)
    )
    any_gpu = any(node.get("GPU", 0) >= 1 for node in nodes)
    if device == "cpu" or (device == "auto" and gpus == 1 and not accelerator and not any_gpu):
        gpus = 0
    min_workers, count = wanted if isinstance(wanted, tuple) else (None, wanted)
    count = count or (max(1, sum(int(node.get("GPU", 0)) for node in there)) if gpus > 0.5 else 1)
    gpus = floor_to_unit(gpus)
    workers = Workers(count, cpus or default_cpus(nodes, count, gpus), gpus, accelerator, min_workers)
    if placeable(nodes, workers.resources) >= workers.needed:
        return workers
    if coming is None and autoscaler_can([workers.resources] * workers.needed):
        return workers
    has = "can have" if coming else "has"
    if accelerator and not nodes:
        kinds = sorted({name.removeprefix(ACCELERATOR) for node in everything for name in node if ACCELERATOR in name})
        raise RequestError(
            f"--accelerator {accelerator}: this cluster {has} {', '.join(kinds) or 'no GPU whose kind Ray knows'}."
        )
    total = describe({name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")})
    lower = "--workers, --cpus-per-worker or --gpus-per-worker" if gpus else "--workers or --cpus-per-worker"
    raise RequestError(
        f"{words.count(workers.needed, 'worker')} of {describe(workers.resources)} each can't be placed: "
        f"this cluster {has} {total}, room for at most {placeable(nodes, workers.resources)} of them. "
        f"Lower {lower}{', or give --device cpu' if gpus else ''}."
    )


def default_cpus(nodes: Sequence[Resources], count: int, gpus: float) -> float:
    """Return the CPUs of each of `count` workers with `gpus` each, or raise RequestError if there are too few CPUs."""
    if gpus:
        ratios = [node.get("CPU", 0) / placeable([node], {"GPU": gpus}) for node in nodes if node.get("GPU", 0) >= 1]
        return max(MIN_CPU_SHARE, whole_or_part(min([GPU_WORKER_CPUS, *ratios])))
    free = [usable_cpus(node.get("CPU", 0)) for node in nodes]
    each = largest_share(free, count)
    if each < MIN_CPU_SHARE:
        fit = int(sum(free) / MIN_CPU_SHARE)
        raise RequestError(f"{count} workers can't share {sum(free):g} CPUs: set --workers to at most {fit}.")
    return each


def size_trials(
    count: int, device: str, cpus: float | None, gpus: float, accelerator: str | None, trials: int
) -> tuple[Workers, int]:
    """Return the sizing of each of several runs, and how many of them the cluster holds at once.

    By default a run on CPUs takes the largest share of a node with which every node is busy.

    Args:
        count: workers of each run.
        device, cpus, gpus, accelerator: as `size_workers` takes them.
        trials: how many runs.
    """
    nodes = alive_nodes() + (nodes_to_come() or [])
    if not cpus and (device == "cpu" or not any(node.get("GPU") for node in nodes)):
        free = [usable_cpus(node.get("CPU", 0)) for node in nodes]
        each = largest_share(free, count * max(1, min(trials, sum(amount > 0 for amount in free))))
        cpus = each if each >= MIN_CPU_SHARE else None
    workers = size_workers(count, device, cpus, gpus, accelerator)
    return workers, max(1, placeable(nodes, workers.resources) // count)


def trials_on_head() -> int:
    """Return how many trials' drivers the head's memory holds at once."""
    head = next(node for node in alive_nodes() if HEAD in node)
    return max(1, int(head["memory"] / TRIAL_MEMORY))


def placeable(nodes: Iterable[Resources], each: Resources) -> int:
    """Return how many workers that take `each` fit on the nodes; a share of a GPU is of one of them."""
    return sum(min(times_it_fits(node.get(name, 0), amount, name) for name, amount in each.items()) for node in nodes)


def times_it_fits(available: float, amount: float, name: str) -> int:
    """Return how many times a node with `available` of a resource can give `amount`."""
    if name == "GPU" and amount < 1:
        rest = available % 1
        return int(available) * int(1 / amount + 1e-9) + int(rest / amount + 1e-9)
    return int(available / amount + 1e-9)


def alive_nodes() -> list[Resources]:
    """Return the resources of each node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def nodes_to_come() -> list[Resources] | None:
    """Return the resources of each node that the autoscaler may add; None if that can't be seen."""
    config = ray_internals.autoscaler_config()
    if not config:
        return None if config is None else []
    most, there = config.get("max_workers", MAX_NODES), [node for node in alive_nodes() if HEAD not in node]
    counts: Counter[tuple[tuple[str, float], ...]] = Counter()  # types with the same resources, as of spot machines
    for name, kind in config["available_node_types"].items():
        resources = {key: float(kind["resources"].get(key, 0)) for key in ("CPU", "GPU")}
        resources |= {key: amount for key, amount in kind["resources"].items() if key.startswith(ACCELERATOR)}
        if name != config.get("head_node_type", "ray.head.default"):
            counts[tuple(resources.items())] += kind.get("max_workers", most)
    coming: list[Resources] = []
    for each, count in counts.items():
        like_it = sum(all(node.get(key, 0) == amount for key, amount in each) for node in there)
        coming += [dict(each)] * min(count - like_it, most - len(there), MAX_NODES)
    return coming


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
    """Return the most CPUs that each of `count` workers can have, on nodes with `free` CPUs."""
    shares = sorted({cpus / k for cpus in free if cpus for k in range(1, count + 1)}, reverse=True)
    fitting = (share for share in shares if sum(int(cpus / share + 1e-9) for cpus in free) >= count)
    return whole_or_part(next(fitting, 0.0))


def whole_or_part(cpus: float) -> float:
    """Return a number of CPUs, rounded down to a whole number, or to Ray's unit if it is below one."""
    return float(int(cpus)) if cpus >= 1 else floor_to_unit(cpus)


def floor_to_unit(amount: float) -> float:
    """Return an amount, rounded down to Ray's unit, 0.0001. Ray rounds to the nearest: six sixths would be too much."""
    return math.floor(amount * 1e4 + 1e-6) / 1e4
