"""The record of an epoch: a row of `metrics.jsonl`."""

import math
from dataclasses import dataclass, fields
from typing import Any, Self

# Names that earlier versions gave to columns.
RENAMED = {
    "clean_loss": "train_eval_loss",
    "clean_top1": "train_eval_top1",
    "clean_images": "train_eval_images",
    "signals": "diagnostics",
}


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """The record of a finished epoch. None stands for a value that is unknown or not finite."""

    epoch: int  # from 1
    train_loss: float | None  # mean cross-entropy of the augmented images, in training mode
    train_top1: float | None  # accuracy on the augmented images, a fraction
    val_loss: float | None = None  # mean cross-entropy of the validation images
    val_top1: float | None = None  # a fraction, as all accuracies
    val_top5: float | None = None
    val_loss_se: float | None = None  # standard error of val_loss over the validation images
    val_gained: int | None = None  # validation images that became correct since the last epoch
    val_lost: int | None = None  # validation images that are no longer correct
    train_eval_loss: float | None = None  # of training images scored like validation images
    train_eval_top1: float | None = None
    train_eval_images: int | None = None  # how many these are
    lr: float  # of the last step
    stage: str | None = None  # "head" or "whole": what was trained
    grad_norm: float | None = None  # mean over the steps
    grad_norm_max: float | None = None
    grad_norm_max_step: int | None = None  # from 0
    rise: dict[str, Any] | None = None  # of the images' losses since the last epoch: see `describe_rise`
    diagnostics: dict[str, Any] | None = None  # of a network that isn't learning: see `examine`
    restarts: int = 0  # of the run during the epoch
    images_per_second: float  # over all workers
    training_seconds: float = 0.0  # of the training steps
    seconds: float  # of the epoch, scoring included
    workers: int  # at the end of the epoch
    time: float | None = None  # Unix time at the end of the epoch

    def to_json(self) -> dict[str, Any]:
        """Return a row of `metrics.jsonl`: JSON has no NaN and no infinity."""
        return {f.name: finite(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the record of a row, whichever version wrote it."""
        known = {f.name for f in fields(cls)}
        renamed = {RENAMED.get(name, name): value for name, value in values.items()}
        row = {name: finite(value) for name, value in renamed.items() if name in known}
        if (rise := row.get("rise")) and "share" in rise:
            row["rise"] = {"fraction": rise["share"], "indices": rise["images"]}
        return cls(**row)


def finite(value: Any) -> Any:
    """Return a value with each float that isn't finite replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value
