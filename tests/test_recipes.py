"""The hyperparameters and the learning rate they give."""

import dataclasses

import pytest

from raycifar import models
from raycifar.recipes import RECIPES, Recipe


def test_every_model_has_a_recipe():
    assert set(RECIPES) == set(models.NAMES)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step", "constant"])
def test_the_learning_rate_rises_to_its_peak_and_never_again(schedule):
    recipe = Recipe(schedule=schedule, lr=0.1, warmup=0.1)
    rates = [recipe.learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.001)
    assert max(rates) == pytest.approx(0.1)
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert all(rate > 0 for rate in rates)


def test_schedules_end_where_they_say():
    assert Recipe(schedule="cosine", lr=0.1).learning_rate(999, 1000) < 1e-5
    assert Recipe(schedule="linear", lr=0.1, warmup=0.0).learning_rate(500, 1000) == pytest.approx(0.05)
    assert Recipe(schedule="step", lr=0.1, warmup=0.0).learning_rate(850, 1000) == pytest.approx(0.1 / 125)
    assert Recipe(schedule="constant", lr=0.1).learning_rate(999, 1000) == 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": -1},
        {"lr": float("nan")},
        {"lr": -0.1},
        {"ema": 1.0},
        {"label_smoothing": -0.1},
        {"mixup": 0.6, "cutmix": 0.6},
        {"schedule": "polynomial"},
    ],
)
def test_senseless_values_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(Recipe(), **change)
