"""Pictures in folders of their classes: train/CLASS/… and test/CLASS/…, or train/SUPERCLASS/CLASS/…"""

from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from raycifar.data import CIFAR100 as INFO
from raycifar.data.labels import to_labels
from raycifar.data.layouts import Place, split_in
from raycifar.data.layouts.columns import decode_one
from raycifar.data.tables import to_table
from raycifar.data.trees import MOST_IMAGES, Tree
from raycifar.errors import RequestError


def place(path: PurePosixPath) -> Place | None:
    *above, _ = path.parts
    for series, depth in (("CLASS", 2), ("SUPERCLASS/CLASS", 3)):
        if len(above) >= depth and (split := split_in(above[-depth])):
            return Place(PurePosixPath(*above[:-depth]), split, series)
    return None


def read(tree: Tree, paths: list[PurePosixPath], origin: str) -> pa.Table:
    """Return the pictures in the order of their own names, whichever class they are of."""
    if len(paths) > MOST_IMAGES:
        raise RequestError(f"{origin}: more than {MOST_IMAGES:,} images are not read.")
    fine = to_labels([path.parent.name for path in paths], "fine", origin)
    coarse = None
    if split_in(paths[0].parts[-4] if len(paths[0].parts) > 3 else ""):
        coarse = to_labels([path.parent.parent.name for path in paths], "coarse", origin)
    pixels = np.empty((len(paths), *INFO.image_shape), np.uint8)
    for row, path in enumerate(paths):
        pixels[row] = decode_one(tree.read(path), f"{tree.name}: {path}")
    return to_table(pixels, fine, coarse, origin)
