"""Clusters that grow, shrink and lose nodes: minutes each, run by hand with `-m slow`."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import test_spot
import yaml
from command import ROOT, Command, finish
from conftest import checkpoints, history, ps, wait_until
from ray.util.state import list_nodes
from test_spot import ACTION, aws_notice

pytestmark = pytest.mark.slow
metadata_server = test_spot.metadata_server  # the fixture

BIN = Path(sys.executable).parent
CNN = ("--model", "cnn", "--data", "synthetic", "--val-size", 500, "--batch-size", 100, "--cpus-per-worker", 1)
CNN += ("--no-report", "--checkpoint-steps", 10)


def epochs(folder):
    return len(history(folder)) if (folder / "metrics.jsonl").exists() else 0


def check_history(folder, count):
    """Every epoch once; what its images' losses were averaged over is all images."""
    rows = history(folder)
    assert [row["epoch"] for row in rows] == list(range(1, count + 1))
    progress = json.loads((checkpoints(folder)[0] / "progress.json").read_text())
    assert [row["epoch"] for row in progress["history"]] == list(range(1, count + 1))
    return rows


def top1(folder):
    return json.loads((folder / "result.json").read_text())["test"]["top1"]


def test_a_node_is_lost_in_mid_epoch_and_another_taken_in(nodes, tmp_path):
    args = (*CNN, "--limit", 4000, "--epochs", 16, "--workers", "1:2", "--max-failures", 0)
    two = nodes(1, 1)
    command = Command(*args, "--name", "a", storage=tmp_path, env=two.env)
    wait_until(lambda: epochs(tmp_path / "a") >= 2, 240, "epoch 2")
    saved = len(checkpoints(tmp_path / "a"))
    wait_until(lambda: len(checkpoints(tmp_path / "a")) != saved or time.sleep(3) is None, 60)
    two.kill()
    after = wait_until(lambda: (n := epochs(tmp_path / "a")) >= 4 and n, 300, "epoch 4, with one worker")
    two.add()
    done = finish(command) if command.ended else command.finish(600)
    assert done.returncode == 0, done.stdout + done.stderr
    workers = [row["workers"] for row in check_history(tmp_path / "a", 16)]
    assert workers[0] == 2
    assert workers[after - 1] == 1
    assert workers[-1] == 2
    calm = Command(*args, "--name", "calm", storage=tmp_path, env=two.env).finish(600)
    assert calm.returncode == 0, calm.stdout + calm.stderr
    print(done.stdout, workers, top1(tmp_path / "a"), top1(tmp_path / "calm"))
    assert abs(top1(tmp_path / "a") - top1(tmp_path / "calm")) <= 0.02


def test_a_node_that_is_announced_to_go_loses_nothing(nodes, tmp_path, metadata_server):
    """The notice that a cloud gives of a spot machine."""
    args = (*CNN[:-1], 0, "--limit", 4000, "--epochs", 6, "--workers", "1:2", "--max-failures", 0)
    two = nodes(1, 1)
    command = Command(*args, "--name", "a", storage=tmp_path, env=two.env)
    server, answers = metadata_server
    watcher = [sys.executable, "-m", "raycifar.cluster.spot", "aws", "--address", two.env["RAY_ADDRESS"]]
    watcher += ["--node-id", two.others[0].node_id, "--server", server]
    with subprocess.Popen(watcher, env={**os.environ, **two.env}) as watching:
        wait_until(lambda: epochs(tmp_path / "a") >= 1, 240, "epoch 1")
        assert watching.poll() is None
        answers[ACTION] = aws_notice()
        assert watching.wait(60) == 0
    done = command.finish(600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A node of this run is being preempted; the run continues elsewhere from a new checkpoint." in done.stdout
    assert re.search(r"Continuing from epoch [2-6], step", done.stdout)
    assert [row["workers"] for row in check_history(tmp_path / "a", 6)][-1] == 1


def test_chaos(nodes, tmp_path):
    """Ten times, every 20 s, a worker or a node is killed; a node that was is replaced."""
    dice = random.Random(0)
    two = nodes(1, 1)
    args = (*CNN, "--limit", 4000, "--epochs", 24, "--workers", "1:2", "--max-failures", 100, "--name", "a")
    command = Command(*args, storage=tmp_path, env=two.env)
    wait_until(lambda: checkpoints(tmp_path / "a"), 240, "a checkpoint")
    kills = []
    while len(kills) < 10 and not command.ended:
        workers = [int(line.split()[0]) for line in ps() if "ray::RayTrainWorker" in line]
        if dice.random() < 0.4 and two.others:
            two.kill()
            two.add()
            kills.append("node")
        elif workers:
            os.kill(dice.choice(workers), signal.SIGKILL)
            kills.append("worker")
        time.sleep(20)
    done = command.finish(1200)
    print(kills, done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(kills) == 10
    check_history(tmp_path / "a", 24)
    assert top1(tmp_path / "a") > 0.9


@pytest.fixture
def autoscaler(monkeypatch):
    """A head without CPUs for training, and Ray's real autoscaler, which starts nodes on this machine."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    temp = Path(tempfile.mkdtemp(prefix="rc"))
    head = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
    nothing = ("auth", "docker", "file_mounts", "head_node", "worker_nodes")
    empty = ("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands")
    empty += ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude")
    config = {
        "cluster_name": "fake",
        "max_workers": 3,
        "idle_timeout_minutes": 0.3,
        "upscaling_speed": 100,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": head,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
        },
        "head_node_type": "ray.head.default",
        "file_mounts_sync_continuously": False,
        "rsync_filter": [],
        **{key: {} for key in nothing},
        **{key: [] for key in empty},
    }
    (temp / "autoscaler.yaml").write_text(yaml.safe_dump(config))
    env = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": head,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head,
    }
    start = [BIN / "ray", "start", "--head", "--port=6379", "--num-cpus=0", "--dashboard-port=8277"]
    start += [f"--autoscaling-config={temp}/autoscaler.yaml", f"--temp-dir={temp}", "--disable-usage-stats"]
    with (temp / "start.log").open("w") as log:
        subprocess.run(start, env=env, stdout=log, stderr=log, check=True, timeout=120)
    yield {**os.environ, "PATH": env["PATH"], "RAY_ADDRESS": "http://127.0.0.1:8277"}
    for line in ps():
        if str(temp) in line or "6379" in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)


def count_nodes(env):
    """Asked over HTTP: a driver would join one of the nodes, which then isn't idle."""
    return sum(node.state == "ALIVE" for node in list_nodes(address=env["RAY_ADDRESS"]))


def test_the_autoscaler_brings_nodes_and_takes_them_away(autoscaler, tmp_path):
    job = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "raycifar.train"]
    args = (*CNN, "--limit", 3000, "--epochs", 8, "--workers", "1:3", "--storage", tmp_path, "--name", "a")

    def submit(*args):
        return subprocess.run(
            [*job, *map(str, args)], cwd=ROOT, env=autoscaler, capture_output=True, text=True, timeout=900, check=False
        )

    for _ in range(10):
        done = submit(*args)
        if "No available agent" not in done.stderr:
            break
        time.sleep(5)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting for 1 worker of 1 CPU: room for 0" in done.stdout
    assert 3 in [row["workers"] for row in check_history(tmp_path / "a", 8)]
    wait_until(lambda: count_nodes(autoscaler) == 1, 180, "the end of idle nodes")
    too_many = [*job, *map(str, args[:-2]), "--name", "b", "--workers", "5"]
    refused = subprocess.run(
        too_many, cwd=ROOT, env=autoscaler, capture_output=True, text=True, timeout=200, check=False
    )
    assert "this cluster can have 3 CPUs, 0 GPUs, room for at most 3 of them" in refused.stdout
    assert not (tmp_path / "b").exists()


def test_a_job_whose_driver_was_killed_goes_on_when_it_is_submitted_again(cluster, tmp_path):
    env = {**os.environ, **cluster, "RAY_ADDRESS": cluster["RAYCIFAR_TEST_DASHBOARD"]}
    args = (*CNN, "--limit", 2000, "--epochs", 3, "--workers", 2, "--storage", tmp_path, "--name", "a")
    job = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "raycifar.train", *map(str, args)]
    first = subprocess.Popen(job, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: epochs(tmp_path / "a") >= 1 and time.sleep(3) is None, 240, "epoch 1")
    (driver,) = [
        line for line in ps() if "python -m raycifar.train" in line and "ray job" not in line and "sh -c" not in line
    ]
    os.kill(int(driver.split()[0]), signal.SIGKILL)
    assert first.wait(60) != 0
    again = subprocess.run(job, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)
    print(again.stdout)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Continuing from" in again.stdout
    check_history(tmp_path / "a", 3)
