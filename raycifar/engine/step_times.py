"""How long a step takes, by the number of images in it, and how long its exchange of gradients."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from raycifar.cluster.status import Phase
from raycifar.engine.bench import TimedWorker
from raycifar.engine.config import TrainLoopConfig
from raycifar.engine.cuda import WARM_UP, graphs_freed
from raycifar.engine.distributed import BUCKET_BYTES, all_gather_objects, group_by_size
from raycifar.engine.hardware import synchronize
from raycifar.engine.train_step import step_of_random_images
from raycifar.words import count

EXCHANGES = 10  # of a size that are timed in a round


@dataclass(frozen=True, kw_only=True)
class StepTimesLoopConfig(TrainLoopConfig):
    """What is timed: steps of each batch size on each worker, and epochs of all workers, in about `seconds`."""

    batch_sizes: tuple[int, ...]
    rounds: int
    seconds: float


@graphs_freed()
def step_times_loop_per_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Time steps, epochs and exchanges in turn; Ray Train calls it on each worker, with `StepTimesLoopConfig`'s fields.

    Returns:
        Of several rounds the fastest, for other work on a machine can only slow it:
        `alone`: seconds of a step without an exchange, by its images; of several workers the slowest's, while the
        others take theirs. `exchanging`, of one worker: the same with an exchange of one rank.
        `buckets`: bytes of gradients that travel together.
        `link`, of several workers: seconds of a hop, and bytes per second between two.
        `rates`: images per second of epochs as `train` runs them, over all workers, of each round.
    """
    timed = StepTimesLoopConfig(**config)
    worker = TimedWorker(timed)
    worker.set_up()
    worker.report_model()
    world_size, single = worker.world_size, worker.world_size == 1
    worker.reporter.phase(Phase.TIMING, f"{count(world_size, 'worker')}, up to {timed.seconds:.0f} s")
    with nullcontext() if dist.is_initialized() else process_group_of_one(worker.device):
        ways = {"alone": False, "exchanging": True} if single else {"alone": False}
        seconds = timed.seconds / (len(timed.batch_sizes) * len(ways) + 1) / (timed.rounds + 1)
        build = partial(step_of_random_images, timed.initial, timed.recipe, device=worker.device, compile=timed.compile)
        timers = {
            (way, size): timer(build(size, exchange=exchange), worker.device, seconds)
            for way, exchange in ways.items()
            for size in timed.batch_sizes
        }
        worker.use_fewer_images(int(seconds / worker.time_step()))
        worker.train_whole_epoch()
        times: dict[tuple[str, int], list[float]] = {key: [] for key in timers}
        rates, links = [], []
        for _ in range(timed.rounds):  # in turn: a machine that slows down slows all
            for key, seconds_of_step in timers.items():
                times[key].append(max(all_gather_objects(seconds_of_step())))
            began = worker.clock()
            worker.train_whole_epoch()
            rates.append(worker.config.num_train_images / (worker.clock() - began))
            if not single:
                links.append(measure_link(worker.device))
    trained = [p for p in worker.state.model.parameters() if p.requires_grad]
    return {
        **{way: {size: min(times[way, size]) for size in timed.batch_sizes} for way in ways},
        "buckets": [sum(p.nbytes for p in group) for group in group_by_size(trained[::-1])],
        "link": None if single else (min(seconds for seconds, _ in links), max(rate for _, rate in links)),
        "rates": rates,
    }


def timer(step: Callable[[], Any], device: torch.device, seconds: float) -> Callable[[], float]:
    """Return a function that takes a step as often as fits into `seconds`, and returns the seconds of one."""
    time_steps = partial(mean_seconds, step, device)
    time_steps(WARM_UP + 2 if device.type == "cuda" else 1)  # loads libraries, captures
    return partial(time_steps, max(1, round(seconds / time_steps(1))))


def measure_link(device: torch.device) -> tuple[float, float]:
    """Return the seconds of a hop between two workers and the bytes per second, from a small and a large all-reduce.

    Each worker of n sends 2 (n - 1) times, 1/n of the bytes, around a ring (Patarasuk and Yuan, 2009).
    """
    hops = 2 * (dist.get_world_size() - 1)
    small, large = (time_all_reduce(num_bytes, device) for num_bytes in (4, BUCKET_BYTES))
    return small / hops, hops / dist.get_world_size() * BUCKET_BYTES / max(large - small, 1e-9)


def time_all_reduce(num_bytes: int, device: torch.device) -> float:
    tensor = torch.zeros(num_bytes // 4, device=device)
    dist.all_reduce(tensor)
    return mean_seconds(lambda: dist.all_reduce(tensor), device, EXCHANGES)


def mean_seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the seconds of a call, the mean of some in a row."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


@contextmanager
def process_group_of_one(device: torch.device) -> Iterator[None]:
    """Be the one rank of a process group."""
    store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)  # at a free port
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        with graphs_freed():
            yield
    finally:
        dist.destroy_process_group()
