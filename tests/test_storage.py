"""Storage that fails while a run is under way: one sentence, nothing saved is lost, and the run goes on later."""

import subprocess

import pytest
from command import Command
from conftest import history, wait_until
from moto.server import ThreadedMotoServer
from pyarrow import fs

from raycifar.storage.checkpoints import Checkpoints
from raycifar.storage.run_folder import RunFolder

CNN = ("--model", "cnn", "--val-size", 200, "--batch-size", 50, "--no-report", "--name", "a")
DISK = 60_000_000  # bytes: room for one checkpoint of 34 MB and a network of 17 MB


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, almost full after a checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_ends_the_run_in_a_sentence_and_it_goes_on_when_there_is_room(small_disk, small, cluster, workers):
    args = (*CNN, "--data", small, "--epochs", 6, "--workers", workers)
    full = Command(*args, storage=small_disk, env=cluster).finish()
    assert full.returncode == 1, full.stdout + full.stderr
    assert "No space left on device" in full.stderr
    assert "Traceback" not in full.stderr
    assert len(full.stderr.splitlines()) == 1
    rows = history(small_disk / "a")
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert list(Checkpoints(RunFolder(str(small_disk), "a")).sound(print))
    subprocess.run(["mount", "-o", "remount,size=1G", small_disk], check=True)
    more = Command(*args, storage=small_disk, env=cluster).finish()
    assert more.returncode == 0, more.stdout + more.stderr
    assert "Continuing from" in more.stdout
    assert [row["epoch"] for row in history(small_disk / "a")] == [1, 2, 3, 4, 5, 6]


def test_a_folder_that_may_not_be_written_is_refused(small_disk, small):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused = Command(*CNN, "--data", small, "--epochs", 1, "--workers", 0, storage=small_disk).finish()
    assert refused.returncode == 2
    assert f"{small_disk}/a can't be written: " in refused.stderr
    assert "Read-only file system" in refused.stderr
    assert "Give another --storage." in refused.stderr


@pytest.fixture
def s3(monkeypatch):
    """An object store on loopback: its server, and the storage on it."""
    for name, value in {"ID": "a", "KEY": "b"}.items():
        monkeypatch.setenv("AWS_ACCESS_KEY_ID" if name == "ID" else "AWS_SECRET_ACCESS_KEY", value)
    server = ThreadedMotoServer("127.0.0.1", 5544, verbose=False)
    server.start()
    storage = "s3://runs?endpoint_override=127.0.0.1:5544&scheme=http&region=us-east-1&allow_bucket_creation=true"
    filesystem, _ = fs.FileSystem.from_uri(storage)
    filesystem.create_dir("runs")
    yield server, storage
    server.stop()


@pytest.mark.slow
def test_an_object_store_that_goes_away_ends_the_run_and_it_goes_on_when_it_is_back(s3, small, tmp_path):
    server, storage = s3
    args = (*CNN, "--data", small, "--epochs", 6, "--workers", 0)
    command = Command(*args, storage=storage)
    wait_until(lambda: len(RunFolder(storage, "a").history()) >= 2, 120, "epoch 2")
    server._server.shutdown()
    server._server.server_close()
    gone = command.finish()
    assert gone.returncode == 1, gone.stdout + gone.stderr
    *waits, error = gone.stderr.splitlines()
    assert "can't be written: " in error
    assert all(line.startswith("Waiting for the storage") for line in waits)
    server.start()
    assert list(Checkpoints(RunFolder(storage, "a")).sound(print))
    back = Command(*args, storage=storage).finish()
    assert back.returncode == 0, back.stdout + back.stderr
    assert "Continuing from" in back.stdout
    assert [record.epoch for record in RunFolder(storage, "a").history()] == [1, 2, 3, 4, 5, 6]
