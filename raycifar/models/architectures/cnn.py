"""The study's own network: five convolution blocks, then two dense layers."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from raycifar.models.recipe import LONG, SHORT, TRANSFER, Recipe, option

if TYPE_CHECKING:
    from torch import Tensor, nn

FILTERS = (64, 128, 256, 512, 512)
DEEPEST = 100  # convolutions in a block
PATCH = 27  # values of a patch of 3×3 pixels
LAYERS = (*((f"features.{k}.",) for k in range(len(FILTERS))), ("head.",))


@dataclass(frozen=True)
class CnnRecipe(Recipe):
    """How the cnn is trained and built."""

    whiten: bool = option(False, "a first layer, computed from the images and not trained, that whitens 3x3 patches")
    depth: int = option(1, f"convolutions in each block, 1 to {DEEPEST}")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.depth <= DEEPEST:
            raise ValueError(f"depth is {self.depth}: it must be from 1 to {DEEPEST}")


RECIPES = {"scratch": CnnRecipe(**LONG), "short": CnnRecipe(**SHORT), "transfer": CnnRecipe(**TRANSFER)}
PURPOSES = {"transfer": "from weights, --pretrained FILE"}


def build(num_classes: int, dropout: float, whiten: bool, depth: int) -> nn.Module:
    """Return the network: 4.2 M parameters for 100 classes.

    Five poolings reduce 32×32 pixels to a 1×1 map; the average pool is for images that are scaled up.
    """
    from torch import nn

    channels = (PATCH if whiten else 3, *FILTERS)
    whitening = {}
    if whiten:  # by weights that come from the images, and are not trained
        whitening["whiten"] = nn.Conv2d(3, PATCH, kernel_size=3, padding=1, bias=False).requires_grad_(False)
    return nn.Sequential(
        OrderedDict(
            **whitening,
            features=nn.Sequential(*(block(*sizes, depth) for sizes in pairwise(channels))),
            pool=nn.AdaptiveAvgPool2d(1),
            head=nn.Sequential(
                nn.Flatten(),
                nn.Dropout(dropout),
                nn.Linear(FILTERS[-1], 512),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Linear(512, num_classes),
            ),
        )
    )


def block(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    """Return a block: a convolution, `depth` - 1 residual ones, and a pooling that halves the image.

    A single convolution is pooled before its ReLU: the outputs and gradients are the same, and the ReLU has a quarter
    of the work.
    """
    from torch import nn

    from raycifar.models.layers import Residual, conv_bn_relu

    convolution, norm, relu = conv_bn_relu(in_channels, out_channels)
    if depth == 1:
        return nn.Sequential(convolution, norm, nn.MaxPool2d(2), relu)
    more = (Residual(conv_bn_relu(out_channels, out_channels)) for _ in range(depth - 1))
    return nn.Sequential(convolution, norm, relu, *more, nn.MaxPool2d(2))


def initial_weights_from_images(recipe: CnnRecipe, pixels: Tensor) -> dict[str, Tensor]:
    from raycifar.models.layers import whitening_filters

    return {"whiten.weight": whitening_filters(pixels, 3)} if recipe.whiten else {}
