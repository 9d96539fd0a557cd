"""From image files of any size and mode to CIFAR's 32×32 pixels."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps
from pyarrow import fs

from raycifar.data import SIDE
from raycifar.errors import RequestError
from raycifar.storage.files import URI, is_local, locate


def find(place: str) -> Iterator[tuple[str, fs.FileSystem, str]]:
    """Yield name, file system and path of an image file, or of each file in a folder and those below it.

    Args:
        place: a local path or a URI.

    Raises:
        RequestError: there is nothing.
    """
    filesystem, path = locate(place)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.File:
        yield place, filesystem, path
        return
    if kind == fs.FileType.NotFound:
        raise RequestError(f"{place} is not there.")
    files = [
        entry.path
        for entry in filesystem.get_file_info(fs.FileSelector(path, recursive=True))
        if entry.type == fs.FileType.File and not entry.base_name.startswith(".")
    ]
    if not files:
        raise RequestError(f"{place} holds no file.")
    for file in sorted(files):
        inside = file.removeprefix(path).lstrip("/")
        yield f"{place.rstrip('/')}/{inside}" if URI.match(place) or is_local(filesystem) else file, filesystem, file


def read(filesystem: fs.FileSystem, path: str) -> np.ndarray:
    """Return the image of a file as (3, 32, 32) uint8; see `to_pixels`.

    Raises:
        ValueError: it is broken, or no image; the message says how.
    """
    with filesystem.open_input_stream(path) as stream:
        content = stream.read()
    if not content:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return to_pixels(image)
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is no image of a kind that is known here") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(str(error).rstrip(".") or type(error).__name__) from error


def to_pixels(image: Image.Image) -> np.ndarray:
    """Return an image of any size and mode as (3, 32, 32) uint8.

    It is turned as its EXIF data says, laid on white where it is transparent, scaled until its shorter side has
    32 pixels, and cut to the middle.
    """
    upright = to_rgb(ImageOps.exif_transpose(image))
    return np.asarray(ImageOps.fit(upright, (SIDE, SIDE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in 8-bit RGB, on white where it is transparent; 16-bit grey is scaled, not cut off."""
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.float64) / (65535 if np.asarray(image).max() > 255 else 255)
        image = Image.fromarray((wide.clip(0, 1) * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")
