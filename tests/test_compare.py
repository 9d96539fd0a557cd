"""Comparing: of runs that are there, and of runs that Ray Tune orchestrates."""

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Compare, finish
from conftest import RUN, checkpoints, history, wait_until

from raycifar.engine.scoring import to_predictions_file
from raycifar.models import Architecture
from raycifar.models.recipe import Recipe
from raycifar.storage.lock import locked
from raycifar.storage.run_folder import RunFolder
from raycifar.storage.schemas import EpochRecord

IMAGES = 2000
LABELS = torch.arange(IMAGES) % 100


@pytest.fixture
def compare(tmp_path):
    """Run a comparison to its end."""

    def run(*args, code=0, env=None):
        return finish(Compare(*args, storage=tmp_path / "runs", env=env), code)

    return run


@pytest.fixture
def made_up(tmp_path):
    """Make the folder of a finished run whose network is right on `accuracy` of the test images."""

    def make(model, seed, accuracy, **changes):
        rng = np.random.default_rng([seed, len(model)])
        difficulty = np.random.default_rng(0).random(IMAGES)
        right = difficulty * 0.98 + 0.02 * rng.random(IMAGES) < accuracy
        guesses = torch.where(torch.from_numpy(right), LABELS, (LABELS + 1) % 100)
        probabilities = torch.nn.functional.one_hot(guesses, 100).float() * 0.9 + 0.001
        run = RunFolder(str(tmp_path / "made"), f"{model}-s{seed}")
        recipe = vars(Recipe(epochs=2)) | changes.get("recipe", {})
        data = {"source": "cifar100", "fingerprint": "f", "train": 45000, "val": 5000, "test": IMAGES}
        data |= changes.get("data", {})
        run.write_json(
            "run.json",
            {
                "model": model,
                "seed": seed,
                "architecture": Architecture(model).to_json(),
                "recipe": recipe,
                "data": data,
                "parameters": 7,
            },
        )
        seconds = {"cnn": 10.0, "vgg16": 30.0}[model]
        values = {"train_loss": 1.0, "train_top1": 0.5, "lr": 0.1, "images_per_second": 100.0, "workers": 2}
        run.write_history(EpochRecord(epoch=e, val_top1=accuracy * e / 2, seconds=seconds, **values) for e in (1, 2))
        test = {"images": IMAGES, "loss": 1.0, "top1": float(right.mean()), "top5": 0.9}
        result = {"status": changes.get("status", "finished"), "images_per_second": 100.0, "test": test}
        run.write_json("result.json", result)
        copies = changes.get("copies")
        rows = None if copies is None else copies.nonzero()[:, 0].numpy()
        run.write("predictions.parquet", to_predictions_file(probabilities.log(), LABELS, rows))
        return run.location

    return make


# Runs that are there --------------------------------------------------------------------------------


def test_finished_runs_are_compared_without_training(made_up, compare, tmp_path):
    folders = [made_up("cnn", seed, 0.60) for seed in (0, 1)] + [made_up("vgg16", seed, 0.70) for seed in (0, 1, 2)]
    done = compare(*folders, "--name", "c", "--price-per-hour", 3.6)
    assert ", cnn is worse than vgg16, by 9." in done.stdout
    comparison = json.loads((tmp_path / "runs/c/comparison.json").read_text())
    cnn, vgg16 = comparison["models"]["cnn"], comparison["models"]["vgg16"]
    assert cnn["top1"]["n"] == 2
    assert vgg16["top1"]["low"] < vgg16["top1"]["mean"] < vgg16["top1"]["high"]
    assert cnn["device_seconds"] == 40  # 2 epochs of 10 s on 2 workers
    assert vgg16["cost"] == pytest.approx(0.12)
    assert cnn["flops"] == 136_286_208
    assert comparison["equal_device_seconds"] == 40
    assert cnn["at_equal_time"] == pytest.approx(0.60)
    assert vgg16["at_equal_time"] is None  # its first epoch took longer
    (pair,) = comparison["pairs"]
    assert (pair["a"], pair["b"], pair["verdict"]) == ("cnn", "vgg16", "worse")
    assert pair["low"] < pair["difference"] < pair["high"] < 0
    assert [(test["a"], test["b"]) for test in pair["mcnemar"]] == [("cnn-s0", "vgg16-s0"), ("cnn-s1", "vgg16-s1")]
    rows = list(csv.DictReader((tmp_path / "runs/c/comparison.csv").open()))
    assert [(row["model"], row["runs"]) for row in rows] == [("cnn", "2"), ("vgg16", "3")]
    assert float(rows[0]["top1"]) == cnn["top1"]["mean"]


def test_leaving_out_near_duplicates_may_change_the_order(made_up, compare, tmp_path):
    copies = torch.from_numpy(np.random.default_rng(0).random(IMAGES) < 0.63)  # difficulty, as of the runs' images
    every_seventh = torch.arange(IMAGES) % 7 == 0
    folders = [made_up("cnn", 0, 0.60, copies=copies), made_up("vgg16", 0, 0.70, copies=copies & every_seventh)]
    compare(*folders, "--name", "c", "--without-near-duplicates")
    found = json.loads((tmp_path / "runs/c/comparison.json").read_text())
    new = int((~copies).sum())
    assert found["without_near_duplicates"]["images"] == new
    assert found["models"]["cnn"]["top1"]["mean"] < 0.05 < found["models"]["vgg16"]["top1"]["mean"] < 0.3
    assert found["pairs"][0]["images"] == new
    sentence = found["without_near_duplicates"]["sentence"]
    assert f"Without near duplicates ({new} test images left), the order stays" in sentence
    assert sentence in (tmp_path / "runs/c/report.json").read_text()
    folders[1] = made_up("vgg16", 0, 0.55, copies=copies & every_seventh)
    compare(*folders, "--name", "without")  # scored on all images, as ever
    assert "without_near_duplicates" not in json.loads((tmp_path / "runs/without/comparison.json").read_text())


def test_runs_whose_near_duplicates_are_not_known_are_not_compared_without_them(made_up, compare):
    folder = made_up("cnn", 0, 0.60)
    refused = compare(folder, made_up("vgg16", 0, 0.70), "--without-near-duplicates", code=2)
    assert f"run `raycifar evaluate {folder}` to find them" in " ".join(refused.stderr.split())


def test_one_model_with_two_recipes_is_two_and_little_is_not_told_apart(made_up, compare, tmp_path):
    folders = [made_up("cnn", 0, 0.60), made_up("cnn", 1, 0.60, recipe={"lr": 0.4})]
    done = compare(*folders, "--name", "c")
    assert "cnn lr=0.05 and cnn lr=0.4 can't be told apart" in done.stdout
    assert "With a single run of a model" in done.stdout
    (pair,) = json.loads((tmp_path / "runs/c/comparison.json").read_text())["pairs"]
    assert pair["verdict"] == "undecided"


def test_runs_that_are_not_comparable_are_refused_with_the_reason(made_up, compare, tmp_path):
    first = made_up("cnn", 0, 0.6)
    other = made_up("vgg16", 0, 0.6, recipe={"epochs": 9}, data={"train": 5000})
    refused = compare(first, other, code=2).stderr
    assert "vgg16-s0 differs from cnn-s0 in training images 5000 (not 45000), epochs 9 (not 2)" in refused
    failed = made_up("vgg16", 1, 0.6, status="failed")
    assert "can't be compared: it is failed" in compare(first, failed, code=2).stderr
    assert "is not a run's folder" in compare(first, tmp_path / "nothing", code=2).stderr
    assert "--models to train, or the folders" in compare(code=2).stderr
    assert not (tmp_path / "runs").exists()


def test_a_comparison_takes_no_run_s_folder_and_a_run_no_comparison_s(made_up, compare, train, small, tmp_path):
    first, second = made_up("cnn", 0, 0.6), made_up("cnn", 1, 0.6)
    before = {file.name: file.read_bytes() for file in Path(first).iterdir()}
    assert (
        "cnn-s0 is the folder of a run: give another --name"
        in finish(Compare(first, second, "--name", "cnn-s0", storage=tmp_path / "made"), 2).stderr
    )
    assert {file.name: file.read_bytes() for file in Path(first).iterdir()} == before
    compare(first, second, "--name", "c", "--no-report")
    refused = train(*RUN, "--workers", 0, "--data", small, "--name", "c", code=2)
    assert "is the folder of a comparison: give another --name" in refused.stderr
    assert not (tmp_path / "runs/c/run.json").exists()


def test_finished_runs_are_compared_in_no_folder_that_others_write(made_up, compare, tmp_path):
    first, second, folder = made_up("cnn", 0, 0.6), made_up("cnn", 1, 0.6), RunFolder(str(tmp_path / "runs"), "c")
    with locked(folder, pytest.fail):
        assert "c is being trained by process" in " ".join(compare(first, second, "--name", "c", code=2).stderr.split())
        assert folder.read("comparison.json") is None
    folder.write_json("study.json", {})
    refused = compare(first, second, "--name", "c", code=2).stderr
    assert "c is the folder of a comparison: give another --name" in " ".join(refused.split())
    assert folder.file_names() == ["study.json"]


@pytest.mark.parametrize("option", [("--lr", 3), ("--search", 3), ("--seeds", 2), ("--recipe", "study")])
def test_what_finished_runs_have_no_use_for_is_refused(made_up, compare, tmp_path, option):
    says = compare(made_up("cnn", 0, 0.6), made_up("cnn", 1, 0.6), *option, code=2).stderr
    assert f"{option[0]} is for --models to train" in says
    assert not (tmp_path / "runs").exists()


# Runs that Ray Tune orchestrates --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--models", "cnn,alexnet"), "no model is named 'alexnet': choose from cnn, resnet50, speedrun, vgg16"),
        (("--models", "cnn, cnn"), "names a model twice"),
        (("--models", "cnn", "--workers", 4, "--batch-size", 7), "leaves fewer than 2 images for each of 4 workers"),
        (("--models", "cnn", "--search", 3, "--val-size", 0), "needs --val-size above 0"),
        (("--models", "cnn", "--search", 3, "--space", "nowhere.toml"), "--space nowhere.toml can't be read: No such"),
        (("--models", "cnn", "--space", "nowhere.toml"), "--space nowhere.toml is for a search"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(compare, small, tmp_path, args, says):
    assert says in compare(*args, "--data", small, code=2).stderr
    assert not (tmp_path / "runs").exists()


STUDY = (*RUN[2:], "--models", "cnn", "--checkpoint-steps", 4, "--no-report")


@pytest.mark.slow
def test_a_comparison_whose_driver_was_killed_goes_on_mid_epoch(compare, trained, small, cluster, tmp_path):
    args = (*STUDY, "--seeds", 1, "--data", small, "--name", "c")
    folder = tmp_path / "runs/c"
    command = Compare(*args, storage=tmp_path / "runs", env=cluster)

    def in_mid_epoch():
        assert not command.ended, "the comparison ended before it could be disturbed"
        for path in checkpoints(folder / "cnn-s0")[:1]:
            progress = json.loads((path / "progress.json").read_text())
            return progress["epoch"] == 2 and progress["segments"]
        return False

    wait_until(in_mid_epoch, 180, "a checkpoint in the middle of epoch 2")
    command.kill(signal.SIGKILL)
    done = compare(*args, env=cluster)
    assert "cnn-s0: Continuing from epoch 2, step" in done.stdout
    assert [row["epoch"] for row in history(folder / "cnn-s0")] == [1, 2, 3]
    model = json.loads((folder / "comparison.json").read_text())["models"]["cnn"]
    assert model["runs"] == ["cnn-s0"]
    before = (folder / "cnn-s0/result.json").stat().st_mtime_ns
    assert "Already over, and not run again: 1 trial." in compare(*args, env=cluster).stdout
    assert (folder / "cnn-s0/result.json").stat().st_mtime_ns == before
    # The same as `train` gives, to the last bit.
    assert (trained / "model.safetensors").read_bytes() == (folder / "cnn-s0/model.safetensors").read_bytes()
    other = compare(*args, "--lr", 0.3, env=cluster, code=2).stderr
    assert "is another comparison: cnn lr 0.05 there, lr 0.3 here" in other


@pytest.mark.slow
def test_a_trial_that_fails_is_reported_and_the_others_go_on(compare, small, cluster, tmp_path):
    """The folder of one run is a file: it can't be written."""
    (tmp_path / "runs/c").mkdir(parents=True)
    (tmp_path / "runs/c/cnn-s0").write_text("in the way")
    args = (*STUDY, "--epochs", 1, "--checkpoint-steps", 0, "--data", small, "--seeds", 2, "--name", "c")
    done = compare(*args, env=cluster, code=1)
    assert "cnn-s0: Its driver failed (" in done.stdout
    assert " and is restarted." in done.stdout
    assert "1 of 2 trials failed: cnn-s0: " in done.stderr
    comparison = json.loads((tmp_path / "runs/c/comparison.json").read_text())
    assert comparison["models"]["cnn"]["runs"] == ["cnn-s1"]
    assert comparison["failed"][0]["run"] == "cnn-s0"
