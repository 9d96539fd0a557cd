"""The study's own network: five convolution blocks, then two dense layers."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor, nn

FILTERS = (64, 128, 256, 512, 512)
PATCH = 27  # values of a patch of 3×3 pixels
SMALLEST_VARIANCE = 5e-4  # of a component; what varies less is noise
LAYERS = (*((f"features.{k}.",) for k in range(len(FILTERS))), ("head.",))


def convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class Residual(nn.Module):
    """Adds to its input what its layers make of it (He et al., 2016, arXiv:1512.03385)."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def block(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    """Return a block: a convolution, `depth` - 1 more with shortcuts, and a pooling that halves the image.

    Pooling before the ReLU, where nothing is between them, has the same outputs and gradients as pooling after it, and
    leaves it a quarter of the work.
    """
    convolve, norm, relu = convolution(inputs, outputs)
    if depth == 1:
        return nn.Sequential(convolve, norm, nn.MaxPool2d(2), relu)
    more = (Residual(convolution(outputs, outputs)) for _ in range(depth - 1))
    return nn.Sequential(convolve, norm, relu, *more, nn.MaxPool2d(2))


def build(classes: int, dropout: float, large_stem: bool, whiten: bool = False, depth: int = 1) -> nn.Module:
    """Return the network: 4.2 M parameters for 100 classes.

    Five poolings leave a 1×1 map of 32×32 pixels; the average pool is for images that are scaled up.

    Args:
        whiten: put a fixed layer before the blocks that whitens patches of the image.
        depth: convolutions in each block; the study's has one.
    """
    channels = (PATCH if whiten else 3, *FILTERS)
    return nn.Sequential(
        OrderedDict(
            **({"whiten": whitening()} if whiten else {}),
            features=nn.Sequential(*(block(*sizes, depth) for sizes in pairwise(channels))),
            pool=nn.AdaptiveAvgPool2d(1),
            head=nn.Sequential(
                nn.Flatten(),
                nn.Dropout(dropout),
                nn.Linear(FILTERS[-1], 512),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Linear(512, classes),
            ),
        )
    )


def whitening() -> nn.Conv2d:
    """Return the layer that whitens patches; its filters are computed, see `whitening_filters`, and never trained."""
    return nn.Conv2d(3, PATCH, kernel_size=3, padding=1, bias=False).requires_grad_(False)


def whitening_filters(pixels: np.ndarray) -> np.ndarray:
    """Return filters (27, 3, 3, 3) float32 that make the values of a 3×3 patch uncorrelated, of variance one.

    They are the principal components of the patches, divided by their standard deviations, as in Jordan's
    airbench (2024, arXiv:2404.00498).

    Args:
        pixels: (N, 3, H, W) float32, preprocessed.
    """
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (3, 3), axis=(2, 3))
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, PATCH)
    variances, components = np.linalg.eigh(np.cov(patches, rowvar=False))
    filters = components / np.sqrt(variances + SMALLEST_VARIANCE)
    return filters.T.reshape(PATCH, 3, 3, 3).astype(np.float32)
