"""What can be asked for: the same options, with the same defaults, from a command and from Python."""

import inspect
import json
import math

import numpy as np
import pytest

from raycifar import api, compare, train
from raycifar.command import refuse_empty
from raycifar.errors import RequestError
from raycifar.models.architectures.cnn import CnnRecipe
from raycifar.models.recipe import LONG, TRANSFER, Recipe
from raycifar.models.recipes import choose_recipe, recipe_for
from raycifar.workflows.requests import ComparisonRequest, TrainingRequest, parse_workers, to_arguments
from raycifar.workflows.training_run import describe_recipe


def test_a_model_alone_is_a_request(monkeypatch):
    for name in ("RAYCIFAR_DATA", "RAYCIFAR_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    request = TrainingRequest("cnn")
    assert request.recipe == CnnRecipe(**LONG)
    assert (request.data, request.storage, request.workers) == ("cifar100", "results", None)
    assert request.name.startswith("cnn-s0-")
    assert TrainingRequest("resnet50").recipe == Recipe(**TRANSFER)
    monkeypatch.setenv("RAYCIFAR_DATA", "/somewhere")
    assert TrainingRequest("cnn").data == "/somewhere"


@pytest.mark.parametrize(("function", "command"), [(api.train, train.main), (api.compare, compare.main)])
def test_python_has_the_options_of_the_command_with_its_defaults(function, command):
    here = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    there = {p.name: p.default for p in command.params}
    assert here.keys() - {"progress", "models", "model"} == there.keys() - {
        "debug",
        "dry_run",
        "help",
        "names",
        "model",
    }
    shared = here.keys() & there.keys() - {"model", "runs"}
    assert {name: here[name] for name in shared} == {name: there[name] for name in shared}
    assert all(f"    {name}: " in function.__doc__ for name in shared)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epoch": 3}, "unknown option 'epoch'; did you mean 'epochs'?"),
        ({"recipe": 5}, "the recipe is 5: give a name, a TOML file or a run's folder"),
        ({"rungs": (1,)}, "unknown option 'rungs'"),
        ({"epochs": "3"}, "epochs is '3': a whole number is needed"),
        ({"epochs": True}, "epochs is True: a whole number is needed"),
        ({"epochs": -1}, "epochs is -1: it must be at least 1"),
        ({"optimizer": "lion"}, "optimizer is 'lion': choose from sgd"),
        ({"device": "tpu"}, "device is 'tpu': choose from auto, gpu, cpu"),
        ({"device": "mps"}, "--device mps is for --workers 0"),
        ({"device": "mps", "workers": "1:4"}, "--device mps is for --workers 0"),
        ({"seed": -1}, "seed is -1: it must be at least 0"),
        ({"limit": 2.5}, "limit is 2.5: a whole number is needed"),
        ({"cpus_per_worker": 0}, "--cpus-per-worker 0: it must be at least 0.0001"),
        ({"cpus_per_worker": 1e-6}, "--cpus-per-worker 1e-06: it must be at least 0.0001"),
        ({"gpus_per_worker": 0}, "--gpus-per-worker 0: it must be a share of a GPU, above 0"),
        ({"gpus_per_worker": 1.5}, "--gpus-per-worker 1.5: it must be"),
        ({"gpus_per_worker": math.nan}, "gpus_per_worker is nan: a finite number is needed"),
        ({"gpus_per_worker": 0.5, "device": "cpu"}, "--gpus-per-worker 0.5 is for workers on GPUs"),
        ({"gpus_per_worker": 0.5, "workers": 0}, "leave one of them out"),
        ({"gpus_per_worker": 0.5, "workers": "1:4"}, "an elastic run takes whole GPUs"),
        ({"accelerator": "H100", "device": "cpu"}, "--accelerator H100 is for workers on GPUs"),
        ({"optimizer": "muon", "batch_norm": "frozen"}, "--optimizer muon rescales filters, so --batch-norm can't be"),
        ({"name": "../up"}, "'../up' is not a folder name"),
        ({"recipe": "fast"}, "--recipe fast is neither a recipe of cnn"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_with_its_value(options, says):
    with pytest.raises(RequestError, match=r"^[^\n]*$") as refusal:
        TrainingRequest.of("cnn", **options)
    assert says in str(refusal.value)


def test_whole_numbers_are_numbers_and_fewer_epochs_reach_both_stages():
    request = TrainingRequest.of("resnet50", lr=1, wait=5, epochs=2)
    assert (request.recipe.lr, request.recipe.head_epochs) == (1.0, 1)
    assert type(request.recipe.lr) is float


def test_numpys_numbers_are_as_good_as_pythons():
    options = {"epochs": np.int64(3), "lr": np.float32(0.5), "warmup": np.float64(0), "seed": np.uint8(7)}
    options |= {"limit": np.int32(500), "wait": np.int64(5), "gpus_per_worker": np.float16(0.5)}
    request = TrainingRequest.of("cnn", **options, workers=np.int64(2), name="a")
    assert request == TrainingRequest.of("cnn", **{k: v.item() for k, v in options.items()}, workers=2, name="a")
    numbers = {**vars(request), **vars(request.recipe)}
    assert all(type(numbers[name]) in (int, float) for name in (*options, "workers"))
    assert request.recipe.augment == "cutout"  # as of any short training
    assert Recipe(epochs=np.int64(3), lr=1) == Recipe(epochs=3, lr=1.0)
    assert json.dumps(vars(Recipe(epochs=np.int64(3), lr=np.float32(0.5))))
    for wrong in (
        {"epochs": np.float64(3)},
        {"lr": np.float32("nan")},
        {"epochs": np.int64(0)},
        {"epochs": np.bool_(1)},
    ):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            TrainingRequest.of("cnn", **wrong)


@pytest.mark.parametrize(
    ("given", "wanted"), [(None, None), (0, 0), ("4", 4), ("1:4", (1, 4)), ((1, 4), (1, 4)), ("2:2", 2)]
)
def test_workers_are_given_as_a_number_or_a_range(given, wanted):
    assert parse_workers(given) == wanted


@pytest.mark.parametrize("given", ["many", "4:2", "0:2", -1, "1:65", 1.5])
def test_workers_that_make_no_sense_are_refused(given):
    with pytest.raises(RequestError, match="--workers "):
        parse_workers(given)


def test_a_command_asks_for_the_same_as_the_request_it_is_made_of():
    request = TrainingRequest(
        "cnn", CnnRecipe(epochs=3, lr=0.07, tta_flip=True), workers=(1, 4), report=False, wait=7.5
    )
    context = train.main.make_context("train", to_arguments(request))
    refuse_empty(context)  # the recipe's `progressive` is empty
    asked = context.params
    options = {name: value for name, value in asked.items() if name not in ("model", "debug", "dry_run")}
    assert TrainingRequest.of(asked["model"], **options) == request


def test_a_comparison_gives_each_model_its_own_recipe_and_hands_on_the_rest():
    request = ComparisonRequest.of(["cnn", "resnet50"], epochs=4, limit=500, max_failures=1, gpus_per_worker=0.25)
    assert request.recipes["cnn"].pretrained == "none"
    assert request.recipes["resnet50"].pretrained == "imagenet"
    assert request.fixed == {"epochs"}
    trial = request.training("cnn")
    assert (trial.limit, trial.max_failures, trial.recipe.epochs, trial.checkpoint_steps) == (500, 1, 4, 200)
    assert trial.gpus_per_worker == 0.25


def test_a_recipe_is_told_by_what_differs_and_without_what_is_switched_off():
    own, off = recipe_for("cnn"), Recipe()
    told = describe_recipe("cnn", own)
    assert told.startswith(f"the cnn's default recipe: epochs {own.epochs}, batch_size {own.batch_size}, optimizer ")
    for name in ("muon_steps", "layer_decay", "norm_lr", "mixup"):
        assert (f"{name} " in told) == (getattr(own, name) != getattr(off, name))
    changed = describe_recipe("cnn", choose_recipe("cnn", mixup=0.55, epochs=3))
    assert changed.startswith("epochs 3, mixup 0.55; else the cnn's default recipe: batch_size ")
    plain = describe_recipe("cnn", choose_recipe("cnn", "study", mixup=0.55, epochs=3))
    assert plain.startswith("epochs 3, mixup 0.55; else the study recipe: batch_size ")
    assert changed.count("epochs") == 1
    assert "pretrained imagenet" in describe_recipe("resnet50", recipe_for("resnet50"))


@pytest.mark.parametrize("model", [None, 3, ["cnn"]])
def test_what_is_no_name_of_a_model_is_refused(model):
    with pytest.raises(RequestError, match="no model is named" if model else "give --model"):
        TrainingRequest.of(model)
    with pytest.raises(RequestError, match="no model is named"):
        ComparisonRequest.of(["cnn", model])


def test_a_path_is_as_good_as_its_text(tmp_path):
    assert TrainingRequest.of("cnn", storage=tmp_path, data=tmp_path / "d").storage == str(tmp_path)
