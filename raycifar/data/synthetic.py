"""Images that need no files: 100 classes that a CNN can learn and a linear model can't get fully right.

Each image is a grating under noise. Its direction and frequency are the superclass's (5 × 4), its colour the
class's within it (5). The phase is random, so a class's average image is grey, and
weights on single pixels learn little; a convolution finds the stripes wherever they lie.
"""

import numpy as np
import pyarrow as pa

from raycifar.data import CLASSES, SHAPE, SUPERCLASSES
from raycifar.data.tables import Source, to_table

ANGLES = np.linspace(0, np.pi / 2, 5)  # a mirrored image must not be of another class
CYCLES = np.array([2, 4, 7, 11])  # across the image
COLOURS = np.array([(1, 1, 1), (1, -1, 0), (0, 1, -1), (1, 0, -1), (1, -2, 1)])
NOISE = 40  # standard deviation, of 255
SYNTHETIC, SIZE = "synthetic", 50_000
CHUNK = 10_000  # images made at a time, to keep the temporaries small


def synthetic(train: int = SIZE, test: int = 10_000, seed: int = 0) -> Source:
    """Return a data set of the layout, and by default of the size, of CIFAR-100, made from `seed` in seconds."""
    train_rng, test_rng = np.random.default_rng(seed).spawn(2)
    name = SYNTHETIC if train == SIZE else f"{SYNTHETIC}:{train}"
    return Source(name, draw(train, train_rng), draw(test, test_rng))


def draw(count: int, rng: np.random.Generator) -> pa.Table:
    """Return `count` images, as many of each class as of any other."""
    fine = rng.permutation(np.arange(count) % CLASSES)
    images = np.concatenate([paint(part, rng) for part in np.array_split(fine, -(-count // CHUNK))])
    return to_table(images, fine, fine // (CLASSES // SUPERCLASSES), "synthetic")


def paint(fine: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the images (N, 3, 32, 32) uint8 of these classes."""
    _, height, width = SHAPE
    coarse, colour = np.divmod(fine, CLASSES // SUPERCLASSES)
    angle = ANGLES[coarse % len(ANGLES)].astype(np.float32)
    cycles = CYCLES[coarse // len(ANGLES)].astype(np.float32)[:, None, None]
    y, x = np.mgrid[:height, :width].astype(np.float32) / width
    phase = rng.uniform(0, 2 * np.pi, (len(fine), 1, 1)).astype(np.float32)
    contrast = rng.uniform(30, 60, (len(fine), 1, 1)).astype(np.float32)
    across, down = (2 * np.pi * cycles * part(angle)[:, None, None] for part in (np.cos, np.sin))
    waves = contrast * np.sin(across * x + down * y + phase)
    images = waves[:, None] * COLOURS[colour][:, :, None, None].astype(np.float32)
    images += NOISE * rng.standard_normal(images.shape, np.float32) + 128
    return images.clip(0, 255).astype(np.uint8)
