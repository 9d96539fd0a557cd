"""Connecting to Ray, and sizing a run to what it holds: the only room that asks Ray what there is."""

import logging
import math
import os
from dataclasses import dataclass

import ray
from ray._private import services

from raycifar.errors import RequestError, WorkError

GPU_WORKER_CPUS = 4  # a GPU's worker computes nothing on the CPU but its bookkeeping
SMALLEST_SHARE = 0.25  # of a CPU; below, Ray's own processes starve and time out


@dataclass(frozen=True)
class Workers:
    """What is asked of the cluster. A `count` of 0 is training in this process."""

    count: int
    use_gpu: bool
    cpus: float  # of each worker

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    @property
    def resources(self) -> dict[str, float]:
        """Return what each worker reserves, in Ray's words."""
        return {"CPU": self.cpus, **({"GPU": 1} if self.use_gpu else {})}

    def __str__(self) -> str:
        if self.count == 0:
            return "this process"
        share = ", ".join(f"{amount:g} {name}{'s' * (amount > 1)}" for name, amount in self.resources.items())
        return f"{self.count} worker{'s' * (self.count > 1)} of {share}"


def connect(*, debug: bool, dashboard: bool = False) -> str:
    """Join the cluster that is there (RAY_ADDRESS, or `ray start` on this machine), else start one here.

    Args:
        dashboard: run it in a Ray that is started here: it takes time, but only by what it knows does Ray Train
            put away the workers of a training driver that died.

    Returns:
        A phrase that says which.

    Raises:
        WorkError: the cluster refuses, or can't be reached.
    """
    quieten(debug=debug)
    quiet = {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if not address and not started_here():
        ray.init(address="local", include_dashboard=dashboard, _node_ip_address="127.0.0.1", **quiet)
        return "Ray on this machine"
    try:
        context = ray.init(address="auto", **quiet)
    except ConnectionError as error:
        where = f"{address} (RAY_ADDRESS)" if address else "this machine"
        raise WorkError(f"the Ray cluster at {where} can't be reached: {error}.") from error
    except ray.exceptions.AuthenticationError as error:
        raise WorkError(
            "the Ray cluster asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to "
            "the cluster's own."
        ) from error
    return f"the Ray cluster at {context.address_info['gcs_address']}"


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


def in_process(device: str, cpus: float | None, *, debug: bool) -> Workers:
    """Return the sizing of a run without worker actors, for which Ray isn't started."""
    import torch

    quieten(debug=debug)

    if device == "gpu" and not torch.cuda.is_available():
        raise RequestError("--device gpu: this machine has no GPU that PyTorch can use.")
    return Workers(0, device != "cpu" and torch.cuda.is_available(), cpus or torch.get_num_threads())


def size(count: int | None, device: str, cpus: float | None) -> Workers:
    """Return the sizing of a run on the connected cluster.

    Args:
        count: workers; None takes one for each GPU, or one.
        device: auto, gpu or cpu.
        cpus: CPUs of each worker; None takes 4 on GPUs, and else what the nodes have, shared equally.

    Raises:
        RequestError: the cluster can't hold that; the message names the most that it can.
    """
    nodes = alive_nodes()
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    use_gpu = device == "gpu" or (device == "auto" and gpus > 0)
    count = count or (max(1, gpus) if use_gpu else 1)
    if use_gpu:
        with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
        if gpus < count:
            raise RequestError(
                f"{count} worker{'s' * (count > 1)} with a GPU each can't be placed: this cluster has {gpus} GPUs. "
                "Take --workers of at most that, or --device cpu."
            )
        each = cpus or max(1, min([GPU_WORKER_CPUS, *(int(n["CPU"] / n["GPU"]) for n in with_gpus)]))
        most = sum(min(int(n["GPU"]), int(n.get("CPU", 0) / each)) for n in with_gpus)
    else:
        free = [usable_cpus(node.get("CPU", 0)) for node in nodes]
        each = cpus or largest_share(free, count)
        most = sum(int(node.get("CPU", 0) / each + 1e-9) for node in nodes)
        if not cpus and each < SMALLEST_SHARE:
            fit = int(sum(free) / SMALLEST_SHARE)
            raise RequestError(f"{count} workers can't share {sum(free):g} CPUs: take --workers of at most {fit}.")
    if most < count:
        raise RequestError(
            f"{count} workers of {each:g} CPUs each can't be placed: this cluster holds at most {most} of them. "
            "Take fewer --workers or --cpus-per-worker."
        )
    return Workers(count, use_gpu, each)


def size_trials(count: int | None, device: str, cpus: float | None, trials: int) -> tuple[Workers, int]:
    """Return the sizing of each of several runs, and how many of them the cluster holds at once.

    By default a run takes one GPU, or on CPUs as much of a node as lets every node work.
    """
    nodes = alive_nodes()
    count = count or 1
    if not cpus and (device == "cpu" or not any(node.get("GPU") for node in nodes)):
        free = [usable_cpus(node.get("CPU", 0)) for node in nodes]
        cpus = largest_share(free, count * max(1, min(trials, sum(amount > 0 for amount in free)))) or None
    workers = size(count, device, cpus)
    wanted = workers.resources
    fit = sum(int(min(node.get(name, 0) / amount for name, amount in wanted.items()) + 1e-9) for node in nodes)
    return workers, max(1, fit // count)


def alive_nodes() -> list[dict[str, float]]:
    """Return the resources of each node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def usable_cpus(cpus: float) -> float:
    """Return a node's CPUs less what Ray needs: its processes are idle enough to share a small node's."""
    return cpus if cpus <= 4 else cpus - 1


def largest_share(free: list[float], count: int) -> float:
    """Return the most CPUs that `count` workers can each have, of nodes with so many free."""
    shares = sorted({cpus / k for cpus in free if cpus for k in range(1, count + 1)}, reverse=True)
    fitting = (share for share in shares if sum(int(cpus / share + 1e-9) for cpus in free) >= count)
    share = next(fitting, 0.0)
    return float(int(share)) if share >= 1 else math.floor(share * 1e4) / 1e4
