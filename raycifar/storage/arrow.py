"""Reading Arrow's own files, as `datasets.save_to_disk` leaves them, with the same care as Parquet."""

import re
import struct
from collections.abc import Mapping

import pyarrow as pa

from raycifar.storage.parquet import ParquetError, check_size, complete, expect, flat, reading

EXTENSION, HIDDEN = b"ARROW:extension:", b"arrow-extension:"  # equally long, so the message's structure stays
FILE_MAGIC = b"ARROW1\0\0"  # of a file that isn't a plain stream; a stream follows it
END = re.compile(rb"(\xff{4})?\0{4}")  # what a writer that wasn't interrupted puts after the last message
HEADER, COMPRESSION = 2, 3  # fields of the flatbuffers of a message, and of a record batch


def read_arrow(content: bytes, columns: Mapping[str, str]) -> pa.Table:
    """Return columns of an Arrow file, which have no nulls; see `read_parquet`."""
    with reading():
        schema, messages, stream = open_arrow(content)
        expect(flat(schema), columns)
        tops = {name.split(".")[0] for name in columns}
        batches, end = [], stream.tell()
        for message in messages:
            end = stream.tell()
            if message.type != "record batch" or is_compressed(message.metadata.to_pybytes()):
                raise ParquetError("is compressed, or has dictionaries: save it as Parquet")
            batch = pa.ipc.read_record_batch(message, schema)
            batch = batch.select([position for position, name in enumerate(schema.names) if name in tops])
            batch.validate(full=True)  # until then, it may point anywhere
            batches.append(batch)
        if not END.match(content, end):
            raise ParquetError("ends early, as if its writing was interrupted: save it again")
        check_size(sum(batch.num_rows for batch in batches), sum(batch.nbytes for batch in batches))
        table = pa.Table.from_batches(batches).flatten()
        return pa.table({name: complete(table[name], name) for name in columns})


def read_arrow_schema(content: bytes) -> pa.Schema:
    """Return the columns of an Arrow file; see `parquet.read_schema`."""
    with reading():
        return flat(open_arrow(content)[0])


def open_arrow(content: bytes) -> tuple[pa.Schema, pa.MessageReader, pa.NativeFile]:
    """Return an Arrow file's schema, in which there are no extension types, the messages after it, and their stream."""
    stream = pa.BufferReader(content)
    stream.seek(len(FILE_MAGIC) if content.startswith(FILE_MAGIC) else 0)
    messages = pa.ipc.MessageReader.open_stream(stream)
    metadata = messages.read_next_message().metadata.to_pybytes().replace(EXTENSION, HIDDEN)
    return pa.ipc.read_schema(pa.py_buffer(struct.pack("<iI", -1, len(metadata)) + metadata)), messages, stream


def is_compressed(message: bytes) -> bool:
    """Return whether a record batch's buffers are compressed: how large they become is then unknown."""
    (root,) = struct.unpack_from("<I", message)
    header = find_field(message, root, HEADER)
    if header is None:
        return False
    (offset,) = struct.unpack_from("<I", message, header)
    return find_field(message, header + offset, COMPRESSION) is not None


def find_field(message: bytes, table: int, number: int) -> int | None:
    """Return the position of a field of a flatbuffer's table, or None where it is absent."""
    (back,) = struct.unpack_from("<i", message, table)
    vtable = table - back
    (size,) = struct.unpack_from("<H", message, vtable)
    entry = 4 + 2 * number
    (offset,) = struct.unpack_from("<H", message, vtable + entry) if entry < size else (0,)
    return table + offset if offset else None
