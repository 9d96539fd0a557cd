"""From finished runs to verdicts and sentences; the statistics themselves are in test_statistics."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from histories import made_up

from raycifar.analysis import comparison
from raycifar.analysis.comparison import Finished, by_model, compare, not_comparable, sentence
from raycifar.analysis.history import RunHistory
from raycifar.errors import RequestError
from raycifar.models.recipe import SHORT

PAIR = {
    "a": "cnn", "b": "vgg16", "difference": 0.03, "low": 0.01, "high": 0.05, "p_adjusted": 0.004, "verdict": "better",
    "seeds_measured": True, "seeds_needed": 5, "images": 10_000, "epochs": 2, "train_images": 2000, "immature": False,
    "runs": [1, 1], "pairs": 1, "too_early": False, "hardly_learned": [],
}  # fmt: skip


def finished(model, seed, accuracy, **recipe):
    history = made_up(epochs=3, recipe=recipe, val_top1=lambda e: 0.1 * e)
    run = {**history.run, "model": model, "seed": seed, "parameters": 1000}
    run["data"] = {**run["data"], "fingerprint": "f"}
    correct = np.random.default_rng(seed).random(2000) < accuracy
    test = {"top1": float(correct.mean()), "top5": 0.9, "loss": 1.0, "images": 2000}
    result = {"status": "finished", "images_per_second": 1000.0, "test": test}
    history = RunHistory(run, history.records, result)
    name = f"{model}-s{seed}"
    return Finished(name, f"runs/{name}", history, correct, correct, 1.0 - correct)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {},
            "After 2 epochs on 2,000 training images, cnn is better than vgg16, by 3.00 points of test accuracy (95% "
            "interval: 1.00 to 5.00, p = 0.004).",
        ),
        (
            {"verdict": "worse", "difference": -0.03, "low": -0.05, "high": -0.01},
            "cnn is worse than vgg16, by 3.00 points of test accuracy (95% interval: 1.00 to 5.00, p = 0.004).",
        ),
        (
            {"verdict": "undecided", "low": -0.01, "p_adjusted": 0.2},
            "cnn and vgg16 can't be told apart: test accuracy differs by +3.00 points (95% interval: -1.00 to "
            "+5.00, p = 0.2). If the difference is as large as it looks, 5 seeds of each model would show it.",
        ),
        (
            {"verdict": "undecided", "low": -0.01, "seeds_needed": None},
            "No number of seeds would show so small a difference on 10,000 test images.",
        ),
        ({"verdict": "undecided", "difference": 0.0}, "There is no difference for more seeds to confirm."),
        (
            {"verdict": "undecided", "too_early": True},
            "it is too early to compare cnn with vgg16: they have hardly learned anything. Their test accuracy differs "
            "by +3.00 points (95% interval: +1.00 to +5.00).",
        ),
        (
            {"hardly_learned": ["vgg16"], "immature": True},
            "p = 0.004). vgg16 has hardly learned anything, and longer training may change the order.",
        ),
        ({"pairs": 3}, "1.00 to 5.00, p = 0.004, adjusted for 3 pairs)."),
        ({"immature": True}, "Both have more to learn, and longer training may change the order."),
        ({"epochs": 1, "train_images": 1}, "After 1 epoch on 1 training image, cnn is better"),
        (
            {"seeds_measured": False},
            "With a single run of a model, the effect of the seed is estimated from how often the runs disagree.",
        ),
    ],
)
def test_a_pair_in_words(change, said):
    assert said in sentence({**PAIR, **change})


@pytest.mark.parametrize("early", [[], ["cnn"], ["vgg16"], ["cnn", "vgg16"]])
def test_models_are_ranked_as_soon_as_one_has_learned(early, monkeypatch):
    found = SimpleNamespace(kind="too-early")
    monkeypatch.setattr(comparison, "diagnose", lambda history: [found] if history.model in early else [])
    monkeypatch.setattr(comparison, "FIT", 1.0)
    runs = [finished(model, seed, right) for model, right in (("cnn", 0.6), ("vgg16", 0.3)) for seed in range(3)]
    (pair,) = compare(by_model(runs), {"cnn": 10, "vgg16": 20}, None)["pairs"]
    assert pair["verdict"] == ("undecided" if len(early) == 2 else "better")
    assert pair["too_early"] == (len(early) == 2)
    assert ("hardly learned" in pair["sentence"]) == bool(early)


def test_networks_that_learned_much_in_few_steps_are_compared():
    runs = [finished(name, 0, right, batch_size=2048) for name, right in (("cnn", 0.6), ("vgg16", 0.3))]
    assert runs[0].history.steps < 100
    (pair,) = compare(by_model(runs), {"cnn": 10, "vgg16": 20}, None)["pairs"]
    assert (pair["verdict"], pair["hardly_learned"]) == ("better", [])


def test_a_clear_difference_is_a_verdict_and_its_costs_are_told():
    runs = [finished("cnn", seed, 0.6) for seed in range(3)] + [finished("vgg16", seed, 0.3) for seed in range(3)]
    found = compare(by_model(runs), {"cnn": 10, "vgg16": 20}, price_per_hour=3.6)
    (pair,) = found["pairs"]
    assert pair["verdict"] == "better"
    assert pair["p_adjusted"] == pair["p_value"] < 1e-6
    assert len(pair["mcnemar"]) == 3
    assert found["models"]["cnn"]["cost"] == pytest.approx(0.03)
    assert found["models"]["cnn"]["at_equal_time"] == pytest.approx(0.3)
    assert found["models"]["vgg16"]["top1"]["n"] == 3


def test_of_several_pairs_the_interval_and_the_seeds_needed_agree_with_the_verdict():
    rng, runs = np.random.default_rng(6), []
    difficulty = rng.normal(size=2000)
    for model, ease in (("cnn", 0.0), ("vgg16", 0.06), ("resnet50", 0.1)):
        for seed in range(3):
            right = rng.normal(difficulty, 0.7) < 0.7 + ease
            runs.append(replace(finished(model, seed, 0.5), correct=right, loss=1.0 - right))
    groups = by_model(runs)
    found = compare(groups, dict.fromkeys(groups, 1), None)["pairs"]
    assert [(pair["verdict"], pair["low"] <= 0 <= pair["high"]) for pair in found] == [
        ("undecided", True), ("worse", False), ("undecided", True)
    ]  # fmt: skip
    del groups["resnet50"]
    (alone,) = compare(groups, dict.fromkeys(groups, 1), None)["pairs"]
    assert (alone["verdict"], alone["low"] <= 0 <= alone["high"]) == ("worse", False)
    assert alone["seeds_needed"] < found[0]["seeds_needed"]


def test_several_recipes_of_a_model_are_named_by_their_difference():
    groups = by_model([finished("cnn", 0, 0.5), finished("cnn", 1, 0.5), finished("cnn", 0, 0.5, lr=0.1)])
    assert {name: len(runs) for name, runs in groups.items()} == {"cnn lr=0.05": 2, "cnn lr=0.1": 1}


def test_recipes_with_a_name_are_named_by_it():
    runs = [finished("cnn", 0, 0.5), finished("cnn", 0, 0.5, **SHORT | {"epochs": 3}), finished("vgg16", 0, 0.5)]
    assert [*by_model(runs)] == ["cnn study", "cnn short", "vgg16"]
    assert [*by_model([*runs, finished("cnn", 0, 0.5, **SHORT | {"epochs": 3, "augment": "none"})])] == [
        "cnn study", "cnn short augment=cutout", "vgg16", "cnn short augment=none",
    ]  # fmt: skip


def test_runs_under_other_conditions_are_refused():
    other = finished("vgg16", 0, 0.5, epochs=9)
    other.run["data"] |= {"train": 5000}
    assert not_comparable([finished("cnn", 0, 0.5), finished("cnn", 1, 0.5)]) == []
    assert not_comparable([finished("cnn", 0, 0.5), other]) == [
        "vgg16-s0 differs from cnn-s0 in training images 5000 (not 45000), epochs 9 (not 3)"
    ]


def test_a_run_that_is_there_twice_is_no_second_seed():
    run, again = finished("cnn", 0, 0.5), finished("cnn", 0, 0.5)
    assert not_comparable([run, run]) == ["cnn-s0 is the same run as cnn-s0"]
    again = replace(again, folder="elsewhere/b", name="b")
    assert not_comparable([run, finished("cnn", 1, 0.5), again]) == ["b is the same run as cnn-s0"]
    again = replace(again, loss=again.loss + 0.01)  # on a GPU, the same command can give other weights
    assert not_comparable([run, again]) == []


def test_too_few_images_without_near_duplicates_are_refused():
    runs = [replace(finished("cnn", seed, 0.5), near_duplicate=np.arange(2000) < 1999) for seed in range(2)]
    with pytest.raises(RequestError, match="too few others are left"):
        comparison.leave_out_near_duplicates(runs)
