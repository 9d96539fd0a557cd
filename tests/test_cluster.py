"""Which Ray is joined, what is refused before anything starts, and what is waited for."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from unittest.mock import MagicMock

import pytest
from command import Command
from conftest import ps, wait_until
from cpus import free_cpus

from raycifar.cluster import nodes, ray_internals
from raycifar.cluster.sizing import Workers
from raycifar.data.shards import block_bounds, shard_bounds
from raycifar.errors import RequestError
from raycifar.storage.remote import telling

OTHER = """
import ray
ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False)
print("up", flush=True)
input()
"""
HOLDER = """
import ray
ray.init(address="auto", logging_level="ERROR")
group = ray.util.placement_group([{"CPU": 1}])
ray.get(group.ready())
print("held", flush=True)
input()
"""
CNN = ("--model", "cnn", "--val-size", 200, "--epochs", 1, "--no-report")


@contextlib.contextmanager
def program(code, says, env=None):
    """Run Python code beside the test until the test is over."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **(env or {})}, **pipes)
    try:
        assert process.stdout.readline() == f"{says}\n"
        yield
    finally:
        process.communicate("\n")


def test_the_ray_that_another_program_runs_for_itself_is_left_alone(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with program(OTHER, "up"):
        assert ray_internals.own_cluster() is None


def test_gpus_that_nobody_has_are_refused_at_once_and_no_ray_is_left_behind(train, small, tmp_path):
    before = {line for line in ps() if "raylet" in line}
    begun = time.monotonic()
    refused = train(*CNN, "--data", small, "--device", "gpu", "--workers", 64, code=2).stderr
    assert time.monotonic() - begun < 20
    assert "64 workers of 4 CPUs, 1 GPU each can't be placed" in refused
    assert "0 GPUs, room for at most 0 of them" in refused
    assert not (tmp_path / "runs").exists()
    wait_until(lambda: {line for line in ps() if "raylet" in line} <= before, 10, "the end of Ray")


def test_more_workers_than_fit_are_refused_with_the_most_that_do(train, small, cluster, tmp_path):
    args = (*CNN, "--data", small)
    assert "at most 8" in train(*args, "--workers", 64, env=cluster, code=2).stderr
    assert "at most 1 of them" in train(*args, "--workers", 2, "--cpus-per-worker", 2, env=cluster, code=2).stderr
    assert "'4:2'" in train(*args, "--workers", "4:2", env=cluster, code=2).stderr
    assert not (tmp_path / "runs").exists()


def test_a_cluster_that_is_not_there_is_said_at_once(train, small):
    failed = train(*CNN, "--data", small, env={"RAY_ADDRESS": "127.0.0.1:9"}, code=1).stderr
    assert "127.0.0.1:9 (RAY_ADDRESS) can't be reached" in failed


@pytest.mark.parametrize("mode", ["token", pytest.param("disabled", marks=pytest.mark.slow)])
def test_without_the_cluster_s_token_the_message_says_what_to_set(train, small, cluster, tmp_path, mode):
    env = {"RAY_ADDRESS": cluster["RAY_ADDRESS"], "RAY_AUTH_MODE": mode, "HOME": str(tmp_path)}
    failed = train(*CNN, "--data", small, env=env, code=1).stderr
    assert "asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in failed


def test_what_others_use_is_waited_for_and_named_and_not_for_ever(small, cluster, tmp_path):
    args = (*CNN, "--data", small, "--workers", 1, "--cpus-per-worker", 2, "--wait", 5, "--name", "a")
    with program(HOLDER, "held", cluster):
        failed = Command(*args, storage=tmp_path, env=cluster).finish()
    assert failed.returncode == 1, failed.stdout + failed.stderr
    waited = "waiting for 1 worker of 2 CPUs: room for 1, 1 in use, on 1 node"
    assert f"{waited}; for at most 5 s (--wait) …" in failed.stdout
    assert f"after 5 s (--wait) there was still no room: {waited}." in failed.stderr


@pytest.mark.slow
def test_runs_that_are_ended_while_they_wait_reserve_nothing_afterwards(small, cluster, tmp_path):
    """Ray would keep for good what a controller asks for between the end of its job and its own; it happens rarely."""
    args = (*CNN, "--data", small, "--workers", 1, "--cpus-per-worker", 2)
    hasty = {**cluster, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.001"}  # a controller mostly dies in its pauses
    for number in [signal.SIGKILL, signal.SIGTERM] * 8:
        with program(HOLDER, "held", cluster):
            runs = [Command(*args, "--name", name, storage=tmp_path, env=hasty) for name in "abc"]
            wait_until(lambda: all("1 in use" in run.said()[0] for run in runs), what="waiting")  # noqa: B023
            time.sleep(4)  # for the controllers to ask for their room
            for run in runs:
                os.kill(run.process.pid, number)
            for run in runs:
                run.process.join()
        wait_until(lambda: free_cpus(cluster) == 2, 20, f"the end of what was reserved after {number.name}")


def test_a_node_with_other_versions_or_without_the_storage_is_named(tmp_path):
    here = nodes.versions()
    assert nodes.objection(str(tmp_path), here) is None
    assert "it can't see" in nodes.objection(str(tmp_path / "nothing/run.json"), here)
    assert f"torch {here['torch']}, but the driver has torch 1.0" in nodes.objection(None, {**here, "torch": "1.0"})


def test_nodes_have_as_long_to_answer_as_wait_says(monkeypatch):
    late, told = iter([["a", "b"], ["b"], []]), []  # the nodes that haven't answered at each look
    ray = MagicMock()
    ray.nodes.return_value = [{"NodeID": node * 56, "Alive": True, "Resources": {"CPU": 1}} for node in "ab"]
    ray.remote.return_value.options.return_value.remote.side_effect = "abab"
    ray.wait.side_effect = lambda *args, **options: ([], next(late, ["b"]))
    ray.get.return_value = None
    monkeypatch.setattr(nodes, "ray", ray)
    monkeypatch.setattr(nodes, "versions", dict)
    monkeypatch.setattr(nodes, "MIN_SECONDS", 0.01)
    with telling(told.append):
        nodes.check_nodes(Workers(1, 1), None, 100)
        assert told[2] == "waiting for 1 node to load the code, for at most 100 s (--wait)"
        assert len(told) == 3
        ray.nodes.return_value[1]["NodeManagerAddress"] = "10.0.0.2"
        with pytest.raises(RequestError, match=r"Node 10.0.0.2 can't take part: it didn't answer within 0.01 s"):
            nodes.check_nodes(Workers(1, 1), None, 0)


def test_images_are_cut_wherever_a_worker_s_may_begin():
    """Then dealing them out needs no task, which would wait for ever where workers hold all CPUs."""
    assert block_bounds(100, [2]) == [0, 50, 100]
    assert block_bounds(100, range(1, 4)) == [0, 33, 50, 66, 100]
    assert all(set(block_bounds(45_001, range(1, 9))).issuperset(shard_bounds(45_001, size)) for size in range(1, 9))


@pytest.mark.slow
def test_a_node_that_can_t_see_the_storage_is_refused(nodes, small, tmp_path):
    """The second node has another file system mounted where the runs are to be."""
    runs = tmp_path / "runs"
    runs.mkdir()
    two = nodes(1)
    ray = f"{sys.executable} -m ray.scripts.scripts"
    start = f"mount -t tmpfs none {runs} && {ray} start --address={two.env['RAY_ADDRESS']} --num-cpus=1 --block"
    other = subprocess.Popen(["unshare", "-m", "sh", "-c", start], start_new_session=True)
    try:
        time.sleep(15)
        refused = Command(*CNN, "--data", small, storage=runs, env=two.env).finish()
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert "can't take part: it can't see" in refused.stderr
        assert "give --storage a URI, such as s3://bucket/runs, or a shared folder" in refused.stderr
        assert list(runs.iterdir()) == []
    finally:
        os.killpg(other.pid, 9)
