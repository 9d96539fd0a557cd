"""Runs in which something is provoked: `python tests/provoked.py NAME DATA STORAGE` trains one, in this process."""

import sys
from contextlib import ExitStack

from torch import nn

from raycifar.models import cnn
from raycifar.models.recipe import Recipe
from raycifar.terminal import Screen
from raycifar.workflows.requests import TrainingRequest
from raycifar.workflows.training import train

# What is changed of the recipe, how many images it takes, how many are held out, and what must be found.
PROVOKED = {
    "dies": ({"epochs": 3, "lr": 0.5, "warmup": 0.0}, 10_000, 5000, "collapse"),
    "overfits": ({"epochs": 40, "augment": "none", "label_smoothing": 0.0}, 1000, 5000, "overfitting"),
    "underfits": ({"epochs": 1, "lr": 2e-4}, None, 5000, "underfitting"),
    "breaks": ({"epochs": 12, "augment": "flip", "schedule": "constant", "lr": 0.02}, 10_000, 5000, "divergence"),
    "jumps": (
        {"epochs": 12, "augment": "flip", "schedule": "constant", "lr": 0.01, "clip_norm": 1.0, "batch_size": 64},
        5000,
        2000,
        "spike",
    ),
    "is validated by few": ({"epochs": 8, "augment": "flip"}, 10_000, 200, "validation-noise"),
    "is augmented much": (
        {"epochs": 6, "augment": "cutout", "mixup": 0.4, "dropout": 0.3},
        20_000,
        5000,
        "validation-above-training",
    ),
    "is well": ({"epochs": 4, "augment": "none"}, None, 5000, "healthy"),
}
SPIKE = 7  # the epoch whose learning rate is thirty times the others'


def without_batch_norm(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))


def run(name: str, data: str, storage: str) -> None:
    changes, limit, val_size, _ = PROVOKED[name]
    recipe = Recipe(**{**vars(Recipe()), **changes})
    if name == "dies":
        cnn.block = without_batch_norm
    if name in ("jumps", "breaks"):
        usual = Recipe.learning_rate
        Recipe.learning_rate = lambda self, epoch, *at: usual(self, epoch, *at) * (30 if epoch == SPIKE else 1)
    settings = {"val_size": val_size, "limit": limit, "workers": 0, "device": "cpu", "max_failures": 0}
    request = TrainingRequest("cnn", recipe, name=name.replace(" ", "-"), data=data, storage=storage, **settings)
    train(request, Screen(), ExitStack())


if __name__ == "__main__":
    run(*sys.argv[1:])
