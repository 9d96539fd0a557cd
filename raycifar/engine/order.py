"""The images of each step, as a pure function, so that a run resumes exactly where it stopped.

An epoch visits each image of each worker's shard once, in a fixed number of batches of nearly equal size (127 or 128
images if 45,000 make 352 batches), so no image is dropped, and no batch is a tiny remainder.

If the number of workers changes during an epoch, the shards are cut again. The function gives the images that the
former workers have visited, and the current ones divide the rest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from raycifar.data.shards import shard_bounds


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one epoch that were trained by the same number of workers."""

    world_size: int
    steps: int


@dataclass(frozen=True)
class Batch:
    """One step's images on one worker."""

    step: int
    rows: np.ndarray  # (n,) int64, rows of the worker's own shard
    num_images: int  # of the step, over all workers


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    return -(-num_images // batch_size)


def advance(segments: Sequence[Segment], world_size: int) -> list[Segment]:
    """Return the segments after one more step by `world_size` workers."""
    if segments and segments[-1].world_size == world_size:
        return [*segments[:-1], Segment(world_size, segments[-1].steps + 1)]
    return [*segments, Segment(world_size, 1)]


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch's images."""

    seed: int
    epoch: int
    num_images: int  # of the training set, over all workers
    num_steps: int  # of the whole epoch

    def batches(self, segments: Sequence[Segment], world_size: int, rank: int) -> Iterator[Batch]:
        """Yield one worker's remaining batches of the epoch, whose completed steps are the `segments`."""
        past = list(segments)
        current = past.pop() if past and past[-1].world_size == world_size else Segment(world_size, 0)
        unseen = np.ones(self.num_images, bool)
        first_step = 0  # of the current segment
        for part, segment in enumerate(past):
            for rows in self._deal(part, unseen, segment.world_size):
                unseen[rows[: len(rows) * segment.steps // (self.num_steps - first_step)]] = False
            first_step += segment.steps

        dealt = self._deal(len(past), unseen, world_size)
        num_steps = self.num_steps - first_step
        cuts = [[len(rows) * k // num_steps for k in range(num_steps + 1)] for rows in dealt]
        mine = dealt[rank] - shard_bounds(self.num_images, world_size)[rank]
        for k, (start, end) in enumerate(pairwise(cuts[rank])):
            if k >= current.steps:
                yield Batch(first_step + k, mine[start:end], sum(cut[k + 1] - cut[k] for cut in cuts))

    def _deal(self, part: int, unseen: np.ndarray, world_size: int) -> list[np.ndarray]:
        """Return the unseen rows of each worker's shard, in that worker's order."""
        return [
            np.random.default_rng([self.seed, self.epoch, part, world_size, rank]).permutation(
                start + np.flatnonzero(unseen[start:end])
            )
            for rank, (start, end) in enumerate(pairwise(shard_bounds(len(unseen), world_size)))
        ]


def step_seed(seed: int, epoch: int, step: int, world_size: int, rank: int) -> int:
    """Return the seed of one worker's random operations in one step: augmentation and dropout."""
    return int(np.random.SeedSequence([seed, epoch, step, world_size, rank]).generate_state(1, np.uint64)[0] >> 1)
