"""What an expert reads from runs like these: each was seen on real images, and once read wrongly."""

from dataclasses import replace

import numpy as np
import pytest
from histories import GUESSES, made_up
from record import FOLDER, RECORDED, recorded

from raycifar.analysis.departures import departures
from raycifar.analysis.diagnosis import diagnose
from raycifar.analysis.findings import Finding
from raycifar.analysis.prose import next_steps
from raycifar.models.recipe import Recipe


def at(values):
    return lambda e: float(values[e - 1])


def line(start, end, epochs):
    return at(np.linspace(start, end, epochs))


CAUSE = "A likely cause: compared with the study recipe,"


def run(epochs, train=10_000, **options):
    """A made-up run whose learning rate is its recipe's."""
    recipe = replace(Recipe(), epochs=options.get("recipe", {}).get("epochs", epochs), **changed(options))
    steps = -(-train // recipe.batch_size)
    return made_up(epochs, train=train, **{"lr": lambda e: recipe.learning_rate(e, steps - 1, steps), **options})


def changed(options):
    return {name: value for name, value in options.get("recipe", {}).items() if name != "epochs"}


def read(history):
    return {finding.kind: finding for finding in diagnose(history)}


def commands(history, storage="results"):
    return [step["command"] for step in next_steps(history, diagnose(history), storage)]


RISING = [0.077, 0.157, 0.161, 0.223, 0.262, 0.312, 0.350, 0.357]


def short_run(**options):
    """cnn, 10,000 images, 8 epochs."""
    gaps = [0.0, 0.005, 0.01, 0.02, 0.035, 0.055, 0.075, 0.095]
    return run(
        8,
        val_top1=at(RISING),
        train_eval_top1=at(np.add(RISING, gaps)),
        train_top1=at(RISING),
        train_eval_loss=line(4.1, 2.2, 8),
        val_loss=line(4.2, 2.6, 8),
        **options,
    )


def test_a_curve_that_never_falls_is_not_noisy_and_warm_up_only_bends_it():
    assert "validation-noise" not in read(short_run())


def test_a_rise_that_follows_the_schedule_calls_for_a_longer_one():
    finding = read(short_run())["improving"]
    assert "the end of the schedule. At its end the learning rate is nearly 0" in finding.evidence
    assert finding.advice == "Train with a longer schedule: --epochs 16."
    steady = read(made_up(20, val_top1=lambda e: 0.02 * e))["improving"]
    assert "schedule" not in steady.evidence


def test_a_gap_is_told_with_its_trend_although_no_loss_rises():
    finding = read(short_run())["generalization-gap"]
    assert "a gap of 9.5 points, 6 standard errors, which grows by 2.0 points per epoch" in finding.evidence
    assert "healthy" not in read(short_run())


def test_what_stands_at_14_percent_with_a_growing_gap_is_not_healthy():
    history = run(
        10, val_top1=line(0.12, 0.14, 10), train_eval_top1=line(0.13, 0.22, 10),
        train_eval_loss=line(3.8, 3.2, 10), val_loss=line(3.9, 3.8, 10),
    )  # fmt: skip
    assert "generalization-gap" in read(history)
    assert "healthy" not in read(history)


@pytest.mark.parametrize(
    ("train", "epochs", "steps", "needed"), [(1000, 1, "8 steps, in 1 epoch", 13), (100, 1, "1 step, in 1 epoch", 100)]
)
def test_a_few_steps_are_too_early_and_nothing_else(train, epochs, steps, needed):
    (finding,) = diagnose(run(epochs, train=train, **GUESSES, run={"limit": train}))
    assert finding.kind == "too-early"
    assert steps in finding.evidence
    assert f"take {needed} epochs" in finding.evidence


def test_even_in_a_few_steps_a_loss_can_break():
    failed = {"status": "failed", "failure": "not-finite", "reason": "the loss is no longer finite: epoch 2, step 3"}
    assert list(read(run(1, train=1000, result=failed, **GUESSES))) == ["divergence"]


def test_an_interrupted_run_is_continued_under_its_name():
    little = {"train_eval_loss": lambda e: 4.2, "train_loss": lambda e: 4.3, "val_loss": lambda e: 4.3}
    history = run(1, train=45_000, recipe={"epochs": 8}, run={"name": "mine"}, **little)
    assert list(read(history)) == ["too-early"]
    assert commands(history) == ["raycifar train --model cnn --recipe study --epochs 8 --seed 0 --name mine"]
    assert commands(history, "s3://runs")[0].endswith("--name mine --storage s3://runs")


def test_a_run_that_broke_is_not_continued():
    failed = {"status": "failed", "failure": "not-finite", "reason": "the loss is no longer finite: epoch 4, step 3"}
    history = run(3, recipe={"epochs": 8}, run={"name": "mine"}, result=failed)
    assert not any("mine" in command for command in commands(history))


def test_few_images_call_for_all_of_them_first():
    history = run(
        12, train=2000, run={"limit": 2000}, val_top1=line(0.1, 0.2, 12), train_eval_top1=line(0.1, 0.3, 12),
        train_eval_loss=line(4.0, 3.0, 12), val_loss=line(4.0, 3.4, 12),
    )  # fmt: skip
    assert "--limit" not in commands(history)[0]
    assert read(history)["generalization-gap"].advice.startswith("Train on all images")


def test_overfitting_as_plain_as_it_gets_is_found_where_the_loss_is_noisy():
    loss = [*np.linspace(4.55, 4.24, 10), *np.linspace(4.25, 4.45, 15)]
    history = run(
        25, train=500, val=1000, run={"limit": 500, "val_size": 1000},
        val_loss=at(loss), val_loss_se=lambda e: 0.08,
        train_eval_loss=line(4.5, 0.1, 25), train_loss=line(4.6, 0.4, 25),
        val_top1=at([*np.linspace(0.01, 0.13, 10), *np.full(15, 0.135)]), train_eval_top1=line(0.02, 0.996, 25),
        train_eval_images=lambda e: 500,
    )  # fmt: skip
    found = read(history)
    assert "a gap of 86.1 points" in found["overfitting"].evidence
    assert found["overfitting"].metrics["from_epoch"] == 10
    assert not {"healthy", "plateau", "generalization-gap"} & found.keys()
    assert "--limit" not in commands(history)[0]


def test_a_constant_learning_rate_is_named_beside_the_gap():
    top1 = [*np.linspace(0.03, 0.17, 10), 0.177, 0.193, 0.179, 0.163]
    history = run(
        14, train=3000, recipe={"schedule": "constant", "lr": 0.1}, val_top1=at(top1),
        train_eval_top1=at([*np.linspace(0.03, 0.25, 10), 0.28, 0.29, 0.30, 0.312]),
        train_eval_loss=line(4.3, 2.6, 14), val_loss=line(4.4, 3.8, 14),
    )  # fmt: skip
    finding = read(history)["generalization-gap"]
    assert finding.evidence.startswith(
        "A likely cause: compared with the study recipe, --schedule is constant instead of cosine"
    )
    assert "a gap of 14.9 points" in finding.evidence
    assert "healthy" not in read(history)
    assert not any("--schedule constant" in command for command in commands(history))


def test_noise_does_not_hide_a_gap_that_it_does_not_explain():
    history = run(
        12, train=3000, val=100, recipe={"schedule": "constant"}, run={"val_size": 100},
        val_top1=at([0.05, 0.12, 0.18, 0.22, 0.24, 0.21, 0.23, 0.22, 0.21, 0.24, 0.22, 0.22]),
        train_eval_top1=line(0.1, 0.497, 12), train_eval_loss=line(4, 1.9, 12), val_loss=line(4, 3.3, 12),
        val_gained=lambda e: 6, val_lost=lambda e: 6,
    )  # fmt: skip
    found = read(history)
    assert {"validation-noise", "generalization-gap"} == found.keys()
    assert "a gap of 27.7 points" in found["generalization-gap"].evidence


def test_a_collapse_under_dropout_is_laid_to_the_dropout():
    dead = {"dead_relus": {"2": 1.0}, "gradient_norms": {"0": 0.1, "1": 0.1}}
    history = run(10, recipe={"dropout": 0.9}, diagnostics=lambda e: dead, **GUESSES)
    (finding,) = diagnose(history)
    assert finding.kind == "collapse"
    assert finding.evidence.startswith(f"{CAUSE} --dropout is 0.9 instead of 0.")
    assert finding.advice == "First of all, use --dropout 0."
    assert commands(history)[0] == "raycifar train --model cnn --recipe study --epochs 10"


def test_underfitting_under_weight_decay_is_laid_to_the_weight_decay():
    little = {
        **{name: lambda e: 4.45 for name in ("train_loss", "train_eval_loss", "val_loss")},
        **{name: lambda e: 0.02 for name in ("train_top1", "train_eval_top1", "val_top1")},
    }
    history = run(12, recipe={"weight_decay": 0.3}, **little)
    finding = read(history)["underfitting"]
    assert finding.evidence.startswith(
        "A likely cause: compared with the study recipe, --weight-decay is 0.3 instead of 0.0005"
    )
    assert finding.advice == "First of all, use --weight-decay 0.0005."
    assert commands(history)[0] == "raycifar train --model cnn --recipe study --epochs 12"


def test_what_is_already_so_is_not_advised():
    assert "--augment" not in read(short_run(recipe={"augment": "trivial"}))["generalization-gap"].advice
    assert "--augment trivial" in commands(short_run(recipe={"augment": "trivial"}))[-1]
    done = {"augment": "cutout", "mixup": 0.5, "clip_norm": 1.0}
    advice = read(short_run(recipe=done))["generalization-gap"].advice
    assert "--augment" not in advice
    assert "--mixup" not in advice
    broken = {"status": "failed", "failure": "not-finite", "reason": "the loss is no longer finite"}
    (finding,) = diagnose(run(0, recipe={**done, "epochs": 3}, result=broken))
    assert "--clip-norm" not in finding.advice


def test_the_model_s_own_recipe_is_never_the_cause():
    kinds = ("collapse", "divergence", "underfitting", "overfitting", "generalization-gap", "validation-noise", "spike")
    assert [departures(run(8), Finding(kind, 0.9, "", "", [1])) for kind in kinds] == [[]] * len(kinds)


def test_a_learning_rate_that_is_too_low_is_mended_before_more_epochs_are_tried():
    little = {name: lambda e: 4.4 for name in ("train_loss", "train_eval_loss", "val_loss")}
    first, second = commands(run(8, recipe={"lr": 1e-4}, **little))[:2]
    assert first == "raycifar train --model cnn --recipe study --epochs 8"
    assert second == "raycifar train --model cnn --recipe study --epochs 24"


@pytest.mark.parametrize("epochs", [8, 25, 100])
def test_healthy_runs_raise_no_false_alarm(epochs):
    """Made-up healthy runs: cosine schedules, sampling noise in every score; at most one alarm in fifty."""
    alarms = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        top1 = 0.62 * (1 - np.exp(-np.arange(1, epochs + 1) / (epochs / 4)))
        noisy = top1 + rng.normal(0, 0.004, epochs)
        history = run(
            epochs, train=45_000, val_top1=at(noisy), train_top1=at(top1),
            train_eval_top1=at(top1 + 0.03 + rng.normal(0, 0.012, epochs)),
            train_eval_loss=at(4.3 - 4.6 * top1), val_loss=at(4.4 - 4.6 * top1 + rng.normal(0, 0.01, epochs)),
            train_loss=at(4.5 - 4.6 * top1), val_loss_se=lambda e: 0.025,
        )  # fmt: skip
        alarms += [kind for kind in read(history) if kind not in ("healthy", "improving", "plateau")]
        assert "healthy" in read(history) or alarms
    assert len(alarms) <= 1, alarms


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json")))
def test_recorded_runs_are_read_as_an_expert_reads_them(name):
    """Real images; `record.py` says how they were trained."""
    _, right, wrong = RECORDED[name]
    found = read(recorded(name))
    assert right <= found.keys()
    assert not wrong & found.keys()


def test_a_learning_rate_that_is_far_too_low_is_not_lowered():
    found = read(run(8, recipe={"lr": 1e-4}, **GUESSES))
    assert {"underfitting", "learning-rate-low"} <= found.keys()
    assert "collapse" not in found


def test_a_learning_rate_that_is_far_too_high_is_the_cause_and_not_the_warm_up():
    broken = {"status": "failed", "failure": "not-finite", "reason": "the loss is no longer finite: epoch 1, step 9"}
    found = read(run(0, recipe={"epochs": 3, "lr": 5.0, "warmup": 0.0}, result=broken))
    assert list(found) == ["divergence", "learning-rate-high"]
    assert "recipe" not in found["divergence"].metrics
    slow = read(run(0, recipe={"epochs": 3, "warmup": 0.0}, result=broken))
    assert slow["divergence"].metrics["recipe"] == {"warmup": 0.0}


def test_a_curve_that_the_falling_learning_rate_will_settle_is_not_called_unstable():
    swinging = {"val_top1": lambda e: 0.5 + 0.05 * (-1) ** e, "val_loss": lambda e: 1.5}
    assert "validation-noise" not in read(run(20, recipe={"epochs": 200}, **swinging))
    assert "validation-noise" in read(run(20, **swinging))
    assert "validation-noise" in read(
        run(20, recipe={"epochs": 200, "schedule": "constant", "warmup": 0.0}, **swinging)
    )


def test_validation_that_is_rightly_ahead_is_healthy_too():
    found = read(made_up(train_top1=lambda e: 0.4, train_eval_top1=lambda e: 0.66 - 0.6 * np.exp(-e / 5)))
    assert "validation-above-training" in found
    assert "healthy" in found


def test_no_finding_is_quite_sure():
    for history in (short_run(), run(10, **GUESSES), made_up(val_loss=lambda e: 1.6 + 0.5 * abs(e - 6))):
        assert all(finding.confidence <= 0.99 for finding in diagnose(history))


def test_all_images_come_before_the_recipe_and_the_recipe_before_the_rest():
    history = run(
        12, train=2000, run={"limit": 2000}, recipe={"augment": "none"}, val_top1=line(0.1, 0.2, 12),
        train_eval_top1=line(0.1, 0.5, 12), train_eval_loss=line(4.0, 2.0, 12), val_loss=line(4.0, 3.4, 12),
    )  # fmt: skip
    assert read(history)["generalization-gap"].advice == (
        "Train on all images, without --limit. Then use --augment crop. Then try --augment cutout, --mixup 0.5 or more "
        "weight decay."
    )
    short = {"optimizer": "muon", "warmup": 0.1}
    history = replace(history, run={**history.run, "recipe": {**history.run["recipe"], **short}})
    assert read(history)["generalization-gap"].advice == (
        "Train on all images, without --limit. Then use --augment cutout. Then try --mixup 0.5 or more dropout."
    )
