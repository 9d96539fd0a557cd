"""The architectures, by name. Each is a file in this folder, with

    build       a function that returns the network
    LAYERS      prefixes of the parameters' names for each layer, from the input to the head
    RECIPES     by name, such as `scratch`, `short` and `transfer`; the first is the default: see `recipe_for`

and optionally

    IMAGENET    torchvision's name for the ImageNet weights
    PURPOSES    the purposes of recipes other than `scratch`, `short` and `transfer`
    initial_weights_from_images     a function that computes weights from training images
    is_for_small_images             where there are ImageNet weights: a function that tells from the shapes of weights,
                                    by name, whether they were trained on CIFAR's image size instead

An architecture's options are fields of a subclass of `Recipe`; `build` takes them by name. Every command imports all
architectures, so they import PyTorch, which takes seconds, only when they build a network.

`timm:NAME` is any of timm's architectures: see `from_timm`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from raycifar.data import CIFAR100
from raycifar.errors import RequestError, in_a_line
from raycifar.models.recipe import MAX_IMAGE_SIZE, TRANSFER, Recipe, checked_value, model_options
from raycifar.storage.schemas import Positive, Real, checked

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from raycifar.models.from_timm import FromTimm

    # From a recipe and training images, (N, 3, H, W) float32, preprocessed, to weights by name.
    WeightsMaker = Callable[[Recipe, Tensor], dict[str, Tensor]]
    ShapesTest = Callable[[Mapping[str, Sequence[int]]], bool]

NOT_ARCHITECTURES = {"from_timm", "initial_weights", "layers", "recipe", "recipes"}  # the other files here
TIMM = "timm:"
TIMM_RECIPES = {"transfer": Recipe(**TRANSFER), "scratch": Recipe()}
RENAMED = {"classes": "num_classes", "mirror": "tta_flip"}  # keys of earlier versions


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 pixels to a network's input: scaled to `size` pixels a side, then (pixel / 255 - mean) / std."""

    size: Annotated[Positive, Field(le=1024)]
    mean: Annotated[tuple[Real, ...], Field(min_length=3, max_length=3)]
    std: Annotated[tuple[Annotated[Real, Field(gt=0)], ...], Field(min_length=3, max_length=3)]
    interpolation: Annotated[str, Field(pattern="^(bilinear|bicubic)$")] = "bilinear"


CIFAR = Preprocessing(CIFAR100.image_size, CIFAR100.mean, CIFAR100.std)


@dataclass(frozen=True)
class Architecture:
    """How to build and use a network, which travels with its weights."""

    model: str
    num_classes: int = CIFAR100.num_classes
    large_stem: bool = False  # first layers for ImageNet's 224×224 pixels, not for CIFAR's 32×32
    preprocessing: Preprocessing = CIFAR
    tta_flip: bool = False  # in evaluation mode, return the mean logits of an image and its horizontal flip
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)  # by name; missing ones take their defaults

    def __post_init__(self) -> None:
        for name, kind in (("num_classes", int), ("large_stem", bool), ("tta_flip", bool)):
            checked_value(name, getattr(self, name), kind)
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}: it must be at least 1")
        object.__setattr__(self, "options", model_options(recipe_type(self.model)(**self.options)))

    def build(self, dropout: float = 0.0) -> nn.Module:
        """Return the network, initialized by torch's default generator.

        The network maps preprocessed images (N, 3, H, W) float to logits (N, num_classes).

        Args:
            dropout: probability of zeroing a feature before a dense layer of the head.
        """
        family, size = find(self.model), self.preprocessing.size
        network = family.build(self.num_classes, dropout, self.large_stem, size, **self.options)
        if self.tta_flip:
            add_tta_flip(network)
        return network

    def outline(self) -> nn.Module:
        """Return the network without memory: its parameters have only shapes, and nothing is initialized."""
        import torch

        with torch.device("meta"):
            return self.build()

    def outline_forward(self, size: int) -> None:
        """Pass an image of `size` pixels a side through the `outline`; nothing is computed."""
        import torch

        with torch.inference_mode():
            self.outline().eval()(torch.empty(1, 3, size, size, device="meta"))

    def check_size(self, size: int) -> None:
        """Raise RequestError unless the network can take images of `size` pixels a side."""
        try:
            self.outline_forward(size)
        except Exception as error:  # networks may raise any
            raise RequestError(
                f"{self.model} can't take images of {size} pixels ({in_a_line(error)}): give another --image-size or "
                f"--progressive, up to {MAX_IMAGE_SIZE}, or another model."
            ) from error

    def layers(self, network: nn.Module) -> list[list[str]]:
        """Return the parameters' names by layer, from the input to the head."""
        return find(self.model).layers(network)

    def heads(self, network: nn.Module) -> tuple[str, ...]:
        """Return the prefixes of the parameters whose shapes depend on the number of classes."""
        return find(self.model).heads(network)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Architecture:
        """Return the architecture of a weights file or a `run.json`, whichever version wrote it.

        Raises:
            RequestError: there is no such model.
            ValueError, KeyError, TypeError: the values are not those of an architecture.
        """
        values = {RENAMED.get(name, name): value for name, value in values.items()}
        checked_value("model", values["model"], str)
        preprocessing = checked(Preprocessing, values.pop("preprocessing"))
        common = {name: values[name] for name in ("model", "num_classes", "large_stem", "tta_flip") if name in values}
        given = {**values, **values.get("options", {})}  # earlier versions wrote the options beside the rest
        options = {name: given[name] for name in model_options(recipe_type(values["model"])()) if name in given}
        return cls(**common, preprocessing=preprocessing, options=options)


class Builtin:
    """An architecture of this folder."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.weights: str | None = getattr(module, "IMAGENET", None)
        self.initial_weights_from_images: WeightsMaker | None = getattr(module, "initial_weights_from_images", None)
        self.is_for_small_images: ShapesTest = getattr(
            module, "is_for_small_images", lambda shapes: self.weights is None
        )

    def build(self, num_classes: int, dropout: float, large_stem: bool, size: int, **options: Any) -> nn.Module:
        return self.module.build(num_classes, dropout, large_stem, **options)

    def rescale(self, tensors: Mapping[str, Tensor], size: int) -> Mapping[str, Tensor]:
        """Return published weights for images of another size; a convolution's stay the same."""
        return tensors

    def layers(self, network: nn.Module) -> list[list[str]]:
        names = [name for name, _ in network.named_parameters()]
        return [[name for name in names if name.startswith(prefixes)] for prefixes in self.module.LAYERS]

    def heads(self, network: nn.Module) -> tuple[str, ...]:
        return self.module.LAYERS[-1]

    def imagenet_preprocessing(self, size: int) -> Preprocessing:
        """Return the ImageNet weights' preprocessing, or CIFAR-100's if there are none."""
        if self.weights is None:
            return replace(CIFAR, size=size)
        from torchvision.models import get_weight

        pixels = get_weight(self.weights).transforms()
        return Preprocessing(size, tuple(pixels.mean), tuple(pixels.std), pixels.interpolation.value)

    def imagenet_weights(self) -> dict[str, Tensor] | None:
        """Return the state dict, downloaded once into torchvision's cache, or None if there is none."""
        if self.weights is None:
            return None
        from torchvision.models import get_weight

        return get_weight(self.weights).get_state_dict(progress=False, check_hash=True, weights_only=True)


def names() -> tuple[str, ...]:
    """Return the names of this folder's architectures."""
    return tuple(sorted({module.name for module in pkgutil.iter_modules(__path__)} - NOT_ARCHITECTURES))


def find(name: str) -> Builtin | FromTimm:
    """Return the architecture of that name, or raise RequestError if there is none."""
    if isinstance(name, str) and name.startswith(TIMM):
        from raycifar.models.from_timm import FromTimm

        return FromTimm(name.removeprefix(TIMM))
    return Builtin(import_architecture(name))


def import_architecture(name: str) -> ModuleType:
    if name not in names():
        raise RequestError(f"no model is named {name!r}: choose from {', '.join(names())}, or timm:NAME.")
    return importlib.import_module(f"{__name__}.{name}")


def recipes_of(model: str) -> dict[str, Recipe]:
    """Return a model's recipes by name; the first is the default, and `study` is the same for all models."""
    # This doesn't import timm, which a report on such a run doesn't need.
    own = TIMM_RECIPES if model.startswith(TIMM) else import_architecture(model).RECIPES
    return {**own, "study": recipe_type(model)()}


def recipe_type(model: str) -> type[Recipe]:
    """Return the class of a model's recipes, which has the model's options."""
    return Recipe if model.startswith(TIMM) else type(next(iter(import_architecture(model).RECIPES.values())))


def add_tta_flip(network: nn.Module) -> None:
    """Make a network return, in evaluation mode, the mean logits of an image and its horizontal flip."""
    import torch

    def append_flipped(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return inputs if module.training else (torch.cat([inputs[0], inputs[0].flip(3)]),)

    def average(module: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        return logits if module.training else logits.unflatten(0, (2, -1)).mean(0)

    network.register_forward_pre_hook(append_flipped)
    network.register_forward_hook(average)


def slug(name: str) -> str:
    """Return an architecture's name in a form that file names can contain."""
    return name.replace(":", "-").replace("/", "-")


@functools.cache
def flops(architecture: Architecture) -> int:
    """Return the floating-point operations of one image's forward pass; a multiply-add counts as two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        architecture.outline_forward(architecture.preprocessing.size)
    return counter.get_total_flops()
