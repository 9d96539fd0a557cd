"""The architectures, by name. Adding one is a line here, and a module with three names:

    build       a function that returns the network
    LAYERS      prefixes of its parameters' names for each layer, from the input to the head
    IMAGENET    torchvision's name of its ImageNet weights, where there are any

`timm:NAME` is any of timm's: see `from_timm`.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from raycifar.data import CLASSES, MEAN, SIDE, STD
from raycifar.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from raycifar.models.from_timm import FromTimm

NAMES = ("cnn", "vgg16", "resnet50")
TIMM = "timm:"


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 pixels to a network's input: scaled to `size` pixels a side, then (pixel / 255 - mean) / std."""

    size: int = SIDE
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    interpolation: str = "bilinear"  # or bicubic


CIFAR = Preprocessing()


@dataclass(frozen=True)
class Architecture:
    """What it takes to build a network, and to ask it: it travels with the weights.

    large_stem: the first layers are those of ImageNet's 224×224 pixels, not those of CIFAR's 32×32.
    whiten: a first layer, not trained, makes the pixels of a patch uncorrelated; the CNN alone has it.
    depth: convolutions in each block of the CNN.
    mirror: the network answers, in evaluation mode, with the mean logits of an image and its mirror image.
    """

    model: str
    classes: int = CLASSES
    large_stem: bool = False
    preprocessing: Preprocessing = CIFAR
    whiten: bool = False
    depth: int = 1
    mirror: bool = False

    def build(self, dropout: float = 0.0) -> nn.Module:
        """Return the network, initialised from torch's default generator.

        It maps float images (N, 3, H, W), preprocessed, to logits (N, classes).

        Args:
            dropout: probability of zeroing a feature before a dense layer of the head.
        """
        options = {"whiten": self.whiten, "depth": self.depth} if self.model == "cnn" else {}
        network = find(self.model).build(self.classes, dropout, self.large_stem, self.preprocessing.size, **options)
        if self.mirror:
            look_twice(network)
        return network

    def layers(self, network: nn.Module) -> list[list[str]]:
        """Return the names of the network's parameters, layer by layer: from the input to the head."""
        return find(self.model).layers(network)

    def heads(self, network: nn.Module) -> tuple[str, ...]:
        """Return what the names of the parameters begin with whose shapes depend on the classes."""
        return find(self.model).heads(network)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Architecture:
        lists = values["preprocessing"]
        preprocessing = Preprocessing(**{**lists, "mean": tuple(lists["mean"]), "std": tuple(lists["std"])})
        return cls(**{**values, "preprocessing": preprocessing})


class Builtin:
    """An architecture that is a module here."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def module(self) -> ModuleType:
        """Imported when asked for: a worker that trains `cnn` has no need of torchvision, a name's check of torch."""
        return importlib.import_module(f"raycifar.models.{self.name}")

    @property
    def weights(self) -> str | None:
        return getattr(self.module, "IMAGENET", None)

    def build(self, classes: int, dropout: float, large_stem: bool, size: int, **options: Any) -> nn.Module:
        return self.module.build(classes, dropout, large_stem, **options)

    def rescale(self, tensors: Mapping[str, Tensor], size: int) -> Mapping[str, Tensor]:
        """Return published weights for images of another size: a convolution's are the same."""
        return tensors

    def layers(self, network: nn.Module) -> list[list[str]]:
        names = [name for name, _ in network.named_parameters()]
        return [[name for name in names if name.startswith(prefixes)] for prefixes in self.module.LAYERS]

    def heads(self, network: nn.Module) -> tuple[str, ...]:
        return self.module.LAYERS[-1]

    def imagenet_preprocessing(self, size: int) -> Preprocessing:
        """Return what ImageNet weights expect; where there are none, what CIFAR-100 does."""
        if self.weights is None:
            return Preprocessing(size)
        from torchvision.models import get_weight

        pixels = get_weight(self.weights).transforms()
        return Preprocessing(size, tuple(pixels.mean), tuple(pixels.std), pixels.interpolation.value)

    def imagenet_weights(self) -> dict[str, Tensor] | None:
        """Return their state dict, fetched once into torchvision's cache, or None where there are none."""
        if self.weights is None:
            return None
        from torchvision.models import get_weight

        return get_weight(self.weights).get_state_dict(progress=False, check_hash=True, weights_only=True)


def find(name: str) -> Builtin | FromTimm:
    """Return where the architecture `name` comes from.

    Raises:
        RequestError: there is no such architecture; the message names those that there are.
    """
    if name.startswith(TIMM):
        from raycifar.models.from_timm import FromTimm

        return FromTimm(name.removeprefix(TIMM))
    if name not in NAMES:
        raise RequestError(f"no model is named {name!r}: choose from {', '.join(NAMES)}, or timm:NAME.")
    return Builtin(name)


def look_twice(network: nn.Module) -> None:
    """Have a network answer, in evaluation mode, with the mean logits of an image and of its mirror image."""
    import torch

    def add_mirror_images(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return inputs if module.training else (torch.cat([inputs[0], inputs[0].flip(3)]),)

    def average(module: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        return logits if module.training else logits.unflatten(0, (2, -1)).mean(0)

    network.register_forward_pre_hook(add_mirror_images)
    network.register_forward_hook(average)


def slug(name: str) -> str:
    """Return an architecture's name as part of a file's."""
    return name.replace(":", "-").replace("/", "-")


@functools.cache
def flops(architecture: Architecture) -> int:
    """Return the floating-point operations of one image's forward pass; a multiply-add counts as two."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model, size = architecture.build().eval(), architecture.preprocessing.size
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.empty(1, 3, size, size))
    return counter.get_total_flops()
