"""The operations of TrivialAugment and RandAugment on a whole batch, each image with its own operation and strength.

torchvision's policies sample one operation for all images of a call, and so do Kornia's, which sample only strengths
per image. Called for each image, they would launch a thousand kernels per batch, and a GPU would wait for each sample.
Here all operations are one formula: an operation is a row of coefficients, and every batch takes the same few tensor
operations. No shape depends on a tensor's content, so a GPU never waits. The results equal those of
torchvision.transforms for uint8 tensors with nearest interpolation and black fill, value for value.
"""

import functools
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Policy = Literal["trivial", "rand"]

LEVELS = 31  # strengths of each operation, as in both papers
RAND_LEVEL = 9  # RandAugment's strength, torchvision's default
MARGIN = 2  # black pixels around an image; even, so that ties round to the same pixel


class Operation(NamedTuple):
    """The coefficients of one operation; the defaults are the identity.

    The pixel at (x, y) from the image's center comes from (xx, yx) * x + (xy, yy) * y + (x0, y0). Its value becomes
    ratio * value + rest * other, where other is its gray, the image's mean gray, the blurred image's value, or 0.
    """

    xx: float = 1.0
    yx: float = 0.0
    xy: float = 0.0
    yy: float = 1.0
    x0: float = 0.0
    y0: float = 0.0
    ratio: float = 1.0
    rest: float = 0.0  # 1 - ratio
    gray: float = 0.0  # 1: blend with it, as for the next two
    mean: float = 0.0
    blurred: float = 0.0
    stretch: float = 0.0  # 1: stretch each channel to the range from 0 to 255
    threshold: float = math.inf  # larger or equal values are inverted
    mask: float = 255.0  # of a value's bits
    equalize: float = 0.0  # 1: equalize each channel's histogram


IDENTITY = Operation()
GEOMETRY, TONE, HISTOGRAM = slice(0, 6), slice(6, 14), slice(14, 15)  # groups of coefficients


def operation(name: str, magnitude: float, height: int, width: int) -> Operation:
    """Return the operation with a name and magnitude of torchvision's, for images of a size in pixels."""
    cosine, sine = math.cos(math.radians(magnitude)), math.sin(math.radians(magnitude))
    blended = Operation(ratio=1 + magnitude, rest=-magnitude)
    return {
        "Identity": IDENTITY,
        "ShearX": Operation(xy=magnitude, x0=magnitude * height / 2),
        "ShearY": Operation(yx=magnitude, y0=magnitude * width / 2),
        "TranslateX": Operation(x0=-int(magnitude)),
        "TranslateY": Operation(y0=-int(magnitude)),
        "Rotate": Operation(xx=cosine, yx=sine, xy=-sine, yy=cosine),
        "Brightness": blended,
        "Color": blended._replace(gray=1),
        "Contrast": blended._replace(mean=1),
        "Sharpness": blended._replace(blurred=1),
        "Posterize": Operation(mask=256 - 2 ** (8 - int(magnitude))),
        "Solarize": Operation(threshold=magnitude),
        "AutoContrast": Operation(stretch=1),
        "Equalize": Operation(equalize=1),
    }[name]


def magnitudes(policy: Policy, height: int, width: int) -> dict[str, list[float]]:
    """Return the equally likely magnitudes of a policy's operations, by name."""
    if policy == "trivial":
        shear, shift_x, shift_y, degrees, blend, bits = 0.99, 32.0, 32.0, 135.0, 0.99, 6
        chosen = slice(None)
    else:
        shear, shift_x, shift_y, degrees, blend, bits = 0.3, 150 / 331 * width, 150 / 331 * height, 30.0, 0.9, 4
        chosen = slice(RAND_LEVEL, RAND_LEVEL + 1)
    signed = {"ShearX": shear, "ShearY": shear, "TranslateX": shift_x, "TranslateY": shift_y, "Rotate": degrees}
    signed |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), blend)
    levels = {name: torch.linspace(0.0, largest, LEVELS)[chosen].tolist() for name, largest in signed.items()}
    return {
        "Identity": [0.0],
        **{name: [*some, *(-value for value in some)] for name, some in levels.items()},
        "Posterize": [8.0 - round(k * bits / (LEVELS - 1)) for k in range(LEVELS)][chosen],
        "Solarize": torch.linspace(255.0, 0.0, LEVELS)[chosen].tolist(),
        "AutoContrast": [0.0],
        "Equalize": [0.0],
    }


@functools.cache
def operations(policy: Policy, height: int, width: int, device: torch.device) -> Tensor:
    """Return a policy's equally likely operations, (operations, coefficients) float32, cached on the device."""
    space = magnitudes(policy, height, width)
    rows = math.lcm(*map(len, space.values()))
    table = [
        operation(name, value, height, width)
        for name, values in space.items()
        for value in values
        for _ in range(rows // len(values))
    ]
    return torch.tensor(table).to(device, non_blocking=True)


def sample_operations(policy: Policy, images: Tensor) -> Tensor:
    """Return a random operation for each image, (N, coefficients), from torch's default generator."""
    table = operations(policy, *images.shape[-2:], images.device)
    return table[torch.randint(len(table), (len(images),), device=images.device)]


def apply_operations(images: Tensor, coefficients: Tensor) -> Tensor:
    """Return `images` (N, 3, H, W) uint8, each changed by its `Operation`, a row of (N, coefficients) float32."""
    for change, own in ((warp, GEOMETRY), (blend, TONE), (equalize, HISTOGRAM)):
        some = coefficients[:, own]
        if images.device.type == "cuda":
            images = change(images, some)
        else:  # on a CPU, selecting the images that change takes no synchronization
            rows = (some != torch.tensor(IDENTITY[own])).any(1).nonzero()[:, 0]
            images = images.index_copy(0, rows, change(images[rows], some[rows]))
    return images


@functools.cache
def grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pixels' x (W,) and y (H, 1) from the image's center, and the padded image's center (2, 1, 1)."""
    center = torch.tensor([(width - 1) / 2, (height - 1) / 2])
    x, y = torch.arange(width) - center[0], torch.arange(height)[:, None] - center[1]
    x, y, center = (each.to(device, non_blocking=True) for each in (x, y, center[:, None, None] + MARGIN))
    return x, y, center


def warp(images: Tensor, geometry: Tensor) -> Tensor:
    """Return each image transformed with nearest interpolation and black fill."""
    count, channels, height, width = images.shape
    x, y, center = grid(height, width, images.device)
    along_x, along_y, offset = geometry.view(count, 3, 2, 1, 1).unbind(1)
    # Separate products and sums round alike everywhere; fused ones would break ties differently on a GPU.
    columns, rows = (along_x * x).add(along_y * y).add_(offset + center).round_().unbind(1)
    columns, rows = columns.clamp_(MARGIN - 1, width + MARGIN), rows.clamp_(MARGIN - 1, height + MARGIN)
    pixels = columns.add(rows, alpha=width + 2 * MARGIN).long().view(count, 1, height * width)
    padded = F.pad(images, (MARGIN,) * 4).flatten(2)
    return padded.gather(2, pixels.expand(-1, channels, -1)).view(images.shape)


def blend(images: Tensor, tone: Tensor) -> Tensor:
    """Return each image with its pixels blended, stretched, inverted or masked."""
    ratio, rest, gray, mean, blurred, stretch, threshold, mask = tone[:, :, None, None, None].unbind(1)
    pixels = images.float()
    red, green, blue = pixels.split(1, dim=1)
    grays = (red * 0.2989).add_(green * 0.587).add_(blue * 0.114).floor_()
    other = torch.addcmul(grays.mean((2, 3), keepdim=True) * mean, grays, gray)
    other = torch.addcmul(other, blur(pixels), blurred)
    values = (pixels * ratio).add_(other.mul_(rest))

    low, high = (each[:, :, None, None] for each in pixels.flatten(2).aminmax(dim=2))
    span = (high - low).mul_(stretch)
    as_is = span == 0
    values.sub_(low.masked_fill_(as_is, 0)).mul_(255 / span.masked_fill_(as_is, 255))
    values = torch.where(values >= threshold, 255 - values, values)
    return values.clamp_(0, 255).to(torch.uint8).bitwise_and_(mask.to(torch.uint8))


def blur(pixels: Tensor) -> Tensor:
    """Return means of 3x3 pixels, with the center weighted five times; the outermost pixels are unchanged."""
    three = (pixels[..., :-2, :] + pixels[..., 1:-1, :]).add_(pixels[..., 2:, :])
    blurred = pixels.clone()
    inner = blurred[..., 1:-1, 1:-1]
    inner.mul_(4).add_(three[..., :-2]).add_(three[..., 1:-1]).add_(three[..., 2:]).div_(13).round_()
    return blurred


def equalize(images: Tensor, chosen: Tensor) -> Tensor:
    """Return the chosen images with each channel's histogram equalized, as by PIL."""
    values = images.flatten(2).long()
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int32, device=images.device)
    counts.scatter_(2, values, 1, reduce="add")
    below = counts.cumsum(2, dtype=torch.int32).sub_(counts)
    step = below.gather(2, values.amax(2, keepdim=True)) // 255
    table = ((below + step // 2) / step).clamp_(max=255).to(torch.uint8)
    spread = table.gather(2, values).view(images.shape)
    return torch.where((step * chosen[:, :, None] > 0)[..., None], spread, images)
