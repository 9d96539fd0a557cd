"""The command on Ray, with worker actors: sharded, repeatable, and resumed exactly whoever is killed."""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from command import ROOT, Command, Program
from conftest import RUN, checkpoints, history, processes_of_ray, wait_until

ARGS = (*RUN, "--checkpoint-steps", 4, "--no-report")
THREE = ("--workers", 3, "--cpus-per-worker", 0.5)  # on two CPUs


@pytest.fixture(scope="module")
def reference(small, cluster, tmp_path_factory):
    """Return the folder of an undisturbed job with this number of workers; each is submitted once.

    It is submitted by the file that users submit with, and its log lies beside its folder.
    """
    folders: dict[int, Path] = {}

    def get(workers):
        if workers not in folders:
            storage = tmp_path_factory.mktemp(f"reference-{workers}")
            env = {**os.environ, **cluster, "MODEL": "cnn", "NAME": "a", "RAYCIFAR_STORAGE": str(storage)}
            env["RAY_ADDRESS"] = cluster["RAYCIFAR_TEST_DASHBOARD"]
            sizing = THREE if workers == 3 else ("--workers", workers)
            job = ["jobs/train.sh", *map(str, (*ARGS[2:], "--data", small, *sizing))]
            done = subprocess.run(job, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            (storage / "log").write_text(done.stdout)
            folders[workers] = storage / "a"
        return folders[workers]

    return get


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def in_the_middle_of_epoch_2(command, folder):
    """Wait for a checkpoint in the middle of epoch 2 and for training to continue after it."""

    def condition():
        assert not command.ended, "the run ended before it could be disturbed"
        for path in checkpoints(folder)[:1]:
            progress = json.loads((path / "progress.json").read_text())
            return progress["epoch"] == 2 and progress["segments"]
        return False

    wait_until(condition, 180, "a checkpoint in the middle of epoch 2")


def worker_pids(cluster):
    """Return the session's own training workers."""
    its = processes_of_ray(Path(cluster["RAY_AUTH_TOKEN_PATH"]))
    return [process.pid for process in its if process.info["name"].startswith("ray::RayTrainWo")]


def metric(cluster, name):
    """Return the value that Ray shows to Prometheus for run `ü`, once there is one; other runs' stay there a while."""

    def shown():
        text = urllib.request.urlopen(cluster["RAYCIFAR_TEST_METRICS"]).read().decode()
        return re.search(rf"""^ray_raycifar_{name}{{.*model="cnn".*run="%C3%BC".*}} (\S+)$""", text, re.MULTILINE)

    return float(wait_until(shown, 180, f"the metric {name}")[1])


def dashboard(cluster):
    """Return the jobs that Ray's dashboard lists."""
    token = Path(cluster["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(
        f"{cluster['RAYCIFAR_TEST_DASHBOARD']}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    return json.loads(urllib.request.urlopen(request).read())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_command_gives_the_same_weights_byte_for_byte(reference, train, small, cluster, tmp_path, workers):
    train(*ARGS, "--data", small, "--name", "again", "--workers", workers, env=cluster)
    assert weights(tmp_path / "runs/again") == weights(reference(workers))
    assert {row["workers"] for row in history(tmp_path / "runs/again")} == {workers}


def test_a_worker_killed_in_mid_epoch_changes_nothing(reference, small, cluster, tmp_path):
    command = Command(*ARGS, "--data", small, "--name", "ü", "--workers", 2, storage=tmp_path, env=cluster)
    with ThreadPoolExecutor() as pool:
        watched = pool.submit(lambda: (metric(cluster, "loss"), metric(cluster, "val_top1"), dashboard(cluster)))
        in_the_middle_of_epoch_2(command, tmp_path / "ü")
        os.kill(worker_pids(cluster)[-1], signal.SIGKILL)
        done = command.finish()
        loss, val_top1, shown = watched.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the workers are restarted from the last checkpoint" in done.stdout
    assert "ü" in [job["metadata"].get("job_name") for job in shown]
    assert 3 <= loss < 5
    assert 0 <= val_top1 <= 1
    assert "Continuing from epoch 2, step" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["ü"]
    assert weights(tmp_path / "ü") == weights(reference(2))
    assert [row["epoch"] for row in history(tmp_path / "ü")] == [1, 2, 3]


LONG_EPOCH = """
import time
import ray
from raycifar.engine.reporter import Gauges

ray.init("auto")
gauges = Gauges("ü", "cnn")
gauges.set({"val_top1": 0.25})
for step in range(140):
    gauges.set({"loss": 4.0 - step / 100})
    time.sleep(0.5)
"""


@pytest.mark.slow
def test_metrics_of_the_last_epoch_stay_as_long_as_the_next_one_lasts(cluster, tmp_path):
    program = Program(tmp_path / "long_epoch.py", LONG_EPOCH, env={**cluster, "PYTHONPATH": str(ROOT)})
    for _ in range(12):
        assert metric(cluster, "val_top1") == 0.25
        time.sleep(5)
    assert metric(cluster, "loss") < 3.5
    program.kill()


def test_a_run_that_is_told_to_stop_says_how_to_go_on(small, cluster, tmp_path):
    """By SIGTERM, as `ray job stop` does; Ray's own answer would be a stack and an abort."""
    command = Command(*ARGS, "--data", small, "--name", "a", "--workers", 1, storage=tmp_path, env=cluster)
    wait_until(lambda: "starting the workers" in command.said()[0], what="the start of the workers")
    done = command.kill(signal.SIGTERM)
    assert done.returncode == 130
    assert "give the same command with --name a" in done.stdout
    assert done.stderr == "Interrupted.\n"


@pytest.mark.slow
def test_the_driver_killed_and_started_again_changes_nothing(reference, train, small, cluster, tmp_path):
    args = (*ARGS, "--data", small, "--name", "a", "--workers", 2)
    command = Command(*args, storage=tmp_path / "runs", env=cluster)
    in_the_middle_of_epoch_2(command, tmp_path / "runs/a")
    command.kill()
    wait_until(lambda: not worker_pids(cluster), 60, "the end of the orphaned workers")
    train(*args, env=cluster)
    assert weights(tmp_path / "runs/a") == weights(reference(2))
    assert [row["epoch"] for row in history(tmp_path / "runs/a")] == [1, 2, 3]


@pytest.mark.slow
def test_three_workers_resume_exactly_and_score_each_image_once(reference, train, small, cluster, tmp_path):
    result = json.loads((reference(3) / "result.json").read_text())
    assert result["test"]["images"] == 300
    args = (*ARGS, "--data", small, "--name", "a", *THREE)
    command = Command(*args, storage=tmp_path / "runs", env=cluster)
    in_the_middle_of_epoch_2(command, tmp_path / "runs/a")
    command.kill(signal.SIGINT)
    wait_until(lambda: not worker_pids(cluster), 60, "the end of the interrupted workers")
    train(*args, env=cluster)
    assert weights(tmp_path / "runs/a") == weights(reference(3))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers(train, small, cluster, tmp_path):
    args = (*ARGS, "--data", small, "--name", "a")
    command = Command(*args, "--workers", 2, storage=tmp_path / "runs", env=cluster)
    in_the_middle_of_epoch_2(command, tmp_path / "runs/a")
    command.kill()
    done = train(*args, "--workers", 0)
    assert "Continuing from epoch 2, step" in done.stdout
    assert [row["workers"] for row in history(tmp_path / "runs/a")] == [2, 1, 1]


def test_a_job_submitted_to_a_cluster_with_a_token_succeeds(reference):
    log = (reference(2).parent / "log").read_text()
    assert "Test, 300 images" in log
    assert "\x1b[?" not in log
    assert json.loads((reference(2) / "result.json").read_text())["status"] == "finished"
