"""Columns of image files and labels, in Parquet or Arrow, as the Hugging Face hub and `datasets` have them."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePosixPath

import pyarrow as pa

from raycifar.data.dataset import to_table
from raycifar.data.labels import numbers_of, to_labels
from raycifar.data.pictures import decode_all
from raycifar.data.trees import Tree, check_count
from raycifar.errors import RequestError
from raycifar.storage.arrow import read_arrow, read_arrow_schema
from raycifar.storage.parquet import KINDS, ParquetError, read_parquet, read_schema

COLUMNS = {  # the first of these names that a file has
    "image": ("img.bytes", "image.bytes", "img", "image"),
    "fine": ("fine_label", "label"),
    "coarse": ("coarse_label",),
}


def read(
    schema_of: Callable[[bytes], pa.Schema],
    columns_of: Callable[[bytes, Mapping[str, str]], pa.Table],
    tree: Tree,
    paths: list[PurePosixPath],
    origin: str,
) -> pa.Table:
    """Return a table of all files' images, by functions that read a file's schema and some of its columns."""
    tables: list[pa.Table] = []
    for path in paths:
        origin, content = f"{tree.name}: {path}", tree.read(path)
        try:
            schema = schema_of(content)
            chosen = choose(schema, origin)
            columns = columns_of(content, dict(chosen.values()))
        except ParquetError as error:
            raise RequestError(f"{origin} {error}.") from error
        check_count(len(columns) + sum(map(len, tables)), origin)
        images, _ = chosen.pop("image")
        labels = {}
        for level, (name, kind) in chosen.items():
            values = columns[name].to_numpy() if kind == "integers" else columns[name].to_pylist()
            labels[level] = to_labels(values, level, origin)
            if kind == "integers":
                labels[level] = numbers_of(class_names(schema, name), level, f"{origin}, column {name},")[labels[level]]
        files = ((file.as_py(), f"{origin}: image {row}") for row, file in enumerate(columns[images]))
        pixels = decode_all(files, len(columns))
        tables.append(to_table(pixels, labels, origin))
    return pa.concat_tables(tables)


read_parquet_files = partial(read, read_schema, read_parquet)
read_arrow_files = partial(read, read_arrow_schema, read_arrow)


def choose(schema: pa.Schema, origin: str) -> dict[str, tuple[str, str]]:
    """Return name and kind of the columns of images, fine and coarse labels; the last may be missing."""
    chosen = {}
    for role, names in COLUMNS.items():
        if found := [name for name in names if name in schema.names]:
            is_text = KINDS["text"](schema.field(found[0]).type)
            chosen[role] = found[0], "bytes" if role == "image" else "text" if is_text else "integers"
    if missing := [" or ".join(COLUMNS[role]) for role in ("image", "fine") if role not in chosen]:
        raise RequestError(
            f"{origin} lacks the columns {' and '.join(missing)}; it has {', '.join(schema.names[:8]) or 'none'}."
        )
    return chosen


def class_names(schema: pa.Schema, column: str) -> list[str]:
    """Return the names of the classes that a column's numbers stand for, as the library `datasets` notes them."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
