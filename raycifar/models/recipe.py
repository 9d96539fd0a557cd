"""How a model is trained: the hyperparameters, one frozen dataclass.

Every field is an option of `raycifar train`. None depends on the number of workers: the batch size is global, and the
learning rate is a function of epoch and step alone. The default of a new field must reproduce earlier runs, whose
recipes lack it.
"""

import math
from dataclasses import dataclass, field, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_type_hints

from raycifar.data import CIFAR100

Optimizer = Literal["sgd", "adamw", "muon"]
Schedule = Literal["cosine", "linear", "step", "constant"]
Augmentation = Literal["none", "flip", "crop", "cutout", "trivial", "rand", "alternate"]
Precision = Literal["auto", "bfloat16", "float32"]
BatchNorm = Literal["train", "frozen"]
Stage = Literal["head", "whole"]

FORWARD_PASSES_PER_STEP = 3  # about: the backward pass takes two
MAX_IMAGE_SIZE = 224  # pixels per side
IMAGE_SIZES = range(CIFAR100.image_size, MAX_IMAGE_SIZE + 1)
MAX_NUMBER = 10**9  # more is a slip
FRACTIONS = ("warmup", "label_smoothing", "momentum", "dropout", "ema")
KINDS: dict[type, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),  # also NumPy's, as the next
    float: (Real, "a number"),
    str: (str, "a string"),
}


def option(default: Any, help: str) -> Any:  # noqa: A002 (click's own word)
    """Return a field of a recipe."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. An architecture adds its options in a subclass.

    The defaults are those of the recipe `study`: plain, from scratch, the same for all models.

    Raises:
        ValueError: a value is not allowed; the message names the field.
    """

    epochs: int = option(200, "passes over the training images")
    batch_size: int = option(128, "images in a step, over all workers")
    optimizer: Optimizer = option("sgd", "sgd (Nesterov momentum), adamw, or muon (of filters; sgd of the rest)")
    muon_steps: int = option(5, "Newton-Schulz steps of muon, 1 to 10")
    lr: float = option(0.05, "peak learning rate")
    norm_lr: float = option(1.0, "learning rate of norms and biases, as a multiple of the others'")
    momentum: float = option(0.9, "of sgd and muon; the first beta of adamw")
    schedule: Schedule = option("cosine", "learning rate after warm-up; step divides by 5 at 30, 60 and 80%")
    warmup: float = option(0.2, "fraction of all steps over which the learning rate rises from 0")
    weight_decay: float = option(5e-4, "of weights, except muon's filters; none on norms and biases")
    label_smoothing: float = option(0.1, "fraction of each label spread over all classes")
    augment: Augmentation = option(
        "crop",
        "none; flip; crop (flip and 4-pixel shifts); cutout (crop and an 8x8 hole); trivial (crop and TrivialAugment, "
        "Müller and Hutter, 2021); rand (crop and RandAugment, Cubuk et al., 2020); alternate (flip every other epoch, "
        "and reflected 2-pixel shifts)",
    )
    erasing: float = option(0.0, "probability that a rectangle of an image is erased (Zhong et al., 2020)")
    mixup: float = option(0.0, "fraction of batches blended pairwise (Zhang et al., 2018)")
    cutmix: float = option(0.0, "fraction of batches with patches exchanged (Yun et al., 2019)")
    dropout: float = option(0.0, "fraction of features zeroed before each dense layer")
    ema: float = option(0.0, "decay of a running average of the weights, which is then scored and kept; 0: none")
    clip_norm: float = option(0.0, "largest gradient norm; 0: no limit")
    precision: Precision = option("auto", "auto is bfloat16 where every worker's hardware gains by it, else float32")
    tta_flip: bool = option(False, "score the mean of each image and its horizontal flip")
    image_size: int = option(
        CIFAR100.image_size,
        f"side to which images are scaled, {CIFAR100.image_size} to {MAX_IMAGE_SIZE} pixels; 0: that of the weights",
    )
    progressive: str = option(
        "", "smaller images at first, as PIXELS:END,... where END is a fraction of all steps, such as 20:0.15,24:0.5"
    )
    pretrained: str = option("none", "initial weights: imagenet, a file (PyTorch or safetensors), or none")
    head_epochs: int = option(0, "first epochs, which train only the head; the rest of the network is frozen")
    layer_decay: float = option(1.0, "learning rate of each layer as a fraction of the next one's; 1: all equal")
    batch_norm: BatchNorm = option("train", "running statistics: train, or frozen")
    separate_copies: bool = option(False, "keep near duplicates of training images out of the validation set")

    def __post_init__(self) -> None:
        types = field_types(type(self))
        for f in fields(self):
            object.__setattr__(self, f.name, checked_value(f.name, getattr(self, f.name), types[f.name]))
        for names, allowed, wanted in (
            (("epochs", "batch_size"), lambda v: v >= 1, "at least 1"),
            (("muon_steps",), lambda v: 1 <= v <= 10, "from 1 to 10"),
            (("lr", "norm_lr", "weight_decay", "clip_norm"), lambda v: v >= 0, "0 or more"),
            (("mixup", "cutmix", "erasing"), lambda v: 0 <= v <= 1, "a fraction from 0 to 1"),
            (("layer_decay",), lambda v: 0 < v <= 1, "a fraction above 0, at most 1"),
            (("image_size",), lambda v: v == 0 or v in IMAGE_SIZES, f"from {IMAGE_SIZES[0]} to {IMAGE_SIZES[-1]}"),
            (("head_epochs",), lambda v: 0 <= v <= self.epochs, f"from 0 to the {self.epochs} epochs"),
            (FRACTIONS, lambda v: 0 <= v < 1, "a fraction from 0 to below 1"),
        ):
            for name in names:
                if not allowed(value := getattr(self, name)):
                    raise ValueError(f"{name} is {value}: it must be {wanted}")
        parse_sizes(self.progressive)
        if self.mixup + self.cutmix > 1:
            raise ValueError(
                f"mixup {self.mixup} and cutmix {self.cutmix} are fractions of the batches: their sum must be at most 1"
            )

    def stage(self, epoch: int) -> Stage:
        """Return what `epoch` (from 1) trains: the head, or the whole network."""
        return "head" if min(epoch, self.epochs) <= self.head_epochs else "whole"

    def image_size_at(self, epoch: int, step: int, steps_per_epoch: int) -> int | None:
        """Return the side to which a step's images are scaled; None is that of the network. See `learning_rate`."""
        return self._image_size_after(((epoch - 1) * steps_per_epoch + step) / (self.epochs * steps_per_epoch))

    def _image_size_after(self, done: float) -> int | None:
        return next((size for size, end in parse_sizes(self.progressive) if done < end), None)

    def cost(self, network_size: int, done: float) -> float:
        """Return about what a step costs after a fraction `done` of all steps.

        The unit is a step of the whole network on images of its own size, `network_size` pixels.
        """
        size = self._image_size_after(done) or network_size
        of_head = self.stage(1 + int(done * self.epochs)) == "head"
        return (size / network_size) ** 2 / (FORWARD_PASSES_PER_STEP if of_head else 1)

    def mean_cost(self, network_size: int, done: float = 0.0) -> float:
        """Return the mean of `cost` over the steps that are left after a fraction `done`."""
        return sum(self.cost(network_size, done + (1 - done) * (k + 0.5) / 100) for k in range(100)) / 100

    def learning_rate(self, epoch: int, step: int, steps_per_epoch: int) -> float:
        """Return the head's learning rate; each stage has its own warm-up and schedule.

        Args:
            epoch: from 1. step: in the epoch, from 0.
        """
        first, last = (0, self.head_epochs) if self.stage(epoch) == "head" else (self.head_epochs, self.epochs)
        at, total = (epoch - 1 - first) * steps_per_epoch + step, (last - first) * steps_per_epoch
        warmup_steps = self.warmup * total
        if at + 1 < warmup_steps:
            return self.lr * (at + 1) / warmup_steps
        done = max(0.0, at - warmup_steps) / max(1.0, total - warmup_steps)
        match self.schedule:
            case "cosine":
                return self.lr * 0.5 * (1 + math.cos(math.pi * done))
            case "linear":
                return self.lr * (1 - done)
            case "step":
                return self.lr * 0.2 ** sum(at / total >= milestone for milestone in (0.3, 0.6, 0.8))
            case _:
                return self.lr


TRANSFER: dict[str, Any] = {
    "epochs": 20, "lr": 0.02, "warmup": 0.1, "weight_decay": 1e-4, "image_size": MAX_IMAGE_SIZE,
    "pretrained": "imagenet", "head_epochs": 2, "layer_decay": 0.7,
}  # fmt: skip
"""How a recipe that starts from ImageNet weights differs from the default."""

LONG: dict[str, Any] = {"augment": "trivial", "cutmix": 0.5, "lr": 0.1, "warmup": 0.05}
"""How a recipe for long training from scratch differs from the default: a network must not memorize its images."""

SHORT: dict[str, Any] = {
    "epochs": 16, "batch_size": 256, "optimizer": "muon", "lr": 0.05, "warmup": 0.1, "augment": "cutout",
}  # fmt: skip
"""How a recipe for few epochs from scratch differs from the default."""


def field_types(recipe_type: type[Recipe]) -> dict[str, Any]:
    """Return the types of a recipe's fields, by name."""
    hints = get_type_hints(recipe_type)
    return {f.name: hints[f.name] for f in fields(recipe_type)}


def checked_value(name: str, value: Any, kind: Any, most: float = MAX_NUMBER) -> Any:
    """Return the value of a field as one of `kind`: a whole number is a number, and NumPy numbers are accepted.

    Raises:
        ValueError: it is of another kind, or not allowed; the message names the field.
    """
    if allowed := get_args(kind):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}: choose from {', '.join(allowed)}")
        return value
    admitted, wanted = KINDS[kind]
    if not isinstance(value, admitted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r}: {wanted} is needed")
    if kind not in (int, float):
        return value
    value = int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: a finite number is needed")
    if value > most:
        raise ValueError(f"{name} is {value}: it must be at most {most:,}")
    return kind(value) if value >= -most else value  # which no field takes, and a float may not hold


def parse_sizes(progressive: str) -> list[tuple[int, float]]:
    """Return the smaller sizes of training images, in pixels a side, and the fractions of all steps where they end.

    Raises:
        ValueError: the text is no list of these.
    """
    try:
        sizes = [(int(size), float(end)) for size, end in (part.split(":") for part in progressive.split(",") if part)]
    except ValueError:
        sizes = [(0, 0.0)]
    ends = [0.0, *(end for _, end in sizes), 1.0]
    if not all(1 <= size <= MAX_IMAGE_SIZE for size, _ in sizes) or not all(a < b for a, b in pairwise(ends)):
        raise ValueError(
            f"progressive is {progressive!r}: it must be PIXELS:END,... with 1 to {MAX_IMAGE_SIZE} pixels and "
            "fractions that rise from above 0 to below 1, such as 20:0.15,24:0.5"
        )
    return sizes


def model_options(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that the architecture adds, which determine how the network is built."""
    return {name: value for name, value in vars(recipe).items() if name not in Recipe.__dataclass_fields__}


def changes(recipe: Recipe, base: Recipe) -> dict[str, Any]:
    """Return the fields in which `recipe` differs from `base`, a recipe of the same model."""
    return {name: value for name, value in vars(recipe).items() if value != getattr(base, name)}


def describe_changes(recipe: Recipe, base: Recipe) -> str:
    """Return in words how `recipe` differs from `base`, or the empty string."""
    pairs = changes(recipe, base).items()
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in pairs)
