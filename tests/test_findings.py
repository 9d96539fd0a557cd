"""What is read from curves: made-up ones here; recorded ones in `test_provoked.py`."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from histories import GUESSES, OVERFITS, made_up
from scipy import stats
from torch import nn

from raycifar.analysis.diagnosis import diagnose, seed_variance
from raycifar.analysis.rules.trends import swings
from raycifar.engine import evaluator
from raycifar.engine.evaluator import examine
from raycifar.errors import FailureKind
from raycifar.models import Architecture
from raycifar.models.recipe import Recipe


def kinds(history):
    return {finding.kind for finding in diagnose(history)}


def test_a_healthy_run_has_nothing_but_its_health_and_its_trend():
    assert kinds(made_up()) - {"plateau", "improving"} == {"healthy"}


@pytest.mark.parametrize("val", [0, 5000])
@pytest.mark.parametrize("epochs", [1, 2])
def test_losses_are_said_to_fall_only_where_they_do(epochs, val):
    def healthy(**columns):
        (finding,) = [f for f in diagnose(made_up(epochs, val, **columns)) if f.kind == "healthy"]
        return finding.evidence

    rising = dict.fromkeys(("train_loss", "train_eval_loss", "val_loss"), lambda e: 2.0 + 0.01 * e)
    falling = dict.fromkeys(rising, lambda e: 2.0 - 0.01 * e)
    assert "fall" not in healthy(**rising)
    assert ("fall" in healthy(**falling)) == (epochs > 1)


def test_a_network_that_guesses_has_collapsed_and_nothing_else():
    (finding,) = diagnose(made_up(**GUESSES))
    assert finding.kind == "collapse"
    assert finding.epochs == list(range(1, 21))
    assert "stays at the level of guessing (4.6052; ln(100) = 4.6052)" in finding.evidence
    (finding,) = diagnose(made_up(**GUESSES | {"train_loss": lambda e: 6.5}))
    assert "stays above the level of guessing (6.5000;" in finding.evidence


def test_a_network_that_dies_late_is_said_to_have_died_then():
    def dying(before, after):
        return lambda e: before if e < 8 else after

    dead = {name: dying(3.5, 4.6055) for name in ("train_loss", "train_eval_loss", "val_loss")}
    dead |= {name: dying(0.2, 0.01) for name in ("train_top1", "train_eval_top1", "val_top1")}
    (finding,) = diagnose(made_up(**dead))
    assert (finding.kind, finding.epochs[0]) == ("collapse", 8)
    assert "the network has lost what it had learned." in finding.evidence


@pytest.mark.parametrize(
    ("relus", "gradients", "cause"),
    [
        ({"a": 0.1, "b": 1.0}, {"x": 0.0, "y": 0.0}, "Its ReLUs have died: in layer b, 100%"),
        ({"a": 0.1}, {"x": 1e-9, "y": 1.0}, "Its gradients vanish"),
        ({"a": 0.1}, {"x": 1e6, "y": 1.0}, "Its gradients explode"),
        ({"a": 0.1}, {"x": 0.5, "y": 1.0}, "the network has learned nothing."),
    ],
)
def test_a_collapse_names_its_cause(relus, gradients, cause):
    diagnostics = {"dead_relus": relus, "gradient_norms": gradients}
    (finding,) = diagnose(made_up(epochs=1, **GUESSES, diagnostics=lambda e: diagnostics))
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
    assert all(p.grad is None for p in model.parameters())


def test_a_network_that_calls_a_relu_again_with_other_channels_has_signals():
    model = Architecture("resnet50").build()
    signals = examine(model, torch.randn(2, 3, 32, 32), torch.arange(2))
    assert set(signals["dead_relus"]) >= {"relu", "layer1.0.relu"}


def test_signals_are_the_same_however_many_images_pass_at_a_time(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    with torch.no_grad():
        model[1].bias.copy_(torch.linspace(-4, 1, 8))  # some units are dead only for some images
    images, labels = torch.randn(17, 3, 8, 8), torch.arange(17) % 10
    together = examine(model, images, labels)
    assert 0 < together["dead_relus"]["2"] < 1
    monkeypatch.setattr(evaluator, "PIXELS", 5 * 64)
    apart = examine(model, images, labels)
    assert apart["dead_relus"] == together["dead_relus"]
    assert apart["gradient_norms"] == pytest.approx(together["gradient_norms"], rel=1e-4)


def test_overfitting_is_a_validation_loss_that_rises_while_training_goes_on():
    found = diagnose(made_up(**OVERFITS))
    (finding,) = [f for f in found if f.kind == "overfitting"]
    assert finding.metrics["from_epoch"] == 6
    unknown = {**OVERFITS, "val_loss": lambda e: None if e == 3 else OVERFITS["val_loss"](e)}
    assert "overfitting" in kinds(made_up(**unknown))
    assert "overfitting" not in kinds(made_up(val=200, val_loss=lambda e: 1.6 + 0.001 * abs(e - 6)))


def test_a_loss_that_rises_while_accuracy_does_is_overconfidence():
    rises = OVERFITS | {"val_top1": lambda e: 0.78 - 0.4 * np.exp(-e / 9)}
    found = {finding.kind: finding for finding in diagnose(made_up(**rises, recipe={"label_smoothing": 0.0}))}
    assert found.keys() >= {"overfitting", "improving"}
    assert "because the network grows overconfident in its errors, not because" in found["improving"].evidence
    assert found["improving"].advice == "Against overconfidence, try --label-smoothing 0.1."
    assert kinds(made_up(**OVERFITS | {"val_top1": lambda e: 0.5 - 0.002 * e})) == {"overfitting"}


@pytest.mark.parametrize("coincidence", ["lr", "restarts", "grad_norm_max", "rise", None])
def test_a_spike_is_found_at_its_epoch_with_what_it_coincides_with(coincidence):
    usual = {"lr": 0.05, "restarts": 0, "grad_norm_max": 2.0, "rise": None}
    value = {"lr": 1.5, "restarts": 1, "grad_norm_max": 50.0, "rise": {"fraction": 0.6, "indices": [5, 6]}}
    history = made_up(
        val_loss=lambda e: 1.4 + 2.8 * np.exp(-e / 5) + 1.5 * (e == 12),
        val_top1=lambda e: 0.63 - 0.58 * np.exp(-e / 5) - 0.2 * (e == 12),
        **({coincidence: lambda e: (value if e == 12 else usual)[coincidence]} if coincidence else {}),
    )
    (finding,) = [f for f in diagnose(history) if f.kind == "spike"]
    assert finding.epochs == [12]
    said = {
        "lr": "30 times that of the epoch before",
        "restarts": "a restart of the run",
        "grad_norm_max": "a gradient norm of 50.00 (usually 2.00)",
        "rise": "1% of them cause 60%",
        None: "Nothing that was recorded coincides",
    }
    assert said[coincidence] in finding.evidence
    assert "spike" not in kinds(made_up())


TWO_STAGES = {"head_epochs": 2, "warmup": 0.1, "lr": 0.02}
GENTLY = "Start the whole network more gently: a smaller --lr or --layer-decay, or a longer --warmup."


def unfreezing(spike=3, **columns):
    """A run whose loss spikes, at the epoch that is the first of the whole network's unless another is given."""
    recipe = Recipe(epochs=20, **TWO_STAGES)
    usual = {
        "val_loss": lambda e: 1.4 + 2.8 * np.exp(-e / 5) + 1.5 * (e == spike),
        "val_top1": lambda e: 0.63 - 0.58 * np.exp(-e / 5) - 0.2 * (e == spike),
        "lr": lambda e: recipe.learning_rate(e, 351, 352),
        "stage": recipe.stage,
    }
    return made_up(recipe=TWO_STAGES, result={"status": "finished"}, **(usual | columns))


def test_a_spike_where_the_whole_network_is_first_trained_is_put_down_to_that():
    (finding,) = [f for f in diagnose(unfreezing()) if f.kind == "spike"]
    assert "with the change from training the head alone to training the whole network." in finding.evidence
    assert finding.advice == GENTLY
    assert finding.metrics == {"stage": "whole"}
    (finding,) = [f for f in diagnose(unfreezing(grad_norm_max=lambda e: 50.0 if e == 3 else 2.0)) if f.kind == "spike"]
    assert "the whole network; with a gradient norm of 50.00" in finding.evidence


def test_a_run_that_never_recovers_from_it_is_told_the_same():
    broken = dict.fromkeys(("train_loss", "train_eval_loss", "val_loss"), lambda e: 2.0 - 0.1 * e if e < 3 else 4.55)
    broken |= dict.fromkeys(("train_top1", "train_eval_top1", "val_top1"), lambda e: 0.5 if e < 3 else 0.015)
    finding = diagnose(unfreezing(**broken))[0]
    assert (finding.kind, finding.epochs, finding.advice) == ("divergence", [3], GENTLY)


@pytest.mark.parametrize(
    ("spike", "stage"), [(12, None), (3, lambda e: None)], ids=["later", "of a version that kept no stage"]
)
def test_another_spike_of_a_run_in_two_stages_is_put_down_to_the_learning_rate(spike, stage):
    rates = {"lr": lambda e: 0.6 if e == spike else 0.02}
    history = unfreezing(spike, **rates, **({"stage": stage} if stage else {}))
    (finding,) = [f for f in diagnose(history) if f.kind == "spike"]
    assert "a learning rate 30 times that of the epoch before" in finding.evidence
    assert "whole network" not in finding.evidence + finding.advice


def test_unfreezing_without_a_spike_is_no_finding():
    assert kinds(unfreezing(spike=None)) <= {"healthy", "improving", "plateau"}


def test_few_validation_images_are_said_to_be_noisy_and_whether_sampling_explains_it():
    rng = np.random.default_rng(0)
    noise = dict(enumerate(rng.normal(0, 0.02, 30)))
    noisy = made_up(
        val=200,
        val_top1=lambda e: 0.63 - 0.58 * np.exp(-e / 5) + noise[e],
        val_gained=lambda e: 20,
        val_lost=lambda e: 18,
        val_loss_se=lambda e: 0.1,
    )
    (finding,) = [f for f in diagnose(noisy) if f.kind == "validation-noise"]
    assert "200 validation images" in finding.evidence
    assert "no more than sampling explains" in finding.evidence
    swinging = made_up(val_top1=lambda e: 0.6 + 0.1 * (-1) ** e, val_loss=lambda e: 1.5)
    (finding,) = [f for f in diagnose(swinging) if f.kind == "validation-noise"]
    assert finding.metrics["cause"] == "network"


@pytest.mark.parametrize(("clean", "explained"), [(0.62, True), (0.45, False)])
def test_validation_above_training_is_explained_by_augmentation_or_is_not(clean, explained):
    found = diagnose(made_up(train_top1=lambda e: 0.4, train_eval_top1=lambda e: clean))
    (finding,) = [f for f in found if f.kind == "validation-above-training"]
    assert finding.metrics["explained"] == explained
    assert ("augmentation (crop)" in finding.evidence) == explained
    erased = made_up(train_top1=lambda e: 0.4, recipe={"augment": "none", "erasing": 0.5})
    (finding,) = [f for f in diagnose(erased) if f.kind == "validation-above-training"]
    assert "what lowers training accuracy is random erasing and averaging" in finding.evidence


def blamed(**columns):
    return {finding.kind: set(finding.metrics.get("recipe", ())) for finding in diagnose(made_up(**columns))}


def test_a_cause_in_the_recipe_fits_the_evidence():
    few = {"val": 100, "val_gained": lambda e: 5, "val_lost": lambda e: 4, "recipe": {"schedule": "constant"}}
    assert blamed(**few)["validation-noise"] == set()  # but to the few images
    swings = made_up(val_top1=lambda e: 0.6 + 0.1 * (-1) ** e, val_loss=lambda e: 1.5, recipe={"schedule": "constant"})
    (noise,) = [f for f in diagnose(swings) if f.kind == "validation-noise"]
    assert noise.evidence.startswith("A likely cause: compared with the study recipe, --schedule is constant")
    for optimizer, causes in (("adamw", set()), ("muon", set()), ("sgd", {"weight_decay"})):
        other = {"optimizer": optimizer, "lr": 0.01, "weight_decay": 0.05}
        assert blamed(**GUESSES, recipe=other)["collapse"] == causes


@pytest.mark.parametrize(("epoch", "causes"), [(5, {"warmup"}), (30, set())])
def test_a_missing_warm_up_explains_only_what_happens_early(epoch, causes):
    spike = blamed(
        epochs=40, val_loss=lambda e: 1.5 + 2 * (e == epoch), val_top1=lambda e: 0.5 - 0.2 * (e == epoch),
        recipe={"warmup": 0.0},
    )  # fmt: skip
    assert spike["spike"] == causes
    failed = {"status": "failed", "failure": "not-finite", "reason": "the loss is no longer finite"}
    assert blamed(epochs=epoch, result=failed, recipe={"warmup": 0.0, "epochs": 40})["divergence"] == causes


def test_underfitting_by_a_tiny_learning_rate_says_both():
    small = {name: lambda e: 4.5 for name in ("train_loss", "train_eval_loss", "val_loss")}
    small |= {name: lambda e: 0.03 for name in ("train_top1", "train_eval_top1", "val_top1")}
    assert kinds(made_up(epochs=1, recipe={"lr": 1e-4}, **small)) == {"underfitting", "learning-rate-low"}
    assert "learning-rate-low" not in kinds(made_up(epochs=1, **small))
    scaled = {"lr": 0.05 / 16, "batch_size": 8}  # in proportion to the batch
    assert kinds(made_up(epochs=1, recipe=scaled, **small)) == {"underfitting"}
    assert kinds(made_up(epochs=1, recipe=scaled, **GUESSES)) == {"collapse"}


def test_the_trend_is_read_and_extrapolated():
    assert "improving" in kinds(made_up(val_top1=lambda e: 0.02 * e))
    flat = next(f for f in diagnose(made_up(val_top1=lambda e: 0.6 + 0.001 * (-1) ** e)) if f.kind == "plateau")
    assert flat.metrics["gain"] < 0.03


@pytest.mark.parametrize(("images", "first", "last"), [(100, 0.25, 0.4), (500, 0.3, 0.4), (1000, 0.3, 0.38)])
def test_what_few_images_hide_is_no_plateau(images, first, last):
    """Curves that rise all the time, with the sampling noise of so few images."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        easy = rng.normal(size=images) - np.linspace(*stats.norm.ppf([1 - first, 1 - last]), 20)[:, None]
        right = easy + rng.normal(0, 0.5, easy.shape) > 0
        top1 = right.mean(1)
        rises = made_up(val=images, val_top1=lambda e, top1=top1: top1[e - 1], recipe={"schedule": "constant"})
        assert "plateau" not in kinds(rises)


def test_accuracy_that_falls_is_told_and_not_healthy():
    def finding(**columns):
        found = diagnose(made_up(val_top1=lambda e: 0.61 - 0.01 * e, recipe={"schedule": "constant"}, **columns))
        (finding,) = [f for f in found if f.kind == "plateau"]
        assert "healthy" not in {f.kind for f in found}
        assert "validation accuracy falls by 1.0 points per epoch" in finding.evidence
        return finding

    worse = dict.fromkeys(("train_loss", "train_eval_loss", "val_loss"), lambda e: 1.6 + 0.05 * e)
    worse |= dict.fromkeys(("train_top1", "train_eval_top1"), lambda e: 0.61 - 0.01 * e)
    assert "The training loss rises, too" in (found := finding(**worse)).evidence
    assert found.advice.startswith("Lower --lr")
    assert "--augment cutout" in finding(train_eval_top1=lambda e: 0.61 - 0.01 * e).advice


def test_underfitting_is_no_plateau_at_which_to_stop():
    flat = dict.fromkeys(("train_loss", "train_eval_loss", "val_loss"), lambda e: 3.9)
    flat |= dict.fromkeys(("train_top1", "train_eval_top1", "val_top1"), lambda e: 0.1)
    assert kinds(made_up(**flat)) == {"underfitting"}


@pytest.mark.parametrize("unknown", ["train_eval_top1", "val_loss"])
def test_a_run_whose_gap_is_unknown_is_not_called_healthy(unknown):
    (finding,) = diagnose(made_up(3, **{unknown: lambda e: None}, **LEARNED))
    assert finding.kind == "too-early"
    assert "so whether the network overfits can't be told" in finding.evidence
    assert kinds(made_up(20, **{unknown: lambda e: None})) <= {"improving", "plateau"}


LEARNED = {"train_loss": lambda e: 2.0, "train_eval_loss": lambda e: 2.0}
LITTLE = {name: lambda e: 4.4 for name in ("train_loss", "train_eval_loss", "val_loss")}
SWINGS = {"val_top1": lambda e: 0.5 + 0.1 * (-1) ** e, "val_loss": lambda e: 1.5}
RISES = {"val_top1": lambda e: 0.01 * e, "train_eval_top1": lambda e: 0.01 * e}


@pytest.mark.parametrize(
    ("epochs", "columns", "finished", "stopped"),
    [
        (22, {"val_top1": lambda e: 0.6 + 0.001 * (-1) ** e}, {"healthy", "plateau"}, {"too-early"}),
        (66, RISES, {"healthy", "improving"}, {"improving", "too-early"}),
        (22, SWINGS, {"validation-noise", "plateau"}, {"too-early"}),
        (3, LITTLE, {"underfitting"}, {"too-early"}),
        (3, {}, {"healthy"}, {"too-early"}),
        (22, OVERFITS, {"overfitting", "improving"}, {"overfitting", "improving", "too-early"}),
        (22, GUESSES, {"collapse"}, {"collapse"}),
    ],
)
def test_of_a_trial_that_a_search_stopped_the_end_is_not_judged(epochs, columns, finished, stopped):
    ended = made_up(epochs, result={"status": "finished"}, **columns)
    trial = made_up(epochs, result={"status": "stopped"}, recipe={"epochs": 200}, **columns)
    assert kinds(ended) == finished
    assert kinds(trial) == stopped
    for finding in diagnose(trial):
        if finding.kind in ("too-early", "improving"):
            assert finding.advice == "To see how it would end, train its recipe outside the search."
        if finding.kind == "too-early":
            assert f"A search stopped this run after {epochs} of 200 epochs" in finding.evidence


def staircase(epochs, seed, rise=0.0, done=None, swing=0.02):
    """A run whose accuracy jumps with each step of its learning rate, and rises after the last by `rise` per epoch."""
    changed = {"epochs": epochs, "schedule": "step", "warmup": 0.05}
    lr = np.array([Recipe(**changed).learning_rate(e, 351, 352) for e in range(1, epochs + 1)])
    high, late = lr / lr.max(), np.maximum(0, np.arange(1, epochs + 1) - 0.8 * epochs)
    noise = np.random.default_rng(seed).normal(size=epochs) * (0.002 + swing * high)
    top1 = 0.67 - 0.06 * high - 0.5 * np.exp(-np.arange(epochs) / 4) + rise * late + noise
    curves = {"lr": lr, "val_top1": top1, "val_loss": 4.6 - 4 * top1}
    columns = {name: lambda e, values=values: values[e - 1] for name, values in curves.items()}
    return made_up(done or epochs, result=None if done else {"status": "finished"}, recipe=changed, **columns)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("epochs", [30, 60, 100, 200])
def test_the_steps_of_a_schedule_are_no_trend(epochs, seed):
    trends = kinds(staircase(epochs, seed, 0.0)) & {"improving", "plateau"}
    assert trends <= {"plateau"}
    assert trends or epochs == 30  # whose last six epochs are too few to be sure
    assert "improving" not in kinds(staircase(epochs, seed, done=int(0.75 * epochs), swing=0.0))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("epochs", [60, 100])
def test_what_still_rises_after_the_last_step_is_improving(epochs, seed):
    (finding,) = [f for f in diagnose(staircase(epochs, seed, 0.003)) if f.kind in ("improving", "plateau")]
    assert finding.kind == "improving"
    assert finding.epochs == list(range(round(0.8 * epochs) + 2, epochs + 1))
    assert "the learning rate falls" not in finding.evidence  # it no longer does
    assert finding.advice == f"Train for more epochs: --epochs {2 * epochs}."


@pytest.mark.parametrize("epochs", [6, 10, 16, 20])
def test_few_epochs_after_the_last_step_are_no_trend(epochs):
    for seed in range(5):
        assert not kinds(staircase(epochs, seed)) & {"improving", "plateau"}


@pytest.mark.parametrize("epochs", [8, 20, 200])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_end_of_a_smooth_schedule_is_no_step(epochs, schedule):
    recipe = Recipe(epochs=epochs, schedule=schedule)
    rates = {"lr": lambda e: recipe.learning_rate(e, 351, 352), "val_top1": lambda e: 0.5 + 0.15 * e / epochs}
    history = made_up(epochs, result={"status": "finished"}, recipe={"schedule": schedule}, **rates)
    (finding,) = [f for f in diagnose(history) if f.kind in ("improving", "plateau")]
    assert finding.kind == "improving"
    assert finding.epochs[0] == epochs - max(4, epochs // 2) + 1
    assert "It rises as the learning rate falls to the end of the schedule" in finding.evidence


@pytest.mark.parametrize("seed", [1, 4])
def test_swings_are_noise_only_where_they_outlast_the_last_step(seed):
    settled = staircase(60, seed, swing=0.2)
    assert "validation-noise" not in kinds(settled)
    records = [replace(record, val_top1=0.6 + 0.1 * (-1) ** record.epoch, val_loss=1.5) for record in settled.records]
    assert "validation-noise" in kinds(replace(settled, records=records))


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("typed", [{"failure": FailureKind.NOT_FINITE}, {}])
def test_a_loss_that_is_not_finite_is_a_divergence_even_without_an_epoch(epochs, typed):
    failed = {"status": "failed", "reason": "the loss is no longer finite: epoch 1, step 3. Try less", **typed}
    finding = diagnose(made_up(epochs=epochs, result=failed, recipe={"epochs": 5}))[0]
    assert finding.kind == "divergence"
    assert finding.evidence == "The loss is no longer finite: epoch 1, step 3. Training stopped there."


def test_why_a_run_failed_is_a_kind_and_not_its_words():
    failed = {"status": "failed", "reason": "the disk's finite space is used up", "failure": "storage"}
    assert diagnose(made_up(epochs=0, result=failed, recipe={"epochs": 5})) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_fluctuates_more_while_the_learning_rate_is_high_has_no_spikes(seed):
    lr = (1 + np.cos(np.pi * np.arange(100) / 100)) / 2
    noise = np.random.default_rng(seed).normal(size=100) * 0.1 * lr**2
    loss, top1 = 3 - 0.01 * np.arange(100) + noise, 0.3 + 0.003 * np.arange(100) - noise / 4
    history = made_up(epochs=100, val_loss=lambda e: loss[e - 1], val_top1=lambda e: top1[e - 1])
    assert not [finding for finding in diagnose(history) if finding.kind in ("spike", "divergence")]


def test_a_jump_that_never_comes_back_is_a_divergence_at_its_epoch():
    losses = dict.fromkeys(
        ("train_loss", "train_eval_loss", "val_loss"), lambda e: 1.2 + 3 * np.exp(-e / 5) if e < 12 else 4.58
    )
    accuracies = dict.fromkeys(("train_top1", "val_top1"), lambda e: 0.5 if e < 12 else 0.015)
    broken = {**losses, **accuracies, "lr": lambda e: 0.6 if e == 12 else 0.02}
    (finding,) = diagnose(made_up(**broken))
    assert (finding.kind, finding.epochs) == ("divergence", [12])
    assert "it never recovers" in finding.evidence
    (under_way,) = diagnose(made_up(**broken, recipe={"epochs": 30}))
    assert "it has not recovered so far" in under_way.evidence
    assert "30 times that of the epoch before" in finding.evidence


@pytest.mark.parametrize(("val", "rise"), [(5000, 0.004), (0, 0.03)])
def test_a_jump_too_small_to_matter_is_no_divergence(val, rise):
    steady = np.random.default_rng(0).normal(0, 2e-4, 31)
    losses = {
        name: lambda e, at=at: at + steady[e] + rise * (e >= 15)
        for name, at in (("train_loss", 1.2), ("train_eval_loss", 1.1), ("val_loss", 1.4))
    }
    assert "divergence" not in kinds(made_up(30, val, **losses))


@pytest.mark.parametrize("epochs", [1, 6])
def test_a_loss_far_above_guessing_is_a_divergence_from_the_first_epoch(epochs):
    losses = {name: lambda e: 50.0 for name in ("train_loss", "train_eval_loss", "val_loss")}
    (finding,) = diagnose(made_up(epochs=epochs, **GUESSES | losses))
    assert finding.kind == "divergence"
    assert "The training loss stands at 50.00" in finding.evidence


def test_an_epoch_whose_scores_are_unknown_hides_nothing_and_makes_nothing_up():
    spike = {
        "val_loss": lambda e: 1.4 + 2.8 * np.exp(-e / 5) + 1.5 * (e == 12),
        "val_top1": lambda e: 0.63 - 0.58 * np.exp(-e / 5) - 0.2 * (e == 12),
    }
    without = {name: lambda e, value=value: None if e == 3 else value(e) for name, value in spike.items()}
    assert [f.epochs for f in diagnose(made_up(**without)) if f.kind == "spike"] == [[12]]
    rises = made_up(val_top1=lambda e: None if e == 15 else 0.02 * e)
    text = " ".join(found.evidence for found in diagnose(rises))
    assert "nan" not in text
    assert "improving" in kinds(rises)


def test_noise_of_sampling_alone_is_seldom_taken_for_more():
    """The chance is that of as much noise by sampling: of 3,000 curves, about 30 are below 1%."""
    rng, n, sd = np.random.default_rng(0), 5000, 0.005
    moved = np.full(30, 2 * sd**2 * n**2)
    history = SimpleNamespace(column=lambda name: moved / 2, num_val=n)
    chances = [swings(history, 0.5 + sd * rng.normal(size=30))[2] for _ in range(3000)]
    assert 0.005 < np.mean(np.array(chances) < 0.01) < 0.02


def test_seeds_that_differ_by_more_than_sampling_are_told_and_others_are_not():
    rng = np.random.default_rng(0)
    usual = [(rng.random(10_000) < 0.6).mean() for _ in range(5)]
    assert seed_variance("cnn", usual, 10_000) is None
    assert seed_variance("cnn", [0.6, 0.1, 0.62], 10_000).kind == "seed-variance"
    assert seed_variance("cnn", [0.6], 10_000) is None
    limited = seed_variance("cnn", [0.6, 0.1, 0.62], 10_000, limited=True)
    assert "each seed trains on other images" in limited.evidence
    assert limited.advice.startswith("Train on all images")
