"""Images that need no files: 100 classes that a CNN can learn and a linear model can't get fully right.

Each image shows two small colour patches on noise, one that tells the superclass and one that tells the
class within it, at random places and contrasts. Where a patch lies says nothing, so weights on single
pixels see little more than the average colour; a convolution finds a patch wherever it is.
"""

import numpy as np
import pyarrow as pa

from raycifar.data import CLASSES, SHAPE, SUPERCLASSES
from raycifar.data.tables import Source, to_table

PATCH = 10
CHUNK = 10_000  # images made at a time, to keep the temporaries small


def synthetic(train: int = 50_000, test: int = 10_000, seed: int = 0) -> Source:
    """Return a data set of the size and layout of CIFAR-100, made from `seed` in seconds."""
    patches_seed, train_seed, test_seed = np.random.SeedSequence(seed).spawn(3)
    rng = np.random.default_rng(patches_seed)
    patches = [draw_patches(count, rng) for count in (SUPERCLASSES, CLASSES)]
    return Source(
        name="synthetic",
        train=draw(train, patches, np.random.default_rng(train_seed)),
        test=draw(test, patches, np.random.default_rng(test_seed)),
    )


def draw_patches(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return (count, 3, PATCH, PATCH) float32 of blocky colours from -1 to 1, each with a mean of 0."""
    coarse = rng.uniform(-1, 1, (count, 3, PATCH // 2, PATCH // 2))
    patches = coarse.repeat(2, axis=2).repeat(2, axis=3)
    patches -= patches.mean(axis=(2, 3), keepdims=True)
    return (patches / np.abs(patches).max(axis=(1, 2, 3), keepdims=True)).astype(np.float32)


def draw(count: int, patches: list[np.ndarray], rng: np.random.Generator) -> pa.Table:
    fine = rng.permutation(np.arange(count) % CLASSES)
    coarse = fine // (CLASSES // SUPERCLASSES)
    images = np.empty((count, *SHAPE), np.uint8)
    for start in range(0, count, CHUNK):
        rows = slice(start, min(start + CHUNK, count))
        images[rows] = paint([coarse[rows], fine[rows]], patches, rng)
    return to_table(images, fine, coarse, "synthetic")


def paint(labels: list[np.ndarray], patches: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    channels, height, width = SHAPE
    count = len(labels[0])
    canvas = rng.integers(96, 160, (count, channels * height * width), np.uint8).astype(np.float32)
    within = (
        np.arange(channels)[:, None, None] * height * width
        + np.arange(PATCH)[None, :, None] * width
        + np.arange(PATCH)[None, None, :]
    ).ravel()
    for label, shapes in zip(labels, patches, strict=True):
        y, x = rng.integers(0, height - PATCH + 1, count), rng.integers(0, width - PATCH + 1, count)
        contrast = rng.uniform(60, 110, (count, 1)).astype(np.float32)
        where = (y * width + x)[:, None] + within
        inked = np.take_along_axis(canvas, where, axis=1) + contrast * shapes[label].reshape(count, -1)
        np.put_along_axis(canvas, where, inked, axis=1)
    return canvas.clip(0, 255).astype(np.uint8).reshape(count, *SHAPE)
