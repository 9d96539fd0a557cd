"""From a table on the driver to uint8 tensors on each worker's device, sharded once by Ray Data.

Ray Train's default splitting drops remainder rows and gives blocks to whichever worker asks first. Here the driver cuts
the blocks exactly at the boundaries between workers, so splitting them takes no Ray task: no row is lost, each worker
always gets the same rows, and nothing waits for a free CPU, which may never come if the workers hold them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import torch

from raycifar.data import CIFAR100
from raycifar.data.dataset import to_images


def shard_bounds(rows: int, world_size: int) -> list[int]:
    """Return the boundaries between workers: rank r has the rows bounds[r]:bounds[r + 1]."""
    return [rows * rank // world_size for rank in range(world_size + 1)]


def to_datasets(tables: dict[str, pa.Table], world_sizes: Sequence[int]) -> dict[str, Any]:
    """Return a Ray dataset for each table, in the object store, cut at every boundary between workers.

    Args:
        world_sizes: the possible numbers of workers. If 0 is the only one, for training in this process, the tables
            are returned as they are: Ray Train passes them on to the training function, and Ray needn't run.
    """
    if not any(world_sizes):
        return dict(tables)
    import ray.data  # takes 0.7 s, which training in this process saves

    # from_arrow would start tasks that wait for a CPU, forever if the head has none.
    return {
        name: ray.data.from_blocks([table.slice(a, b - a) for a, b in pairwise(block_bounds(len(table), world_sizes))])
        for name, table in tables.items()
    }


def block_bounds(rows: int, world_sizes: Sequence[int]) -> list[int]:
    """Return the boundaries of all `world_sizes`, so that each worker's rows are whole blocks."""
    return sorted({bound for size in world_sizes for bound in shard_bounds(rows, size)})


class ExactShards(ray.train.DataConfig):
    """Splits datasets by `shard_bounds`, without Ray tasks: all rows, and always the same rows for each worker."""

    def configure(self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        shards: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            inner = shard_bounds(dataset.count(), world_size)[1:-1]
            parts = dataset.split_at_indices(inner) if inner else [dataset]
            for shard, part in zip(shards, parts, strict=True):
                shard[name] = part
        return shards


@dataclass(frozen=True)
class Shard:
    """A worker's images, all on its device."""

    images: torch.Tensor  # (N, 3, H, W) uint8
    labels: torch.Tensor  # (N,) int64, the classes
    coarse: torch.Tensor  # (N,) int64, the superclasses
    index: torch.Tensor  # (N,) int64, rows of the source's training or test set

    def __len__(self) -> int:
        return len(self.images)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Shard":
        return Shard(*map(function, vars(self).values()))

    def head(self, rows: int) -> "Shard":
        return self.map(lambda values: values[:rows])


def load_shard(name: str, device: torch.device) -> Shard:
    """Return this worker's shard of the split `name`; all workers must call it together."""
    source = ray.train.get_dataset_shard(name)
    # Iterating over the dataset would start an actor of Ray Data that stays on this node, which the autoscaler could
    # then never remove.
    tables = [source] if isinstance(source, pa.Table) else ray.get(source.to_arrow_refs())
    return to_shard(tables, device)


def to_shard(tables: Sequence[pa.Table], device: torch.device) -> Shard:
    """Return the images of tables with the columns image, fine, coarse and index."""
    table = pa.concat_tables(tables)
    none = np.empty((0, *CIFAR100.image_shape), np.uint8)  # a table of no images has no chunks
    images = np.concatenate([none, *map(to_images, table["image"].chunks)])
    fine, coarse, index = (torch.tensor(table[name].to_numpy(), device=device) for name in ("fine", "coarse", "index"))
    return Shard(torch.from_numpy(images).to(device), fine, coarse, index)
