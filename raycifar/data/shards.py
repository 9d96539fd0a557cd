"""From a table at the driver to uint8 tensors on each worker's device: sharded by Ray Data, once.

Ray Train's own splitting drops the remainder rows and gives blocks to whichever worker asks first. Here the driver
cuts the blocks exactly where one worker's rows end and the next's begin, so splitting them needs no task: no row is
lost, the same worker always gets the same rows, and nothing has to wait for a CPU, which would never be free on a
machine whose CPUs the workers hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import torch

from raycifar.data import CIFAR100, DatasetInfo
from raycifar.data.tables import to_numpy


def bounds(rows: int, world_size: int) -> list[int]:
    """Return where each worker's rows begin, and the end: the worker of rank r has rows bounds[r]:bounds[r + 1]."""
    return [rows * rank // world_size for rank in range(world_size + 1)]


def to_datasets(tables: dict[str, pa.Table], world_sizes: Sequence[int]) -> dict[str, Any]:
    """Return a Ray dataset for each table, in the object store, cut wherever a worker's rows begin.

    Args:
        world_sizes: the possible numbers of workers. With 0 alone, which is training in this process, the tables
            themselves are returned: Ray Train passes them on to the training function, and Ray need not run.
    """
    if not any(world_sizes):
        return dict(tables)
    import ray.data  # 0.7 s that training in this process can do without

    # from_arrow starts tasks to learn what is known here, and they wait for a CPU: forever where the head has none.
    return {
        name: ray.data.from_blocks([table.slice(a, b - a) for a, b in pairwise(cuts(len(table), world_sizes))])
        for name, table in tables.items()
    }


def cuts(rows: int, world_sizes: Sequence[int]) -> list[int]:
    """Return where to cut so that, whatever the number of workers, a worker's rows are whole blocks."""
    return sorted({cut for size in world_sizes for cut in bounds(rows, size)})


class ExactShards(ray.train.DataConfig):
    """Gives each worker its rows as a dataset: none is lost, they are always the same, and no task is needed."""

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
    """A worker's own images, all on its device.

    images: (N, 3, H, W) uint8. labels: (N,) int64, the classes. coarse: (N,) int64, the superclasses.
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


def load_shard(name: str, device: torch.device, info: DatasetInfo = CIFAR100) -> Shard:
    """Return this worker's shard of the split `name`; all workers must call it together."""
    source = ray.train.get_dataset_shard(name)
    # The blocks themselves: iterating over them starts an executor, and an actor of Ray Data that stays on this
    # worker's node, so that the autoscaler could never remove the node.
    tables = [source] if isinstance(source, pa.Table) else ray.get(source.to_arrow_refs())
    images = torch.empty((sum(map(len, tables)), *info.image_shape), dtype=torch.uint8)
    start = 0
    for chunk in (chunk for table in tables for chunk in table["image"].chunks):
        images.numpy()[start : start + len(chunk)] = to_numpy(chunk, "image", info)
        start += len(chunk)
    fine, coarse, index = (
        torch.from_numpy(np.concatenate([table[column].to_numpy() for table in tables])).to(device)
        for column in ("fine", "coarse", "index")
    )
    return Shard(images.to(device), fine, coarse, index)
