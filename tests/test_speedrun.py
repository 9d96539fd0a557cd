"""The recipe for the least time, its network, its optimizer and its clock, at a small size."""

import json
import signal
from dataclasses import make_dataclass
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from command import Command, Speedrun, finish
from conftest import checkpoints, history, wait_until
from safetensors.torch import load_file

from raycifar.analysis.statistics import mean_interval
from raycifar.data.dataset import split
from raycifar.data.shards import to_shard
from raycifar.data.sources import load
from raycifar.engine.optimizers import Muon, build_optimizer, orthogonalize
from raycifar.engine.speedrun import SpeedRun
from raycifar.engine.state import ExponentialMovingAverage
from raycifar.models import Architecture
from raycifar.models.initial_weights import load_initial_weights
from raycifar.models.layers import ConvOfColors, MaxMeanPool, MaxPool
from raycifar.models.recipe import Recipe
from raycifar.models.recipes import choose_recipe
from raycifar.storage.run_folder import RunFolder
from raycifar.terminal import Screen
from raycifar.workflows import speedrun
from raycifar.workflows.requests import TrainingRequest
from raycifar.workflows.speedrun import possible

CPU = torch.device("cpu")
SMALL = ("--limit", 200, "--val-size", 100, "--epochs", 2, "--batch-size", 50, "--cpus-per-worker", 1)
RUN = ("--recipe", "speedrun", *SMALL, "--no-report")


# The network and its optimizer ----------------------------------------------------------------------


def test_every_convolution_but_the_whitening_passes_its_inputs_on_at_first():
    network = Architecture("speedrun").build()
    assert not network.whiten.weight.requires_grad
    for module in network.features.modules():
        if isinstance(module, torch.nn.Conv2d):
            inputs = torch.randn(2, module.in_channels, 5, 5)
            kept = min(module.in_channels, module.out_channels)
            assert torch.allclose(module(inputs)[:, :kept], inputs[:, :kept], atol=1e-5)


@pytest.mark.parametrize("size", [20, 24, 32])
def test_the_network_takes_each_size_of_its_recipe_and_begins_undecided(size):
    logits = Architecture("speedrun").build()(torch.randn(4, 3, size, size))
    assert logits.shape == (4, 100)
    assert not logits.any()


@pytest.mark.parametrize("size", [(31, 31), (8, 7), (2, 2)])
def test_a_compiled_pooling_has_the_values_and_gradients_of_pytorch_s(size):
    pool, images = MaxPool(), torch.randn(4, 8, *size).to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(pool(images))
    plain, compiled = (
        (out := function(images), *torch.autograd.grad(out, images, gradient))
        for function in (pool, torch.compile(lambda x: pool(x), backend="aot_eager", dynamic=False))
    )
    assert torch.equal(plain[0], compiled[0])
    assert torch.equal(plain[1], compiled[1])
    if size > (2, 2):  # a single pixel has no layout of its own
        assert compiled[1].is_contiguous(memory_format=torch.channels_last)  # else a convolution copies it first


def test_the_first_of_equal_largest_values_has_a_compiled_pooling_s_gradient_as_in_pytorch():
    pool = MaxPool()
    images = torch.randint(0, 3, (64, 8, 9, 9), generator=torch.Generator().manual_seed(0)).float().requires_grad_()
    (plain,) = torch.autograd.grad(pool(images).sum(), images)
    (compiled,) = torch.autograd.grad(torch.compile(lambda x: pool(x), backend="aot_eager")(images).sum(), images)
    assert torch.equal(plain, compiled)


def test_one_of_equal_largest_values_has_the_gradient_of_the_pooling_over_the_image():
    images = torch.ones(1, 3, 2, 2, requires_grad=True)
    MaxMeanPool()(images).sum().backward()  # a share of each, as amax gives, would be the NaN of 0 / 0 if compiled
    assert images.grad.flatten(2).sort().values.tolist() == [[[0.25, 0.25, 0.25, 1.25]] * 3]


def test_a_compiled_convolution_of_colors_computes_what_pytorch_s_does():
    layer, images = ConvOfColors(3, 24, 2), torch.randn(4, 3, 9, 9)
    compiled = torch.compile(lambda x: layer(x), backend="aot_eager", dynamic=False)(images)
    assert torch.allclose(compiled, torch.nn.functional.conv2d(images, layer.weight, layer.bias), atol=1e-6)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_an_orthogonal_update_has_singular_values_near_one_and_the_gradient_s_directions(low):
    generator = torch.Generator().manual_seed(0)
    shapes = ((64, 27, 3, 3), (128, 64, 3, 3), (100, 4, 3, 3), (64, 27, 3, 3), (64, 243, 1, 1))
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        updates = orthogonalize(gradients, steps=5)
    for gradient, update in zip(gradients, updates, strict=True):
        assert (update.shape, update.dtype) == (gradient.shape, gradient.dtype)
        assert torch.equal(update, update.bfloat16()) == low
        singular = torch.linalg.svdvals(update.flatten(1).double())
        assert 0.3 < singular.min() <= singular.max() < 1.3
        left, _, right = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
        exact = left @ right
        assert torch.nn.functional.cosine_similarity(update.flatten().double(), exact.flatten(), dim=0) > 0.95


def test_norms_and_biases_have_a_learning_rate_of_their_own():
    network = Architecture("cnn").build()
    recipe = Recipe(lr=0.1, norm_lr=3.0)
    optimizer = build_optimizer(network, Architecture("cnn").layers(network), recipe)
    scales = {p.ndim: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales == {1: 3.0, 2: 1.0, 4: 1.0}


def test_muon_keeps_filters_at_one_norm_and_steps_like_sgd_elsewhere():
    conv, dense = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(4, 2)
    groups = [{"params": [p], "lr_scale": 1.0, "weight_decay": 0.01} for p in (conv.weight, dense.weight)]
    before = dense.weight.detach().clone()
    for parameter in (conv.weight, dense.weight):
        parameter.grad = torch.ones_like(parameter)
    optimizer = Muon(groups, lr=0.1, momentum=0.9)
    optimizer.step()
    assert torch.allclose(conv.weight.norm(), torch.tensor(8**0.5))
    reference = torch.nn.Parameter(before.clone())
    reference.grad = torch.ones_like(reference)
    torch.optim.SGD([reference], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01).step()
    assert torch.allclose(dense.weight, reference)


def test_the_running_average_begins_with_the_first_weights_and_looks_back_ever_farther():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average, expected = ExponentialMovingAverage(network, 0.5), None
    for n in range(20):
        for value in (*network.parameters(), network[1].running_mean):
            torch.nn.init.constant_(value, float(n))
        network[1].num_batches_tracked.fill_(n)
        average.update_parameters(network)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = float(n) if expected is None else decay * expected + (1 - decay) * n
        means = (*average.module.parameters(), average.module[1].running_mean)
        assert all(torch.allclose(value, torch.full_like(value, expected)) for value in means)
        assert average.module[1].num_batches_tracked == n
    assert average.n_averaged == 20


# What it leaves behind ------------------------------------------------------------------------------


def test_it_is_named_by_the_recipe_alone_and_follows_no_image_where_that_is_not_wanted(train, small, tmp_path):
    train(*RUN, "--workers", 0, "--no-record", "--data", small, "--name", "a")
    run, rows = json.loads((tmp_path / "runs/a/run.json").read_text()), history(tmp_path / "runs/a")
    assert (run["model"], run["recipe"]["progressive"]) == ("speedrun", "20:0.15,24:0.5")
    assert all(np.isfinite(row["train_loss"]) for row in rows)
    assert not any(row.get("grad_norm") or row.get("rise") for row in rows)
    assert not (tmp_path / "runs/a/example_stats.parquet").exists()
    checkpoint = checkpoints(tmp_path / "runs/a")[0]
    assert "example_stats" not in load_file(checkpoint / "state.safetensors")
    weights = load_file(tmp_path / "runs/a/model.safetensors")
    filters = load_initial_weights("speedrun", choose_recipe("speedrun"), load(small)).weights["whiten.weight"]
    assert torch.equal(weights["whiten.weight"], torch.from_numpy(filters))


@pytest.mark.slow
def test_two_workers_that_are_killed_end_with_the_same_bytes(train, small, tmp_path, cluster):
    args = (*RUN, "--workers", 2, "--data", small, "--checkpoint-steps", 1)
    train(*args, "--name", "whole", env=cluster)
    killed = Command(*args, "--name", "a", storage=tmp_path / "runs", env=cluster)
    wait_until(lambda: len(checkpoints(tmp_path / "runs/a")) > 1, what="a checkpoint")
    killed.kill(signal.SIGKILL)
    assert "Continuing from " in train(*args, "--name", "a", env=cluster).stdout
    whole, resumed = ((tmp_path / "runs" / name / "model.safetensors").read_bytes() for name in ("whole", "a"))
    assert resumed == whole


# The clock ------------------------------------------------------------------------------------------


@pytest.fixture
def timed(small):
    """A recipe's runs on 200 images, and what they start from."""

    def make(recipe, seed=0):
        source = load(small)
        tables = split(source, 100, 200, seed).tables()
        shards = [to_shard([tables[name]], CPU) for name in ("train", "val")]
        initial = load_initial_weights("speedrun", recipe, source)
        return SpeedRun(initial.architecture, recipe, *shards, CPU, threads=1)

    return make


def test_a_run_depends_on_nothing_but_its_seed(timed):
    runs, fractions = timed(choose_recipe("speedrun", epochs=1, batch_size=100)), []
    first, other, again = (runs.run(seed, fractions.append) for seed in (3, 4, 3))
    assert fractions == [0.5, 1] * 3
    drop = {"seconds", "whole_seconds"}
    assert {k: v for k, v in first.items() if k not in drop} == {k: v for k, v in again.items() if k not in drop}
    assert other["train_loss"] != first["train_loss"]
    assert first["whole_seconds"] > first["seconds"] > 0


def test_the_program_counts_what_a_run_computes(timed):
    work = timed(choose_recipe("speedrun", epochs=4, batch_size=100, progressive="20:0.5")).work()
    assert (work.parameters, work.steps, work.images) == (6_508_984, 8, 800)
    assert work.multiply_adds == {20: 56_869_920, 32: 154_793_760}
    assert work.multiply_adds_mean == sum(work.multiply_adds.values()) / 2
    products = 6 * 800 * work.multiply_adds_mean / 1e15
    sgd = timed(choose_recipe("speedrun", epochs=4, batch_size=100, progressive="20:0.5", optimizer="sgd")).work()
    assert products * 0.95 < sgd.petaflop < products  # the first layer needs no gradient for its inputs
    assert work.petaflop > sgd.petaflop  # Muon's products come on top


def test_an_interval_of_few_runs_holds_only_what_is_possible():
    seconds, top1 = possible("seconds", mean_interval([10.0, 20.0])), possible("top1", mean_interval([0.2, 0.7]))
    assert (seconds["mean"], seconds["low"], seconds["high"]) == (15, 0, pytest.approx(78.5, abs=0.1))
    assert (top1["low"], top1["high"], top1["n"]) == (0, 1, 2)
    assert possible("top1", mean_interval([0.2]))["low"] is None


def test_the_command_times_runs_by_the_public_rules_and_ctrl_c_shows_what_is_there(small, tmp_path):
    command = Speedrun(*SMALL, "--data", small, "--runs", 99, "--out", tmp_path / "out", storage=None, cwd=tmp_path)
    wait_until(lambda: command.said()[0].count("by the clock") >= 2, what="the second run")
    done = command.kill(signal.SIGINT)
    assert done.returncode == 130
    found = RunFolder.at(str(tmp_path / "out")).read_json("speedrun.json")
    assert len(found["runs"]) == found["top1"]["n"] >= 2
    assert found["top1"]["low"] <= found["top1"]["mean"] <= found["top1"]["high"]
    assert (found["model"], found["train_images"]) == ("speedrun", 200)
    assert found["scored"] == {"split": "val", "images": 100}
    assert found["work"]["steps"] == 8
    for part in ("top-1, one view", "with the mirror image", "by the public clock", "not timed", "the user's clock"):
        assert part in done.stdout
    assert "Training with seed 1 …" in done.stdout
    assert not (tmp_path / "results").exists()


def test_ctrl_c_just_after_the_first_run_shows_no_run_without_the_user_s_time(small, tmp_path, monkeypatch):
    work = make_dataclass("Work", [])()
    trainer = SimpleNamespace(prepare=list, run=lambda *args: dict.fromkeys(speedrun.MEANS, 1.0), work=lambda: work)
    trainer.state = SimpleNamespace(dtype=torch.float32)
    monkeypatch.setattr("raycifar.engine.speedrun.SpeedRun", lambda *args, **options: trainer)
    monkeypatch.setattr(speedrun.psutil, "Process", MagicMock(side_effect=KeyboardInterrupt))
    request, shown = TrainingRequest.of("speedrun", data=small, limit=200, val_size=100, device="cpu"), []
    with pytest.raises(KeyboardInterrupt):
        speedrun.speedrun(request, Screen(quiet=True), shown.append, runs=1, out=str(tmp_path))
    assert all("first_result_seconds" in found for found in shown)


def test_a_run_whose_loss_is_not_finite_ends_the_others_and_is_written(small, tmp_path):
    args = ("--data", small, "--runs", 3, "--optimizer", "sgd", "--lr", "1e9", "--out", tmp_path / "out")
    failed = finish(Speedrun(*SMALL, *args, storage=None, cwd=tmp_path), code=1)
    assert "With seed 0, the training loss is no longer finite, so the run doesn't count." in failed.stderr
    assert len(RunFolder.at(str(tmp_path / "out")).read_json("speedrun.json")["runs"]) == 1


def test_what_the_clock_can_not_time_is_refused(small):
    refused = finish(Speedrun("--pretrained", "a.pth", "--data", small, storage=None), code=2)
    assert "pretrained is a.pth: the clock is for training from scratch, so for pretrained none." in refused.stderr
