"""How long work takes, before and while: on CPUs, and of a whole comparison."""

import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from raycifar import models
from raycifar.cluster.sizing import Workers
from raycifar.cluster.status import StepStatus, WorkerStatus
from raycifar.data.dataset import split
from raycifar.data.sources import load
from raycifar.engine import reporter, train_step
from raycifar.engine.train_step import TrainStep
from raycifar.models import Architecture
from raycifar.models.initial_weights import InitialWeights
from raycifar.models.recipe import Recipe
from raycifar.models.recipes import recipe_for
from raycifar.storage.run_folder import RunFolder
from raycifar.terminal import Screen
from raycifar.workflows import estimate, preview, training
from raycifar.workflows.estimate import cpu_seconds, operations_of, warn_of_hours
from raycifar.workflows.requests import ComparisonRequest, TrainingRequest
from raycifar.workflows.trial import TrialStatus
from raycifar.workflows.tuning import Study, StudySearcher

STEP = StepStatus(
    epoch=1, step=5, steps=10, lr=0.1, loss=2.5, top1=0.25, images_per_second=50, seconds_of_epoch=10, seconds_left=100
)

SCREEN = Screen(quiet=True)


def test_hours_on_cpus_are_said_before_with_what_is_shorter(monkeypatch):
    recipe, initial = recipe_for("resnet50", "none"), InitialWeights(Architecture("resnet50"))
    splits = split(load("synthetic:5000"), 500, None, 0)
    assert operations_of(recipe, initial, splits) == (
        (3 * 4500 + 500) * recipe.epochs * models.flops(initial.architecture)
    )
    monkeypatch.setattr(estimate, "cpu_seconds", lambda *run: 40_000.0)
    monkeypatch.setattr(estimate, "available_cpus", lambda: 2)
    (line,) = warn_of_hours([(recipe, initial)], splits, Workers(0, 2), SCREEN)
    epochs = int(recipe.epochs * 3600 / 40_000)
    assert line.startswith("On these CPUs this takes about 11 h 7 min: ")
    assert f"--epochs {epochs} or --limit 400 would take about an hour" in line
    assert "5 h 33 min" in warn_of_hours([(recipe, initial)], splits, Workers(2, 2), SCREEN)[0]
    assert "33 h 20 min" in warn_of_hours([(recipe, initial)], splits, Workers(2, 1), SCREEN, repeats=3)[0]
    assert warn_of_hours([(recipe, initial)], splits, Workers(1, 4, gpus=1), SCREEN) == []


def test_what_is_short_on_any_cpu_is_not_measured(monkeypatch):
    monkeypatch.setattr(estimate, "cpu_seconds", lambda *run: pytest.fail("measured"))
    run = replace(recipe_for("cnn"), epochs=1), InitialWeights(Architecture("cnn"))
    assert warn_of_hours([run], split(load("synthetic:5000"), 500, None, 0), Workers(0, 2), SCREEN) == []


def estimated(recipe, seconds_of, monkeypatch):
    """Return the seconds estimated for 1,280 training and 300 validation images, and the steps that were timed."""
    timed = []

    def take(num_images, number):
        timed.append(num_images)
        return seconds_of(num_images)

    monkeypatch.setattr(train_step, "step_of_random_images", lambda initial, recipe, num_images, device: num_images)
    monkeypatch.setattr(estimate.timeit, "timeit", take)
    splits = SimpleNamespace(train=range(1280), val=range(300))
    return cpu_seconds(recipe, InitialWeights(Architecture("cnn")), splits), timed


def test_an_estimate_has_steps_that_take_longer_with_more_images(monkeypatch):
    seconds, timed = estimated(Recipe(epochs=3, batch_size=60), lambda n: 0.03 + 0.01 * n, monkeypatch)
    assert seconds == pytest.approx(3 * (1280 / 60 * (0.03 + 0.01 * 60) + 300 * 0.01 / 3))
    assert list(dict.fromkeys(timed)) == [4, 16, 60]
    seconds, timed = estimated(
        Recipe(epochs=1, batch_size=640), lambda n: 2 + 0.02 * n, monkeypatch
    )  # a slow optimizer
    assert seconds == pytest.approx(2 * (2 + 0.02 * 640) + 300 * 0.02 / 3)
    assert timed == [4, 16, 64, 256]


@pytest.mark.parametrize("size", [1, 2, 5, 128])
def test_of_steps_that_take_long_few_are_timed(size, monkeypatch):
    seconds, timed = estimated(Recipe(epochs=1, batch_size=size), lambda n: 3.0 * n, monkeypatch)
    assert seconds == pytest.approx(1280 * 3 + 300 * 3 / 3)
    assert timed == ([4, min(16, size)] if size > 4 else [4])


def test_a_dry_run_gives_up_timing_steps_that_take_long(monkeypatch, tmp_path, capsys):
    release = threading.Event()
    monkeypatch.setattr(estimate, "LONGEST_SECONDS", 0.05)
    monkeypatch.setattr(preview, "cpu_seconds", lambda *run: release.wait(60))
    options = {"data": "synthetic:200", "limit": 100, "val_size": 0, "storage": str(tmp_path), "device": "cpu"}
    preview.preview(TrainingRequest.of("cnn", workers=0, **options), Screen(), ExitStack())
    preview.preview_comparison(ComparisonRequest.of(["cnn"], **options), Screen())
    release.set()
    assert capsys.readouterr().out.count("unknown: a few steps take over") == 2


def test_the_steps_of_the_head_and_of_small_images_cost_less():
    assert Recipe(epochs=7).mean_cost(32) == 1
    assert Recipe(epochs=20, head_epochs=2).mean_cost(32) == pytest.approx((2 / 3 + 18) / 20)
    assert Recipe(epochs=20, head_epochs=2).mean_cost(224, 0.1) == 1
    assert Recipe(progressive="16:0.5").mean_cost(32) == pytest.approx(0.5 / 4 + 0.5)
    assert Recipe(progressive="16:0.5").mean_cost(32, 0.75) == 1
    halves = Recipe(epochs=2, head_epochs=1, batch_size=128)
    assert [halves.cost(32, done) for done in (0, 0.49, 0.5, 0.99)] == [1 / 3, 1 / 3, 1, 1]


def test_an_estimate_has_steps_of_the_whole_network_where_it_is_trained(monkeypatch):
    recipes, state = [], train_step.TrainingState
    monkeypatch.setattr(train_step, "TrainingState", lambda *args: recipes.append(args[2]) or state(*args))
    for head_epochs in (1, 2):
        recipe = Recipe(epochs=2, head_epochs=head_epochs)
        train_step.step_of_random_images(InitialWeights(Architecture("cnn")), recipe, 8, torch.device("cpu"))
    assert [recipe.head_epochs for recipe in recipes] == [0, 2]


def test_a_run_that_trains_the_head_alone_is_estimated_by_steps_of_the_head(monkeypatch):
    whole, head = (
        estimated(Recipe(epochs=4, head_epochs=epochs, batch_size=64), lambda n: 0.01 * n, monkeypatch)[0]
        for epochs in (0, 4)
    )
    assert head == pytest.approx(whole)  # the steps that were timed took as long


def test_an_estimate_leaves_the_random_numbers_of_the_process_as_they_are():
    recipe, initial = recipe_for("cnn"), InitialWeights(Architecture("cnn"))
    before = torch.get_rng_state()
    assert cpu_seconds(recipe, initial, split(load("synthetic:200"), 0, None, 0)) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_the_slow_first_step_of_an_image_size_is_not_taken_for_the_others(tmp_path, monkeypatch):
    told, sizes, report, take = [], set(), reporter.Reporter.step, TrainStep.__call__

    def slow_at_first(self, batch, size=None):
        if size not in sizes:
            sizes.add(size)
            time.sleep(2)
        return take(self, batch, size)

    def step(self, **values):
        told.append(values)
        report(self, **values)

    monkeypatch.setattr(reporter, "STEP_SECONDS", 0.02)
    monkeypatch.setattr(reporter.Reporter, "step", step)
    monkeypatch.setattr(TrainStep, "__call__", slow_at_first)
    options = {"data": "synthetic:200", "limit": 100, "val_size": 0, "storage": str(tmp_path), "report": False}
    options |= {"workers": 0, "cpus_per_worker": 1, "epochs": 3, "batch_size": 5, "progressive": "36:0.3,40:0.6"}
    request = replace(TrainingRequest.of("cnn", **options), test=False)
    with ExitStack() as connection:
        training.train(request, Screen(quiet=True), connection)
    assert sizes == {36, 40, None}
    assert {values["epoch"] for values in told} == {1, 2, 3}
    assert max(values["seconds_of_epoch"] for values in told) < 15  # 20 steps like the first would take 40 s


@pytest.fixture
def searcher(tmp_path):
    """A comparison of two models with two seeds, of which two trials run at once."""
    recipes = {model: recipe_for(model) for model in ("vgg16", "cnn")}
    initial_by_model = {model: SimpleNamespace(architecture=Architecture(model)) for model in recipes}
    folder = RunFolder(str(tmp_path), "c")
    study = Study(ComparisonRequest(recipes, seeds=2), folder, recipes, initial_by_model, {})
    return StudySearcher(study, 2)


def test_the_time_left_of_a_comparison_counts_waiting_trials_as_many_at_once_as_run(searcher):
    assert searcher.seconds_left() is None
    for key in ("a", "b"):
        assert searcher.suggest(key)
    assert searcher.suggest("c") is None
    assert searcher.seconds_left() is None
    running = [trial for trial in searcher.trials if trial.status == TrialStatus.RUNNING]
    assert [trial.model for trial in running] == ["vgg16", "vgg16"]
    for trial in running:
        trial.status_store.put_worker(WorkerStatus(step=STEP))
    flops = {model: models.flops(Architecture(model)) for model in ("cnn", "vgg16")}
    waiting = recipe_for("cnn").epochs * STEP.seconds_of_epoch * flops["cnn"] / flops["vgg16"]  # by the other's pace
    assert searcher.seconds_left() == pytest.approx(STEP.seconds_left + waiting, abs=1)
    searcher.max_concurrent = 4
    assert searcher.seconds_left() == pytest.approx(max(STEP.seconds_left, waiting), abs=1)
