"""A network that learns a lot in few epochs, for `raycifar speedrun`: the study's five blocks, with few early poolings.

Its parts are those of the fastest public entries of the CIFAR-100 speedrun, and of airbench (Jordan, 2024,
arXiv:2404.00498), for images of 20 to 32 pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from raycifar.models.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

PATCH = 2  # pixels a side that are whitened
WHITENED = 24  # channels: each component of a patch of 3 colors, and its negative
NORM_MOMENTUM = 0.4  # of running statistics, which must settle within few steps
LOGIT_SCALE = 0.5  # the head learns slower by its square

SPEEDRUN = Recipe(
    epochs=14, batch_size=1000, optimizer="muon", muon_steps=3, lr=0.18, momentum=0.6, norm_lr=8.0, weight_decay=0.01,
    schedule="linear", warmup=0.25, label_smoothing=0.25, augment="alternate", progressive="20:0.15,24:0.5",
)  # fmt: skip
RECIPES = {"speedrun": SPEEDRUN}
PURPOSES = {"speedrun": "test top-1 of 0.75 in the least time"}
LAYERS = (("whiten.",), *((f"features.{k}.",) for k in range(5)), ("head.",))


def build(num_classes: int, dropout: float) -> nn.Module:
    """Return the network: 6.5 M parameters for 100 classes, three poolings."""
    from torch import nn

    from raycifar.models.layers import ConvOfColors, MaxMeanPool, Residual, Scale

    whiten = ConvOfColors(3, WHITENED, PATCH)
    whiten.weight.requires_grad_(False)
    nn.init.zeros_(whiten.get_parameter("bias"))
    head = nn.Linear(512, num_classes, bias=False)
    nn.init.zeros_(head.weight)  # a first step as long as the others, whatever the features
    return nn.Sequential(
        OrderedDict(
            whiten=whiten,
            activation=nn.SiLU(inplace=True),
            features=nn.Sequential(
                nn.Sequential(
                    *conv_norm_silu(24, 64, 3, pool=True),
                    Residual([*conv_norm_silu(64, 64, 1), *conv_norm_silu(64, 64, 1)]),
                ),
                nn.Sequential(
                    *conv_norm_silu(64, 128, 3, pool=True),
                    Residual([*conv_norm_silu(128, 128, 3), *conv_norm_silu(128, 128, 1)]),
                ),
                nn.Sequential(*conv_norm_silu(128, 256, 3)),
                nn.Sequential(*conv_norm_silu(256, 512, 3, pool=True), Residual(conv_norm_silu(512, 512, 3))),
                nn.Sequential(Residual(conv_norm_silu(512, 512, 3))),
            ),
            pool=MaxMeanPool(),
            dropout=nn.Dropout(dropout),
            head=head,
            scale=Scale(LOGIT_SCALE),
        )
    )


def conv_norm_silu(in_channels: int, out_channels: int, size: int, *, pool: bool = False) -> list[nn.Module]:
    """Return a convolution that preserves the image's size, a pooling that halves it, batch norm and SiLU.

    At first, one filter per input channel passes that channel through (Zagoruyko and Komodakis, 2017,
    arXiv:1706.00388).
    """
    import torch
    from torch import nn

    from raycifar.models.layers import MaxPool

    convolution = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False)
    with torch.no_grad():  # nn.init.dirac_ takes an operation for each filter
        first = convolution.weight[:in_channels].zero_()
        first[:, :, size // 2, size // 2] = torch.eye(*first.shape[:2])
    pooling = [MaxPool()] if pool else []
    return [convolution, *pooling, nn.BatchNorm2d(out_channels, momentum=NORM_MOMENTUM), nn.SiLU(inplace=True)]


def initial_weights_from_images(recipe: Recipe, pixels: Tensor) -> dict[str, Tensor]:
    import torch

    from raycifar.models.layers import whitening_filters

    filters = whitening_filters(pixels, PATCH)
    return {"whiten.weight": torch.cat([filters, -filters])}
