"""What a run records of each epoch: a row of `metrics.jsonl`, typed and described."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Self

# What columns were called in earlier versions.
RENAMED = {
    "clean_loss": "train_eval_loss",
    "clean_top1": "train_eval_top1",
    "clean_images": "train_eval_images",
    "signals": "diagnostics",
}


def column(description: str, **options: Any) -> Any:
    return field(metadata={"description": description}, **options)


def optional(description: str) -> Any:
    return column(description, default=None)


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What is known of a finished epoch. A value that isn't finite, or isn't known, is None."""

    epoch: int = column("number of the epoch, from 1")
    train_loss: float | None = column("mean cross-entropy of the images as trained: augmented, in training mode")
    train_top1: float | None = column("accuracy of the images as trained, a fraction")
    val_loss: float | None = optional("mean cross-entropy of the validation images")
    val_top1: float | None = optional("accuracy of the validation images, a fraction")
    val_top5: float | None = optional("fraction of validation images whose class is among the five likeliest")
    val_loss_se: float | None = optional("standard error of val_loss over the validation images")
    val_gained: int | None = optional("validation images that became correct since the last epoch")
    val_lost: int | None = optional("validation images that were correct in the last epoch and no longer are")
    train_eval_loss: float | None = optional("mean cross-entropy of training images scored like validation images")
    train_eval_top1: float | None = optional("accuracy of the same training images, a fraction")
    train_eval_images: int | None = optional("number of training images that are scored like validation images")
    lr: float = column("learning rate of the last step")
    stage: str | None = optional("what was trained: the head, or the whole network")
    grad_norm: float | None = optional("mean norm of the gradients over the steps")
    grad_norm_max: float | None = optional("largest norm of the gradients")
    grad_norm_max_step: int | None = optional("step with the largest norm of the gradients, from 0")
    rise: dict[str, Any] | None = optional(
        "of the rise of the images' losses since the last epoch: the fraction that is due to the hundredth of the "
        "images that rose most, and the indices of the foremost of these"
    )
    diagnostics: dict[str, Any] | None = optional(
        "of a network that isn't learning: the fraction of dead ReLUs and the gradient norm of each layer"
    )
    restarts: int = column("restarts of the run during the epoch", default=0)
    images_per_second: float = column("training images per second, over all workers")
    training_seconds: float = column("seconds of the training steps", default=0.0)
    seconds: float = column("seconds of the epoch, scoring included")
    workers: int = column("number of workers at the end of the epoch")
    time: float | None = optional("Unix time at the end of the epoch")

    def to_json(self) -> dict[str, Any]:
        """Return the row as it stands in `metrics.jsonl`: JSON has no NaN and no infinity."""
        return {f.name: finite(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the record of a row, also of one that an earlier or a later version wrote."""
        known = {f.name for f in fields(cls)}
        renamed = {RENAMED.get(name, name): value for name, value in values.items()}
        row = {name: finite(value) for name, value in renamed.items() if name in known}
        if (rise := row.get("rise")) and "share" in rise:
            row["rise"] = {"fraction": rise["share"], "indices": rise["images"]}
        return cls(**row)


def finite(value: Any) -> Any:
    """Return a value with None for each float that isn't finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def to_lines(history: Iterable[EpochRecord]) -> bytes:
    """Return the content of `metrics.jsonl`."""
    return "".join(json.dumps(record.to_json(), allow_nan=False) + "\n" for record in history).encode()


def from_lines(content: bytes) -> list[EpochRecord]:
    return [EpochRecord.from_json(json.loads(line)) for line in content.splitlines()]
