"""`--dry-run`: the whole plan, and nothing else."""

import re
from contextlib import ExitStack

import pytest
import torch
from command import Command, Compare, finish
from conftest import RUN

from raycifar.errors import RequestError
from raycifar.terminal import Screen
from raycifar.workflows import preview
from raycifar.workflows.requests import ComparisonRequest, TrainingRequest


def test_the_plan_is_shown_and_nothing_is_written_or_started(small, tmp_path):
    args = (*RUN, "--data", small, "--dry-run", "--name", "a", "--accelerator", "H100")
    out = finish(Command(*args, storage=tmp_path / "runs")).stdout
    assert "in a Ray that is started on this machine; whether it has H100 can't be told before" in out
    for words in ("cnn, seed 0", "200 training, 100 validation, 300 test", "  epochs 3, batch_size 20; else the cnn"):
        assert words in out
    assert "10 in each epoch" in out
    assert "on this machine's CPU" in out or "raycifar bench measures it" in out
    assert "Nothing was started." in out
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_is_named_as_such_and_another_recipe_refused(trained, small):
    args = (*RUN, "--data", small, "--name", "a", "--workers", 0, "--dry-run")
    assert "nothing would be trained" in finish(Command(*args, storage=trained.parent)).stdout
    assert (
        "is another run: lr 0.05 there, 0.3 here"
        in finish(Command(*args, "--lr", 0.3, storage=trained.parent), code=2).stderr
    )


def test_the_trials_of_a_comparison_are_shown_and_nothing_is_written_or_started(small, tmp_path):
    args = ("--models", "cnn,vgg16", "--seeds", 2, "--search", 3, "--limit", 200, "--val-size", 100, "--epochs", 3)
    args += ("--batch-size", 4)  # so few images are timed
    out = finish(Compare(*args, "--data", small, "--dry-run", "--name", "a", storage=tmp_path / "runs")).stdout
    for model in ("cnn", "vgg16"):
        recipe = f"epochs 3, batch_size 4; else the {model}'s default recipe: "
        assert re.search(rf"  {model} +3 search trials, then seeds 0 to 1.*; {recipe}", out)
    assert "2 of each, after 3 to search" in out
    assert "by the time of a few steps" in out or "raycifar bench measures it" in out
    assert "Nothing was started." in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", [("--val-size", 7), ("--recipe", "nothing.toml"), ("--depth", 0)])
def test_a_wrong_request_is_refused_as_without_it(small, tmp_path, option):
    args = (*RUN, "--data", small, *option, "--dry-run", "--workers", 0)
    assert finish(Command(*args, storage=tmp_path), code=2).stderr.startswith("Error: ")


@pytest.mark.parametrize(
    ("options", "workers", "hours"),
    [
        ({}, "one for each GPU, else one", 1),
        ({"device": "cpu"}, "one", 1),
        ({"device": "cpu", "workers": "1:4"}, "1 to 4", 1),
        ({"device": "cpu", "workers": 2, "cpus_per_worker": 1}, "2", 4),
        ({"device": "gpu"}, "one for each GPU, else one", None),
        ({"accelerator": "H100"}, "one for each GPU, else one", None),
    ],
)
def test_the_workers_and_the_time_are_those_that_are_asked_for(options, workers, hours, monkeypatch):
    """On a machine of 8 CPUs without a GPU, all of which would take an hour."""
    monkeypatch.setattr(preview, "available_cpus", lambda: 8)
    monkeypatch.setattr(preview, "find_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(preview, "cpu_seconds", lambda *run: 3600.0)
    request = TrainingRequest.of("cnn", **options)
    assert preview.number_of_workers(request) == workers
    seconds = preview.estimate(preview.expected_workers(request), None, None, None, Screen(quiet=True))
    assert seconds == (hours and 3600 * hours)


def test_trials_that_take_a_part_of_the_cpus_run_beside_each_other(monkeypatch):
    monkeypatch.setattr(preview, "available_cpus", lambda: 8)
    monkeypatch.setattr(preview, "cpu_seconds", lambda *run: 3600.0)
    told, screen = {}, Screen(quiet=True)
    screen.facts = lambda name, facts: told.update(facts)
    options = {"data": "synthetic:300", "val_size": 100, "device": "cpu", "seeds": 4, "cpus_per_worker": 2}
    preview.preview_comparison(ComparisonRequest.of(["cnn"], **options), screen)
    assert "4 h 0 min each" in told["cnn"]
    assert told["time"].startswith("about 4 h 0 min, by")


def test_a_storage_that_can_t_be_written_is_refused_as_without_it():
    options = {"data": "synthetic:200", "limit": 100, "val_size": 0, "storage": "/proc/x"}
    with pytest.raises(RequestError, match=r"^/proc/x/.* can't be written: .* Give another --storage\.$"):
        preview.preview(TrainingRequest.of("cnn", workers=0, **options), Screen(quiet=True), ExitStack())
    with pytest.raises(RequestError, match="can't be written"):
        preview.preview_comparison(ComparisonRequest.of(["cnn"], **options), Screen(quiet=True))
