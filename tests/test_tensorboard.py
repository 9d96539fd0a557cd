"""The history, as TensorBoard reads it."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import test_storage
from conftest import wait_until

from raycifar.engine.tensorboard import SCALARS, EventLog, read_events
from raycifar.errors import StorageError
from raycifar.storage.run_folder import EVENTS, RunFolder
from raycifar.storage.schemas import EpochRecord

s3 = test_storage.s3  # the fixture
COMMON = {"train_top1": 0.5, "lr": 0.1, "images_per_second": 100.0, "seconds": 1.0, "workers": 1}


def records(count):
    return [EpochRecord(epoch=e, train_loss=4.0 / e, time=1000.0 + e, **COMMON) for e in range(1, count + 1)]


def losses(content):
    found = [(e.step, e.wall_time, v) for e in read_events(content) for v in e.summary.value]
    return [(step, moment, v.simple_value) for step, moment, v in found if v.tag == SCALARS["train_loss"]]


@pytest.fixture
def run(tmp_path):
    return RunFolder(str(tmp_path), "a")


def test_each_epoch_is_there_once_at_its_time_and_what_is_unknown_is_left_out(run):
    EventLog(run).write(records(2))
    content = run.read(EVENTS)
    assert losses(content) == [(1, 1001.0, 4.0), (2, 1002.0, 2.0)]
    assert not any(v.tag == SCALARS["val_loss"] for e in read_events(content) for v in e.summary.value)


def test_the_file_grows_over_starts_and_keeps_its_beginning(run):
    log = EventLog(run)
    for count in (1, 2):
        log.write(records(count))
    early, file = run.read(EVENTS), Path(run.location, EVENTS).stat().st_ino
    for _ in range(2):  # a restart at an earlier checkpoint trains epochs again
        log = EventLog(run)
        log.write(records(2))
        log.write(records(4))
    assert run.read(EVENTS).startswith(early)
    assert Path(run.location, EVENTS).stat().st_ino == file
    assert [step for step, _, _ in losses(run.read(EVENTS))] == [1, 2, 3, 4]


@pytest.mark.parametrize("lost", [1, 5, 30, 200])
def test_an_event_that_a_kill_cut_is_written_again(run, lost):
    EventLog(run).write(records(3))
    whole = run.read(EVENTS)
    run.write(EVENTS, whole[:-lost])
    EventLog(run).write(records(3))
    assert run.read(EVENTS) == whole


def test_nothing_is_appended_through_a_link(run, tmp_path):
    log = EventLog(run)
    log.write(records(1))
    Path(run.location, EVENTS).unlink()
    (tmp_path / "elsewhere").write_bytes(b"mine")
    Path(run.location, EVENTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="symbolic links"):
        log.write(records(2))
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"


def test_in_an_object_store_each_start_has_a_file(s3):
    run = RunFolder(s3[1], "a")
    first = EventLog(run)
    for count in (1, 2):
        first.write(records(count))
    time.sleep(1)  # the files are named by the second
    EventLog(run).write(records(4))
    files = [name for name in run.file_names() if name.startswith(EVENTS)]
    assert [[step for step, _, _ in losses(run.read(name))] for name in files] == [[1, 2], [3, 4]]


def test_tensorboard_follows_a_run_that_is_being_written(run, tmp_path):
    log = EventLog(run)
    log.write(records(1))
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--host", "127.0.0.1"]
    command += ["--port", "0", "--reload_interval", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as board:
        try:
            address = next(line for line in board.stderr if "http://" in line).split("http://")[1].split()[0]
            tag = urllib.parse.quote(SCALARS["train_loss"])
            url = f"http://{address}data/plugin/scalars/scalars?run=a&tag={tag}"
            for count in range(1, 5):
                log.write(records(count))
                wait_until(lambda count=count: len(ask(url)) == count, 30, f"epoch {count} in TensorBoard")
            assert [point[1] for point in ask(url)] == [1, 2, 3, 4]
        finally:
            board.terminate()


def ask(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError:  # the run isn't read yet
        return []
