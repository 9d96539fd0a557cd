"""Predicting the classes of images with a trained network."""

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from raycifar.analysis.collapse import chance_level
from raycifar.data import CIFAR100
from raycifar.data.pictures import find_images, read_image, to_pixels
from raycifar.errors import DamagedFileError, RequestError, in_a_line
from raycifar.redaction import shown
from raycifar.storage.run_folder import RESULT, RunFolder

if TYPE_CHECKING:
    from raycifar.engine.trained_model import Weights

TOP = 5


class Predictions(NamedTuple):
    """The likeliest class of each of n images, and (n, classes) float32 probabilities."""

    classes: list[str]
    probabilities: np.ndarray


class Model:
    """A trained network, in float32.

    Args:
        location: a run's folder, or a weights file. device: auto, gpu or cpu.

    Raises:
        RequestError: the weights or the device don't exist.
    """

    def __init__(self, location: str, device: str = "auto") -> None:
        from raycifar.engine.trained_model import Trained, read_weights

        self.location = location
        self.class_names = CIFAR100.class_names
        self.trained = Trained(read_weights(location), device, "float32")

    @property
    def weights(self) -> "Weights":
        """The architecture, and the tensors by name."""
        return self.trained.weights

    @property
    def network(self) -> Any:
        """The `torch.nn.Module` that maps preprocessed images to logits, in evaluation mode."""
        return self.trained.network

    def predict(self, images: Any) -> Predictions:
        """Return the predictions for images.

        Args:
            images: a PIL image, a path or URI, or a list of these, of any size and mode; or an array or tensor
                (n, 32, 32, 3) or (32, 32, 3) uint8.

        Raises:
            RequestError: an image can't be read, or has another type.
        """
        probabilities = self.probabilities(read_images(images))
        return Predictions([self.class_names[label] for label in probabilities.argmax(1)], probabilities)

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Return (n, classes) float32 probabilities of `pixels` (n, 3, 32, 32) uint8."""
        import torch

        from raycifar.engine.trained_model import check_finite

        return check_finite(self.trained.logits(torch.from_numpy(pixels)), self.location).softmax(1).numpy()

    def __repr__(self) -> str:
        return f"Model({self.weights.architecture.model!r}, from {shown(self.location)!r}, on {self.trained.device})"


def read_images(images: Any) -> np.ndarray:
    """Return images of any type as (n, 3, 32, 32) uint8; see `Model.predict`."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    if isinstance(images, list | tuple):
        if not images:
            raise RequestError("the list of images is empty: give at least one.")
        return np.concatenate([as_pixels(image) for image in images])
    pixels = np.asarray(images.cpu() if hasattr(images, "cpu") else images)
    if pixels.ndim == 3:
        pixels = pixels[None]
    side, channels = CIFAR100.image_size, CIFAR100.image_shape[0]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (side, side, channels):
        raise RequestError(
            f"the images are {pixels.dtype} of shape {pixels.shape}: give uint8 of shape (n, {side}, {side}, "
            f"{channels}), PIL images or paths."
        )
    if not len(pixels):
        raise RequestError("the array holds no image: give at least one.")
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def as_pixels(image: Any) -> np.ndarray:
    """Return one of several images, or a path's images, as (n, 3, 32, 32) uint8."""
    try:
        match image:
            case Image.Image():
                return to_pixels(image)[None]
            case str() | os.PathLike():
                return np.stack([read_image(file.filesystem, file.path) for file in find_images(str(image))[0]])
    except (ValueError, OSError) as error:
        name = "a PIL image" if isinstance(image, Image.Image) else image
        raise RequestError(f"{name} can't be read: {in_a_line(error)}.") from error
    return read_images(np.asarray(image) if isinstance(image, list | tuple) else image)


def predict_files(network: str, locations: Iterable[str], device: str = "auto") -> tuple[list[dict[str, Any]], int]:
    """Return `{image, top5: [{class, probability}]}` for each image file, or `{image, error}` if it can't be read.

    Args:
        network: a run's folder, or a weights file. locations: files, folders or URIs.

    Returns:
        The answers, and the number of files in the folders that are no images.

    Raises:
        RequestError: the network or a file doesn't exist.
    """
    found = [find_images(location) for location in locations]  # a typo fails before PyTorch loads
    model = Model(network, device)
    rows: list[dict[str, Any]] = []
    pixels = []
    for file in [file for files, _ in found for file in files]:
        try:
            pixels.append(read_image(file.filesystem, file.path))
            rows.append({"image": shown(file.name)})
        except (ValueError, OSError) as error:
            rows.append({"image": shown(file.name), "error": in_a_line(error)})
    if pixels:
        probabilities = iter(model.probabilities(np.stack(pixels)))
        for row in rows:
            if "error" not in row:
                row["top5"] = likeliest(next(probabilities), model.class_names)
    return rows, sum(others for _, others in found)


def warn_of_chance(network: str) -> str | None:
    """Return a sentence if a run's scores on its test set, where it has them, are no better than guesses."""
    with suppress(DamagedFileError):
        test = (RunFolder.at(network).read_json(RESULT) or {}).get("test")
        if test and test["top1"] <= chance_level(test["images"], CIFAR100.num_classes):
            return (
                f"This network is at the level of chance: it is right on {test['top1']:.2%} of its {test['images']:,} "
                f"test images, and a guess on {1 / CIFAR100.num_classes:.0%}. Its answers mean nothing."
            )
    return None


def likeliest(probabilities: np.ndarray, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the five classes with the highest probabilities (classes,), highest first."""
    order = np.argsort(-probabilities, kind="stable")[:TOP]
    return [{"class": class_names[label], "probability": float(probabilities[label])} for label in order]
