"""VGG-16 (Simonyan and Zisserman, 2015, arXiv:1409.1556), torchvision's, with batch norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raycifar.models.recipe import SHORT, TRANSFER, Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

IMAGENET = "VGG16_BN_Weights.IMAGENET1K_V1"
# The five blocks between poolings; torchvision numbers convolutions, norms, activations and poolings in one sequence.
BLOCKS = (range(6), range(7, 13), range(14, 23), range(24, 33), range(34, 43))
LAYERS = (*(tuple(f"features.{k}." for k in block) for block in BLOCKS), ("classifier.",))
RECIPES = {"scratch": Recipe(), "short": Recipe(**SHORT), "transfer": Recipe(**TRANSFER)}


def build(num_classes: int, dropout: float) -> nn.Module:
    """Return the network: 15.0 M parameters for 100 classes.

    Five poolings reduce 32×32 pixels to a 1×1 map, so a global average pool and a head of 512 features replace
    torchvision's 7×7 average pool and its head of 25,088. Each max pool comes before the ReLU: outputs and gradients
    are the same, and the ReLU has a quarter of the work. The convolutions' biases are not trained: batch norm subtracts
    any constant, so their gradients are zero up to rounding.
    """
    from torch import nn
    from torchvision.models import vgg16_bn

    model = vgg16_bn(weights=None, num_classes=num_classes)
    for k, layer in enumerate(model.features):
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            layer.bias.requires_grad_(False)
        if isinstance(layer, nn.MaxPool2d):
            model.features[k - 1], model.features[k] = layer, model.features[k - 1]
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(512, num_classes),
    )
    return model


def is_for_small_images(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Return whether the head takes the 512 features of a 1×1 map; that of ImageNet's weights takes 7×7 as many."""
    heads = (shape for name, shape in shapes.items() if name.startswith(LAYERS[-1]) and len(shape) == 2)
    return next(heads, [0, 0])[1] == 512
