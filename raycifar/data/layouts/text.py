"""CSV: train.csv and test.csv, with a header, a column of labels and 3,072 of pixels, channels first."""

import csv
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from raycifar.data import CIFAR100
from raycifar.data.dataset import to_table
from raycifar.data.trees import Tree, check_count
from raycifar.errors import RequestError, in_a_line

LABELS = {"fine": ("fine_label", "label", "fine", "class"), "coarse": ("coarse_label", "coarse", "superclass")}
HEADER = 2**17  # bytes; pixel names take a third
BLOCK = 2**24  # bytes read at a time


def read(tree: Tree, paths: list[PurePosixPath], origin: str) -> pa.Table:
    return pa.concat_tables([read_file(tree.read(path), f"{tree.name}: {path}") for path in paths])


def read_file(content: bytes, origin: str) -> pa.Table:
    try:
        names = next(csv.reader([content[:HEADER].split(b"\n", 1)[0].decode("utf-8-sig")]), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{origin} is not a readable CSV file: {in_a_line(error)}.") from error
    names = [name.strip() for name in names]
    found = {level: next((name for name in known if name in names), None) for level, known in LABELS.items()}
    pixels = [name for name in names if name not in found.values()]
    if not found["fine"] or len(pixels) != CIFAR100.image_bytes or len(set(names)) != len(names):
        raise RequestError(
            f"{origin} must have a header with a column label and {CIFAR100.image_bytes:,} columns of pixels, channels "
            f"first; it has {len(names):,}: {', '.join(names[:3])[:60]}…"
        )
    texts: dict[str, list[str]] = {level: [] for level, name in found.items() if name}
    blocks: list[np.ndarray] = []
    try:
        batches = arrow_csv.open_csv(
            pa.BufferReader(content),
            arrow_csv.ReadOptions(block_size=BLOCK, column_names=names, skip_rows=1),
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(pixels, pa.uint8()) | {name: pa.string() for name in found.values() if name},
                null_values=[],
            ),
        )
        for batch in batches:
            blocks.append(np.stack([batch.column(name).to_numpy() for name in pixels], axis=1))
            for level, values in texts.items():
                values += batch.column(found[level]).to_pylist()
            check_count(sum(map(len, blocks)), origin)
    except pa.ArrowException as error:
        raise RequestError(f"{origin} is not a readable CSV file: {in_a_line(error)}.") from error
    if not blocks:
        raise RequestError(f"{origin} holds no images.")
    return to_table(np.concatenate(blocks), texts, origin)
