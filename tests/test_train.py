"""The command in one process (`--workers 0`): what it leaves behind, and that it resumes exactly."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
from command import Command, Program, finish
from conftest import RUN, checkpoints, history, wait_until
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ControllerError
from safetensors import safe_open
from safetensors.torch import load_file

from raycifar.cluster.status import FailureCause, StatusStore
from raycifar.data import CIFAR100
from raycifar.errors import WorkError
from raycifar.models.recipe import Recipe
from raycifar.workflows import ray_train

ARGS = (*RUN, "--workers", 0, "--no-report")


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


# What a run leaves behind ---------------------------------------------------------------------------


def test_the_run_folder_holds_what_the_contract_names(trained):
    run = json.loads((trained / "run.json").read_text())
    assert run["name"] == "a"
    assert run["model"] == "cnn"
    assert run["recipe"]["batch_size"] == 20
    assert run["recipe"]["label_smoothing"] is not None
    assert (run["data"]["train"], run["data"]["val"], run["data"]["test"]) == (200, 100, 300)
    assert {"workers", "device", "seed", "versions"} <= run.keys()

    rows = history(trained)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    keys = {"epoch", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "lr", "images_per_second"}
    assert all(keys | {"seconds", "workers"} <= row.keys() for row in rows)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]

    result = json.loads((trained / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["epochs"] == 3
    assert result["best_epoch"] == max(rows, key=lambda row: row["val_top1"])["epoch"]
    assert result["test"].keys() == {"images", "loss", "top1", "top5", "superclass_top1", "ece"}
    assert result["test"]["images"] == 300
    assert result["train_seconds"] > 0
    assert result["images_per_second"] > 0


def test_the_weights_travel_with_what_it_takes_to_use_them(trained):
    with safe_open(trained / "model.safetensors", "pt") as file:
        about = json.loads(file.metadata()["raycifar"])
    pixels = {"size": 32, "mean": list(CIFAR100.mean), "std": list(CIFAR100.std), "interpolation": "bilinear"}
    network = {"model": "cnn", "num_classes": 100, "large_stem": False, "tta_flip": False}
    assert re.fullmatch("[0-9a-f]+", about.pop("digest"))
    assert about == {**network, "options": {"whiten": False, "depth": 1}, "preprocessing": pixels}
    assert load_file(trained / "best.safetensors").keys() == load_file(trained / "model.safetensors").keys()


def test_the_last_few_checkpoints_are_kept(trained):
    assert len(checkpoints(trained)) == 3


def test_the_same_command_gives_the_same_weights_byte_for_byte(trained, train, small, tmp_path):
    train(*ARGS, "--data", small, "--name", "again")
    assert weights(tmp_path / "runs/again") == weights(trained)
    differing = {"seconds", "training_seconds", "images_per_second", "time"}
    for mine, theirs in zip(history(tmp_path / "runs/again"), history(trained), strict=True):
        assert {k: v for k, v in mine.items() if k not in differing} == {
            k: v for k, v in theirs.items() if k not in differing
        }


def test_a_run_whose_folder_was_renamed_is_the_same_run(trained, train, small, tmp_path):
    shutil.copytree(trained, tmp_path / "runs/b")
    (tmp_path / "runs/b/result.json").unlink()
    train(*ARGS, "--data", small, "--name", "b")
    assert json.loads((tmp_path / "runs/b/run.json").read_text())["name"] == "b"
    assert weights(tmp_path / "runs/b") == weights(trained)


def test_a_finished_run_is_shown_and_another_recipe_refused(trained, train, small):
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*")}
    shown = train(*ARGS, "--data", small, "--name", "a", storage=trained.parent)
    assert "nothing is trained again" in shown.stdout
    assert "top-1" in shown.stdout
    refused = train(*ARGS, "--lr", 0.3, "--seed", 1, "--data", small, "--name", "a", storage=trained.parent, code=2)
    assert f"lr {Recipe().lr} there, 0.3 here" in refused.stderr
    assert "seed 0 there, 1 here" in refused.stderr
    refused = train(*ARGS, "--val-size", 200, "--data", small, "--name", "a", storage=trained.parent, code=2)
    assert refused.stderr.count("100 there, 200 here") == 1
    assert {file: file.stat().st_mtime_ns for file in trained.rglob("*")} == before


def test_lines_are_plain_where_there_is_no_terminal(train, small):
    out = train(*ARGS, "--data", small, "--epochs", 1, "--name", "plain").stdout
    assert "starting the workers" not in out
    assert out.index("epoch 1/1  loss ") < out.index("Test, ")
    assert "scoring" not in out[: out.index("epoch 1/1  loss ")]
    assert "\x1b" not in out
    assert "\r" not in out
    assert "epoch 1/1  loss " in out
    assert "Test, 300 images: top-1 " in out


# Stopped and started again --------------------------------------------------------------------------


def stop_in_epoch_2(small, storage, number, *args, env=None):
    """Start the run, and send it a signal in the middle of epoch 2, after a checkpoint there."""
    command = Command(*ARGS, "--data", small, "--name", "a", "--checkpoint-steps", 4, *args, storage=storage, env=env)
    folder = storage / "a"

    def in_epoch_2():
        newest = next(iter(checkpoints(folder)), None)
        if command.ended:
            return "ended"
        progress = json.loads((newest / "progress.json").read_text()) if newest else {"epoch": 0}
        return progress["epoch"] == 2 and progress["segments"]

    where = wait_until(in_epoch_2, what="a checkpoint in the middle of epoch 2")
    done = command.kill(number)
    assert where != "ended", done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """Return a copy of a run stopped by such a signal, and what it said; each is stopped once."""
    runs = {}

    def get(number, storage):
        if number not in runs:
            original = tmp_path_factory.mktemp("stopped")
            runs[number] = stop_in_epoch_2(small, original, number), original
        done, original = runs[number]
        shutil.copytree(original, storage)
        return done

    return get


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGKILL, signal.SIGTERM))]
)
def test_a_run_stopped_in_mid_epoch_ends_with_the_same_weights(trained, stopped, train, small, tmp_path, number):
    done = stopped(number, tmp_path / "runs")
    if number != signal.SIGKILL:
        assert done.returncode == 130
        assert "give the same command with --name a" in done.stdout
        assert "Traceback" not in done.stderr
    resumed = train(*ARGS, "--data", small, "--name", "a", "--checkpoint-steps", 4)
    # A run that is asked to stop looks for it a few times a second, and its epochs here take less than one.
    assert re.search(r"Continuing from (epoch [23], step|after epoch 2)", resumed.stdout)
    assert json.loads((tmp_path / "runs/a/run.json").read_text())["checkpoint_steps"] == 4  # for a suggested command
    assert weights(tmp_path / "runs/a") == weights(trained)
    assert (tmp_path / "runs/a/example_stats.parquet").read_bytes() == (trained / "example_stats.parquet").read_bytes()
    assert [row["epoch"] for row in history(tmp_path / "runs/a")] == [1, 2, 3]
    assert sorted(row["restarts"] for row in history(tmp_path / "runs/a")) == [0, 0, 1]
    for mine, theirs in zip(history(tmp_path / "runs/a"), history(trained), strict=True):
        for name in ("rise", "val_gained", "val_lost", "step_losses"):
            assert mine[name] == theirs[name]
        for key in (
            "train_loss",
            "train_top1",
            "val_loss",
            "val_top1",
            "val_top5",
            "train_eval_loss",
            "grad_norm",
            "lr",
        ):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-12)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(trained, stopped, train, small, tmp_path):
    stopped(signal.SIGINT, tmp_path / "runs")
    newest, before, *_ = checkpoints(tmp_path / "runs/a")
    state = newest / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1000])
    resumed = train(*ARGS, "--data", small, "--name", "a", "--checkpoint-steps", 4)
    assert f"{newest.name} is skipped: state.safetensors is damaged" in resumed.stdout
    assert f"({before.name})" in resumed.stdout
    assert weights(tmp_path / "runs/a") == weights(trained)


def test_a_run_killed_before_its_scores_were_written_only_scores(trained, train, small, tmp_path):
    shutil.copytree(trained, tmp_path / "runs/a")
    for file in ("result.json", "model.safetensors"):
        (tmp_path / "runs/a" / file).unlink()
    train(*ARGS, "--data", small, "--name", "a")
    assert weights(tmp_path / "runs/a") == weights(trained)
    assert history(tmp_path / "runs/a") == history(trained)


def test_a_run_killed_before_its_best_weights_were_written_writes_them(trained, train, small, tmp_path):
    shutil.copytree(trained, tmp_path / "runs/a")
    best = (trained / "best.safetensors").read_bytes()
    (tmp_path / "runs/a/result.json").unlink()
    (tmp_path / "runs/a/best.safetensors").write_bytes(b"those of an earlier epoch")
    train(*ARGS, "--data", small, "--name", "a")
    result = json.loads((tmp_path / "runs/a/result.json").read_text())
    assert result["best_epoch"] == result["epochs"]  # else the last checkpoint doesn't have them
    assert (tmp_path / "runs/a/best.safetensors").read_bytes() == best


def test_checkpoints_of_a_clock_that_went_back_are_ordered_by_what_was_trained(trained, train, small, tmp_path):
    """Earlier versions named them by the local time."""
    shutil.copytree(trained, tmp_path / "runs/a")
    for file in ("result.json", "model.safetensors"):
        (tmp_path / "runs/a" / file).unlink()
    for hour, checkpoint in enumerate(checkpoints(tmp_path / "runs/a")):
        checkpoint.rename(checkpoint.with_name(f"checkpoint_2026-10-25_0{hour}-30-00.000000"))
    resumed = train(*ARGS, "--data", small, "--name", "a")
    assert "Continuing from after epoch 3 (checkpoint_2026-10-25_00-30-00.000000)" in resumed.stdout
    assert weights(tmp_path / "runs/a") == weights(trained)


@pytest.mark.slow
def test_a_run_goes_on_in_another_time_zone(trained, train, small, tmp_path):
    stop_in_epoch_2(small, tmp_path / "runs", signal.SIGKILL, env={"TZ": "Asia/Tokyo"})
    stop_in_epoch_2(small, tmp_path / "runs", signal.SIGKILL, "--epochs", 3, env={"TZ": "America/Los_Angeles"})
    train(*ARGS, "--data", small, "--name", "a", "--checkpoint-steps", 4, env={"TZ": "UTC"})
    assert weights(tmp_path / "runs/a") == weights(trained)


def test_the_same_command_at_the_same_time_is_refused(trained, train, small, tmp_path):
    first = Command(*ARGS, "--data", small, "--name", "a", storage=tmp_path / "runs")
    wait_until(lambda: list(tmp_path.glob("runs/a/.lock-*")), what="the lock")
    refused = train(*ARGS, "--data", small, "--name", "a", code=2)
    assert f"{tmp_path}/runs/a is being trained by process {first.process.pid} on " in refused.stderr
    finish(first)
    assert weights(tmp_path / "runs/a") == weights(trained)
    assert not list(tmp_path.glob("runs/a/.*"))


def test_a_run_whose_output_is_closed_stops_at_a_checkpoint_and_says_so(small, tmp_path):
    command = [sys.executable, "-m", "raycifar.train", *ARGS, "--epochs", 12, "--data", small, "--name", "a"]
    command += ["--storage", tmp_path]
    run = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not run.stdout.readline().startswith("epoch  1/12"):
        pass
    run.stdout.close()
    said = run.stderr.read()
    assert said == "Interrupted: nobody reads the output. To continue, give the same command with --name a\n"
    assert run.wait() == 130
    assert len(history(tmp_path / "a")) < 12
    assert len(checkpoints(tmp_path / "a")) >= len(history(tmp_path / "a"))


def test_a_run_whose_epochs_have_a_single_step_stops_between_them(small, tmp_path):
    args = (*ARGS, "--batch-size", 500, "--epochs", 500, "--data", small, "--name", "a")
    command = Command(*args, storage=tmp_path)
    wait_until(lambda: (tmp_path / "a/metrics.jsonl").exists(), what="an epoch")
    command.kill(signal.SIGINT)
    assert command.finish().returncode == 130
    assert 1 <= len(history(tmp_path / "a")) < 500


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        ("--optimizer", "adamw", "--lr", 0.001, "--ema", 0.99, "--dropout", 0.2, "--mixup", 0.5),
        ("--optimizer", "muon", "--cutmix", 0.25, "--ema", 0.98, "--whiten", "--depth", 2),
        ("--model", "speedrun"),
        ("--augment", "trivial", "--erasing", 0.5),
        ("--augment", "rand", "--erasing", 0.25),
    ],
)
def test_every_part_of_the_state_is_resumed(train, small, tmp_path, recipe):
    train(*ARGS, *recipe, "--data", small, "--name", "whole")
    stop_in_epoch_2(small, tmp_path / "runs", signal.SIGKILL, *recipe)
    train(*ARGS, *recipe, "--data", small, "--name", "a", "--checkpoint-steps", 4)
    assert weights(tmp_path / "runs/a") == weights(tmp_path / "runs/whole")


# Runs that go wrong ---------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(train, small, tmp_path):
    recipe = ("--lr", 1e9, "--precision", "float32", "--warmup", 0, "--checkpoint-steps", 1)
    failed = train(*ARGS, *recipe, "--data", small, "--name", "hot", code=1)
    assert "the loss is no longer finite: epoch 1, step " in failed.stderr
    assert "smaller --lr" in failed.stderr
    result = json.loads((tmp_path / "runs/hot/result.json").read_text())
    assert result["status"] == "failed"
    assert "epoch 1, step" in result["reason"]
    kept = load_file(checkpoints(tmp_path / "runs/hot")[0] / "state.safetensors")
    assert all(value.isfinite().all() for value in kept.values())


def test_a_network_that_learns_nothing_is_warned_of(train, small):
    small_network = ("--model", "timm:test_resnet", "--pretrained", "none")
    dead = train(*ARGS, *small_network, "--epochs", 1, "--batch-size", 2, "--lr", 0, "--data", small, "--name", "dead")
    assert "Warning: after epoch 1" in dead.stdout
    assert "ln(100) = 4.6052" in dead.stdout
    assert "not learning" in dead.stdout


def test_val_size_0_trains_on_everything_and_says_nothing_of_validation(train, small, tmp_path):
    train(*ARGS, "--val-size", 0, "--epochs", 1, "--data", small, "--name", "all")
    (row,) = history(tmp_path / "runs/all")
    assert row["val_loss"] is row["val_top1"] is row["val_top5"] is None
    result = json.loads((tmp_path / "runs/all/result.json").read_text())
    assert result["best_epoch"] is None
    assert not (tmp_path / "runs/all/best.safetensors").exists()


@pytest.mark.slow
def test_synthetic_images_are_learned_without_a_warning_and_said_to_be_synthetic(train, tmp_path):
    args = ("--model", "cnn", "--workers", 0, "--data", "synthetic", "--limit", 2500, "--val-size", 500, "--epochs", 3)
    args += ("--batch-size", 64)
    done = train(*args, "--name", "s")
    assert "says nothing about CIFAR-100" in done.stdout
    assert "Warning" not in done.stdout
    assert json.loads((tmp_path / "runs/s/result.json").read_text())["test"]["top1"] > 0.9


class Fallible:
    """Stands for Ray Train where its controller fails by a worker's death; `test_chaos` has the real one."""

    def __init__(self, *failures):
        self.failures = list(failures)
        self.return_value = {"history": []}

    def fit(self):
        if self.failures:
            raise ControllerError(self.failures.pop(0))
        return self


def test_a_worker_that_dies_as_it_is_launched_ends_no_run(monkeypatch):
    def fit(*failures, most):
        return ray_train.fit_with_restarts(Fallible(*failures), StatusStore(), most)

    def reason_to_end(failure, reason, status_store, max_failures):
        seen.append(failure)
        return "too often" if len(seen) > max_failures else None

    seen = []
    monkeypatch.setattr(ray_train, "reason_to_end", reason_to_end)
    monkeypatch.setattr(ray_train, "prepare_restart", lambda failure, status_store: None)
    assert fit(RayActorError(), RayActorError(), most=2) == {"history": []}
    assert fit(OutOfMemoryError("too much"), most=3) == {"history": []}
    assert [failure.cause for failure in seen] == [*[FailureCause.CONTROLLER] * 2, FailureCause.MEMORY]
    with pytest.raises(WorkError, match=r"training failed: too often\.$"):
        fit(RayActorError(), most=2)
    with pytest.raises(WorkError, match="on worker 1, out of memory"):
        fit(RuntimeError("on worker 1, out of memory"), most=9)


# As a library ---------------------------------------------------------------------------------------


def test_a_run_without_a_test_set_ends_with_what_it_has(small, tmp_path):
    code = """
import sys
from contextlib import ExitStack
from raycifar.models.recipe import Recipe
from raycifar.terminal import Screen
from raycifar.workflows.requests import TrainingRequest
from raycifar.workflows.training import train

request = TrainingRequest(
    "cnn", Recipe(epochs=1), data=sys.argv[1], storage="runs", name="a", val_size=100, workers=0, test=False
)
assert train(request, Screen(), ExitStack())["status"] == "finished"
assert "test" not in train(request, Screen(), ExitStack())
"""
    done = finish(Program(tmp_path / "program.py", code, small))
    assert "Trained 1 epoch in" in done.stdout
    assert "Test, " not in done.stdout
    assert "nothing is trained again" in done.stdout
