"""Runs in which something is provoked: `python tests/provoked.py DATA [SECONDS]` records those that aren't recorded.

Real images, in this process, on one core. The networks are thin cnns, with a fraction of the cnn's filters, which take
a fraction of its time.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raycifar.analysis.history import RunHistory
from raycifar.errors import WorkError
from raycifar.models.architectures import cnn
from raycifar.models.recipe import Recipe
from raycifar.storage.run_folder import RESULT, RUN, RunFolder
from raycifar.storage.schemas import EpochRecord
from raycifar.terminal import Screen
from raycifar.workflows.requests import TrainingRequest
from raycifar.workflows.training import train

FOLDER = Path(__file__).with_name("recorded") / "provoked"
LENGTHS = (3, 8, 25)
TRENDS = {"healthy", "improving", "plateau", "too-early"}  # no diseases: they stand beside any
KEPT = [
    *("train_loss", "train_top1", "train_eval_loss", "train_eval_top1", "train_eval_images", "lr", "diagnostics"),
    *("val_loss", "val_top1", "val_loss_se", "val_gained", "val_lost", "grad_norm", "grad_norm_max", "rise"),
]


@dataclass(frozen=True)
class Provoked:
    """A disease, and how it is provoked.

    found: the kinds that must be found, besides trends. may: others that may be found. cause: the field of the recipe
    that must be blamed. changes: of the recipe. train, val: images.
    lengths: numbers of epochs in which it can be seen. seeds: of each. thin: the fraction of the cnn's filters that the
    network has, as a divisor. batch_norm: whether it has any. burst: the factor by which the learning rate is too high
    in a single epoch, in mid-run. test: whether the test set is scored.
    """

    found: set[str]
    may: frozenset[str] = frozenset()
    cause: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    train: int = 1000
    val: int = 500
    lengths: tuple[int, ...] = LENGTHS
    seeds: int = 3
    thin: int = 8
    batch_norm: bool = True
    burst: float = 1.0
    test: bool = False


SMALL = {"batch_size": 32, "lr": 0.02}
MANY_STEPS = {"batch_size": 16}
BROKEN = frozenset({"collapse", "divergence"})
BARE = {**MANY_STEPS, "augment": "none", "label_smoothing": 0.0, "lr": 0.02}
CALM = {**SMALL, "schedule": "constant", "lr": 0.01, "clip_norm": 1.0}
GAP = frozenset({"generalization-gap"})  # beyond the noise
UNDERFITS = frozenset({"underfitting"})  # so thin a network, on so few images
DULL = frozenset({"collapse", "underfitting"})
PROVOKED = {
    "too early": Provoked({"too-early"}, train=500, lengths=(3,)),
    "dies": Provoked({"collapse"}, changes={**MANY_STEPS, "lr": 0.3, "warmup": 0.0}, batch_norm=False),
    "diverges": Provoked(
        {"divergence"}, changes={**MANY_STEPS, "schedule": "constant", "lr": 0.01}, batch_norm=False, burst=3000.0
    ),
    "decays": Provoked(set(), DULL, "weight_decay", {**MANY_STEPS, "weight_decay": 0.3}),
    "drops out": Provoked(set(), DULL, "dropout", {**MANY_STEPS, "lr": 0.01, "dropout": 0.9}),
    "is slow": Provoked({"underfitting", "learning-rate-low"}, changes={**MANY_STEPS, "lr": 1e-4}),
    "is too fast": Provoked({"learning-rate-high"}, BROKEN, changes={**MANY_STEPS, "lr": 5.0, "warmup": 0.0}),
    "overfits": Provoked({"overfitting"}, changes=BARE, train=600, val=1000, lengths=(25,), thin=4),
    "overfits in part": Provoked(
        {"generalization-gap"}, frozenset({"overfitting"}), changes=BARE, train=600, val=1000, lengths=(8,), thin=4
    ),
    "has a gap": Provoked({"generalization-gap"}, changes=SMALL, train=1500, val=1000, lengths=(25,)),
    "spikes": Provoked({"spike"}, UNDERFITS, changes=CALM, train=2000, val=1500, lengths=(25,), burst=30.0),
    "is validated by few": Provoked({"validation-noise"}, GAP | UNDERFITS, changes=SMALL, train=2000, val=100),
}

# Milder forms, of which docs/report.md shows the charts.
PICTURED = {
    "never recovers": Provoked(
        {"divergence"}, changes={**CALM, "clip_norm": 0.0}, train=800, val=1000, lengths=(12,), seeds=1, burst=60.0
    ),
    "is unstable": Provoked(
        {"learning-rate-high"}, BROKEN, changes={**MANY_STEPS, "lr": 2.0}, train=800, lengths=(8,), seeds=1
    ),
    "differs by seed": Provoked(
        set(), UNDERFITS | BROKEN, changes={"batch_size": 32, "lr": 1.0}, lengths=(8,), test=True
    ),
}


def without_batch_norm(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(inplace=True))


BLOCK, FILTERS, LEARNING_RATE = cnn.block, cnn.FILTERS, Recipe.learning_rate


def prepare(disease: Provoked, epochs: int) -> None:
    """Make the network and the learning rate those of the disease."""

    def learning_rate(self: Recipe, epoch: int, *at: int) -> float:
        return LEARNING_RATE(self, epoch, *at) * (disease.burst if epoch == burst_epoch(epochs) else 1)

    cnn.FILTERS = tuple(count // disease.thin for count in FILTERS)
    cnn.block = BLOCK if disease.batch_norm else without_batch_norm
    Recipe.learning_rate = learning_rate


def burst_epoch(epochs: int) -> int:
    return epochs // 2 + 1


def record(disease: Provoked, epochs: int, seed: int, data: str) -> dict[str, Any]:
    """Train a run, and return what the tests read of it."""
    prepare(disease, epochs)
    with tempfile.TemporaryDirectory() as storage:
        request = TrainingRequest.of(
            "cnn", epochs=epochs, **disease.changes, val_size=disease.val, limit=disease.train, seed=seed, name="a",
            workers=0, device="cpu", data=data, storage=storage, report=False,
        )  # fmt: skip
        object.__setattr__(request, "test", disease.test)
        try:
            train(request, Screen(quiet=True), ExitStack())
        except WorkError as error:
            print(error)
        folder = RunFolder(storage, "a")
        run, records = folder.read_json(RUN), folder.history()
        about = {key: run[key] for key in ("model", "seed", "recipe", "val_size", "limit", "device", "workers")}
        about["data"] = {**run["data"], "source": "cifar100"}
        columns = {name: [rounded(getattr(row, name)) for row in records] for name in KEPT}
        return {"run": about, "result": folder.read_json(RESULT), "columns": columns}


def rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def recorded(name: str) -> Iterator[RunHistory]:
    """Yield the recorded runs of a disease."""
    file = file_of(name)
    for line in file.read_text().splitlines() if file.exists() else ():
        yield to_history(json.loads(line))


def to_history(content: dict[str, Any]) -> RunHistory:
    columns = content["columns"]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    records = [
        EpochRecord(epoch=k, **row, images_per_second=1000.0, seconds=1.0, workers=0) for k, row in enumerate(rows, 1)
    ]
    return RunHistory(content["run"], records, content["result"])


def file_of(name: str) -> Path:
    return FOLDER / f"{name.replace(' ', '-')}.jsonl"


def main(data: str, seconds: float = math.inf) -> None:
    torch.set_num_threads(1)
    ends = time.monotonic() + seconds
    diseases = PROVOKED | PICTURED
    for seed in range(max(disease.seeds for disease in diseases.values())):
        for name, disease in diseases.items():
            there = {(run.recipe.epochs, run.run["seed"]) for run in recorded(name)}
            for epochs in disease.lengths if seed < disease.seeds else ():
                if (epochs, seed) in there:
                    continue
                if time.monotonic() > ends:
                    sys.exit(3)
                began = time.monotonic()
                content = record(disease, epochs, seed, data)
                with file_of(name).open("a") as file:
                    file.write(json.dumps(content, separators=(",", ":")) + "\n")
                print(f"{name}, {epochs} epochs, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
