"""Duplicates within and between sets of images: exact copies, near duplicates, and similar images.

Three stages, each more expensive than the last and for fewer pairs:

1. Every pair, by the lowest spatial frequencies of brightness and color: one matrix product. Frequencies that are even
   and odd from left to right are compared separately, which also finds mirrored images at no extra cost.
2. The most alike, by edges at half the resolution, shifted, mirrored and zoomed.
3. Those that remain, by edges at the full resolution.

Equal images are found by a hash besides.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from raycifar.data.dataset import hashes

NEAR, SIMILAR = 0.82, 0.72  # least similarity: from `NEAR` on, nearly all pairs show one photograph
CANDIDATES = 8  # of each image, among those that follow it
ALIKE_AT_FIRST, ALIKE_AT_HALF = 0.7, 0.6  # least similarity in the first two stages
ALIKE_IN_FEATURES = 0.7  # least cosine
FREQUENCIES = 6  # in each direction
CHROMA = 2.0  # weight of a channel's difference from gray
ZOOMS = (1.0, 0.9, 1 / 0.9)
LUMA = (0.299, 0.587, 0.114)
FAINT = 0.02  # strength of edges, for pixels from 0 to 1; below, they are mostly noise
CHUNK = 1024
MAX_VALUES = 2**28  # of a matrix product, 1 GiB


@dataclass(frozen=True)
class Pairs:
    """Pairs of images, the most alike first."""

    first: Tensor  # (n,) int64, rows of the images
    second: Tensor  # (n,) int64, larger than `first`
    similarity: Tensor  # (n,) float32, from `SIMILAR` to 1
    exact: Tensor  # (n,) bool, equal pixels, or mirrored ones


@torch.inference_mode()
def find_pairs(
    images: Tensor, progress: Callable[[float], None] = lambda _: None, features: Tensor | None = None
) -> Pairs:
    """Return the pairs of duplicates and of similar images, on the images' device.

    Each image is compared with the `CANDIDATES` most alike of those that follow it, and with as many by features.

    Args:
        images: (N, 3, H, W) uint8, H = W.
        progress: called with the fraction that is done.
        features: (N, d), the features of a trained network.
    """
    if features is not None:
        features = normalize(features.float() - features.float().mean(0), dim=1).to(images.device)
    even, odd = map(torch.cat, zip(*map(low_frequencies, images.split(CHUNK)), strict=True))
    luma = torch.tensor(LUMA, device=images.device)
    gray = torch.cat([torch.einsum("nchw,c->nhw", part.float(), luma) / 255 for part in images.split(CHUNK)])
    stages = [(Edges(images.shape[-1], step=2), ALIKE_AT_HALF), (Edges(images.shape[-1], step=1), SIMILAR)]
    found = []
    rows = max(1, min(CHUNK, MAX_VALUES // len(images)))
    for start in range(0, len(images), rows):
        chunk, later = slice(start, start + rows), slice(start, None)
        alike = even[chunk] @ even[later].T
        alike += (odd[chunk] @ odd[later].T).abs_()
        first, second = most_alike(alike, start, ALIKE_AT_FIRST)
        if features is not None:
            more = most_alike(features[chunk] @ features[later].T, start, ALIKE_IN_FEATURES)
            both = torch.stack([torch.cat(pair) for pair in zip((first, second), more, strict=True)])
            first, second = both.unique(dim=1)
        for edges, least in stages:
            similarity = edges.similarity(gray, first, second)
            keep = similarity >= least
            first, second, similarity = first[keep], second[keep], similarity[keep]
        found.append((first, second, similarity))
        progress(1 - (1 - min(1, (start + rows) / len(images))) ** 2)  # later chunks have fewer images after them
    first, second, similarity = map(torch.cat, zip(*found, strict=True))
    equal = torch.tensor(equal_pairs(images.cpu().numpy()), dtype=torch.int64, device=images.device).reshape(-1, 2).T
    (first, second), place = torch.cat([torch.stack([first, second]), equal], 1).unique(dim=1, return_inverse=True)
    similarity = similarity.new_ones(len(first)).index_copy(0, place[: len(similarity)], similarity)
    parts = zip(first.split(CHUNK), second.split(CHUNK), strict=True)
    exact = torch.cat([are_exact(images[a], images[b]) for a, b in parts])
    similarity = similarity.masked_fill(exact, 1)
    order = similarity.argsort(descending=True, stable=True)
    return Pairs(first[order], second[order], similarity[order], exact[order])


def are_exact(first: Tensor, second: Tensor) -> Tensor:
    return (first == second).flatten(1).all(1) | (first == second.flip(-1)).flatten(1).all(1)


def equal_pairs(images: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs of equal images, plain ones too, which have no frequencies or edges.

    Of more than `CANDIDATES` that are equal, each is paired with so many of the next and of the last ones.
    """
    rows = defaultdict(list)
    for row, key in enumerate(hashes(images)):
        rows[key].append(row)
    return [
        (row, other)
        for same in rows.values()
        for place, row in enumerate(same)
        for other in {*same[place + 1 : place + 1 + CANDIDATES], *same[max(place + 1, len(same) - CANDIDATES) :]}
    ]


def low_frequencies(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return normalized cosine coefficients, those that are even and those that are odd from left to right.

    The inner product of two images' coefficients is the sum of the products of even and odd ones; for one image
    mirrored it is their difference.
    """
    pixels = images.float() / 255
    gray = pixels.mean(1, keepdim=True)
    channels = torch.cat([gray, CHROMA * (pixels - gray)], 1)
    size = images.shape[-1]
    order, place = torch.arange(FREQUENCIES, device=images.device), torch.arange(size, device=images.device)
    cosines = normalize(torch.cos(math.pi / size * (place + 0.5) * order[:, None]), dim=1)
    coefficients = torch.einsum("ki,ncij,lj->nckl", cosines, channels, cosines)
    low = order[:, None] + order < FREQUENCIES
    low[0, 0] = False  # the mean
    parts = [(low & (order % 2 == parity)).nonzero(as_tuple=True) for parity in (0, 1)]
    even, odd = (coefficients[:, :, rows, columns].flatten(1) for rows, columns in parts)
    norm = torch.cat([even, odd], 1).norm(dim=1, keepdim=True).clamp_min(1e-6)
    return even / norm, odd / norm


def most_alike(alike: Tensor, start: int, least: float) -> tuple[Tensor, Tensor]:
    """Return rows (n,) of images from `start` on, and of later ones, by how `alike` (images, later images) they are."""
    itself = torch.ones(len(alike), len(alike), dtype=torch.bool, device=alike.device).tril_()
    alike[:, : len(alike)].masked_fill_(itself, -1)
    top = alike.topk(min(CANDIDATES, alike.shape[1]), sorted=False)
    row, place = (top.values >= least).nonzero(as_tuple=True)
    return start + row, start + top.indices[row, place]


class Edges:
    """Compares images by their edges, with equal weight for faint and strong ones, in the middle three quarters.

    Edges are the difference of two Gaussian blurs, divided by its local strength: otherwise the outline of an object on
    a plain background outweighs everything else, and all bottles look alike.

    Args:
        size: of the images, in pixels. step: pixels between two samples, and the scale of the edges.
    """

    def __init__(self, size: int, step: int) -> None:
        self.size, self.step = size, step
        self.width = size * 3 // 4 // step  # samples of a patch
        self.shifts = 4 // step  # from two pixels one way to two the other, in samples

    def similarity(self, gray: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Return the correlation (n,) of pairs of images: the largest over shifts, mirror images and zooms."""
        parts = zip(first.split(CHUNK), second.split(CHUNK), strict=True)
        return torch.cat([self._similarity(gray[a], gray[b]) for a, b in parts])

    def _similarity(self, first: Tensor, second: Tensor) -> Tensor:
        zoomed = torch.stack([self.edges(first, self.width, zoom) for zoom in ZOOMS], 1)
        patches = standardize(torch.cat([zoomed, zoomed.flip(-1)], 1).flatten(2))
        around = self.edges(second, self.width + self.shifts, 1.0)
        windows = around.unfold(1, self.width, 1).unfold(2, self.width, 1).flatten(3).flatten(1, 2)
        return (standardize(windows) @ patches.mT).flatten(1).amax(1)

    def edges(self, gray: Tensor, width: int, zoom: float) -> Tensor:
        """Return the edges (n, width, width) of images, about their centers."""
        pixels = torch.arange(self.size, device=gray.device) - (self.size - 1) / 2
        samples = (torch.arange(width, device=gray.device) - (width - 1) / 2) * self.step / zoom
        fine, broad = (gaussian(samples, pixels, sigma * self.step) for sigma in (0.7, 2.0))
        around = gaussian(samples, samples, 3.0 * self.step / zoom)
        edges = fine @ gray @ fine.T - broad @ gray @ broad.T
        return edges / ((around @ edges.square() @ around.T).sqrt() + FAINT)


def gaussian(to: Tensor, of: Tensor, sigma: float) -> Tensor:
    """Return the weights (m, n) of places `of` (n,) in averages about places `to` (m,)."""
    return torch.softmax((to[:, None] - of).square() / (-2 * sigma**2), 1)


def standardize(patches: Tensor) -> Tensor:
    """Return patches (…, pixels) with mean 0 and norm 1."""
    centered = patches - patches.mean(-1, keepdim=True)
    return centered / centered.norm(dim=-1, keepdim=True).clamp_min(1e-6)
