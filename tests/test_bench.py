"""`raycifar bench`: what it times is what it says, and adds up."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import psutil
import pytest
from command import Bench, finish
from conftest import wait_until

from raycifar.cluster.sizing import Workers
from raycifar.command import Interrupted
from raycifar.errors import RequestError, WorkError
from raycifar.storage.run_folder import RunFolder
from raycifar.terminal import Screen
from raycifar.workflows import benchmark
from raycifar.workflows.benchmark import draw, sentences, shares_of_time, summarize
from raycifar.workflows.requests import TrainingRequest

TINY = ("--model", "timm:test_resnet", "--pretrained", "none")
ARGS = ("--limit", 200, "--val-size", 100, "--rounds", 2, "--batch-size", 50, "--cpus-per-worker", 1)


@pytest.mark.parametrize(
    ("workers", "against"), [(0, "dataloader"), pytest.param(2, "dataloader,stream", marks=pytest.mark.slow)]
)
def test_the_figures_are_written_shown_and_drawn(small, tmp_path, request, workers, against):
    env = request.getfixturevalue("cluster") if workers else None
    args = (*TINY, *ARGS, "--data", small, "--workers", workers, "--against", against, "--out", tmp_path / "out")
    done = finish(Bench(*args, storage=None, env=env, cwd=tmp_path))
    assert not re.search("^training", done.stdout, re.MULTILINE)  # its own phases are shown to the end
    bench = json.loads((tmp_path / "out/bench.json").read_text())
    assert bench["n"] == 2
    assert bench["ratio"] == pytest.approx(bench["stages"]["train"]["share"]["median"])
    assert bench["train_images_per_second"] > 0
    assert bench["bare_images_per_second"] > 0
    names = ["bare", *["gradients"] * (workers > 1), "images", "train", "epoch"]
    assert list(bench["stages"]) == names
    assert list(bench["against"]) == against.split(",")
    for name, way in bench["against"].items():
        assert way["spread"]["speedup"]["n"] == 2
        assert f"train is {way['speedup']:.2f} times as fast as" in done.stdout
        assert f"({name})" in done.stdout
    assert "<svg" in (tmp_path / "out/bench.svg").read_text()
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_a_bench_that_is_killed_leaves_no_process_behind(small, tmp_path):
    args = (*TINY, *ARGS[:-4], "--rounds", 100, "--data", small, "--workers", 0, "--against", "dataloader")
    bench = Bench(*args, storage=None, cwd=tmp_path)
    wait_until(lambda: "timing, round 1" in bench.said()[0], what="the first round")
    of_its_own = psutil.Process(bench.process.pid).children(recursive=True)
    assert any("spawn_main" in " ".join(process.cmdline()) for process in of_its_own)
    bench.kill()
    assert psutil.wait_procs(of_its_own, timeout=30)[1] == []


def test_what_cannot_be_timed_is_refused(small, tmp_path):
    args = ("--model", "cnn", *ARGS, "--data", small, "--workers", 0)
    with pytest.raises(RequestError, match="--storage https://host/a is refused"):
        benchmark.BenchRequest(TrainingRequest("cnn"), storage="https://host/a")
    for against, said in (("nonsense", "choose from dataloader, stream"), ("stream", "give --workers 1 or more")):
        refused = finish(Bench(*args, "--against", against, storage=None, cwd=tmp_path), 2)
        assert said in refused.stderr


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_timed_is_kept_where_all_nodes_see_it_and_then_deleted(inside, tmp_path):
    storage = str(tmp_path / "shared") if inside else None
    with benchmark.scratch(storage) as folder:
        assert (Path(folder).parent == tmp_path / "shared") is inside
        RunFolder(folder, "bench").write_json("run.json", {})
    assert not Path(folder).exists()


def test_what_is_timed_is_read_and_then_not_left_in_a_long_lived_cluster(store, monkeypatch):
    rates = {name: [100.0, 110.0] for name in ("bare", "images", "train", "epoch", "following", "checkpoint")}
    request, found = benchmark.BenchRequest(TrainingRequest("cnn")), {}
    inputs = SimpleNamespace(splits=SimpleNamespace(train=[1]))
    run = SimpleNamespace(request=request.training, inputs=inputs, workers=Workers(0, 1), status_store=store)
    monkeypatch.setattr(benchmark, "time_on_workers", lambda *args, **options: store.put_timings(rates))
    benchmark.time_stages(run, request, Screen(quiet=True), 1, found)
    assert found["n"] == 2
    assert store.timings() == {}


def test_the_sentence_names_what_costs_most():
    rates = {
        "bare": [100.0, 102.0, 98.0],
        "images": [99.0, 101.0, 97.0],
        "train": [98.5, 100.5, 96.5],
        "epoch": [80.0, 81.0, 79.0],
        "following": [20_000.0] * 3,
        "checkpoint": [9_850.0] * 3,
        "dataloader": [40.0, 41.0, 39.0],
    }
    bench = summarize(rates, ["dataloader"])
    assert bench["ratio"] == pytest.approx(0.985, abs=0.001)
    lines = sentences(bench)
    assert "Most is lost to validation" in lines[1]
    assert "0.49% of this epoch, a checkpoint 1.00%" in lines[2]
    assert "2.4" in lines[3]
    assert not any("noise" in line for line in lines)
    noisy = sentences(summarize({**rates, "images": [150.0, 151.0, 149.0]}, ["dataloader"]))
    assert any(line.startswith("This is noise: images can't be faster") for line in noisy)
    svg = draw({**bench, "model": "cnn", "machine": "2 workers, a processor"})
    assert ">Where the time goes: cnn on 2 workers, a processor<" in svg
    assert ">the bare step: 100 images per second<" in svg
    quick = {name: [100.0] * 3 for name in ("bare", "images", "train", "epoch", "following", "checkpoint")}
    assert "only a cheaper step would help" in sentences(summarize(quick, []))[1]


@pytest.mark.slow
def test_the_way_to_the_first_step_is_timed(small, tmp_path):
    args = ("--model", "cnn", *ARGS, "--data", small, "--workers", 0, "--startup", "--out", tmp_path / "out")
    finish(Bench(*args, storage=None, cwd=tmp_path))
    startup = json.loads((tmp_path / "out/bench.json").read_text())["startup"]
    for name in ("first_step_seconds", "floor_seconds", "ratio"):  # which is longer is for the machine to say
        assert startup[name]["low"] > 0
        assert startup[name]["n"] == 2


@pytest.mark.parametrize("began", [None, 5.0])
def test_the_run_whose_start_is_timed_is_ended_in_any_case(began, monkeypatch):
    """What a signal raises in a command isn't exactly KeyboardInterrupt, for which Popen doesn't wait long."""

    def sleep(seconds):
        raise Interrupted

    monkeypatch.setattr(benchmark.RunFolder, "read_json", lambda folder, file: {"training_began": began})
    monkeypatch.setattr(benchmark.time, "sleep", sleep)
    monkeypatch.setattr(benchmark.time, "time", lambda: 2.0)
    process = subprocess.Popen(["sleep", "5"])
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: process)
    with nullcontext() if began else pytest.raises(Interrupted):
        assert benchmark.time_first_step(TrainingRequest("cnn")) == 3
    assert process.returncode == -signal.SIGTERM


def test_an_empty_trainer_has_the_same_workers_and_leaves_nothing(monkeypatch):
    """Ray is a stand-in, and so is the interpreter, which says at what time the loop begins."""
    done, trainers, workers = subprocess.CompletedProcess("", 0, "a\n7.5\n", ""), [], Workers(2, 1.5, gpus=1)

    def interpreter(command, **options):
        monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
        exec(command[2], {})
        return done

    monkeypatch.setattr("ray.train.torch.TorchTrainer", lambda *loop, **config: trainers.append(config) or MagicMock())
    monkeypatch.setattr(subprocess, "run", interpreter)
    monkeypatch.setattr(benchmark.time, "time", lambda: 5.0)
    assert benchmark.time_floor(workers) == 2.5
    config = trainers[0]["scaling_config"]
    assert (config.num_workers, config.use_gpu, config.resources_per_worker) == (2, True, workers.resources)
    assert trainers[0]["run_config"].storage_filesystem is not None  # else it writes to ~/ray_results
    assert benchmark.time_floor(Workers(0, 1)) == 2.5
    assert len(trainers) == 1
    done = subprocess.CompletedProcess("", 1, "", "Traceback:\nValueError: no room\n")
    with pytest.raises(WorkError, match=r"an empty trainer, timed beside this one, failed: ValueError: no room\."):
        benchmark.time_floor(workers)


def test_what_is_done_before_the_first_part_counts():
    shares = shares_of_time(2, time.monotonic() + 10)
    time.sleep(0.2)
    assert 4 < next(shares) <= 4.9
    assert 8 < next(shares) <= 9.8
