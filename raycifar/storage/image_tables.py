"""Tables with a row for each image, predictions.parquet and example_stats.parquet: their columns and their ranges."""

import math
from collections.abc import Mapping

import pyarrow as pa

from raycifar.data import CIFAR100
from raycifar.storage.parquet import read_parquet, read_schema

PREDICTION_COLUMNS = {"label": "integers", "top5": "lists of integers", "probabilities": "lists of real numbers"}
EXAMPLE_STATS_COLUMNS = {
    **dict.fromkeys(("index", "label", "rival"), "integers"),
    **{"margin": "real numbers", "seen": "integers"},
}
OPTIONAL = {"near_duplicate": "integers"}  # columns that earlier versions lack
RANGES = {
    **dict.fromkeys(("label", "top5", "rival"), (0, CIFAR100.num_classes - 1)),
    **dict.fromkeys(("index", "seen"), (0, math.inf)),
    "near_duplicate": (0, 1),
    "probabilities": (0, 1.001),
}


def read_image_table(content: bytes, columns: Mapping[str, str]) -> pa.Table:
    """Return columns of a Parquet file, see `read_parquet`, and those of `OPTIONAL` that it has.

    Raises:
        ValueError: the file is damaged, or a column holds what it can't: a class that there isn't, or no probability.
    """
    optional = {name: kind for name, kind in OPTIONAL.items() if name in read_schema(content).names}
    table = read_parquet(content, {**columns, **optional})
    for name in RANGES.keys() & table.column_names:
        column, (low, high) = table[name].combine_chunks(), RANGES[name]
        values = (column.flatten() if pa.types.is_fixed_size_list(column.type) else column).to_numpy()
        if not low <= values.min() <= values.max() <= high:
            wanted = f"{low} to {high}" if math.isfinite(high) else f"{low} or more"
            raise ValueError(f"the column {name} has values from {values.min()} to {values.max()}, not {wanted}")
        if name == "probabilities" and column.type.list_size != CIFAR100.num_classes:
            raise ValueError(f"the column {name} has no probabilities of {CIFAR100.num_classes} classes")
    return table
