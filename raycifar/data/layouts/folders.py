"""Pictures in folders of their classes: train/CLASS/… and test/CLASS/…, or train/SUPERCLASS/CLASS/…"""

from pathlib import PurePosixPath

import pyarrow as pa

from raycifar.data.dataset import to_table
from raycifar.data.labels import to_labels
from raycifar.data.layouts import Place, split_in
from raycifar.data.pictures import decode_all
from raycifar.data.trees import Tree, check_count


def place(path: PurePosixPath) -> Place | None:
    *above, _ = path.parts
    for series, depth in (("CLASS", 2), ("SUPERCLASS/CLASS", 3)):
        if len(above) >= depth and (split := split_in(above[-depth])):
            return Place(PurePosixPath(*above[:-depth]), split, series)
    return None


def read(tree: Tree, paths: list[PurePosixPath], origin: str) -> pa.Table:
    """Return the pictures in the order of their file names, whatever their class."""
    check_count(len(paths), origin)
    labels = {"fine": to_labels([path.parent.name for path in paths], "fine", origin)}
    if (placed := place(paths[0])) and placed.series == "SUPERCLASS/CLASS":
        labels["coarse"] = to_labels([path.parent.parent.name for path in paths], "coarse", origin)
    pixels = decode_all(((tree.read(path), f"{tree.name}: {path}") for path in paths), len(paths))
    return to_table(pixels, labels, origin)
