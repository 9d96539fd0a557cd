"""The hyperparameters: one frozen dataclass, one instance a model.

Every field is an option of `raycifar train`. None depends on the number of workers: the batch size is
global, and the learning rate is a function of epoch and step alone.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

Optimizer = Literal["sgd", "adamw", "muon"]
Schedule = Literal["cosine", "linear", "step", "constant"]
Augmentation = Literal["none", "flip", "crop", "cutout", "trivial", "rand"]
Precision = Literal["auto", "bfloat16", "float32"]
BatchNorm = Literal["train", "frozen"]
Stage = Literal["head", "whole"]

SHARES = ("warmup", "label_smoothing", "momentum", "dropout", "ema")


def option(default: Any, help: str) -> Any:  # noqa: A002 (click's own word)
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Raises ValueError, naming the field, where a value makes no sense."""

    epochs: int = option(200, "passes over the training images")
    batch_size: int = option(128, "images in a step, over all workers")
    optimizer: Optimizer = option("sgd", "sgd (Nesterov momentum), adamw, or muon (of filters; sgd of the rest)")
    lr: float = option(0.05, "peak learning rate")
    momentum: float = option(0.9, "of sgd and muon; the first beta of adamw")
    schedule: Schedule = option("cosine", "learning rate after warm-up; step divides by 5 at 30, 60 and 80 %")
    warmup: float = option(0.2, "share of all steps over which the learning rate rises from 0")
    weight_decay: float = option(5e-4, "of weights; none on norms and biases")
    label_smoothing: float = option(0.1, "share of each label spread over all classes")
    augment: Augmentation = option(
        "crop",
        "none; flip; crop (flip and 4-pixel shifts); crop and: cutout (an 8x8 hole), trivial (TrivialAugment, one of "
        "14 operations for each image), rand (RandAugment, two of them)",
    )
    erasing: float = option(0.0, "share of images with a rectangle blanked (random erasing, Zhong et al., 2020)")
    mixup: float = option(0.0, "share of batches blended pairwise (Zhang et al., 2018)")
    cutmix: float = option(0.0, "share of batches with patches exchanged (Yun et al., 2019)")
    dropout: float = option(0.0, "share of features zeroed before each dense layer")
    ema: float = option(0.0, "decay of a running average of the weights, which is then scored and kept; 0: none")
    clip_norm: float = option(0.0, "largest gradient norm; 0: no limit")
    precision: Precision = option("auto", "auto is bfloat16 where every worker's hardware gains by it, else float32")
    whiten: bool = option(False, "a first layer, of the cnn alone, that whitens 3x3 patches; made from the images")
    depth: int = option(1, "convolutions in each block, of the cnn alone")
    mirror: bool = option(False, "score the mean of each image and its mirror image")
    image_size: int = option(32, "side to which images are scaled, 32 to 224 pixels")
    pretrained: str = option("none", "weights to begin with: imagenet, a file (PyTorch or safetensors), or none")
    head_epochs: int = option(0, "first epochs, which train the head alone; the rest of the network is frozen")
    layer_decay: float = option(1.0, "learning rate of each layer as a share of the next one's; 1: all the same")
    batch_norm: BatchNorm = option("train", "running statistics: train, or frozen as they came")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if (choices := get_args(f.type)) and value not in choices:
                raise ValueError(f"{f.name} is {value!r}: choose from {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{f.name} is {value}: a finite number is needed")
        for names, allowed, wanted in (
            (("epochs", "batch_size", "depth"), lambda v: v >= 1, "at least 1"),
            (("lr", "weight_decay", "clip_norm"), lambda v: v >= 0, "0 or more"),
            (("mixup", "cutmix", "erasing"), lambda v: 0 <= v <= 1, "a share from 0 to 1"),
            (("layer_decay",), lambda v: 0 < v <= 1, "a share above 0, at most 1"),
            (("image_size",), lambda v: 32 <= v <= 224, "from 32 to 224"),
            (("head_epochs",), lambda v: 0 <= v <= self.epochs, f"from 0 to the {self.epochs} epochs"),
            (SHARES, lambda v: 0 <= v < 1, "a share from 0 to below 1"),
        ):
            for name in names:
                if not allowed(value := getattr(self, name)):
                    raise ValueError(f"{name} is {value}: it must be {wanted}")
        if self.mixup + self.cutmix > 1:
            raise ValueError(
                f"mixup {self.mixup} and cutmix {self.cutmix} are shares of the same batches: at most 1 together"
            )

    def stage(self, epoch: int) -> Stage:
        """Return what trains in `epoch` (from 1): the head alone, or the whole network."""
        return "head" if min(epoch, self.epochs) <= self.head_epochs else "whole"

    def learning_rate(self, epoch: int, step: int, steps: int) -> float:
        """Return the head's learning rate; each stage has a warm-up and a schedule of its own.

        Args:
            epoch: from 1. step: of the epoch, from 0. steps: of an epoch.
        """
        first, last = (0, self.head_epochs) if self.stage(epoch) == "head" else (self.head_epochs, self.epochs)
        at, total = (epoch - 1 - first) * steps + step, (last - first) * steps
        warmup_steps = self.warmup * total
        if at + 1 < warmup_steps:
            return self.lr * (at + 1) / warmup_steps
        done = (at - warmup_steps) / max(1.0, total - warmup_steps)
        match self.schedule:
            case "cosine":
                return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
            case "linear":
                return self.lr * (1 - min(1.0, max(0.0, done)))
            case "step":
                return self.lr * 0.2 ** sum(at / total >= milestone for milestone in (0.3, 0.6, 0.8))
            case _:
                return self.lr


def changes(recipe: Recipe, base: Recipe) -> dict[str, Any]:
    """Return the fields of `recipe` in which it differs from `base`."""
    return {f.name: getattr(recipe, f.name) for f in fields(Recipe) if getattr(recipe, f.name) != getattr(base, f.name)}


def describe_changes(recipe: Recipe, base: Recipe) -> str:
    """Return the fields in which `recipe` differs from `base` in words, or the empty string."""
    pairs = changes(recipe, base).items()
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in pairs)


SCRATCH = Recipe()
TRANSFER = Recipe(
    epochs=20, lr=0.02, warmup=0.1, weight_decay=1e-4, image_size=224, pretrained="imagenet", head_epochs=2,
    layer_decay=0.7,
)  # fmt: skip

SPEEDRUN = Recipe(
    epochs=20, batch_size=500, optimizer="muon", lr=0.05, momentum=0.85, schedule="linear", warmup=0.15, ema=0.98,
    label_smoothing=0.2, augment="cutout", cutmix=0.25, whiten=True, depth=2, mirror=True,
)  # fmt: skip
NAMED = {"speedrun": {"cnn": SPEEDRUN}}  # besides each model's own: by name, for the models that have it


def recipe_for(model: str, pretrained: str | None = None, name: str | None = None) -> Recipe:
    """Return a model's own recipe, or that of a name: from scratch, or for the weights that it begins with.

    The study's CNN and VGG-16 are trained from scratch, its ResNet-50 and all of timm's from ImageNet weights.
    """
    if name:
        return NAMED[name][model]
    if pretrained is None:
        pretrained = "none" if model in ("cnn", "vgg16") else "imagenet"
    return SCRATCH if pretrained == "none" else replace(TRANSFER, pretrained=pretrained)
