"""The architectures, by name. Each is a file here, which no other file names:

    build       returns the network
    LAYERS      prefixes of its parameters' names for each layer, from the input to the head
    RECIPES     how it is trained, by name: `scratch`, `transfer` and names of its own; the first is the model's own

and, where there is something to say:

    IMAGENET    torchvision's name of its ImageNet weights
    PURPOSES    what the recipes with names of their own are for
    initial_weights_from_images     weights that are made from the training images

Options of its own are fields that it adds to `Recipe` in a subclass; `build` takes them by name. Every command imports
every architecture, for its options and recipes: so PyTorch, which takes seconds, is imported where a network is built.

`timm:NAME` is any of timm's: see `from_timm`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from raycifar.data import CIFAR100
from raycifar.errors import RequestError
from raycifar.models.recipe import TRANSFER, Recipe, model_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from torch import Tensor, nn

    from raycifar.models.from_timm import FromTimm

    # From a recipe and training images, (N, 3, H, W) float32, preprocessed, to weights by name.
    WeightsMaker = Callable[[Recipe, np.ndarray], dict[str, np.ndarray]]

NO_ARCHITECTURES = {"from_timm", "initial_weights", "layers", "recipe", "recipes"}  # the other files here
TIMM = "timm:"
TIMM_RECIPES = {"transfer": Recipe(**TRANSFER), "scratch": Recipe()}
RENAMED = {"classes": "num_classes", "mirror": "tta_flip"}  # keys of earlier versions


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 pixels to a network's input: scaled to `size` pixels a side, then (pixel / 255 - mean) / std."""

    size: int = CIFAR100.image_size
    mean: tuple[float, ...] = CIFAR100.mean
    std: tuple[float, ...] = CIFAR100.std
    interpolation: str = "bilinear"  # or bicubic


CIFAR = Preprocessing()


@dataclass(frozen=True)
class Architecture:
    """What it takes to build a network and to use it: it travels with the weights.

    large_stem: the first layers are those for ImageNet's 224×224 pixels, not those for CIFAR's 32×32.
    tta_flip: in evaluation mode, the network returns the mean logits of an image and its mirror image.
    options: the model's own, by name; those that aren't given have their defaults.
    """

    model: str
    num_classes: int = CIFAR100.num_classes
    large_stem: bool = False
    preprocessing: Preprocessing = CIFAR
    tta_flip: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        defaults = model_options(recipe_type(self.model)())
        object.__setattr__(self, "options", {**defaults, **self.options})

    def build(self, dropout: float = 0.0) -> nn.Module:
        """Return the network, initialized from torch's default generator.

        It maps float images (N, 3, H, W), preprocessed, to logits (N, num_classes).

        Args:
            dropout: probability of zeroing a feature before a dense layer of the head.
        """
        family, size = find(self.model), self.preprocessing.size
        network = family.build(self.num_classes, dropout, self.large_stem, size, **self.options)
        if self.tta_flip:
            add_tta_flip(network)
        return network

    def layers(self, network: nn.Module) -> list[list[str]]:
        """Return the names of the network's parameters, layer by layer: from the input to the head."""
        return find(self.model).layers(network)

    def heads(self, network: nn.Module) -> tuple[str, ...]:
        """Return the prefixes of the parameters whose shapes depend on the classes."""
        return find(self.model).heads(network)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Architecture:
        """Return the architecture of a weights file or a `run.json`, also of one that an earlier version wrote."""
        values = {RENAMED.get(name, name): value for name, value in values.items()}
        lists = values.pop("preprocessing")
        preprocessing = Preprocessing(**{**lists, "mean": tuple(lists["mean"]), "std": tuple(lists["std"])})
        common = {name: values[name] for name in ("model", "num_classes", "large_stem", "tta_flip") if name in values}
        given = {**values, **values.get("options", {})}  # earlier versions wrote the options beside the rest
        options = {name: given[name] for name in model_options(recipe_type(values["model"])()) if name in given}
        return cls(**common, preprocessing=preprocessing, options=options)


class Builtin:
    """An architecture that is a file here."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.weights: str | None = getattr(module, "IMAGENET", None)
        self.initial_weights_from_images: WeightsMaker | None = getattr(module, "initial_weights_from_images", None)

    def build(self, num_classes: int, dropout: float, large_stem: bool, size: int, **options: Any) -> nn.Module:
        return self.module.build(num_classes, dropout, large_stem, **options)

    def rescale(self, tensors: Mapping[str, Tensor], size: int) -> Mapping[str, Tensor]:
        """Return published weights for images of another size: a convolution's are the same."""
        return tensors

    def layers(self, network: nn.Module) -> list[list[str]]:
        names = [name for name, _ in network.named_parameters()]
        return [[name for name in names if name.startswith(prefixes)] for prefixes in self.module.LAYERS]

    def heads(self, network: nn.Module) -> tuple[str, ...]:
        return self.module.LAYERS[-1]

    def imagenet_preprocessing(self, size: int) -> Preprocessing:
        """Return what ImageNet weights expect, or CIFAR-100's preprocessing where there are none."""
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


def names() -> tuple[str, ...]:
    """Return the names of the architectures that are files here."""
    return tuple(sorted({module.name for module in pkgutil.iter_modules(__path__)} - NO_ARCHITECTURES))


def find(name: str) -> Builtin | FromTimm:
    """Return where the architecture `name` comes from.

    Raises:
        RequestError: there is no such architecture; the message names those that there are.
    """
    if name.startswith(TIMM):
        from raycifar.models.from_timm import FromTimm

        return FromTimm(name.removeprefix(TIMM))
    return Builtin(import_architecture(name))


def import_architecture(name: str) -> ModuleType:
    if name not in names():
        raise RequestError(f"no model is named {name!r}: choose from {', '.join(names())}, or timm:NAME.")
    return importlib.import_module(f"{__name__}.{name}")


def recipes_of(model: str) -> dict[str, Recipe]:
    """Return a model's recipes by name; the first is its own, and `study` is the same for all models."""
    # Without timm itself, which a report on such a run can do without.
    own = TIMM_RECIPES if model.startswith(TIMM) else import_architecture(model).RECIPES
    return {**own, "study": recipe_type(model)()}


def recipe_type(model: str) -> type[Recipe]:
    """Return the class of a model's recipes, which has the model's own options."""
    return Recipe if model.startswith(TIMM) else type(next(iter(import_architecture(model).RECIPES.values())))


def add_tta_flip(network: nn.Module) -> None:
    """Make a network return, in evaluation mode, the mean logits of an image and its mirror image."""
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
