"""A run's history as an event file of TensorBoard."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCALARS = {
    "train_loss": "loss/train",
    "train_eval_loss": "loss/train, without augmentation",
    "val_loss": "loss/validation",
    "train_top1": "top-1/train",
    "train_eval_top1": "top-1/train, without augmentation",
    "val_top1": "top-1/validation",
    "val_top5": "top-5/validation",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_second": "images per second",
    "workers": "workers",
}


def to_events(history: Sequence[dict[str, Any]]) -> bytes:
    """Return the content of an event file with each epoch once, at the time when it ended."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder, write_to_disk=True) as writer:
            for row in history:
                for key, tag in SCALARS.items():
                    if row[key] is not None:
                        writer.add_scalar(tag, row[key], row["epoch"], walltime=row["time"])
        (file,) = Path(folder).iterdir()
        return file.read_bytes()
