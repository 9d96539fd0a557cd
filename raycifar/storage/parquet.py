"""Reading Parquet files that others have made: of data sets, and of runs.

Arrow keeps types of its own beside Parquet's, under a key of the footer. Some of them run code as they are read: the
extension types that a library has registered, as Ray Data does. So that key is hidden from Arrow, and a file has no
types but Parquet's.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from raycifar.errors import in_a_line

MOST_ROWS = 10_000_000
MOST_BYTES = 2**30  # of the columns that are read, decompressed
MAGIC = b"PAR1"
ARROW_TYPES, HIDDEN = b"ARROW:schema", b"arrow-schema"  # equally long, so the footer's structure stays

KINDS: Final[Mapping[str, Callable[[pa.DataType], bool]]] = {
    "integers": types.is_integer,
    "real numbers": types.is_floating,
    "text": types.is_string,
    "bytes": types.is_binary,
    "lists of integers": lambda found: types.is_list(found) and types.is_integer(found.value_type),
    "lists of real numbers": lambda found: types.is_list(found) and types.is_floating(found.value_type),
}


class ParquetError(ValueError):
    """A Parquet file can't be read, or doesn't hold what is expected; the message goes on after the file's name."""


def read_parquet(file: bytes | pa.NativeFile, columns: Mapping[str, str]) -> pa.Table:
    """Return columns of a Parquet file, which have no nulls.

    Args:
        file: the open file, or its content.
        columns: what each column must hold, one of `KINDS`, by name; "img.bytes" is the field `bytes` of structs.

    Returns:
        A table of these columns. The lists of a column are equally long, and of Arrow's type for these. Text and bytes
        are dictionaries, so that a value that stands in many rows takes memory once.

    Raises:
        ParquetError: the file is damaged or too large, or a column is missing, of another kind, or has a null.
        OSError: the file can't be read.
    """
    with open_parquet(file, columns) as parquet:
        schema = read_schema(parquet)
        for name, kind in columns.items():
            if schema.get_field_index(name) < 0:
                raise ParquetError(f"has no column {name}, or more than one")
            if not KINDS[kind](schema.field(name).type):
                raise ParquetError(f"has {schema.field(name).type} in the column {name}, not {kind}")
        check_size(parquet, columns)
        try:
            table = parquet.read([*columns]).flatten()
            table.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise damaged(error) from error
    return pa.table({name: complete(table[name], name) for name in columns})


def open_parquet(file: bytes | pa.NativeFile, dictionaries: Iterable[str] = ()) -> pq.ParquetFile:
    """Open a Parquet file, in which Arrow then finds no types but Parquet's.

    Args:
        dictionaries: the columns of text or bytes that are read as dictionaries.

    Raises:
        ParquetError: it isn't a Parquet file, or is damaged.
        OSError: the file can't be read.
    """
    stream = pa.BufferReader(file) if isinstance(file, bytes) else file
    size = stream.size()
    stream.seek(max(0, size - 8))
    tail = stream.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or length > size - 12:
        raise ParquetError("is not a Parquet file, or is cut short")
    stream.seek(size - 8 - length)
    footer = stream.read(length).replace(ARROW_TYPES, HIDDEN)
    try:
        metadata = pq.read_metadata(pa.BufferReader(MAGIC + footer + tail))
        leaves = {metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)}
        return pq.ParquetFile(stream, metadata=metadata, read_dictionary=[*leaves.intersection(dictionaries)])
    except (pa.ArrowException, OSError) as error:
        raise damaged(error) from error


def read_schema(parquet: pq.ParquetFile) -> pa.Schema:
    """Return a file's columns, with the fields of structs as columns, "img.bytes"."""
    fields = parquet.schema_arrow.empty_table().flatten().schema
    return pa.schema(
        (field.name, field.type.value_type if types.is_dictionary(field.type) else field.type) for field in fields
    )


def check_size(parquet: pq.ParquetFile, columns: Iterable[str]) -> None:
    """Refuse a file whose columns would take too much memory, by what its footer says."""
    metadata = parquet.metadata
    if metadata.num_rows > MOST_ROWS or not metadata.num_rows:
        raise ParquetError(f"has {metadata.num_rows:,} rows, not 1 to {MOST_ROWS:,}")
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    chunks = [group.column(column) for group in groups for column in range(group.num_columns)]
    wanted = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(tuple(f"{name}." for name in columns))]
    size = sum(max(chunk.total_uncompressed_size, 8 * chunk.num_values) for chunk in wanted)
    if size > MOST_BYTES:
        raise ParquetError(
            f"takes {size / 2**30:.2g} GiB of memory; no more than {MOST_BYTES / 2**30:.2g} GiB are read"
        )


def complete(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Return a column that has no nulls; lists of one length become Arrow's fixed-size lists."""
    if column.null_count:
        raise ParquetError(f"has nothing in row {np.flatnonzero(column.is_null())[0]} of the column {name}")
    if not types.is_list(column.type):
        return column
    lists = column.combine_chunks()
    values, lengths = lists.flatten(), np.unique(lists.value_lengths())
    if values.null_count or len(lengths) > 1 or not lengths[0]:
        raise ParquetError(f"has lists of several lengths, or with gaps, in the column {name}")
    return pa.chunked_array([pa.FixedSizeListArray.from_arrays(values, int(lengths[0]))])


def damaged(error: Exception) -> ParquetError:
    return ParquetError(f"is damaged: {in_a_line(error)}")
