"""What a search varies, and that where it looks next depends on nothing but what is known."""

import os
from dataclasses import replace

import pytest

from raycifar.errors import RequestError
from raycifar.models.architectures.cnn import CnnRecipe
from raycifar.models.architectures.speedrun import SPEEDRUN
from raycifar.models.recipe import Recipe
from raycifar.workflows.search_space import PastTrial, default_space, read_space, space_to_json, suggest

BASE = Recipe(epochs=4)


def anything(recipe):
    """Every recipe can be trained."""


def go_on(space, trials, count):
    while len(trials) < count:
        recipe = suggest(space, BASE, trials, seed=0, check=anything)
        # A made-up landscape: the nearer lr is to 0.02, the better.
        score = 1 / (1 + abs(recipe.lr - 0.02))
        trials = [*trials, PastTrial(recipe, "stopped" if len(trials) % 4 == 3 else "finished", [score / 2, score])]
    return trials


def test_the_first_trial_is_the_recipe_itself():
    assert suggest(default_space(BASE), BASE, [], seed=0, check=anything) == BASE


@pytest.mark.parametrize("recipe", [BASE, SPEEDRUN])
def test_the_recipe_lies_in_the_space_around_it(recipe):
    for name, distribution in default_space(recipe).items():
        assert distribution._contains(distribution.to_internal_repr(getattr(recipe, name))), name


def test_batches_leave_two_images_for_each_worker_and_the_learning_rate_is_above_0():
    recipe = replace(BASE, batch_size=128)
    for workers, sizes in ((1, (64, 128, 256)), (32, (64, 128, 256)), (40, (128, 256)), (64, (128, 256))):
        assert default_space(recipe, workers)["batch_size"].choices == sizes
    with pytest.raises(RequestError, match="give a --lr above 0"):
        default_space(replace(BASE, lr=0.0))


def test_a_search_that_is_taken_up_again_goes_on_as_if_it_had_not_been_stopped():
    space = default_space(BASE)
    whole = go_on(space, [], 9)
    assert go_on(space, whole[:4], 9) == whole
    assert len({trial.recipe for trial in whole}) == 9
    assert {trial.recipe.epochs for trial in whole} == {4}


def test_the_search_finds_what_is_good():
    space = {"lr": default_space(BASE)["lr"]}
    tried = [trial.recipe.lr for trial in go_on(space, [], 30)]
    late, early = (sorted(abs(lr - 0.02) for lr in part) for part in (tried[15:], tried[:15]))
    assert late[7] < early[7]


def test_trials_that_failed_or_lie_outside_the_space_are_passed_over(tmp_path):
    file = tmp_path / "space.toml"
    file.write_text("[lr]\nmin = 0.1\nmax = 0.2\n")
    space = read_space(str(file), "vgg16")
    trials = [PastTrial(BASE, "finished", [0.5]), PastTrial(Recipe(epochs=4, lr=0.15), "failed", [])]
    assert 0.1 <= suggest(space, BASE, trials, seed=0, check=anything).lr <= 0.2


def test_a_space_is_read_from_a_file_alone(tmp_path):
    os.mkfifo(tmp_path / "space.toml")
    with pytest.raises(RequestError, match=r"space\.toml can't be read: it is a device, a pipe or a socket"):
        read_space(str(tmp_path / "space.toml"), "cnn")


def test_a_space_is_read_from_toml(tmp_path):
    file = tmp_path / "space.toml"
    file.write_text("""
[lr]
min = 0.01
max = 1.0
log = true
[batch_size]
min = 32
max = 64
[optimizer]
choices = ["sgd", "adamw"]
""")
    assert space_to_json(read_space(str(file), "vgg16")) == {
        "lr": {"min": 0.01, "max": 1.0, "log": True},
        "batch_size": {"min": 32, "max": 64, "log": False},
        "optimizer": ["sgd", "adamw"],
    }


def test_a_model_s_own_options_can_be_varied_and_other_models_leave_them_out(tmp_path):
    file = tmp_path / "space.toml"
    file.write_text("[lr]\nmin = 0.01\nmax = 1.0\n[depth]\nmin = 1\nmax = 3\n[whiten]\nchoices = [true, false]\n")
    assert read_space(str(file), "vgg16").keys() == {"lr"}
    space, base = read_space(str(file), "cnn"), CnnRecipe(epochs=4)
    tried = [PastTrial(base, "finished", [0.1])]
    for _ in range(5):
        tried.append(PastTrial(suggest(space, base, tried, seed=0, check=anything), "finished", [0.1]))
    assert {trial.recipe.depth for trial in tried} == {1, 2, 3}
    assert {trial.recipe.whiten for trial in tried} == {True, False}
    file.write_text("[depth]\nmin = 0\nmax = 3\n")
    with pytest.raises(RequestError, match=r"\[depth\]: depth is 0: it must be from 1 to 100"):
        read_space(str(file), "cnn")
    with pytest.raises(RequestError, match="names no field of the recipe of vgg16"):
        read_space(str(file), "vgg16")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[learning_rate]\nmin = 1\nmax = 2", "[learning_rate]: a search can't vary it: choose from batch_size, "),
        ("[epochs]\nmin = 1\nmax = 2", "[epochs]: a search can't vary it"),
        ("[lr]\nmin = 1", "[lr]: min and max are needed, or choices"),
        ("[lr]\nmin = 2.0\nmax = 1.0", "[lr]: "),
        ("[lr]\nmin = -1.0\nmax = 1.0", "[lr]: lr is -1.0: it must be 0 or more"),
        ("[lr]\nlow = 1", "[lr]: a table is needed of choices, log, max, min"),
        ("[optimizer]\nmin = 1\nmax = 2", "[optimizer]: it takes choices"),
        ("[optimizer]\nchoices = ['lion']", "[optimizer]: optimizer is 'lion': choose from sgd, adamw"),
        ("lr = 3", "[lr]: a table is needed"),
        ("", "names no field of the recipe"),
        ("[lr", "can't be read: "),
    ],
)
def test_a_space_that_makes_no_sense_is_refused_in_a_sentence(tmp_path, text, says):
    file = tmp_path / "space.toml"
    file.write_text(text)
    with pytest.raises(RequestError, match="--space") as caught:
        read_space(str(file), "vgg16")
    assert says in str(caught.value)


def test_values_that_do_not_go_together_are_not_tried(tmp_path):
    file = tmp_path / "space.toml"
    file.write_text("[mixup]\nmin = 0.0\nmax = 0.9\n[cutmix]\nmin = 0.0\nmax = 0.9\n[head_epochs]\nmin = 0\nmax = 6\n")
    space, tried = read_space(str(file), "vgg16"), [PastTrial(BASE, "finished", [0.1])]
    for _ in range(20):
        recipe = suggest(space, BASE, tried, seed=0, check=anything)
        assert recipe == suggest(space, BASE, tried, seed=0, check=anything)
        tried.append(PastTrial(recipe, "finished", [recipe.mixup]))
    assert len({trial.recipe for trial in tried}) == 21
    assert max(trial.recipe.mixup + trial.recipe.cutmix for trial in tried) <= 1
    assert max(trial.recipe.head_epochs for trial in tried) <= 4
