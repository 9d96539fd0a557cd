"""`raycifar data`: what a data set holds, and taking it elsewhere."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import Data, finish

from raycifar.data import CIFAR100
from raycifar.data.sources import load
from raycifar.data.synthetic import synthetic
from raycifar.terminal import Screen
from raycifar.workflows.datasets import write_parquet


def test_a_data_set_is_described(small):
    said = finish(Data("describe", "--data", small, storage=None)).stdout
    assert load(small).fingerprint in said
    assert "training images  800, 8 of each of 100 classes in 20 superclasses" in said
    assert "test images      300, 3 of each" in said


def test_cifar_100_is_what_its_authors_describe(cifar):
    assert (CIFAR100.class_names[23], CIFAR100.superclass_names[10]) == ("cloud", "large_natural_outdoor_scenes")
    said = finish(Data("describe", "--data", cifar, storage=None)).stdout
    assert "50,000, 500 of each of 100 classes in 20 superclasses" in said
    assert "10,000, 100 of each" in said
    assert "red 0.5071 ± 0.2673 green 0.4866 ± 0.2564 blue 0.4409 ± 0.2762" in said


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_is_prepared_holds_the_same_images_and_labels(small, tmp_path, scheme):
    there = f"{scheme}{tmp_path}/parquet"
    done = finish(Data("prepare", there, "--data", small, storage=None))
    assert f"--data {there}" in done.stdout
    assert load(there).fingerprint == load(small).fingerprint


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/below"])
def test_a_destination_that_can_t_be_written_is_said_before_anything_is_read(place, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused = finish(Data("prepare", tmp_path / place, "--data", tmp_path / "nothing", storage=None), code=2)
    assert refused.stderr.startswith(f"Error: {tmp_path / place} can't be written: ")
    assert refused.stderr.endswith(". Give another DESTINATION.\n")
    assert len(refused.stderr.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "in the way"
    assert len(list(tmp_path.iterdir())) == 1


def test_another_data_set_is_not_replaced(small, tmp_path):
    write_parquet(synthetic(200, 100), str(tmp_path), Screen(quiet=True))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    refused = finish(Data("prepare", tmp_path, "--data", small, storage=None), code=2)
    assert refused.stderr == f"Error: {tmp_path} holds another data set: give another DESTINATION.\n"
    assert "Writing" not in refused.stdout
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("splits", [("train", "test"), ("test",)])
def test_tables_of_other_things_are_not_replaced(small, tmp_path, splits):
    for split in splits:
        pq.write_table(pa.table({"user": [1, 2], "money": [3.0, 4.0]}), tmp_path / f"{split}.parquet")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    refused = finish(Data("prepare", tmp_path, "--data", small, storage=None), code=2)
    first = tmp_path / f"{splits[0]}.parquet"
    assert refused.stderr == f"Error: {first} exists and isn't part of this data set: give another DESTINATION.\n"
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("left", ["train.parquet", "test.parquet"])
def test_what_was_interrupted_is_written_to_its_end_and_once(small, tmp_path, left):
    source = load(small)
    write_parquet(source, str(tmp_path), Screen(quiet=True))
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for name in whole.keys() - {left}:
        (tmp_path / name).unlink()
    for _ in range(2):
        write_parquet(source, str(tmp_path), Screen(quiet=True))
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == whole


def test_no_data_set_is_written_among_the_files_of_a_run(small, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    refused = finish(Data("prepare", tmp_path, "--data", small, storage=None), code=2)
    assert "is the folder of a run: give another DESTINATION." in refused.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
