"""Asking a trained network what images show."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from raycifar.data import CIFAR100
from raycifar.data.pictures import find_images, read_image, to_pixels
from raycifar.errors import RequestError

if TYPE_CHECKING:
    from raycifar.engine.trained_model import Weights

TOP = 5


class Predictions(NamedTuple):
    """What a network says of n images: the likeliest class of each, and (n, classes) float32 probabilities."""

    classes: list[str]
    probabilities: np.ndarray


class Model:
    """A trained network that answers, in float32.

    Args:
        place: a run's folder, or a weights file. device: auto, gpu or cpu.

    Raises:
        RequestError: there are no such weights, or there is no such device.
    """

    def __init__(self, place: str, device: str = "auto") -> None:
        from raycifar.engine.trained_model import Trained, read_weights

        self.place = place
        self.class_names = CIFAR100.class_names
        self.trained = Trained(read_weights(place), device, "float32")

    @property
    def weights(self) -> "Weights":
        """The architecture, and the tensors by name."""
        return self.trained.weights

    @property
    def network(self) -> Any:
        """The `torch.nn.Module`, in evaluation mode: from preprocessed images to logits."""
        return self.trained.network

    def predict(self, images: Any) -> Predictions:
        """Return what images show.

        Args:
            images: a PIL image, a path or URI, or a list of these, of any size and mode; or an array or tensor
                (n, 32, 32, 3) or (32, 32, 3) uint8.

        Raises:
            RequestError: they are something else, or can't be read.
        """
        probabilities = self.ask(read_images(images))
        return Predictions([self.class_names[label] for label in probabilities.argmax(1)], probabilities)

    def ask(self, pixels: np.ndarray) -> np.ndarray:
        """Return (n, classes) float32 probabilities of `pixels` (n, 3, 32, 32) uint8."""
        import torch

        return self.trained.logits(torch.from_numpy(pixels)).softmax(1).numpy()

    def __repr__(self) -> str:
        return f"Model({self.weights.architecture.model!r}, from {self.place!r}, on {self.trained.device})"


def read_images(images: Any) -> np.ndarray:
    """Return images of any kind as (n, 3, 32, 32) uint8; see `Model.predict`."""
    if isinstance(images, (str, Image.Image)) or hasattr(images, "__fspath__"):
        images = [images]
    if isinstance(images, list | tuple):
        if not images:
            raise RequestError("there is no image to ask about.")
        return np.concatenate([as_pixels(image) for image in images])
    pixels = np.asarray(images.cpu() if hasattr(images, "cpu") else images)
    if pixels.ndim == 3:
        pixels = pixels[None]
    side, channels = CIFAR100.image_size, CIFAR100.image_shape[0]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (side, side, channels):
        raise RequestError(
            f"the images are {pixels.dtype} of shape {pixels.shape}: uint8 of shape (n, {side}, {side}, {channels}), "
            "PIL images or paths are needed."
        )
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def as_pixels(image: Any) -> np.ndarray:
    """Return one image, or the images of one path, as (n, 3, 32, 32) uint8."""
    if isinstance(image, Image.Image):
        return to_pixels(image)[None]
    if not isinstance(image, str) and not hasattr(image, "__fspath__"):
        return read_images(np.asarray(image.cpu() if hasattr(image, "cpu") else image))
    try:
        return np.stack([read_image(filesystem, path) for _, filesystem, path in find_images(str(image))])
    except (ValueError, OSError) as error:
        raise RequestError(f"{image} can't be read: {error}.") from error


def predict_files(network: str, places: Iterable[str], device: str = "auto") -> list[dict[str, Any]]:
    """Return `{image, top5: [{class, probability}]}` for each image file, or `{image, error}` for one that is broken.

    Args:
        network: a run's folder, or a weights file. places: files, folders or URIs.

    Raises:
        RequestError: there is no such network, or no such file.
    """
    files = [
        file for place in places for file in find_images(place)
    ]  # before PyTorch is loaded: a typing error shows at once
    model = Model(network, device)
    answers: list[dict[str, Any]] = []
    pixels = []
    for name, filesystem, path in files:
        try:
            pixels.append(read_image(filesystem, path))
            answers.append({"image": name})
        except (ValueError, OSError) as error:
            answers.append({"image": name, "error": str(error)})
    if pixels:
        probabilities = iter(model.ask(np.stack(pixels)))
        for answer in answers:
            if "error" not in answer:
                answer["top5"] = likeliest(next(probabilities), model.class_names)
    return answers


def likeliest(probabilities: np.ndarray, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the classes with the highest probabilities (classes,), the highest first."""
    order = np.argsort(-probabilities, kind="stable")[:TOP]
    return [{"class": class_names[label], "probability": float(probabilities[label])} for label in order]
