"""CIFAR-100-C: the test images, corrupted in many ways and at five severities (Hendrycks and Dietterich, 2019).

A folder of NAME.npy for each corruption, uint8 (5 N, 32, 32, 3), severity by severity, and labels.npy.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
from pyarrow import fs

from raycifar.data.dataset import to_table
from raycifar.data.labels import to_labels
from raycifar.data.layouts import split_in
from raycifar.data.layouts.arrays import read_array, to_channels_first
from raycifar.data.trees import Tree, open_folder
from raycifar.errors import RequestError
from raycifar.storage.files import locate_images

SEVERITIES = 5
LABELS = "labels.npy"
EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")  # for tuning; the benchmark's mean leaves them out


@dataclass(frozen=True)
class Corruptions:
    """Corrupted test images; `names` are the corruptions, and `labels` (5 N,) those of each one's images."""

    tree: Tree
    names: list[str]
    labels: np.ndarray

    def read(self, name: str) -> list[pa.Table]:
        """Return the images of a corruption: a table for each severity.

        Raises:
            RequestError: they aren't as many as the labels, or of another size.
        """
        where = f"{self.tree.name}: {name}.npy"
        pixels = to_channels_first(read_array(self.tree.read(PurePosixPath(f"{name}.npy")), where), where)
        if len(pixels) != len(self.labels):
            raise RequestError(f"{where} has {len(pixels):,} images, and {LABELS} {len(self.labels):,} labels.")
        each = zip(np.split(pixels, SEVERITIES), np.split(self.labels, SEVERITIES), strict=True)
        return [to_table(images, {"fine": labels}, where) for images, labels in each]


def find_corruptions(location: str) -> Corruptions | None:
    """Return the corrupted test images in a folder, or None if it isn't such a folder.

    Raises:
        RequestError: the labels can't be read, or aren't those of five severities.
    """
    filesystem, path, kind = locate_images(location)
    if kind != fs.FileType.Directory:
        return None
    tree = open_folder(location, filesystem, path)
    names = sorted(file.stem for file in tree.paths if file.suffix == ".npy" and file.parent == PurePosixPath())
    if PurePosixPath(LABELS) not in tree.paths or len(names) < 2 or any(map(split_in, names)):
        return None
    names.remove("labels")
    where = f"{location}: {LABELS}"
    labels = to_labels(read_array(tree.read(PurePosixPath(LABELS)), where), "fine", where)
    if not len(labels) or len(labels) % SEVERITIES:
        raise RequestError(f"{where} has {len(labels):,} labels, which {SEVERITIES} severities can't share equally.")
    return Corruptions(tree, names, labels)


def benchmark(names: list[str]) -> list[str]:
    """Return the corruptions that a mean error is taken over: those of the benchmark, or all if there are no others."""
    return [name for name in names if name not in EXTRA] or names
