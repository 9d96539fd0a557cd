"""Parquet files of strangers: no type of theirs is ever made, and nothing but what is expected is read."""

import contextlib
import os
import pickle
from importlib import import_module

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycifar.storage.parquet import ParquetError, read_parquet, to_parquet


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def parquet(columns, **options):
    sink = pa.BufferOutputStream()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), sink, **options)
    return sink.getvalue().to_pybytes()


def as_ray_object(field):
    """The field, whose values Ray Data unpickles once it is imported."""
    return field.with_metadata(
        {"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": ""}
    )


@pytest.mark.parametrize("place", ["column", "struct", "list", "map", "dictionary"])
def test_an_extension_type_comes_into_play_nowhere(tmp_path, place):
    import_module("ray.train.torch")  # registers the extension type
    cells = pa.array([pickle.dumps(Bomb(tmp_path / "mark"))], pa.large_binary())
    field = as_ray_object(pa.field("bytes", pa.large_binary()))
    made = {
        "column": lambda: cells,
        "struct": lambda: pa.StructArray.from_arrays([cells], fields=[field]),
        "list": lambda: pa.ListArray.from_arrays([0, 1], cells, pa.list_(field)),
        "map": lambda: pa.MapArray.from_arrays([0, 1], pa.array([0]), cells, pa.map_(pa.int64(), field)),
        "dictionary": lambda: cells.dictionary_encode(),
    }[place]()
    outer = pa.field("cell", made.type)
    outer = outer if place in ("struct", "list", "map") else as_ray_object(outer)
    schema = pa.schema([outer, pa.field("label", pa.int64())])
    content = parquet(pa.Table.from_arrays([made, pa.array([7])], schema=schema))
    if place != "dictionary":  # the trap is set
        assert "ray" in str(pq.read_schema(pa.BufferReader(content)).field("cell").type).lower()
    assert read_parquet(content, {"label": "integers"})["label"].to_pylist() == [7]
    name = {"column": "cell", "dictionary": "cell", "struct": "cell.bytes"}.get(place)
    if name:
        assert read_parquet(content, {name: "bytes"})[name].to_pylist() == cells.to_pylist()
    else:
        with pytest.raises(ParquetError, match="not lists of integers"):
            read_parquet(content, {"cell": "lists of integers"})
    assert not (tmp_path / "mark").exists()


def test_columns_come_as_they_are_wanted():
    content = parquet(
        {
            "label": np.arange(3, dtype=np.int32),
            "top5": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6)), 2),
            "img": [{"bytes": b"a", "path": "x"}] * 3,
            "name": pa.array(["p", "q", "p"]).dictionary_encode(),
            "other": [{"label": 9}, {}, None],
        }
    )
    kinds = {"top5": "lists of integers", "label": "integers", "img.bytes": "bytes", "name": "text"}
    table = read_parquet(content, kinds)
    assert table.column_names == list(kinds)
    assert table["top5"].combine_chunks().flatten().to_pylist() == list(range(6))
    assert table.drop("top5").to_pylist()[1] == {"label": 1, "img.bytes": b"a", "name": "q"}


def test_a_column_is_read_from_all_row_groups():
    rows = [{"img": {"bytes": b"%d" % row, "path": None}, "name": f"{row % 7}", "list": [row]} for row in range(100)]
    content = parquet(pa.Table.from_pylist(rows), row_group_size=30)
    table = read_parquet(content, {"img.bytes": "bytes", "name": "text", "list": "lists of integers"})
    assert table["img.bytes"].to_pylist() == [row["img"]["bytes"] for row in rows]
    assert table.drop("img.bytes").to_pylist() == [{"name": row["name"], "list": row["list"]} for row in rows]


@pytest.mark.parametrize(
    ("columns", "kind", "words"),
    [
        ({"other": [1]}, "integers", "has no column x, or more than one"),
        ({"x": [1.0]}, "integers", "has double in the column x, not integers"),
        ({"x": [True]}, "integers", "has bool in the column x, not integers"),
        ({"x": [[1]]}, "integers", "has list<element: int64> in the column x, not integers"),
        ({"x": pa.array([0], pa.timestamp("us"))}, "integers", "has timestamp[us] in the column x, not integers"),
        ({"x": [1, None]}, "integers", "has nothing in row 1 of the column x"),
        ({"x": pa.array([], pa.int64())}, "integers", "has 0 rows"),
        ({"x": [[1], [2, 3]]}, "lists of integers", "has lists of several lengths"),
        ({"x": [[1, None]]}, "lists of integers", "has lists of several lengths, or with gaps"),
        ({"x": pa.array([[], []], pa.list_(pa.int64()))}, "lists of integers", "has lists of several lengths"),
    ],
)
def test_what_is_not_expected_is_named(columns, kind, words):
    with pytest.raises(ParquetError) as error:
        read_parquet(parquet(columns), {"x": kind})
    assert words in str(error.value)


def test_damage_is_named():
    content = parquet({"x": np.arange(10_000)}, compression="none", use_dictionary=False)
    for broken in (b"", b"PAR1", content[:-1], content[100:], content[:4] + bytes(500) + content[504:], b"x" * 99):
        with pytest.raises(ParquetError, match=r"is damaged|is not a Parquet file|cut short"):
            read_parquet(broken, {"x": "integers"})


def test_a_value_that_stands_in_many_rows_takes_memory_once():
    ten_gigabytes = pa.DictionaryArray.from_arrays(np.zeros(10_000, np.int32), pa.array([bytes(10**6)]))
    content = parquet({"x": ten_gigabytes})
    before = pa.total_allocated_bytes()
    table = read_parquet(content, {"x": "bytes"})
    assert pa.total_allocated_bytes() - before < 10**7
    assert len(table) == 10_000


def test_more_than_a_file_may_hold_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr("raycifar.storage.parquet.MAX_ROWS", 10_000)
    monkeypatch.setattr("raycifar.storage.parquet.MAX_BYTES", 2**30 // 100)
    with pytest.raises(ParquetError, match="has 20,000 rows, not 1 to 10,000"):
        read_parquet(parquet({"x": np.zeros(20_000, np.int8)}), {"x": "integers"})
    with pytest.raises(ParquetError, match=r"takes 0.011 GiB of memory; at most 0.01 GiB is read"):
        read_parquet(parquet({"x": pa.array([bytes(1_200_000) + bytes([k]) for k in range(10)])}), {"x": "bytes"})


def varint(number, length=1):
    """A number as Thrift writes it, in at least this number of bytes."""
    digits = [number * 2 >> shift & 127 for shift in range(0, max(7 * length, (2 * number).bit_length()), 7)]
    return bytes([*(digit | 128 for digit in digits[:-1]), digits[-1]])


def test_how_much_a_file_takes_is_not_what_its_footer_says(monkeypatch):
    monkeypatch.setattr("raycifar.storage.parquet.MAX_BYTES", 2**24)
    images = pa.table({"x": [bytes(3_000_000) + bytes([k]) for k in range(10)]})
    content = parquet(images, compression="zstd", row_group_size=3)
    forged, groups = content, pq.read_metadata(pa.BufferReader(content))
    for size in {groups.row_group(group).total_byte_size for group in range(4)}:
        forged = forged.replace(varint(size), varint(1000, len(varint(size))))
    forged_groups = pq.read_metadata(pa.BufferReader(forged))
    assert [forged_groups.row_group(group).total_byte_size for group in range(4)] == [1000] * 4
    with pytest.raises(ParquetError, match=r"takes 0\.017 GiB of memory; at most 0\.016 GiB is read"):
        read_parquet(forged, {"x": "bytes"})


def test_what_raycifar_writes_is_read_as_it_was_or_not_at_all():
    table = pa.table({"x": np.arange(1000), "top5": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(5000)), 5)})
    content = to_parquet(table)
    wanted = read_parquet(content, {"x": "integers", "top5": "lists of integers"})
    random = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(content)
        broken[random.integers(len(broken))] ^= 1 << random.integers(8)
        with contextlib.suppress(ParquetError):
            assert read_parquet(bytes(broken), {"x": "integers", "top5": "lists of integers"}).equals(wanted)
