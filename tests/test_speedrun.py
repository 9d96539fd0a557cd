"""The recipe that trains the CNN in the least time, at a small size."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import history
from safetensors import safe_open
from safetensors.torch import load_file

from raycifar.data.sources import load
from raycifar.engine.optimizers import Muon, orthogonal
from raycifar.engine.state import Average
from raycifar.models import Architecture
from raycifar.models.cnn import SPEEDRUN, CnnRecipe
from raycifar.models.initial_weights import load_initial_weights

RUN = ("--model", "cnn", "--workers", 0, "--limit", 200, "--val-size", 100, "--recipe", "speedrun")
RUN += ("--epochs", 2, "--batch-size", 100)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_an_orthogonal_update_has_singular_values_near_one_and_the_gradient_s_directions(low):
    for shape in ((64, 27, 3, 3), (512, 256, 3, 3), (100, 4, 3, 3)):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            update = orthogonal(gradient)
        assert (update.shape, update.dtype) == (gradient.shape, gradient.dtype)
        assert torch.equal(update, update.bfloat16()) == low
        singular = torch.linalg.svdvals(update.flatten(1).double())
        assert 0.3 < singular.min() <= singular.max() < 1.3
        left, _, right = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
        exact = left @ right
        assert torch.nn.functional.cosine_similarity(update.flatten().double(), exact.flatten(), dim=0) > 0.95


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
    average, expected = Average(network, 0.5), None
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


def test_it_trains_the_five_blocks_and_its_first_layer_stays(train, small, tmp_path):
    train(*RUN, "--data", small, "--name", "a")
    file = tmp_path / "runs/a/model.safetensors"
    with safe_open(file, "pt") as content:
        about = Architecture.from_json(json.loads(content.metadata()["raycifar"]))
    assert (about.options, about.tta_flip) == ({"whiten": True, "depth": SPEEDRUN.depth}, True)
    weights = load_file(file)
    about.build().load_state_dict(weights)
    filters = load_initial_weights("cnn", SPEEDRUN, load(small)).weights["whiten.weight"]
    assert torch.equal(weights["whiten.weight"], torch.from_numpy(filters))
    assert [weights[f"features.{k}.0.weight"].shape[0] for k in range(5)] == [64, 128, 256, 512, 512]
    again = load_initial_weights("cnn", CnnRecipe(pretrained=str(file)), load(small))  # whose tta_flip is its own
    assert (again.architecture, again.weights.keys()) == (replace(about, tta_flip=False), weights.keys())
    first, last = history(tmp_path / "runs/a")
    assert last["train_loss"] < first["train_loss"] < np.log(100) * 1.1
    recipe = json.loads((tmp_path / "runs/a/run.json").read_text())["recipe"]
    assert (recipe["optimizer"], recipe["whiten"], recipe["epochs"]) == ("muon", True, 2)
