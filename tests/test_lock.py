"""The lock of a run folder: one holder at a time, on a disk and in an object store, whoever died before."""

import json
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

import raycifar.storage.lock as room
from raycifar.errors import DamagedFileError, RequestError
from raycifar.storage.lock import Claim, claims, delete_stale_locks, living_claim, locked, write
from raycifar.storage.run_folder import STUDY, RunFolder
from raycifar.terminal import Screen
from raycifar.workflows.training import lock


@pytest.fixture(params=["disk", "object store"])
def run(request, tmp_path, monkeypatch):
    if request.param == "disk":
        yield RunFolder(str(tmp_path / "runs"), "a")
        return
    server = ThreadedMotoServer(port=0)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    filesystem, _ = fs.FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")
    filesystem.create_dir("bucket")
    yield RunFolder("s3://bucket/runs", "a")
    server.stop()


def test_the_second_is_refused_by_name_and_the_folder_is_free_again_at_the_end(run):
    with locked(run, pytest.fail):
        with pytest.raises(RequestError, match=r"is being trained by process \d+ on .*, since .* UTC\. Wait"):
            locked(run, pytest.fail).__enter__()
        assert len(claims([run])) == 1
    with locked(run, pytest.fail):
        pass
    assert run.file_names() == []


@pytest.mark.parametrize("content", [b"{}", b'{"pid": -1}', b"[]", b"no JSON"])
def test_a_damaged_claim_is_told(run, content):
    run.write(f"{room.CLAIM}abc", content)
    for look in (living_claim, delete_stale_locks, lambda folder: locked(folder, pytest.fail).__enter__()):
        with pytest.raises(DamagedFileError, match=r"\.lock-abc is damaged: .+\. Delete it if nothing trains"):
            look(run)
    run.delete(f"{room.CLAIM}abc")


def test_a_claim_that_the_storage_does_not_give_is_not_taken_for_damaged(tmp_path, monkeypatch):
    run = RunFolder(str(tmp_path / "runs"), "a")

    def time_out(*args, **options):
        raise TimeoutError("no answer has come within 60 s")

    with locked(run, pytest.fail):
        monkeypatch.setattr("raycifar.storage.folder.open_file", time_out)
        with pytest.raises(DamagedFileError, match=r"\.lock-\w+ can't be read: no answer has come within 60 s\.$"):
            living_claim(run)
        monkeypatch.undo()


def test_a_claim_that_cannot_be_read_for_a_while_is_renewed_afterwards(tmp_path, monkeypatch):
    run = RunFolder(str(tmp_path / "runs"), "a")
    monkeypatch.setattr(room, "BEAT_SECONDS", 0.05)
    with locked(run, pytest.fail) as held:
        claim, whole, link = Path(held.claim), tmp_path / "whole", tmp_path / "link"
        whole.write_bytes(claim.read_bytes())
        link.symlink_to(whole)  # to a place outside the folder, so it isn't read
        link.replace(claim)
        time.sleep(0.3)
        whole.replace(claim)
        before = json.loads(claim.read_text())["beats"]
        time.sleep(0.3)
        assert json.loads(claim.read_text())["beats"] > before


def test_a_claim_that_is_being_renewed_as_the_run_fails_is_withdrawn(tmp_path, monkeypatch):
    run, renewing, beating = RunFolder(str(tmp_path / "runs"), "a"), threading.Event(), write

    def slowly(*args):
        if threading.current_thread() is not threading.main_thread():
            renewing.set()
            time.sleep(0.3)
        beating(*args)

    monkeypatch.setattr(room, "BEAT_SECONDS", 1)
    monkeypatch.setattr(room, "write", slowly)
    with suppress(ValueError), locked(run, pytest.fail):
        renewing.wait()
        raise ValueError
    time.sleep(0.5)
    assert claims([run]) == []


def test_of_many_that_begin_at_once_one_holds_the_lock(run):
    """Each holds it until all have tried."""
    all_began, all_tried = threading.Barrier(8), threading.Barrier(8)
    held = []

    def attempt():
        all_began.wait()
        try:
            with locked(run, print):
                held.append(1)
                all_tried.wait()
        except RequestError:
            all_tried.wait()

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    assert claims([run]) == []


def die(run: RunFolder) -> None:
    """Let a process take the lock, and die of SIGKILL."""
    program = """
import os, signal, sys
from raycifar.storage.lock import locked
from raycifar.storage.run_folder import RunFolder
with locked(RunFolder(*sys.argv[1:]), print):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program, run.storage, run.name], check=False)


def test_the_lock_of_a_process_that_was_killed_is_taken_over_at_once_and_what_it_left_running_writes_nothing(run):
    die(run)
    ((_, dead),) = claims([run])
    said = []
    with locked(run, said.append) as held:
        held.write("metrics.jsonl", b"mine")
        with pytest.raises(OSError, match=r"metrics\.jsonl can't be written: another process has taken over"):
            replace(run, claim=run.path(dead.file)).write("metrics.jsonl", b"theirs")
    assert said == [f"{run.location} was being trained by {dead}, which died: its lock is taken over."]
    assert run.read("metrics.jsonl") == b"mine"


def test_many_that_delete_a_dead_claim_at_once_all_find_it_gone(tmp_path):
    run, together, failed = RunFolder(str(tmp_path), "a"), threading.Barrier(8), []

    def delete():
        together.wait()
        try:
            run.delete(f"{room.CLAIM}abc")
        except OSError as error:
            failed.append(error)

    for _ in range(20):
        run.write(f"{room.CLAIM}abc", b"{}")
        threads = [threading.Thread(target=delete) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (failed, run.file_names()) == ([], [])


def test_what_a_process_that_died_after_its_run_has_left_is_deleted(run):
    die(run)
    delete_stale_locks(run)
    assert claims([run]) == []
    with locked(run, pytest.fail):
        delete_stale_locks(run)
        assert len(claims([run])) == 1


def test_a_process_that_has_a_dead_one_s_number_is_not_that(run):
    write(run, replace(Claim.of_this_process(), number=1, started=-100.0))
    said = []
    with locked(run, said.append):
        assert "which died" in said[0]


def test_another_machine_s_process_lives_as_long_as_it_renews_its_claim(run, monkeypatch):
    monkeypatch.setattr(room, "DEAD_SECONDS", 1)
    monkeypatch.setattr(room, "BEAT_SECONDS", 0.3)
    elsewhere = replace(Claim.of_this_process(), machine="another", host="other", number=1)
    write(run, elsewhere)
    alive, said = threading.Event(), []
    beating = threading.Thread(target=room.renew, args=(run, elsewhere, alive))
    beating.start()
    with pytest.raises(RequestError, match=r"is being trained by process \d+ on other"):
        locked(run, said.append).__enter__()
    alive.set()
    beating.join()
    with locked(run, said.append):
        assert "for a sign of life" in said[0]
        assert "which died" in said[-1]
        assert len(claims([run])) == 1


def test_a_process_that_dies_while_it_chooses_its_number_holds_up_nobody(run):
    write(run, replace(Claim.of_this_process(), pid=2**22 + 1))
    with locked(run, pytest.fail):
        assert len(claims([run])) == 1


def test_a_comparison_holds_its_runs_and_a_run_its_comparison(run):
    comparison = RunFolder(run.storage, "c")
    comparison.write_json(STUDY, {})
    trial = RunFolder(comparison.location, "cnn-s0")
    trial.write_json("run.json", {})
    assert trial.comparison == RunFolder(comparison.storage, "c")
    assert run.comparison is None
    with locked(comparison, pytest.fail, also=comparison.runs()), pytest.raises(RequestError):
        locked(trial, pytest.fail, also=[trial.comparison]).__enter__()
    with locked(trial, pytest.fail), pytest.raises(RequestError):
        locked(comparison, pytest.fail, also=comparison.runs()).__enter__()


def test_a_folder_that_was_made_for_the_lock_alone_is_removed(tmp_path):
    with locked(RunFolder(str(tmp_path / "x/y"), "a"), print) as held:
        assert json.loads(Path(held.claim).read_text())["number"] == 1
    assert list(tmp_path.iterdir()) == []


def test_what_goes_wrong_around_the_folder_is_said_of_it(tmp_path):
    def also():
        raise OSError(5, "Input/output error")

    folder = RunFolder(str(tmp_path), "a")
    with ExitStack() as until, pytest.raises(RequestError, match=r"can't be written: Input/output error\. Give"):
        lock(folder, Screen(quiet=True), until, also)
