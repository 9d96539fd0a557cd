"""Made-up runs, as their files would tell them."""

import numpy as np

from raycifar.analysis.history import RunHistory
from raycifar.models.recipe import Recipe
from raycifar.storage.schemas import EpochRecord

RUN = {"model": "cnn", "seed": 0, "val_size": 5000, "limit": None, "device": "cpu", "workers": 1}


def made_up(epochs=20, val=5000, result=None, recipe=None, train=45000, run=None, **columns):
    """A run whose curves are healthy except those that are given, by function of the epoch (from 1)."""
    usual = {
        "train_loss": lambda e: 1.2 + 3 * np.exp(-e / 5),
        "train_eval_loss": lambda e: 1.1 + 3 * np.exp(-e / 5),
        "val_loss": lambda e: 1.4 + 2.8 * np.exp(-e / 5),
        "train_top1": lambda e: 0.66 - 0.6 * np.exp(-e / 5),
        "train_eval_top1": lambda e: 0.65 - 0.6 * np.exp(-e / 5),
        "val_top1": lambda e: 0.63 - 0.58 * np.exp(-e / 5) + 0.002 * (-1) ** e,
        "val_loss_se": lambda e: 0.02,
        "lr": lambda e: 0.05,
        "grad_norm": lambda e: 1.0,
        "grad_norm_max": lambda e: 2.0,
        "images_per_second": lambda e: 1000.0,
        "val_gained": lambda e: None if e == 1 else 400,
        "val_lost": lambda e: None if e == 1 else 300,
        "train_eval_images": lambda e: 1000,
        "grad_norm_max_step": lambda e: 3,
        "rise": lambda e: None,
        "restarts": lambda e: 0,
        "workers": lambda e: 1,
        "stage": lambda e: "whole",
        "seconds": lambda e: 10.0,
        "diagnostics": lambda e: None,
    } | columns
    if not val:
        usual = {name: value for name, value in usual.items() if not name.startswith("val_")}
    records = [EpochRecord(epoch=e, **{name: f(e) for name, f in usual.items()}) for e in range(1, epochs + 1)]
    data = {"source": "cifar100", "train": train, "val": val, "test": 10000}
    about = {**RUN, "data": data, "recipe": {**vars(Recipe()), "epochs": epochs, **(recipe or {})}, **(run or {})}
    return RunHistory(about, records, result)


OVERFITS = {"val_loss": lambda e: 1.6 + 0.05 * abs(e - 6), "train_eval_top1": lambda e: min(0.99, 0.1 * e)}
GUESSES = {
    **{name: lambda e: 4.6052 for name in ("train_loss", "train_eval_loss", "val_loss")},
    **{name: lambda e: 0.0099 for name in ("train_top1", "train_eval_top1", "val_top1")},
}
