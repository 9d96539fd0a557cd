"""A run's history as an event file of TensorBoard."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from raycifar.storage.records import EpochRecord

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


def to_events(history: Sequence[EpochRecord]) -> bytes:
    """Return the content of an event file with each epoch once, at the time of its end."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder, write_to_disk=True) as writer:
            for record in history:
                for name, tag in SCALARS.items():
                    if (value := getattr(record, name)) is not None:
                        writer.add_scalar(tag, value, record.epoch, walltime=record.time)
        (file,) = Path(folder).iterdir()
        return file.read_bytes()
