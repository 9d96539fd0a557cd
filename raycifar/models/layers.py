"""Layers that architectures share."""

from collections.abc import Sequence
from typing import Any

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


class MaxPool(nn.MaxPool2d):
    """The largest of 2×2 values: (N, C, H, W) to (N, C, H // 2, W // 2).

    Where training is compiled, it is elementwise operations, which are fused with those after it.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.training and torch.compiler.is_compiling()
        return LargestOfFour.apply(x) if fused else super().forward(x)


class LargestOfFour(torch.autograd.Function):
    """Like `MaxPool`. Its backward pass reads one byte per patch: the index of the (first) maximum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        height, width = (size // 2 * 2 for size in x.shape[2:])  # an odd row or column is left out
        # The four values of each patch, (N, C, H // 2, W // 2) each
        a, b, c, d = [x[:, :, row:height:2, column:width:2] for row in (0, 1) for column in (0, 1)]
        top, bottom = torch.maximum(a, b), torch.maximum(c, d)
        first = torch.where(bottom > top, torch.where(d > c, 3, 2), torch.where(b > a, 1, 0))
        ctx.save_for_backward(first.to(torch.uint8))
        ctx.odd = (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2)
        return torch.maximum(top, bottom)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (first,) = ctx.saved_tensors
        # (N, H, 1, W, 1, C) each, spread to (N, H, 2, W, 2, C): channels_last, as the convolution before it needs it
        first, gradient = (each.permute(0, 2, 3, 1)[:, :, None, :, None] for each in (first, gradient))
        place = torch.arange(4, device=gradient.device).view(2, 1, 2, 1)
        spread = torch.where(first == place, gradient, 0).flatten(1, 2).flatten(2, 3)
        return F.pad(spread, ctx.odd).permute(0, 3, 1, 2)


class ConvOfColors(nn.Conv2d):
    """A convolution of RGB images; in compiled training, zeros pad them to eight channels, as tensor cores need."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.compiler.is_compiling()):
            return super().forward(x)
        x, weight = (F.pad(each, (0, 0, 0, 0, 0, 5)) for each in (x, self.weight))
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class MaxMeanPool(nn.Module):
    """The largest value of each channel plus its mean: (N, C, H, W) to (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # so the gradient is channels_last, as x is
        # Not amax, which divides the gradient among the values that equal the maximum. Inductor may find none, since it
        # compares float32 values with a maximum that is rounded to bfloat16, and 0 / 0 is NaN.
        return pixels.max(1).values + pixels.mean(1)


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
