"""The hyperparameters and the learning rate they give."""

import dataclasses

import pytest

from raycifar.recipes import SCRATCH, TRANSFER, Recipe, recipe_for


def test_the_study_s_resnet_50_begins_with_imagenet_weights_and_the_others_with_none():
    assert recipe_for("cnn") == recipe_for("vgg16") == recipe_for("resnet50", "none") == SCRATCH
    assert recipe_for("resnet50") == recipe_for("timm:test_vit") == TRANSFER
    assert recipe_for("vgg16", "a.pth") == dataclasses.replace(TRANSFER, pretrained="a.pth")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step", "constant"])
def test_the_learning_rate_rises_to_its_peak_and_never_again(schedule):
    recipe = Recipe(epochs=10, schedule=schedule, lr=0.1, warmup=0.1)
    rates = [recipe.learning_rate(epoch, step, 100) for epoch in range(1, 11) for step in range(100)]
    assert rates[0] == pytest.approx(0.001)
    assert max(rates) == pytest.approx(0.1)
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert all(rate > 0 for rate in rates)


def test_schedules_end_where_they_say():
    assert Recipe(epochs=10, schedule="cosine", lr=0.1).learning_rate(10, 99, 100) < 1e-5
    assert Recipe(epochs=10, schedule="linear", lr=0.1, warmup=0.0).learning_rate(6, 0, 100) == pytest.approx(0.05)
    assert Recipe(epochs=10, schedule="step", lr=0.1, warmup=0.0).learning_rate(9, 50, 100) == pytest.approx(0.1 / 125)
    assert Recipe(epochs=10, schedule="constant", lr=0.1).learning_rate(10, 99, 100) == 0.1


def test_each_stage_has_a_warm_up_and_a_schedule_of_its_own():
    recipe = Recipe(epochs=5, head_epochs=2, lr=0.1, warmup=0.1)
    rates = {epoch: [recipe.learning_rate(epoch, step, 100) for step in range(100)] for epoch in range(1, 6)}
    assert [recipe.stage(epoch) for epoch in range(1, 7)] == ["head", "head", "whole", "whole", "whole", "whole"]
    assert rates[1][0] < 0.01
    assert rates[3][0] < 0.01
    assert rates[2][-1] < 1e-4
    assert rates[5][-1] < 1e-4
    assert max(rates[1]) == pytest.approx(0.1)
    assert max(rates[3]) == pytest.approx(0.1)


def test_a_head_that_is_trained_to_the_end_stays_alone():
    recipe = Recipe(epochs=3, head_epochs=3)
    assert {recipe.stage(epoch) for epoch in range(1, 5)} == {"head"}


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
        {"erasing": 1.5},
        {"augment": "magic"},
        {"schedule": "polynomial"},
        {"image_size": 16},
        {"layer_decay": 0.0},
        {"head_epochs": 201},
    ],
)
def test_senseless_values_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(Recipe(), **change)
