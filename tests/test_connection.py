"""Connecting leaves this process as it was, and works again."""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time

import pytest

from raycifar.cluster import connection, ray_internals
from raycifar.cluster.connection import connected, quiet
from raycifar.errors import RequestError, WorkError

TWICE = """
import logging, os, psutil, ray, stat
from pathlib import Path
from ray._private import worker
from raycifar.cluster.connection import connected

def outside():
    \"\"\"The addresses but this machine's own at which the Ray of this process listens.\"\"\"
    its = {process.pid for process in psutil.Process().children(recursive=True)} | {os.getpid()}
    listening = [c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in its]
    assert len(listening) > 5
    return [ip for ip in listening if not ip.endswith("127.0.0.1")]

def state():
    return logging.getLogger("ray").level, worker.print_to_stdstream, dict(os.environ), ray.is_initialized()

ray.logger
before = state()
for _ in range(2):
    with connected(debug=False):
        assert ray.is_initialized()
        assert worker.print_to_stdstream is not before[1]
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64 and os.environ["RAY_AUTH_MODE"] == "token"
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # as a comparison sets it
        assert ray.cluster_resources()["CPU"] == len(os.sched_getaffinity(0))
        assert outside() == []
        folder = Path(worker._global_node.get_session_dir_path())
        assert stat.S_IMODE(folder.parent.parent.stat().st_mode) == 0o700
    assert state() == before, (state(), before)
print("twice")
"""


@pytest.mark.slow
def test_connecting_twice_in_a_process_works_and_leaves_nothing_behind():
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", TWICE], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "twice\n", done.stderr


@pytest.fixture
def refused(monkeypatch):
    """Try to connect, and return what is said, within a few seconds."""
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 1)

    def connect(kind, **env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        began = time.monotonic()
        with pytest.raises(kind, match=r"^[^\n]+\.$") as refusal, connected(debug=False):
            pass
        assert time.monotonic() - began < 5
        return str(refusal.value)

    return connect


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "garbage", "ray://127.0.0.1:10001", "a b:1", "host:"])
def test_what_is_no_address_of_a_cluster_is_refused(refused, address):
    assert f"RAY_ADDRESS={address} isn't the address of a Ray cluster" in refused(RequestError, RAY_ADDRESS=address)


def test_a_cluster_that_does_not_answer_is_not_waited_for_long(refused):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        said = refused(WorkError, RAY_ADDRESS=address)
    assert f"the Ray cluster at {address} (RAY_ADDRESS) can't be reached: nothing there speaks Ray's protocol" in said


def test_a_folder_that_ray_can_t_use_is_named(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert "RAY_TMPDIR=/a/a" in refused(RequestError, RAY_TMPDIR="/a" * 50)
    (tmp_path / "file").touch()
    monkeypatch.setattr(connection, "MAX_FOLDER_BYTES", 1000)
    assert "file can't be written to (" in refused(RequestError, RAY_TMPDIR=str(tmp_path / "file"))


def test_a_long_temporary_folder_is_not_ray_s(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "a" * 60)
    assert connection.ray_folder() == f"/tmp/ray-{os.getuid()}/ray"


@pytest.mark.skipif(os.getuid() != 0, reason="acts as another user")
def test_a_cluster_that_another_user_has_announced_is_not_joined(monkeypatch, tmp_path):
    """What `ray start` leaves: a process that names the address, and a file in the temporary folder."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:7777")
    for user, joined in ((12345, None), (os.getuid(), "127.0.0.1:7777")):
        with acting(user, "raylet", "--gcs-address=127.0.0.1:7777"):
            assert ray_internals.own_cluster() == joined
            assert connection.cluster_address() == joined


@contextlib.contextmanager
def acting(user, *arguments):
    process = subprocess.Popen(["sh", "-c", "echo; read line", *arguments], stdin=-1, stdout=-1, user=user)
    process.stdout.readline()
    try:
        yield
    finally:
        process.communicate(b"\n")


def test_ray_is_quiet_for_a_while():
    logger = logging.getLogger("ray.tune")
    before = logger.level
    with quiet(debug=False):
        assert logger.level == logging.CRITICAL
    assert logger.level == before
    with quiet(debug=True):
        assert logger.level == before
