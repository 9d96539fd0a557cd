"""Image files: from any size and mode to the pixels of a data set's images, and back to PNG."""

import contextlib
import io
import logging
import mimetypes
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from pyarrow import fs

from raycifar.data import CIFAR100
from raycifar.errors import RequestError
from raycifar.storage.files import list_files, locate_images, open_file
from raycifar.storage.locations import join
from raycifar.words import count

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it says of damaged files is in their errors

# Read by libraries. Pillow's other formats are rare, and one of them, EPS, starts a program: Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)
MAX_BYTES = 2**28  # of an image file
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageFile(NamedTuple):
    """An image file: its name as the user knows it, and where it is."""

    name: str
    filesystem: fs.FileSystem
    path: str

    def is_image(self) -> bool:
        """Return whether the file claims to be an image, by its suffix or else by its content."""
        if kind := mimetypes.guess_type(self.path)[0]:
            return kind.startswith("image/")
        try:
            with open_file(self.filesystem, self.path) as file, Image.open(file, formats=FORMATS):
                return True
        except Image.DecompressionBombError:
            return True
        except Exception:  # a damaged file may cause any
            return False


def find_images(location: str) -> tuple[list[ImageFile], int]:
    """Return an image file, or those in a folder and its subfolders, and the number of other files, not hidden ones.

    In a folder, a file is an image if its suffix is an image's, or if its suffix is unknown and its content an image's.

    Args:
        location: a local path or a URI.

    Raises:
        RequestError: there are no image files.
    """
    filesystem, path, kind = locate_images(location)
    if kind == fs.FileType.NotFound:
        raise RequestError(f"{location} does not exist.")
    if kind != fs.FileType.Directory:
        return [ImageFile(location, filesystem, path)], 0
    inside = {file.removeprefix(path).lstrip("/"): file for file in list_files(filesystem, path)}
    files = [
        ImageFile(join(location, name), filesystem, file)
        for name, file in inside.items()
        if not any(part.startswith(".") for part in name.split("/"))
    ]
    found = [file for file in files if file.is_image()]
    others = len(files) - len(found)
    if not found:
        but = f", but {count(others, 'other file')}" if others else ""
        raise RequestError(f"{location} holds no images{but}.")
    return found, others


def read_image(filesystem: fs.FileSystem, path: str) -> np.ndarray:
    """Return an image file as (3, 32, 32) uint8; see `open_file`, `decode` and `to_pixels`."""
    with open_file(filesystem, path, max_bytes=MAX_BYTES) as file:
        return to_pixels(decode(file.read()))


def decode(content: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """Return the picture that a file of any of `FORMATS` holds; no other program is started.

    Args:
        size: the width and height that it must have, which are looked at before it is decoded.

    Raises:
        ValueError: the file is damaged, not an image, too large, or of another size.
    """
    if not content:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if size and image.size != size:
                raise ValueError(f"it has {image.width}×{image.height} pixels, not {size[0]}×{size[1]}")
            image.load()
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is not an image of a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except Exception as error:  # a damaged file may cause any
        raise ValueError(str(error).rstrip(".") or type(error).__name__) from error
    return image


def decode_all(files: Iterable[tuple[bytes, str]], count: int) -> np.ndarray:
    """Return `count` image files as (N, 3, H, W) uint8; with each comes the start of an error's message.

    Raises:
        RequestError: one isn't an image of the data set's size, which is looked at before it is decoded.
    """
    pixels = np.empty((count, *CIFAR100.image_shape), np.uint8)
    for row, (content, origin) in enumerate(files):
        try:
            image = to_rgb(decode(content, (CIFAR100.image_size, CIFAR100.image_size)))
        except ValueError as error:
            raise RequestError(f"{origin} can't be read: {error}.") from error
        pixels[row] = np.asarray(image).transpose(2, 0, 1)
    return pixels


def to_pixels(image: Image.Image) -> np.ndarray:
    """Return an image of any size and mode as (3, 32, 32) uint8.

    The image is scaled until its shorter side fits, and cropped to its center; see `to_rgb`.

    Raises:
        ValueError: its values have no known range, or no RGB.
    """
    size = (CIFAR100.image_size, CIFAR100.image_size)
    return np.asarray(ImageOps.fit(to_rgb(image), size, Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def to_png(pixels: np.ndarray) -> bytes:
    """Return pixels (3, H, W) uint8 as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


def upright(image: Image.Image) -> Image.Image:
    """Return the image rotated by its EXIF orientation; no other tag is read."""
    orientation = None
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):  # damaged EXIF data may cause any
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    turn = ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image rotated by its EXIF orientation, in 8-bit RGB, on white where it is transparent."""
    image = upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Return a gray image of 16 or 32 bits in 8.

    White is 65,535 in 16 bits, 255 or 65,535 in integers of 32 bits, whichever holds all values, and 1 in real numbers.

    Raises:
        ValueError: a value is outside this range.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    white = {"f": 1, "u": 65535}.get(values.dtype.kind) or (255 if high <= 255 else 65535)
    if not 0 <= low <= high <= white:
        raise ValueError(
            f"its values range from {low:.4g} to {high:.4g}, and which is white isn't known: save it with 8 or 16 bits"
        )
    return Image.fromarray((values.astype(np.float32) * (255 / white) + 0.5).astype(np.uint8))
