"""Synthetic images: classes that a CNN can learn, and that a linear model can't fully separate.

Each image is a noisy grating. Its superclass sets direction and frequency (5 × 4), its class within the superclass the
color (5). The phase is random, so the mean image of a class is gray, and weights on single pixels learn little; a
convolution finds the stripes anywhere.
"""

import numpy as np
import pyarrow as pa

from raycifar.data import CIFAR100
from raycifar.data.dataset import Source, to_table

ANGLES = np.linspace(0, np.pi / 2, 5)  # up to 90°: a flipped image must not belong to another class
CYCLES = np.array([2, 4, 7, 11])  # across the image
COLORS = np.array([(1, 1, 1), (1, -1, 0), (0, 1, -1), (1, 0, -1), (1, -2, 1)])
NOISE = 40  # standard deviation, of 255
SYNTHETIC, NUM_IMAGES = "synthetic", 50_000
CHUNK = 10_000  # images made at a time, to keep the temporary arrays small


def synthetic(train: int = NUM_IMAGES, test: int = 10_000, seed: int = 0) -> Source:
    """Return synthetic training and test images in CIFAR-100's layout, by default as many as CIFAR-100 has."""
    train_rng, test_rng = np.random.default_rng(seed).spawn(2)
    name = SYNTHETIC if train == NUM_IMAGES else f"{SYNTHETIC}:{train}"
    return Source(name, make_table(train, train_rng), make_table(test, test_rng))


def make_table(num_images: int, rng: np.random.Generator) -> pa.Table:
    """Return images in random order, equally many of each class."""
    fine = rng.permutation(np.arange(num_images) % CIFAR100.num_classes)
    chunks = np.array_split(fine, -(-num_images // CHUNK))
    pixels = np.concatenate([make_images(part, rng) for part in chunks])
    return to_table(pixels, {"fine": fine, "coarse": fine // len(COLORS)}, SYNTHETIC)


def make_images(fine: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return images (N, 3, H, W) uint8 of these classes (N,)."""
    _, height, width = CIFAR100.image_shape
    coarse, color = np.divmod(fine, len(COLORS))
    angle = ANGLES[coarse % len(ANGLES)].astype(np.float32)
    cycles = CYCLES[coarse // len(ANGLES)].astype(np.float32)[:, None, None]
    y, x = np.mgrid[:height, :width].astype(np.float32) / width
    phase = rng.uniform(0, 2 * np.pi, (len(fine), 1, 1)).astype(np.float32)
    contrast = rng.uniform(30, 60, (len(fine), 1, 1)).astype(np.float32)
    across, down = (2 * np.pi * cycles * part(angle)[:, None, None] for part in (np.cos, np.sin))
    waves = contrast * np.sin(across * x + down * y + phase)
    images = waves[:, None] * COLORS[color][:, :, None, None].astype(np.float32)
    images += NOISE * rng.standard_normal(images.shape, np.float32) + 128
    return images.clip(0, 255).astype(np.uint8)
