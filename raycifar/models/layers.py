"""Layers that architectures share."""

from collections.abc import Sequence

from torch import Tensor, nn


class Residual(nn.Module):
    """Adds its layers' output to its input (He et al., 2016, arXiv:1512.03385)."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def conv_bn_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    """Return a 3×3 convolution that preserves the image's size, batch norm and ReLU."""
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]
