"""Image files: from any size and mode to the pixels of a data set's images, and back to PNG."""

import io
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageOps
from pyarrow import fs

from raycifar.data import CIFAR100, DatasetInfo
from raycifar.errors import RequestError
from raycifar.storage.files import file_type, list_files, locate, open_file
from raycifar.storage.locations import join


def find_images(location: str) -> Iterator[tuple[str, fs.FileSystem, str]]:
    """Yield name, file system and path of an image file, or of each file in a folder and its subfolders.

    Args:
        location: a local path or a URI.

    Raises:
        RequestError: there are no files.
    """
    filesystem, path = locate(location)
    kind = file_type(filesystem, path)
    if kind == fs.FileType.File:
        yield location, filesystem, path
        return
    if kind == fs.FileType.NotFound:
        raise RequestError(f"{location} does not exist.")
    files = [file for file in list_files(filesystem, path) if not PurePosixPath(file).name.startswith(".")]
    if not files:
        raise RequestError(f"{location} holds no files.")
    for file in files:
        inside = file.removeprefix(path).lstrip("/")
        yield join(location, inside), filesystem, file


def read_image(filesystem: fs.FileSystem, path: str, info: DatasetInfo = CIFAR100) -> np.ndarray:
    """Return an image file as (3, H, W) uint8, of the data set's size; see `to_pixels`.

    Raises:
        ValueError: the file is damaged, or not an image.
    """
    with open_file(filesystem, path) as file:
        content = file.read()
    if not content:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return to_pixels(image, info)
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is not an image of a known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(str(error).rstrip(".") or type(error).__name__) from error


def to_pixels(image: Image.Image, info: DatasetInfo = CIFAR100) -> np.ndarray:
    """Return an image of any size and mode as (3, H, W) uint8, of the data set's size.

    The image is rotated by its EXIF orientation, put on white where it is transparent, scaled until its shorter side
    fits, and cropped to its center.
    """
    size = (info.image_size, info.image_size)
    upright = to_rgb(ImageOps.exif_transpose(image))
    return np.asarray(ImageOps.fit(upright, size, Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def to_png(pixels: np.ndarray) -> bytes:
    """Return pixels (3, H, W) uint8 as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in 8-bit RGB, on white where it is transparent; 16-bit gray is scaled, not clipped."""
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.float64) / (65535 if np.asarray(image).max() > 255 else 255)
        image = Image.fromarray((wide.clip(0, 1) * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
