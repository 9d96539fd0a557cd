"""Which images make up which step: a pure function, so that a run resumes where it stood.

An epoch shows every image of every worker's shard once, in a fixed number of batches as equal in size as
they can be (127 or 128 images where 45,000 are cut into 352), so no image is dropped at an epoch's end and
no batch is a tiny remainder.

Where the number of workers changes in mid-epoch, the shards are cut anew. The images that the workers of
before have shown are known from the same function, and the ones of now deal out what is left.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from raycifar.data.shards import bounds


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one epoch that were trained by the same number of workers."""

    world_size: int
    steps: int


@dataclass(frozen=True)
class Batch:
    """One step's images on one worker.

    rows: (n,) int64, rows of the worker's own shard. images: how many the step has over all workers.
    """

    step: int
    rows: np.ndarray
    images: int


def steps_per_epoch(images: int, batch_size: int) -> int:
    return -(-images // batch_size)


def advance(segments: Sequence[Segment], world_size: int) -> list[Segment]:
    """Return the segments after one more step by `world_size` workers."""
    if segments and segments[-1].world_size == world_size:
        return [*segments[:-1], Segment(world_size, segments[-1].steps + 1)]
    return [*segments, Segment(world_size, 1)]


def batches(
    seed: int, epoch: int, images: int, steps: int, segments: Sequence[Segment], world_size: int, rank: int
) -> Iterator[Batch]:
    """Yield what is left of an epoch for one worker.

    Args:
        images: of the training set, over all workers.
        steps: of the whole epoch.
        segments: what has been trained of the epoch; empty at its beginning.
    """
    past = list(segments)
    current = past.pop() if past and past[-1].world_size == world_size else Segment(world_size, 0)
    unseen = np.ones(images, bool)
    begun = 0  # steps of the epoch before the segment at hand
    for part, segment in enumerate(past):
        for rows in deal(seed, epoch, part, unseen, segment.world_size):
            unseen[rows[: len(rows) * segment.steps // (steps - begun)]] = False
        begun += segment.steps

    hands = deal(seed, epoch, len(past), unseen, world_size)
    first_row = bounds(images, world_size)[rank]
    cuts = [[len(rows) * k // (steps - begun) for k in range(steps - begun + 1)] for rows in hands]
    mine = hands[rank] - first_row
    for k, (start, end) in enumerate(pairwise(cuts[rank])):
        if k >= current.steps:
            yield Batch(begun + k, mine[start:end], sum(cut[k + 1] - cut[k] for cut in cuts))


def deal(seed: int, epoch: int, part: int, unseen: np.ndarray, world_size: int) -> list[np.ndarray]:
    """Return the unseen rows of each worker's shard, each in the order in which it shows them."""
    return [
        np.random.default_rng([seed, epoch, part, world_size, rank]).permutation(
            start + np.flatnonzero(unseen[start:end])
        )
        for rank, (start, end) in enumerate(pairwise(bounds(len(unseen), world_size)))
    ]


def step_seed(seed: int, epoch: int, step: int, world_size: int, rank: int) -> int:
    """Return the seed of one worker's random operations in one step: augmentation and dropout."""
    return int(np.random.SeedSequence([seed, epoch, step, world_size, rank]).generate_state(1, np.uint64)[0] >> 1)
