"""Layers that architectures share."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_VARIANCE = 5e-4  # of a component; less is noise


class Residual(nn.Module):
    """Adds its layers' output to its input (He et al., 2016, arXiv:1512.03385)."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class MaxMeanPool(nn.Module):
    """The largest value of each channel plus its mean: (N, C, H, W) to (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3)) + x.mean((2, 3))


class Scale(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def conv_bn_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    """Return a 3×3 convolution that preserves the image's size, batch norm and ReLU."""
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def whitening_filters(pixels: Tensor, size: int) -> Tensor:
    """Return filters (3 * size², 3, size, size) float32 that make a patch's values uncorrelated, with unit variance.

    They are the patches' principal components divided by their standard deviations, as in airbench (Jordan, 2024,
    arXiv:2404.00498).

    Args:
        pixels: (N, 3, H, W) float32, preprocessed. size: of a patch, in pixels a side.
    """
    patches = F.unfold(pixels, size).transpose(0, 1).flatten(1)  # (values of a patch, patches)
    variances, components = torch.linalg.eigh(torch.cov(patches.double()).cpu())
    filters = (components / (variances + SMALLEST_VARIANCE).sqrt()).T
    return filters.reshape(-1, pixels.shape[1], size, size).to(pixels)
