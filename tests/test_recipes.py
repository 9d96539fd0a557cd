"""The hyperparameters, the learning rate they give, and how a recipe is chosen: by name, from a file, from a run."""

import dataclasses
import json
from typing import get_args

import pytest
from command import Recipes, finish

from raycifar import models
from raycifar.errors import RequestError
from raycifar.models.architectures.cnn import CnnRecipe
from raycifar.models.architectures.speedrun import SPEEDRUN
from raycifar.models.recipe import LONG, SHORT, TRANSFER, Optimizer, Recipe, changes, describe_changes
from raycifar.models.recipes import (
    choose_recipe,
    list_recipes,
    model_of,
    nearest_recipe,
    options_for,
    recipe_for,
    recipe_from_json,
    resolve,
    shared_options,
    to_toml,
)

FORMER = CnnRecipe(optimizer="muon", whiten=True, depth=2, tta_flip=True)  # as earlier versions' speedrun

# What is in a recipe --------------------------------------------------------------------------------


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
        {"optimizer": "lion"},
        {"muon_steps": 0},
        {"norm_lr": -1.0},
        {"progressive": "20"},
        {"progressive": "20:0.5,24:0.2"},
        {"progressive": "20:1.0"},
        {"progressive": "300:0.5"},
        {"epochs": 2.5},
        {"epochs": True},
        {"lr": "high"},
        {"tta_flip": 1},
        {"pretrained": None},
    ],
)
def test_senseless_values_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(Recipe(), **change)


def test_images_are_small_at_first_where_the_recipe_says_so():
    recipe = Recipe(epochs=2, progressive="20:0.15,24:0.5")
    sizes = [recipe.image_size_at(epoch, step, 10) for epoch in (1, 2) for step in range(10)]
    assert sizes == [20] * 3 + [24] * 7 + [None] * 10
    assert Recipe().image_size_at(1, 0, 10) is None


def test_a_recipe_says_how_it_differs_from_another():
    assert changes(FORMER, CnnRecipe()).keys() >= {"whiten", "depth", "tta_flip", "optimizer"}
    assert describe_changes(CnnRecipe(depth=2, lr=0.1), CnnRecipe()) == "lr 0.1, depth 2"
    assert describe_changes(CnnRecipe(), CnnRecipe()) == ""


def test_every_optimizer_is_one_that_training_knows():
    import torch

    from raycifar.engine.optimizers import build_optimizer

    for name in get_args(Optimizer):
        network = torch.nn.Linear(2, 2)
        build_optimizer(network, [["weight"], ["bias"]], Recipe(optimizer=name))


# Which there are ------------------------------------------------------------------------------------


def test_the_study_s_resnet_50_begins_with_imagenet_weights_and_the_others_with_none():
    assert recipe_for("vgg16") == recipe_for("resnet50", "none") == Recipe()
    assert recipe_for("resnet50") == recipe_for("timm:test_vit") == Recipe(**TRANSFER)
    assert recipe_for("vgg16", "a.pth") == Recipe(**{**TRANSFER, "pretrained": "a.pth", "image_size": 0})


def test_short_training_has_a_recipe_for_it_unless_another_is_named(toml):
    assert recipe_for("cnn") == choose_recipe("cnn", epochs=200) == CnnRecipe(**LONG)
    assert choose_recipe("cnn", epochs=100).augment == "trivial"
    assert choose_recipe("cnn", epochs=99) == choose_recipe("cnn", "short", epochs=99)
    assert choose_recipe("cnn", epochs=99) == CnnRecipe(**SHORT | {"epochs": 99})
    assert choose_recipe("cnn", "scratch", epochs=5).augment == "trivial"
    assert choose_recipe("cnn", "study", epochs=5) == CnnRecipe(epochs=5)
    assert choose_recipe("cnn", toml("epochs = 5")) == CnnRecipe(**SHORT | {"epochs": 5})
    assert choose_recipe("cnn", toml("lr = 0.2"), epochs=5) == CnnRecipe(**SHORT | {"epochs": 5, "lr": 0.2})
    assert choose_recipe("timm:test_vit", pretrained="none", epochs=5) == Recipe(epochs=5)  # it has no such recipe
    for model in ("vgg16", "resnet50"):
        assert choose_recipe(model, pretrained="none", epochs=5) == Recipe(**SHORT | {"epochs": 5})
    assert choose_recipe("speedrun", epochs=5) == dataclasses.replace(SPEEDRUN, epochs=5)
    assert choose_recipe("cnn", pretrained="a.pth", epochs=5).head_epochs == TRANSFER["head_epochs"]
    probe = toml("pretrained = 'a.pth'\nepochs = 20\nhead_epochs = 20")
    assert choose_recipe("resnet50", probe, epochs=5).head_epochs == 5


@pytest.mark.parametrize("model", models.names())
def test_each_model_has_its_own_and_the_study_s_each_with_what_it_is_for(model):
    own, *others = list_recipes(model)
    assert own.own
    assert own.recipe == recipe_for(model)
    assert not any(other.own for other in others)
    assert {"speedrun" if model == "speedrun" else "scratch", "study"} <= {each.name for each in (own, *others)}
    assert all(each.purpose for each in (own, *others))
    assert choose_recipe(model, "study") == type(own.recipe)()


@pytest.mark.parametrize(
    ("model", "recipe", "base", "own"),
    [
        ("cnn", CnnRecipe(**LONG), "scratch", True),
        ("cnn", CnnRecipe(**SHORT | {"epochs": 5, "augment": "none"}), "short", True),
        ("cnn", CnnRecipe(**SHORT | {"epochs": 150}), "short", False),
        ("cnn", CnnRecipe(epochs=5, augment="flip"), "study", False),
        ("cnn", CnnRecipe(**SHORT | {"epochs": 5, "optimizer": "sgd", "lr": 9.0}), "study", False),
        ("cnn", CnnRecipe(**SHORT | {"epochs": 5, "optimizer": "adamw"}), "short", True),
        ("resnet50", Recipe(**TRANSFER | {"epochs": 1, "head_epochs": 0, "lr": 0.1}), "transfer", True),
        ("resnet50", Recipe(**TRANSFER | {"pretrained": "a.pth", "image_size": 0}), "transfer", True),
        ("vgg16", Recipe(), "study", True),
        ("vgg16", Recipe(epochs=5), "study", False),
        ("timm:test_vit", Recipe(epochs=5), "study", True),
    ],
)
def test_the_nearest_recipe_has_the_same_optimizer_and_the_fewest_differences(model, recipe, base, own):
    nearest = nearest_recipe(model, recipe)
    assert (nearest.name, nearest.own) == (base, own)


GIVEN = [
    {name: value for name, value in given.items() if value is not None} | changed
    for recipe in (None, "scratch", "short", "transfer", "study")
    for pretrained in (None, "none", "imagenet", "a.pth")
    for epochs in (None, 1, 16, 20, 100, 200)
    for given in [{"recipe": recipe, "pretrained": pretrained, "epochs": epochs}]
    for changed in ({}, {"optimizer": "muon"}, {"optimizer": "adamw", "lr": 0.001}, {"augment": "none"})
]


@pytest.mark.parametrize("model", [*models.names(), "timm:test_vit"])
def test_the_options_for_a_recipe_choose_that_recipe(model):
    recipes = {
        resolve(model, **options) for options in GIVEN if options.get("recipe", "study") in models.recipes_of(model)
    }
    assert len(recipes) > 100
    for recipe in recipes:
        assert resolve(model, **options_for(model, recipe)) == recipe
    for recipe in (recipe_for(model), choose_recipe(model, pretrained="none", epochs=5)):
        assert options_for(model, recipe).keys() <= {"pretrained", "epochs"}


def test_several_models_are_given_their_recipes_by_the_same_options():
    for options in ({"pretrained": "none", "epochs": 14}, {"epochs": 16}, {"recipe": "study", "lr": 0.1}, {}):
        recipes = [(model, choose_recipe(model, **options)) for model in ("cnn", "resnet50", "vgg16")]
        found = shared_options(recipes)
        assert found is not None
        assert [(model, choose_recipe(model, **found)) for model, _ in recipes] == recipes
    assert shared_options([("cnn", choose_recipe("cnn", "study")), ("vgg16", choose_recipe("vgg16", lr=0.2))]) is None
    assert shared_options([("cnn", choose_recipe("cnn", depth=2)), ("vgg16", choose_recipe("vgg16"))]) is None


# Choosing one ---------------------------------------------------------------------------------------


@pytest.fixture
def toml(tmp_path):
    def write(text):
        (tmp_path / "mine.toml").write_text(text)
        return str(tmp_path / "mine.toml")

    return write


@pytest.fixture
def run(tmp_path):
    """The folder of a run with some recipe; no more of it is read."""

    def make(model, recipe):
        (tmp_path / "a").mkdir()
        (tmp_path / "a/run.json").write_text(json.dumps({"model": model, "recipe": recipe}))
        return str(tmp_path / "a")

    return make


def test_what_a_file_leaves_out_is_the_model_s_own(toml):
    file = toml("lr = 1\naugment = 'cutout'\ndepth = 2\ntta_flip = true\n")
    assert choose_recipe("cnn", file) == CnnRecipe(**LONG | {"lr": 1.0, "augment": "cutout"}, depth=2, tta_flip=True)
    assert choose_recipe("cnn", file, lr=0.2).lr == 0.2
    assert choose_recipe("resnet50", toml("pretrained = 'none'")) == Recipe()
    assert choose_recipe("resnet50", toml("epochs = 1")) == Recipe(**{**TRANSFER, "epochs": 1, "head_epochs": 0})


@pytest.mark.parametrize(
    ("model", "name"), [(model, each.name) for model in models.names() for each in list_recipes(model)]
)
def test_what_is_shown_in_full_is_a_file_that_gives_the_same_recipe(toml, model, name):
    recipe = choose_recipe(model, name)
    assert choose_recipe(model, toml(to_toml(recipe))) == recipe


def test_a_run_s_recipe_is_taken_over(run):
    folder = run("cnn", dataclasses.asdict(FORMER))
    assert choose_recipe("cnn", folder) == FORMER
    assert choose_recipe("cnn", folder, epochs=3) == dataclasses.replace(FORMER, epochs=3)
    assert model_of(folder) == "cnn"


def test_a_recipe_of_one_model_brings_its_model_along(toml):
    assert model_of("speedrun") == "speedrun"
    for recipe in (None, "study", "scratch", "nothing", toml("lr = 1")):
        with pytest.raises(RequestError, match=r"^give --model: cnn, "):
            model_of(recipe)


@pytest.mark.parametrize("model", ["cnn", "vgg16"])
def test_a_recipe_that_an_earlier_version_wrote_is_read(model, run):
    old = {"epochs": 7, "lr": 0.5, "mirror": True, "whiten": model == "cnn", "depth": 1}
    expected = Recipe(epochs=7, lr=0.5, tta_flip=True)
    if model == "cnn":
        expected = CnnRecipe(**dataclasses.asdict(expected), whiten=True)
    assert recipe_from_json(model, old) == choose_recipe(model, run(model, old)) == expected


def test_options_that_are_given_change_the_recipe_and_a_short_run_reaches_both_stages():
    assert choose_recipe("resnet50", epochs=2, lr=0.3) == Recipe(
        **{**TRANSFER, "epochs": 2, "lr": 0.3, "head_epochs": 1}
    )
    assert choose_recipe("speedrun", epochs=9) == dataclasses.replace(SPEEDRUN, epochs=9)
    for pretrained in ("none", "a.safetensors"):
        expected = dataclasses.replace(SPEEDRUN, pretrained=pretrained)
        assert choose_recipe("speedrun", pretrained=pretrained) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rat = 0.1", "mine.toml: a recipe has no field 'learning_rat'; did you mean "),
        ("batchsize = 3", "a recipe has no field 'batchsize'; did you mean 'batch_size'?"),
        ("epochs = 'many'", "epochs is 'many': a whole number is needed."),
        ("lr = true", "lr is True: a number is needed."),
        ("augment = 'rotate'", "augment is 'rotate': choose from none, flip, "),
        ("depth = 2", "depth is an option of cnn, not of vgg16."),
        ("[lr]\nmin = 1", "lr is {'min': 1}: a number is needed."),
        ("lr: 0.1", "it is not a TOML file: "),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_a_sentence(toml, text, says):
    with pytest.raises(RequestError, match=r"^--recipe ") as caught:
        choose_recipe("vgg16", toml(text))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_recipe_of_the_model_is_refused_in_a_sentence(run, tmp_path):
    folder = run("cnn", {})
    for wanted, says in (
        ("speedrun", "--recipe speedrun is for --model speedrun, not for vgg16."),
        (folder, "is a run of cnn, not of vgg16."),
        (
            str(tmp_path),
            "is neither a recipe of vgg16 (scratch, short, transfer, study), nor a TOML file, nor a run's folder.",
        ),
        ("studi", "--recipe studi is neither "),
        ("", "the recipe is '': give a name, "),
    ):
        with pytest.raises(RequestError) as caught:
            choose_recipe("vgg16", wanted)
        assert says in str(caught.value)


# The commands ---------------------------------------------------------------------------------------


def test_the_command_lists_them_and_shows_one_in_full():
    said = finish(Recipes(storage=None)).stdout
    assert [line.split()[:2] for line in said.splitlines() if "speedrun" in line] == [
        ["speedrun", name] for name in ("speedrun", "study")
    ]
    assert said.count("study") == len(models.names())
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 80
    assert 'optimizer = "muon"' in finish(Recipes("speedrun", storage=None)).stdout
    assert "needs a model" in finish(Recipes("--recipe", "speedrun", storage=None), code=2).stderr
    assert "timm has no model named 'nope'" in finish(Recipes("timm:nope", storage=None), code=2).stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--depth", 2), "depth is an option of cnn, not of vgg16."),
        (("--recipe", "speedrun"), "--recipe speedrun is for --model speedrun, not for vgg16."),
        (("--epochs", 0), "epochs is 0"),
    ],
)
def test_a_wrong_recipe_ends_a_command_with_2_and_one_sentence(train, tmp_path, args, says):
    refused = train("--model", "vgg16", "--data", "synthetic:1000", *args, code=2)
    assert says in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
