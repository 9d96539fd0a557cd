"""Which images make up which step."""

import numpy as np
import pytest

from raycifar.data.shards import shard_bounds
from raycifar.engine.order import EpochOrder, Segment, advance, steps_per_epoch


def shown(images, steps, segments, world_size, epoch=1, seed=0, count=None):
    """The global rows that all workers show in each of the next `count` steps."""
    order = EpochOrder(seed, epoch, images, steps)
    workers = [list(order.batches(segments, world_size, rank)) for rank in range(world_size)]
    first = shard_bounds(images, world_size)
    result = []
    for together in list(zip(*workers, strict=True))[:count]:
        rows = np.concatenate([first[rank] + batch.rows for rank, batch in enumerate(together)])
        assert len({batch.step for batch in together}) == 1
        assert all(batch.num_images == len(rows) for batch in together)
        result.append(rows)
    return result


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize(("images", "batch_size"), [(45_000, 128), (1000, 96), (100, 128)])
def test_an_epoch_shows_every_image_once_in_even_batches(images, batch_size, world_size):
    steps = steps_per_epoch(images, batch_size)
    epoch = shown(images, steps, [], world_size)
    assert sorted(np.concatenate(epoch)) == list(range(images))
    sizes = [len(rows) for rows in epoch]
    assert max(sizes) <= batch_size + world_size
    assert max(sizes) - min(sizes) <= world_size


def test_epochs_and_seeds_differ_and_repeat():
    first = shown(1000, 10, [], 2)
    assert all(np.array_equal(a, b) for a, b in zip(first, shown(1000, 10, [], 2), strict=True))
    assert not np.array_equal(first[0], shown(1000, 10, [], 2, epoch=2)[0])
    assert not np.array_equal(first[0], shown(1000, 10, [], 2, seed=1)[0])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resuming_in_mid_epoch_continues_the_same_order(world_size):
    whole = shown(1000, 10, [], world_size)
    rest = shown(1000, 10, [Segment(world_size, 4)], world_size)
    assert len(rest) == 6
    assert all(np.array_equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


@pytest.mark.parametrize("worlds", [(2, 3), (3, 1), (1, 2, 3, 2), (3, 2, 3)])
def test_changing_the_number_of_workers_repeats_and_skips_nothing(worlds):
    images, steps, segments, seen = 1003, 12, [], []
    for world_size in worlds[:-1]:
        seen += shown(images, steps, segments, world_size, count=3)
        for _ in range(3):
            segments = advance(segments, world_size)
    seen += shown(images, steps, segments, worlds[-1])
    assert len(seen) == steps
    assert sorted(np.concatenate(seen)) == list(range(images))


def test_the_last_step_of_an_epoch_is_its_end():
    assert shown(1000, 10, [Segment(2, 10)], 2) == []
