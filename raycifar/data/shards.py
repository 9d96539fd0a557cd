"""From a table at the driver to uint8 tensors on each worker's device: sharded by Ray Data, once.

Ray Train's own splitting drops the remainder rows and hands blocks to whoever asks first. Here the
driver cuts the blocks exactly where one worker's rows end and the next's begin, so that handing them out
is bookkeeping alone: no row is lost, the same worker always gets the same rows, and no task has to run,
which on a machine whose CPUs the workers already hold would wait for ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import torch

from raycifar.data import SHAPE
from raycifar.data.tables import to_numpy


def bounds(rows: int, world_size: int) -> list[int]:
    """Return where each worker's rows begin, and the end: worker r has the rows bounds[r]:bounds[r + 1]."""
    return [rows * rank // world_size for rank in range(world_size + 1)]


def to_datasets(tables: dict[str, pa.Table], world_sizes: Sequence[int]) -> dict[str, Any]:
    """Return a Ray dataset for each table, in the object store, cut wherever a worker's rows begin.

    Args:
        world_sizes: the numbers of workers that there may be. With 0 alone, training in this process, the tables
            themselves are returned: Ray Train hands what it is given to the training function, and no Ray needs
            to be running.
    """
    if not any(world_sizes):
        return dict(tables)
    import ray.data  # 0.7 s that training in this process can do without

    # from_arrow would ask tasks for what is known here, and they wait for a CPU: for ever, where the head has none.
    return {
        name: ray.data.from_blocks([table.slice(a, b - a) for a, b in pairwise(cuts(len(table), world_sizes))])
        for name, table in tables.items()
    }


def cuts(rows: int, world_sizes: Sequence[int]) -> list[int]:
    """Return where to cut so that, whatever the number of workers, a worker's rows are whole blocks."""
    return sorted({cut for size in world_sizes for cut in bounds(rows, size)})


class ExactShards(ray.train.DataConfig):
    """Gives each worker its rows as a dataset: all of them, always the same, by a split that needs no task."""

    def configure(self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        shards: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            inner = bounds(dataset.count(), world_size)[1:-1]
            parts = dataset.split_at_indices(inner) if inner else [dataset]
            for shard, part in zip(shards, parts, strict=True):
                shard[name] = part
        return shards


@dataclass(frozen=True)
class Shard:
    """A worker's own images, resident on its device.

    images: (N, 3, 32, 32) uint8. labels: (N,) int64, the classes. coarse: (N,) int64, the superclasses.
    index: (N,) int64, the rows in the source's training or test set.
    """

    images: torch.Tensor
    labels: torch.Tensor
    coarse: torch.Tensor
    index: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    def head(self, rows: int) -> "Shard":
        """Return the first so many images."""
        return Shard(self.images[:rows], self.labels[:rows], self.coarse[:rows], self.index[:rows])


def load_shard(name: str, device: torch.device) -> Shard:
    """Return this worker's share of the split `name`; all workers must ask for it together."""
    source = ray.train.get_dataset_shard(name)
    # The blocks themselves: to iterate over them would start an executor, and an actor of Ray Data's that then
    # stays on this worker's node, which the autoscaler could never take away again.
    tables = [source] if isinstance(source, pa.Table) else ray.get(source.to_arrow_refs())
    images = torch.empty((sum(map(len, tables)), *SHAPE), dtype=torch.uint8)
    start = 0
    for chunk in (chunk for table in tables for chunk in table["image"].chunks):
        images.numpy()[start : start + len(chunk)] = to_numpy(chunk, "image")
        start += len(chunk)
    fine, coarse, index = (
        torch.from_numpy(np.concatenate([table[column].to_numpy() for table in tables])).to(device)
        for column in ("fine", "coarse", "index")
    )
    return Shard(images.to(device), fine, coarse, index)
