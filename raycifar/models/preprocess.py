"""From uint8 pixels to a network's input."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from raycifar.models import CIFAR, Preprocessing


def preprocess(images: Tensor, preprocessing: Preprocessing = CIFAR) -> Tensor:
    """Return the network's input (N, 3, size, size) float32, channels last, from `images` (N, 3, H, W) uint8."""
    mean, factor = normalization(preprocessing, images.device)
    pixels = resize(images.float(), preprocessing)
    return ((pixels - mean) * factor).contiguous(memory_format=torch.channels_last)


@functools.cache
def normalization(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mean to subtract from pixels (0 to 255), and the factor to multiply by, (3, 1, 1) each."""
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (preprocessing.mean, preprocessing.std))
    return mean.to(device), (1 / std).to(device)


def resize(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return float pixels (N, 3, H, W) scaled to (N, 3, size, size) as by PIL, as for ImageNet weights.

    Without `antialias`, torch's bicubic curve differs from PIL's, even for upscaling.
    """
    size = preprocessing.size
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, (size, size), mode=preprocessing.interpolation, antialias=True)
