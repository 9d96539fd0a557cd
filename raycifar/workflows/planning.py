"""How many workers pay off: the time of a step for each number of workers, from measurements on one and on a few.

A step of n workers takes as long as the slowest needs for its share of the batch, plus the gradient exchange.
Nothing here imports Ray or PyTorch.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raycifar import words
from raycifar.errors import RequestError
from raycifar.models.recipe import Recipe
from raycifar.workflows.requests import check_batch_size

BACKWARD = 2 / 3  # of a step's computation, beside which gradients travel on a GPU
PAYS = 1.1  # times the images per second: below, more workers don't pay off
LARGER_BATCH = 4  # times as large, at most: what a larger --batch-size would change
CLOSE = 0.15  # of the measured rate: a prediction that is further off says why


@dataclass(frozen=True)
class Link:
    """The link between two workers: the seconds of a hop, and bytes per second in each direction."""

    latency: float
    bandwidth: float


# Bandwidths are what the standards give for one direction; seconds of a hop are NCCL's own model of a ring
# (hwLat of src/graph/tuning.cc: NVLink 3.4 µs, PCI 5.7 µs, network 14 µs).
INTERCONNECTS = {
    "nvlink": (Link(3.4e-6, 450e9), "NVLink 4 of an H100, 450 GB/s (NVIDIA's data sheet: 900 GB/s both ways)"),
    "pcie": (Link(5.7e-6, 31.5e9), "PCIe 4.0 with 16 lanes, 31.5 GB/s (PCI-SIG: 16 GT/s a lane, 128b/130b)"),
    "ethernet-25": (Link(14e-6, 3.125e9), "25 gigabit Ethernet, 3.1 GB/s (IEEE 802.3by)"),
    "ethernet-100": (Link(14e-6, 12.5e9), "100 gigabit Ethernet, 12.5 GB/s (IEEE 802.3bj)"),
    "infiniband-200": (Link(14e-6, 25e9), "InfiniBand HDR with 4 lanes, 25 GB/s (InfiniBand Trade Association)"),
    "infiniband-400": (Link(14e-6, 50e9), "InfiniBand NDR with 4 lanes, 50 GB/s (InfiniBand Trade Association)"),
}


@dataclass(frozen=True)
class Place:
    """What the workers would run on."""

    use_gpu: bool  # a GPU for each
    shared: bool  # the CPUs of one machine for all
    most: int  # workers that fit here


@dataclass(frozen=True)
class Measured:
    """What was timed with some workers: see `step_times_loop_per_worker`."""

    alone: Mapping[int, float]
    buckets: Sequence[int]
    rates: Sequence[float]
    exchanging: Mapping[int, float] | None = None
    link: tuple[float, float] | None = None


@dataclass(frozen=True)
class Plan:
    """What is planned, and what is known about it."""

    recipe: Recipe
    counts: Sequence[int]  # of workers
    num_images: int  # of an epoch
    place: Place
    measured: Mapping[int, Measured]  # by number of workers, of one at least
    interconnect: str | None = None

    @property
    def link(self) -> Link | None:
        """The link between workers: as given, or as measured with the most workers; None if it isn't known."""
        if self.interconnect:
            return INTERCONNECTS[self.interconnect][0]
        links = [Link(*measured.link) for _, measured in sorted(self.measured.items()) if measured.link]
        return links[-1] if links else None

    def step_seconds(self, count: int, batch_size: int) -> float:
        """Return the seconds that a step takes on `count` workers."""
        size = share(batch_size, count)
        if self.place.shared:
            most = max(number for number in self.measured if number <= count)
            # More workers than were timed take turns on the same CPUs.
            compute = self.measured[most].alone[size] * count / most
        else:
            one = self.measured[1]
            compute = one.alone[size] if count == 1 or not one.exchanging else one.exchanging[size]
        if count == 1 or not self.link:
            return compute
        hidden = BACKWARD * compute if self.place.use_gpu else 0.0
        return compute + exchange_seconds(self.measured[1].buckets, count, self.link, hidden)

    def images_per_second(self, count: int, batch_size: int) -> float:
        return batch_size / self.step_seconds(count, batch_size)


def parse_plan(text: str, recipe: Recipe) -> list[int]:
    """Return the numbers of workers of `1,2,4`, rising, or raise RequestError if one makes no sense."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise RequestError(f"--plan {text!r}: give numbers of workers, such as 1,2,4,8.") from error
    if counts[0] < 1:
        raise RequestError(f"--plan {text!r}: {counts[0]} is not a number of workers: give 1 or more.")
    check_batch_size(recipe, counts[-1])
    return counts


def counts_to_measure(counts: Sequence[int], place: Place) -> list[int]:
    """Return the numbers of workers to measure with: one, those of the plan that fit, and the most that fit."""
    return sorted({1, min(place.most, counts[-1]), *(count for count in counts if count <= place.most)})


def sizes_to_time(counts: Sequence[int], workers: int, place: Place, batch_size: int) -> list[int]:
    """Return the sizes, in images, of the steps to time with `workers`.

    On shared CPUs they are the shares of this number of workers and of larger ones, else those of all, on one worker.
    """
    if workers > 1 and not place.shared:
        return []
    sizes = {share(batch_size, count) for count in {*counts, *counts_to_measure(counts, place)} if count >= workers}
    return sorted(sizes | {share(larger_batch(batch_size, counts[-1]), counts[-1])}, reverse=True)


def share(batch_size: int, count: int) -> int:
    """Return the largest number of a batch's images on one worker."""
    return -(-batch_size // count)


def larger_batch(batch_size: int, count: int) -> int:
    """Return a larger batch size, of which a worker's share is no more than the present batch."""
    return batch_size * min(LARGER_BATCH, count)


def exchange_seconds(buckets: Sequence[int], count: int, link: Link, hidden: float) -> float:
    """Return what the exchange of gradients adds to a step: what isn't `hidden` beside the backward pass.

    A ring all-reduce takes 2 (n - 1) hops and passes 2 (n - 1) / n of the bytes (Patarasuk and Yuan, 2009). The last
    bucket is complete when the backward pass ends, and can't be hidden.

    Args:
        buckets: bytes that travel together, in their order. hidden: seconds of the backward pass.
    """
    hops = 2 * (count - 1)
    seconds = [hops * link.latency + hops / count * num_bytes / link.bandwidth for num_bytes in buckets]
    return max(sum(seconds) - hidden, seconds[-1] if hidden else 0.0)


# Results ---------------------------------------------------------------------------------------------


def summarize(plan: Plan, price_per_hour: float | None) -> dict[str, Any]:
    """Return what `bench.json` holds about a plan, with the sentences that explain it."""
    batch_size, epochs = plan.recipe.batch_size, plan.recipe.epochs
    workers = {}
    for count in plan.counts if plan.link else [1]:
        rate = plan.images_per_second(count, batch_size)
        seconds = math.ceil(plan.num_images / batch_size) * epochs * plan.step_seconds(count, batch_size)
        device_hours = seconds / 3600 * (1 if plan.place.shared else count)
        workers[count] = {
            "images_per_second": rate,
            "seconds": seconds,
            "device_hours": device_hours,
            "cost": None if price_per_hour is None else device_hours * price_per_hour,
        }
    checked = [
        {
            "workers": count,
            "predicted": plan.images_per_second(count, batch_size),
            "measured": max(measured.rates),
            "low": min(measured.rates),
            "n": len(measured.rates),
        }
        for count, measured in sorted(plan.measured.items())
    ]
    steps = {
        str(count): {"alone": dict(measured.alone), "exchanging": dict(measured.exchanging or {})}
        for count, measured in sorted(plan.measured.items())
    }
    link = plan.link and {"seconds_of_hop": plan.link.latency, "bytes_per_second": plan.link.bandwidth}
    found = {"workers": workers, "assumptions": assumptions(plan), "checked": checked, "steps": steps, "link": link}
    return found | {"sentences": [*advice(plan, workers), *map(describe_check, checked)]}


def assumptions(plan: Plan) -> list[str]:
    """Return what the figures rest on, in words."""
    recipe, place = plan.recipe, plan.place
    gradients = sum(plan.measured[1].buckets) / 1e6
    if place.shared:
        room = "All workers share the CPUs of this machine, which is one device; more of them take turns."
    elif place.use_gpu:
        room = "Each worker has a GPU like the one that was timed."
    else:
        room = "Each worker has a machine like the one that was timed, which is one device, with all its threads."
    if plan.interconnect:
        _, name = INTERCONNECTS[plan.interconnect]
        between = f"The link between workers is {name}, used to the full; nothing was measured."
    elif plan.link:
        between = (
            f"The link between workers was measured: {plan.link.bandwidth / 1e9:.2f} GB/s, "
            f"{plan.link.latency * 1e6:.0f} µs a hop. More workers are assumed to have the same."
        )
    else:
        between = "The link between workers was not measured."
    overlap = (
        "the exchange overlaps with the backward pass, two thirds of a step's computation, except for the last bucket"
        if place.use_gpu
        else "the exchange needs the same CPUs as the backward pass, so none of it is hidden"
    )
    return [
        f"{recipe.epochs} epochs of {plan.num_images:,} images train the whole network with --batch-size "
        f"{recipe.batch_size}; scoring, checkpoints and start-up are not counted.",
        "Figures are the fastest of a few rounds in turn: other work on a machine can only slow it.",
        room,
        between,
        f"Each step exchanges {gradients:.1f} MB of gradients around a ring; {overlap}.",
    ]


def advice(plan: Plan, workers: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Return from which number more workers no longer help, and what a larger batch would change."""
    if len(workers) < 2:
        return []
    rates = {count: figures["images_per_second"] for count, figures in workers.items()}
    pairs = itertools.pairwise(rates)
    stop = next(((few, many) for few, many in pairs if rates[many] < PAYS * rates[few]), None)
    if stop:
        few, many = stop
        hours = workers[many]["device_hours"] / workers[few]["device_hours"]
        line = (
            f"From {few} on, more workers no longer help: {many} train {rates[many] / rates[few]:.2f} times as many "
            f"images per second as {few}, for {hours:.2f} times the device-hours."
        )
    else:
        few, many = min(rates), max(rates)
        line = f"Up to {many}, more workers help: {many} train {rates[many] / rates[few]:.1f} times as fast as {few}."
    batch_size, many = plan.recipe.batch_size, max(rates)
    larger = larger_batch(batch_size, many)
    gain = plan.images_per_second(many, larger) / rates[many]
    return [
        line,
        f"With --batch-size {larger}, {many} would train {gain:.2f} times as many images per second as with "
        f"{batch_size}; the learning rate would have to be tuned again.",
    ]


def describe_check(check: Mapping[str, Any]) -> str:
    """Return a sentence with a prediction and what was measured."""
    predicted, measured = check["predicted"], check["measured"]
    line = f"{words.count(check['workers'], 'worker')}: predicted {predicted:,.0f}, measured {measured:,.0f} images/s"
    if abs(predicted / measured - 1) <= CLOSE:
        return f"{line}."
    return f"{line}: {predicted / measured - 1:+.0%}; what surrounds a step, and other work here, isn't predicted."
