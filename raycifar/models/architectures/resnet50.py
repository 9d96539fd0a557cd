"""ResNet-50 (He et al., 2016, arXiv:1512.03385), torchvision's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raycifar.models.recipe import SHORT, TRANSFER, Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

IMAGENET = "ResNet50_Weights.IMAGENET1K_V2"
LAYERS = (("conv1.", "bn1."), ("layer1.",), ("layer2.",), ("layer3.",), ("layer4.",), ("fc.",))
RECIPES = {"transfer": Recipe(**TRANSFER), "scratch": Recipe(), "short": Recipe(**SHORT)}


def build(num_classes: int, dropout: float, large_stem: bool) -> nn.Module:
    """Return the network: 23.7 M parameters for 100 classes.

    ImageNet weights keep torchvision's stem, a 7×7 convolution of stride 2 and a max pool, which would reduce 32×32
    pixels to an 8×8 map before the first block. From scratch, a 3×3 convolution of stride 1 and no pool keep all 32×32,
    as He et al. do on CIFAR.
    """
    from torch import nn
    from torchvision.models import resnet50

    model = resnet50(weights=None, zero_init_residual=True)
    if not large_stem:
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(dropout))
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model


def is_for_small_images(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Return whether the first convolution is 3×3; ImageNet's is 7×7."""
    return list(shapes.get("conv1.weight", ()))[2:] == [3, 3]
