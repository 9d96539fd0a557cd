"""The run folder: whole files, and checkpoints that can be trusted."""

import json
import subprocess
import sys

import pytest

from raycifar.errors import RequestError, StorageError
from raycifar.storage.checkpoints import Checkpoints, checkpoint_name
from raycifar.storage.run_folder import RunFolder
from raycifar.storage.schemas import EpochRecord


@pytest.fixture
def run(tmp_path):
    run = RunFolder(str(tmp_path / "runs"), "a")
    run.write_json("run.json", {"name": "a"})
    return run


@pytest.fixture
def upload(run):
    return lambda name, **files: Checkpoints(run).write(name, files)


def test_what_is_not_there_is_none(run):
    assert run.read("result.json") is None
    assert RunFolder(run.storage, "other").read_json("run.json") is None
    assert Checkpoints(RunFolder(run.storage, "other")).names() == []


@pytest.mark.parametrize("file", ["run.json", "study.json", "comparison.json"])
def test_results_go_into_no_other_run_s_folder_nor_a_comparison_s(run, file):
    other = RunFolder(run.storage, "b")
    other.write(file, b"{}")
    with pytest.raises(RequestError, match=r"b is the folder of a .*: give another --out"):
        RunFolder.for_output(other.location, run)
    assert RunFolder.for_output(other.location, other) == other


def test_the_history_comes_back_as_it_was_written(run):
    values = {"train_loss": 4.0, "train_top1": 0.1, "lr": 0.1, "images_per_second": 9.0, "seconds": 1.0, "workers": 2}
    records = [EpochRecord(epoch=1, val_loss=None, **values), EpochRecord(epoch=2, val_loss=1 / 3, **values)]
    run.write_history(records)
    assert run.history() == records


def test_a_file_that_can_t_be_written_whole_leaves_the_one_before(tmp_path):
    """A disk that fills up in mid-write, by a limit on the size of files that a process may write."""
    program = """
import resource, signal, sys
from raycifar.storage.run_folder import RunFolder
run = RunFolder(sys.argv[1], "a")
run.write("model.safetensors", b"before")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    run.write("model.safetensors", b"x" * 5000)
except OSError as error:
    sys.exit(f"refused: {error}")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "model.safetensors can't be written: File too large" in done.stderr
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == b"before"


def test_the_checkpoint_that_was_trained_furthest_comes_first(run, upload):
    """Those of earlier versions are named by the time of day where they were written."""

    def old(name, epoch, *steps):
        progress = {"epoch": epoch, "segments": [{"workers": 1, "steps": count} for count in steps]}
        upload(name, **{"progress.json": json.dumps(progress).encode()})

    old("checkpoint_2026-05-01_12-00-00.000000", 3)
    old("checkpoint_2026-05-01_21-00-00.000000", 2, 4, 4)
    old("checkpoint_2026-05-01_05-00-00.000000", 12)
    for position in ((2, 9), (2, 11), (10, 0)):
        upload(checkpoint_name(*position), weights=b"")
    upload("checkpoint_2026-05-02_00-00-00.000000", weights=b"without progress")
    upload("checkpoint_2026-05-01_23-00-00.000000", **{"progress.json": b"{"})
    assert [name for name, _ in Checkpoints(run).sound(pytest.fail)] == [
        "checkpoint_2026-05-01_05-00-00.000000",
        "checkpoint_0010_000000",
        "checkpoint_2026-05-01_12-00-00.000000",
        "checkpoint_0002_000011",
        "checkpoint_0002_000009",
        "checkpoint_2026-05-01_21-00-00.000000",
        "checkpoint_2026-05-02_00-00-00.000000",
        "checkpoint_2026-05-01_23-00-00.000000",
    ]


def test_the_place_of_a_checkpoint_that_cannot_be_read_is_not_made_up(run, tmp_path):
    name = "checkpoint_2026-05-01_12-00-00.000000"
    (tmp_path / "runs/a" / name / "progress.json").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"progress\.json can't be read"):
        Checkpoints(run).names()


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no manifest", "half a manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(run, upload, damage, tmp_path):
    upload("checkpoint_0001_000000", weights=b"good weights")
    upload("checkpoint_0001_000002", weights=b"fine weights")
    folder = tmp_path / "runs/a/checkpoint_0001_000002"
    match damage:
        case "truncate":
            (folder / "weights").write_bytes(b"fine we")
        case "flip":
            (folder / "weights").write_bytes(b"fine weightz")
        case "remove":
            (folder / "weights").unlink()
        case "no manifest":
            (folder / "manifest.json").unlink()
        case _:
            (folder / "manifest.json").write_bytes(b'{"weights": "12')
    said = []
    assert next(Checkpoints(run).sound(said.append)) == ("checkpoint_0001_000000", {"weights": b"good weights"})
    assert len(said) == 1
    assert said[0].startswith("checkpoint_0001_000002 is skipped: ")


def test_json_has_no_number_that_is_not_finite(run):
    run.write_json("bench.json", {"loss": float("nan"), "interval": (1.0, float("-inf")), "test": {"top1": 0.5}})
    assert run.read("bench.json").count(b"null") == 2
    assert run.read_json("bench.json") == {"loss": None, "interval": [1.0, None], "test": {"top1": 0.5}}


def test_a_folder_is_named_by_what_it_is_called_not_by_how_it_was_reached(run, monkeypatch):
    monkeypatch.chdir(run.location)
    for place in (".", "../a", "../a/", run.location):
        assert RunFolder.at(place) == run
    assert RunFolder.at("s3://bucket/runs/a/") == RunFolder("s3://bucket/runs", "a")


def test_what_killed_processes_left_is_deleted(run, tmp_path):
    for left in (".0123456789abcdef.part", ".metrics.jsonl.part", ".validate_storage_marker"):
        (tmp_path / "runs/a" / left).touch()
    run.delete_leftovers()
    assert run.file_names() == ["run.json"]
