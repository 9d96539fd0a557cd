"""What the README claims of real CIFAR-100 on a small machine: minutes each, run by hand with `-m slow`."""

import json
import statistics
import subprocess
import sys
import time

import psutil
import pytest
from conftest import Command, ps, wait_until

pytestmark = pytest.mark.slow

GIGABYTE = 1e9


def scores(storage, cifar, *args, env=None):
    """Train to the end, and return the scores on the test set."""
    name = f"run-{sum(1 for _ in storage.glob('*'))}"
    done = Command("--data", cifar, "--name", name, *args, storage=storage, env=env).finish(timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((storage / name / "result.json").read_text())["test"]


def test_cnn_reaches_half_in_five_epochs(cifar, tmp_path):
    args = ("--model", "cnn", "--epochs", 5, "--workers", 0)
    top1 = [scores(tmp_path, cifar, *args, "--seed", seed)["top1"] for seed in (0, 1)]
    assert statistics.mean(top1) >= 0.50


def test_vgg16_reaches_a_quarter_in_two_epochs(cifar, tmp_path):
    assert scores(tmp_path, cifar, "--model", "vgg16", "--epochs", 2, "--workers", 0)["top1"] >= 0.25


def test_resnet50_trains_on_2000_images_and_scores_them_all(cifar, tmp_path):
    args = ("--model", "resnet50", "--epochs", 1, "--limit", 2000, "--workers", 0)
    assert scores(tmp_path, cifar, *args)["images"] == 10_000


def test_the_number_of_workers_hardly_matters_and_all_test_images_are_scored(cifar, cluster, tmp_path):
    args = ("--model", "cnn", "--epochs", 3, "--limit", 10_000)
    one, two, three = (scores(tmp_path, cifar, *args, "--workers", n, env=cluster) for n in (1, 2, 3))
    assert one["images"] == two["images"] == three["images"] == 10_000
    assert abs(one["top1"] - two["top1"]) <= 0.02


def test_a_worker_with_all_of_cifar_100_takes_at_most_a_gigabyte_more_than_an_idle_one(cifar, cluster, tmp_path):
    imports = (
        "import ray.train.torch, ray.data, raycifar.engine.loop, psutil; print(psutil.Process().memory_info().rss)"
    )
    idle = int(subprocess.run([sys.executable, "-c", imports], capture_output=True, check=True, text=True).stdout)
    args = ("--model", "cnn", "--epochs", 1, "--val-size", 0, "--workers", 1, "--data", cifar, "--name", "a")
    command = Command(*args, storage=tmp_path, env=cluster)

    def worker():
        return [int(line.split()[0]) for line in ps() if "ray::RayTrainWorker" in line]

    process = psutil.Process(wait_until(worker, what="a worker")[0])
    peak = 0
    while command.process.poll() is None and process.is_running():
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    done = command.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"idle {idle / GIGABYTE:.2f} GB, peak {peak / GIGABYTE:.2f} GB")
    assert peak - idle <= GIGABYTE
