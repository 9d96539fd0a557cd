"""From uint8 images on the device to the network's input, a whole batch at a time.

torchvision's transforms.v2 sample one set of random numbers per batch. Flips, shifts, holes and policies must differ
between images, so they are tensor operations here; mixup and cutmix, which need one sample per batch, are its own.
All random numbers come from torch's default generators, which are reseeded in each step. Nothing waits for a GPU.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raycifar.engine.hardware import GENERATOR_LOCK
from raycifar.engine.image_ops import apply_operations, sample_operations
from raycifar.engine.torch_internals import seed_cpu
from raycifar.models import CIFAR
from raycifar.models.preprocess import normalization
from raycifar.models.recipe import Augmentation, Recipe

PAD = 4  # pixels an image may be shifted, as in He et al. (2016)
REFLECTED = 2  # pixels of reflected shifts
HOLE = 8  # side of cutout's square, DeVries and Taylor (2017) for CIFAR-100
OPERATIONS = {"trivial": 1, "rand": 2}  # of a policy, for each image
ERASED_AREA = (0.02, 0.33)  # range of the erased fraction of an image, as in torchvision
ERASED_ASPECT = (0.3, 3.3)  # range of the erased rectangle's height over its width


def augment(images: Tensor, kind: Augmentation, flipped: Tensor | None = None) -> Tensor:
    """Return `images` (N, 3, H, W) uint8, each augmented independently.

    Args:
        kind: none; flip half of the images; crop: flip, and shift by up to 4 pixels (He et al., 2016); cutout: crop,
            and cut a hole (DeVries and Taylor, 2017); trivial: crop, and one operation of TrivialAugment's wide space
            (Müller and Hutter, 2021); rand: crop, and two operations of RandAugment (Cubuk et al., 2020); alternate:
            flip, and shift by up to 2 pixels, reflected at the edges.
        flipped: (N,) bool, which images to flip; None draws them.
    """
    if kind == "none":
        return images
    if flipped is None:
        flipped = torch.rand(len(images), device=images.device) < 0.5
    if kind == "flip":
        return torch.where(flipped[:, None, None, None], images.flip(3), images)
    if kind == "alternate":
        return shift(images, flipped, REFLECTED, reflect=True)
    images = shift(images, flipped, PAD)
    if kind == "cutout":
        return cut_hole(images)
    if kind == "trivial" or kind == "rand":
        for _ in range(OPERATIONS[kind]):
            images = apply_operations(images, sample_operations(kind, images))
    return images


def alternating_flips(index: Tensor, epoch: Tensor) -> Tensor:
    """Return which images to flip in an epoch, (n,) bool: about half of them in the first, the others in the next, …

    So each image is seen both ways in any two epochs, as in airbench (Jordan, 2024, arXiv:2404.00498).

    Args:
        index: (n,) int64, the images' rows in the source. epoch: () int64.
    """
    return ((index * 2654435761 >> 16) + epoch) % 2 == 0  # Knuth's multiplicative hash


def shift(images: Tensor, flipped: Tensor, most: int, *, reflect: bool = False) -> Tensor:
    """Return each image shifted by up to `most` pixels, and flipped where `flipped`, by one gather.

    Args:
        reflect: mirror images at their edges, rather than pad them with black.
    """
    count, channels, height, width = images.shape
    device = images.device
    y, x = torch.randint(0, 2 * most + 1, (2, count), device=device)
    columns = torch.arange(width, device=device)
    columns = torch.where(flipped[:, None], width - 1 - columns, columns) + x[:, None]
    rows = torch.arange(height, device=device) + y[:, None]
    if reflect:
        padded = images.flatten(2)
        rows, columns = (
            size - 1 - (size - 1 - (at - most).abs()).abs() for at, size in ((rows, height), (columns, width))
        )
    else:
        padded = F.pad(images, (most,) * 4).flatten(2)
        width += 2 * most
    pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None]
    return padded.gather(2, pixels.expand(-1, channels, -1)).view(images.shape)


def cut_hole(images: Tensor) -> Tensor:
    count, _, height, width = images.shape
    y = torch.randint(0, height, (count, 1), device=images.device)
    x = torch.randint(0, width, (count, 1), device=images.device)
    return blank(images, y - HOLE // 2, x - HOLE // 2, HOLE, HOLE)


def erase(inputs: Tensor, probability: float) -> Tensor:
    """Return `inputs` (N, 3, H, W) float, with a rectangle of some set to 0, the mean color (Zhong et al., 2020).

    A rectangle as high or wide as the image is made a pixel smaller, where torchvision samples another.
    """
    if not probability:
        return inputs
    count, _, height, width = inputs.shape
    chosen, area, aspect, y, x = torch.rand(5, count, 1, device=inputs.device)
    area = (ERASED_AREA[0] + area * (ERASED_AREA[1] - ERASED_AREA[0])) * (height * width)
    low, high = map(math.log, ERASED_ASPECT)
    aspect = torch.exp(low + aspect * (high - low))
    rows = (area * aspect).sqrt().round().clamp(max=height - 1)
    columns = (area / aspect).sqrt().round().clamp(max=width - 1)
    y, x = (y * (height - rows + 1)).floor(), (x * (width - columns + 1)).floor()
    return blank(inputs, y, x, rows * (chosen < probability), columns)


def blank(images: Tensor, y: Tensor, x: Tensor, rows: Tensor | int, columns: Tensor | int) -> Tensor:
    """Return images (N, 3, H, W) with a rectangle of each set to 0; its corner and size, in pixels, are (N, 1)."""
    row, column = (torch.arange(size, device=images.device) for size in images.shape[-2:])
    row, column = row - y, column - x
    vertical, horizontal = (row >= 0) & (row < rows), (column >= 0) & (column < columns)
    return images * ~(vertical[:, None, :, None] & horizontal[:, None, None, :])


def as_trained(images: np.ndarray, recipe: Recipe, seed: int) -> np.ndarray:
    """Return `images` (N, 3, H, W) uint8 as a batch of the recipe shows them to the network, in pixel values.

    Another thread may be training: this waits for its step, and leaves the generator as it was.
    """
    with GENERATOR_LOCK, torch.random.fork_rng(devices=[]):
        seed_cpu(seed)
        pixels = augment(torch.from_numpy(images.copy()), recipe.augment)
        mean, factor = normalization(CIFAR, pixels.device)
        inputs = erase((pixels.float() - mean) * factor, recipe.erasing)
        mixed, _ = mix(inputs, torch.arange(len(images)), recipe, len(images))
    return (mixed / factor + mean).round().clamp(0, 255).to(torch.uint8).numpy()


def mix(images: Tensor, targets: Tensor, recipe: Recipe, num_classes: int) -> tuple[Tensor, Tensor]:
    """Apply torchvision's mixup or cutmix to the recipe's fractions of batches.

    Args:
        images: (N, 3, H, W) float. targets: (N,) int64.

    Returns:
        The images, and the targets: (N,) int64 unchanged, or (N, classes) float probabilities.
    """
    if not recipe.mixup + recipe.cutmix:
        return images, targets
    from torchvision.transforms import v2  # takes 1 s, which other recipes save

    sample = torch.rand(()).item()
    if sample < recipe.mixup:
        return v2.MixUp(num_classes=num_classes)(images, targets)
    if sample < recipe.mixup + recipe.cutmix:
        return v2.CutMix(num_classes=num_classes)(images, targets)
    return images, targets
