"""NumPy's arrays, in a folder or an npz: x_train, y_train, x_test and y_test, or train_images, train_labels, …"""

import io
import math
import re
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from raycifar.data import CIFAR100
from raycifar.data.dataset import to_table
from raycifar.data.layouts import Place, split_in
from raycifar.data.trees import MAX_IMAGES, Tree
from raycifar.errors import RequestError, in_a_line

ROLES = {
    "coarse": {"coarse", "superclass"},
    "image": {"x", "image", "images", "data", "pixels"},
    "fine": {"y", "fine", "label", "labels", "targets"},
}


def place(path: PurePosixPath) -> Place | None:
    split = split_in(path.stem)
    return Place(path.parent, split) if split else None


def role_of(path: PurePosixPath) -> str:
    words = set(re.split(r"[^a-z]+", path.stem.lower()))
    return next((role for role, names in ROLES.items() if names & words), "")


def read(tree: Tree, paths: list[PurePosixPath], origin: str) -> pa.Table:
    files = {role: [path for path in paths if role_of(path) == role] for role in ROLES}
    if len(files["image"]) != 1 or len(files["fine"]) != 1 or len(files["coarse"]) > 1:
        names = ", ".join(path.name for path in paths)
        raise RequestError(f"{origin}: one array of images, as x_train, and one of labels, as y_train, not {names}.")
    chosen = {role: found[0] for role, found in files.items() if found}
    arrays = {role: read_array(tree.read(path), f"{tree.name}: {path}") for role, path in chosen.items()}
    pixels = to_channels_first(arrays.pop("image"), f"{tree.name}: {chosen['image']}")
    return to_table(pixels, arrays, origin)


def read_array(content: bytes, origin: str) -> np.ndarray:
    """Return the array of integers in a .npy file, after a look at its header."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        shape, fortran, dtype = read_header(file)
    except Exception as error:  # a damaged header may cause any
        raise RequestError(f"{origin} is not a readable .npy array: {in_a_line(error)}.") from error
    data = memoryview(content)[file.tell() :]
    if dtype.kind not in "iu" or not shape or shape[0] > MAX_IMAGES or math.prod(shape) * dtype.itemsize != len(data):
        raise RequestError(
            f"{origin} is {dtype} of shape {shape} in {len(data):,} bytes, not integers of at most {MAX_IMAGES:,} "
            "images."
        )
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def to_channels_first(pixels: np.ndarray, origin: str) -> np.ndarray:
    """Return images (N, H, W, 3), (N, 3, H, W) or (N, 3 * H * W) as either of the last two."""
    channels, height, width = CIFAR100.image_shape
    if pixels.dtype == np.uint8 and pixels.shape[1:] == (height, width, channels):
        return pixels.transpose(0, 3, 1, 2)
    if pixels.dtype == np.uint8 and pixels.shape[1:] in (CIFAR100.image_shape, (CIFAR100.image_bytes,)):
        return pixels
    wanted = f"uint8 (N, {height}, {width}, {channels}) or (N, {CIFAR100.image_bytes})"
    raise RequestError(f"{origin} is {pixels.dtype} of shape {pixels.shape}, not {wanted}.")
