"""The official binary files, train.bin and test.bin: a record of 3,074 bytes for each image."""

from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from raycifar.data.dataset import to_table
from raycifar.data.trees import RECORD, Tree
from raycifar.errors import RequestError


def read(tree: Tree, paths: list[PurePosixPath], origin: str) -> pa.Table:
    """Return the records: coarse label, fine label, pixels."""
    content = tree.read(paths[0])
    if len(content) % RECORD:
        raise RequestError(f"{origin} has {len(content):,} bytes, not a multiple of a CIFAR-100 record's {RECORD:,}.")
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    return to_table(records[:, 2:], {"fine": records[:, 1], "coarse": records[:, 0]}, origin)
