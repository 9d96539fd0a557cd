"""Parquet files: writing them, and reading those that others have made, of data sets and of runs.

Arrow keeps its own types, besides Parquet's, under a key of the footer. Some of them run code as they are read: the
extension types that a library has registered, as Ray Data does. So that key is hidden from Arrow, and a file has no
types but Parquet's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from raycifar.errors import in_a_line

MAX_ROWS = 10_000_000
MAX_BYTES = 2**30  # decompressed
MAGIC = b"PAR1"
ARROW_TYPES, HIDDEN = b"ARROW:schema", b"arrow-schema"  # equally long, so the footer's structure stays

KINDS: Final[Mapping[str, Callable[[pa.DataType], bool]]] = {
    "integers": types.is_integer,
    "real numbers": types.is_floating,
    "text": lambda found: types.is_string(found) or types.is_large_string(found),
    "bytes": lambda found: types.is_binary(found) or types.is_large_binary(found),
    "lists of integers": lambda found: types.is_list(found) and types.is_integer(found.value_type),
    "lists of real numbers": lambda found: types.is_list(found) and types.is_floating(found.value_type),
}


class ParquetError(ValueError):
    """A Parquet file can't be read, or doesn't hold what is expected; the message goes on after the file's name."""


def read_parquet(content: bytes, columns: Mapping[str, str]) -> pa.Table:
    """Return columns of a Parquet file, which have no nulls.

    Args:
        columns: what each column must hold, one of `KINDS`, by name; "img.bytes" is the field `bytes` of structs.

    Returns:
        A table of these columns. The lists of a column are equally long, and of Arrow's type for these. Text and bytes
        are dictionaries, so that a value that stands in many rows takes memory once.

    Raises:
        ParquetError: the file is damaged or too large, or a column is missing, of another kind, or has a null.
    """
    with reading(), open_parquet(content, columns) as parquet:
        expect(flat(parquet.schema_arrow), columns)
        metadata = parquet.metadata
        # Not by columns: pyarrow ends the process where a column's part of the footer is damaged.
        groups = range(metadata.num_row_groups)
        check_size(metadata.num_rows, sum(metadata.row_group(group).total_byte_size for group in groups))
        table = pa.concat_tables(read_groups(parquet, columns))
        table.validate(full=True)
        return pa.table({name: complete(table[name], name) for name in columns})


def read_groups(parquet: pq.ParquetFile, columns: Iterable[str]) -> Iterator[pa.Table]:
    """Yield the row groups, each by itself: Arrow reads no structs whose dictionaries differ, as those of groups do.

    Data beyond the limit is refused, whatever the footer says, after the group that exceeds the limit.
    """
    num_bytes = 0
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, [*columns]).flatten()
        num_bytes += table.nbytes
        check_size(parquet.metadata.num_rows, num_bytes)
        yield table


def read_schema(content: bytes) -> pa.Schema:
    """Return the columns of a Parquet file; the fields of structs are columns too, as "img.bytes"."""
    with reading(), open_parquet(content) as parquet:
        return flat(parquet.schema_arrow)


def open_parquet(content: bytes, dictionaries: Iterable[str] = ()) -> pq.ParquetFile:
    """Open a Parquet file, without Arrow's own types; the columns `dictionaries` are read as such."""
    length = int.from_bytes(content[-8:-4], "little")
    if content[-4:] != MAGIC or length > len(content) - 12:
        raise ParquetError("is not a Parquet file, or is cut short")
    footer = content[-8 - length :].replace(ARROW_TYPES, HIDDEN)
    metadata = pq.read_metadata(pa.BufferReader(MAGIC + footer))
    leaves = {metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)}
    return pq.ParquetFile(
        pa.BufferReader(content),
        metadata=metadata,
        read_dictionary=[*leaves.intersection(dictionaries)],
        page_checksum_verification=True,
    )


# Writing ------------------------------------------------------------------------------------------


def to_parquet(table: pa.Table) -> bytes:
    """Return the content of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def to_lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    """Return rows (n, k) as a column of lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def from_lists(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of lists as (n, k)."""
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)


# What this module and `arrow` share -----------------------------------------------------------------


@contextmanager
def reading() -> Iterator[None]:
    """Turn whatever a damaged file causes into a `ParquetError`."""
    try:
        yield
    except ParquetError:
        raise
    except Exception as error:
        raise ParquetError(f"is damaged: {in_a_line(error)}") from error


def flat(schema: pa.Schema) -> pa.Schema:
    """Return a schema in which the fields of structs are columns too, and dictionaries are their values."""
    columns = []
    for field in schema:
        inner = [*field.type] if types.is_struct(field.type) else []
        columns += [(field.name, field.type), *((f"{field.name}.{part.name}", part.type) for part in inner)]
    plain = [(name, kind.value_type if types.is_dictionary(kind) else kind) for name, kind in columns]
    return pa.schema(plain, metadata=schema.metadata)


def expect(schema: pa.Schema, columns: Mapping[str, str]) -> None:
    """Refuse a flat schema that lacks a column, or has one of another kind."""
    for name, kind in columns.items():
        if schema.get_field_index(name) < 0:
            raise ParquetError(f"has no column {name}, or more than one")
        if not KINDS[kind](schema.field(name).type):
            raise ParquetError(f"has {schema.field(name).type} in the column {name}, not {kind}")


def check_size(rows: int, num_bytes: int) -> None:
    """Refuse a file that has no rows, or would take too much memory."""
    if not 0 < rows <= MAX_ROWS:
        raise ParquetError(f"has {rows:,} rows, not 1 to {MAX_ROWS:,}")
    if num_bytes > MAX_BYTES:
        needed, most = (f"{count / 2**30:.2g} GiB" for count in (num_bytes, MAX_BYTES))
        raise ParquetError(f"takes {needed} of memory; at most {most} is read")


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
