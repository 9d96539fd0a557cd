"""What is read from curves: made-up ones here; the same on real, provoked runs with `-m slow`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import ROOT
from provoked import PROVOKED, SPIKE
from torch import nn

from raycifar.analysis.findings import RunHistory, read, seed_variance
from raycifar.analysis.prose import paragraph, what_next
from raycifar.engine.diagnostics import examine
from raycifar.recipes import SCRATCH

RUN = {"model": "cnn", "seed": 0, "val_size": 5000, "limit": None}


def story(epochs=20, val=5000, result=None, recipe=None, **columns):
    """A run whose curves are healthy but for those that are given, by function of the epoch (from 1)."""
    usual = {
        "train_loss": lambda e: 1.2 + 3 * np.exp(-e / 5),
        "train_eval_loss": lambda e: 1.1 + 3 * np.exp(-e / 5),
        "val_loss": lambda e: 1.4 + 2.8 * np.exp(-e / 5),
        "train_top1": lambda e: 0.66 - 0.6 * np.exp(-e / 5),
        "train_eval_top1": lambda e: 0.68 - 0.6 * np.exp(-e / 5),
        "val_top1": lambda e: 0.63 - 0.58 * np.exp(-e / 5) + 0.002 * (-1) ** e,
        "val_loss_se": lambda e: 0.02,
        "lr": lambda e: 0.05,
        "grad_norm": lambda e: 1.0,
        "grad_norm_max": lambda e: 2.0,
        "images_per_second": lambda e: 1000.0,
        "val_gained": lambda e: None if e == 1 else 400,
        "val_lost": lambda e: None if e == 1 else 300,
    } | columns
    fixed = {
        "train_eval_images": 1000,
        "grad_norm_max_step": 3,
        "rise": None,
        "restarts": 0,
        "workers": 1,
        "stage": "whole",
    }
    rows = [{"epoch": e, **fixed, **{name: f(e) for name, f in usual.items()}} for e in range(1, epochs + 1)]
    data = {"source": "cifar100", "train": 45000, "val": val, "test": 10000}
    run = {**RUN, "data": data, "recipe": {**vars(SCRATCH), "epochs": epochs, **(recipe or {})}}
    return RunHistory(run, rows, result)


def kinds(a_story):
    return {finding.kind for finding in read(a_story)}


def test_a_healthy_run_has_nothing_but_its_health_and_its_trend():
    assert kinds(story()) - {"plateau", "improving"} == {"healthy"}


def test_a_network_that_guesses_has_collapsed_and_nothing_else():
    dead = {name: lambda e: 4.6052 for name in ("train_loss", "train_eval_loss", "val_loss")}
    dead |= {name: lambda e: 0.0099 for name in ("train_top1", "train_eval_top1", "val_top1")}
    (finding,) = read(story(**dead))
    assert finding.kind == "collapse"
    assert finding.epochs == list(range(1, 21))
    assert "ln(100) = 4.6052" in finding.evidence


def test_a_network_that_dies_late_is_said_to_have_died_then():
    def dying(before, after):
        return lambda e: before if e < 8 else after

    dead = {name: dying(3.5, 4.6055) for name in ("train_loss", "train_eval_loss", "val_loss")}
    dead |= {name: dying(0.2, 0.01) for name in ("train_top1", "train_eval_top1", "val_top1")}
    (finding,) = read(story(**dead))
    assert (finding.kind, finding.epochs[0]) == ("collapse", 8)


@pytest.mark.parametrize(
    ("relus", "gradients", "cause"),
    [
        ({"a": 0.1, "b": 1.0}, {"x": 0.0, "y": 0.0}, "Its ReLUs have died: in b, 100%"),
        ({"a": 0.1}, {"x": 1e-9, "y": 1.0}, "Its gradients vanish"),
        ({"a": 0.1}, {"x": 1e6, "y": 1.0}, "Its gradients explode"),
        ({"a": 0.1}, {"x": 0.5, "y": 1.0}, "the network has learned nothing."),
    ],
)
def test_a_collapse_names_its_cause(relus, gradients, cause):
    signals = {"dead_relus": relus, "gradient_norms": gradients}
    rows = story(epochs=1, train_loss=lambda e: 4.606, train_top1=lambda e: 0.01)
    rows.history[0]["diagnostics"] = signals
    (finding,) = read(rows)
    assert cause in finding.evidence


def test_signals_see_dead_units_and_leave_the_network_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    with torch.no_grad():
        model[1].bias[:4] = -100.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    signals = examine(model.train(), torch.randn(16, 3, 8, 8), torch.arange(16) % 10)
    assert signals["dead_relus"] == {"2": 0.5}
    assert list(signals["gradient_norms"]) == ["0.weight", "4.weight"]
    assert all(norm > 0 for norm in signals["gradient_norms"].values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_overfitting_is_a_validation_loss_that_rises_while_training_goes_on():
    found = read(story(val_loss=lambda e: 1.6 + 0.05 * abs(e - 6), train_eval_top1=lambda e: min(0.99, 0.1 * e)))
    (finding,) = [f for f in found if f.kind == "overfitting"]
    assert finding.figures["from_epoch"] == 6
    assert "overfitting" not in kinds(story(val=200, val_loss=lambda e: 1.6 + 0.001 * abs(e - 6)))


@pytest.mark.parametrize("coincidence", ["lr", "restarts", "grad_norm_max", "rise", None])
def test_a_spike_is_found_at_its_epoch_with_what_it_coincides_with(coincidence):
    a_story = story(
        val_loss=lambda e: 1.4 + 2.8 * np.exp(-e / 5) + 1.5 * (e == 12),
        val_top1=lambda e: 0.63 - 0.58 * np.exp(-e / 5) - 0.2 * (e == 12),
    )
    value = {"lr": 1.5, "restarts": 1, "grad_norm_max": 50.0, "rise": {"fraction": 0.6, "indices": [5, 6]}}
    if coincidence:
        a_story.history[11][coincidence] = value[coincidence]
    (finding,) = [f for f in read(a_story) if f.kind == "spike"]
    assert finding.epochs == [12]
    said = {
        "lr": "30 times that of the epoch before",
        "restarts": "a restart of the run",
        "grad_norm_max": "a gradient norm of 50.00 (usually 2.00)",
        "rise": "a hundredth of them make 60%",
        None: "Nothing that was recorded coincides",
    }
    assert said[coincidence] in finding.evidence
    assert "spike" not in kinds(story())


def test_few_validation_images_are_said_to_be_noisy_and_whether_sampling_explains_it():
    rng = np.random.default_rng(0)
    noise = dict(enumerate(rng.normal(0, 0.02, 30)))
    noisy = story(
        val=200,
        val_top1=lambda e: 0.63 - 0.58 * np.exp(-e / 5) + noise[e],
        val_gained=lambda e: 20,
        val_lost=lambda e: 18,
        val_loss_se=lambda e: 0.1,
    )
    (finding,) = [f for f in read(noisy) if f.kind == "validation-noise"]
    assert "200 validation images" in finding.evidence
    assert "no more than sampling explains" in finding.evidence
    swinging = story(val_top1=lambda e: 0.6 + 0.1 * (-1) ** e, val_loss=lambda e: 1.5)
    (finding,) = [f for f in read(swinging) if f.kind == "validation-noise"]
    assert finding.figures["cause"] == "network"


@pytest.mark.parametrize(("clean", "explained"), [(0.62, True), (0.45, False)])
def test_validation_above_training_is_explained_by_augmentation_or_is_not(clean, explained):
    found = read(story(train_top1=lambda e: 0.4, train_eval_top1=lambda e: clean))
    (finding,) = [f for f in found if f.kind == "validation-above-training"]
    assert finding.figures["explained"] == explained
    assert ("augmentation (crop)" in finding.evidence) == explained


def test_underfitting_by_a_tiny_learning_rate_says_both():
    small = {name: lambda e: 4.5 for name in ("train_loss", "train_eval_loss", "val_loss")}
    small |= {name: lambda e: 0.03 for name in ("train_top1", "train_eval_top1", "val_top1")}
    assert kinds(story(epochs=1, recipe={"lr": 1e-4}, **small)) == {"underfitting", "learning-rate-low"}
    assert "learning-rate-low" not in kinds(story(epochs=1, **small))


def test_the_trend_is_read_and_extrapolated():
    assert "improving" in kinds(story(val_top1=lambda e: 0.02 * e))
    flat = next(f for f in read(story(val_top1=lambda e: 0.6 + 0.001 * (-1) ** e)) if f.kind == "plateau")
    assert flat.figures["gain"] < 0.03


def test_a_loss_that_is_not_finite_is_a_divergence_even_without_an_epoch():
    failed = {"status": "failed", "reason": "the loss is no longer finite: epoch 1, step 3. Try a smaller --lr"}
    a_story = story(epochs=1, result=failed)
    (finding,) = read(RunHistory(a_story.run, [], failed))
    assert finding.kind == "divergence"
    assert "epoch 1, step 3" in finding.evidence


def test_a_jump_that_never_comes_back_is_a_divergence_at_its_epoch():
    broken = story(
        train_loss=lambda e: 1.2 + 3 * np.exp(-e / 5) if e < 12 else 4.58,
        train_eval_loss=lambda e: 1.2 + 3 * np.exp(-e / 5) if e < 12 else 4.58,
        val_loss=lambda e: 1.2 + 3 * np.exp(-e / 5) if e < 12 else 4.58,
        train_top1=lambda e: 0.5 if e < 12 else 0.015,
        val_top1=lambda e: 0.5 if e < 12 else 0.015,
        lr=lambda e: 0.6 if e == 12 else 0.02,
    )
    (finding,) = read(broken)
    assert (finding.kind, finding.epochs) == ("divergence", [12])
    assert "never comes back" in finding.evidence
    assert "30 times that of the epoch before" in finding.evidence


def test_seeds_that_differ_by_more_than_sampling_are_told_and_others_are_not():
    rng = np.random.default_rng(0)
    usual = [(rng.random(10_000) < 0.6).mean() for _ in range(5)]
    assert seed_variance("cnn", usual, 10_000) is None
    assert seed_variance("cnn", [0.6, 0.1, 0.62], 10_000).kind == "seed-variance"
    assert seed_variance("cnn", [0.6], 10_000) is None


def test_what_next_is_commands_that_are_understood():
    from raycifar import compare, train

    shown = [
        story(),
        story(val_loss=lambda e: 1.6 + 0.05 * abs(e - 6), train_eval_top1=lambda e: min(0.99, 0.1 * e)),
        story(
            val_loss=lambda e: 1.6 + 0.05 * abs(e - 6),
            train_eval_top1=lambda e: min(0.99, 0.1 * e),
            recipe={"cutmix": 0.8},
        ),
        story(val=200, recipe={"lr": 0.7, "augment": "flip"}),
        story(epochs=2, train_loss=lambda e: 4.606, train_top1=lambda e: 0.01),
    ]
    for a_story in shown:
        steps = what_next(a_story, read(a_story))
        assert steps
        for step in steps:
            _, command, *args = step["command"].split()
            context = {"train": train.main, "compare": compare.main}[command].make_context(command, list(args))
            assert {"train": "model", "compare": "names"}[command] in context.params


def test_the_paragraph_names_figures_and_findings():
    text = paragraph(story(), read(story()))
    assert "cnn was trained from scratch on 45,000 images of cifar100 for 20 epochs" in text
    assert "its best was" in text


# On real runs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_provoked_is_found_where_it_should_be_and_nowhere_else(cifar, tmp_path):
    wanted = [kind for *_, kind in PROVOKED.values()]
    table = {}
    for name in PROVOKED:
        script = [sys.executable, str(Path(__file__).with_name("provoked.py")), name, cifar, str(tmp_path)]
        subprocess.run(script, cwd=ROOT, check=True, capture_output=True, timeout=1800)
        found = json.loads((tmp_path / name.replace(" ", "-") / "report.json").read_text())["findings"]
        table[name] = {finding["kind"]: finding for finding in found}
        print(f"{name:<22}", *(f"{kind}{'*' if kind == PROVOKED[name][3] else ''}" for kind in table[name]))
    for name, (*_, expected) in PROVOKED.items():
        assert {kind for kind in table[name] if kind in wanted} == {expected}, name
    assert table["jumps"]["spike"]["epochs"] == [SPIKE]
    assert "ReLUs have died" in table["dies"]["collapse"]["evidence"]
    assert table["is augmented much"]["validation-above-training"]["figures"]["explained"]
