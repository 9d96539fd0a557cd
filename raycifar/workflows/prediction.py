"""A trained network, from a run's folder or a weights file, and what it predicts."""

# PyTorch takes seconds to import, so functions import what needs it.

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from raycifar.analysis.collapse import chance_level
from raycifar.data import CIFAR100
from raycifar.data.pictures import find_images, read_image, to_pixels
from raycifar.errors import DamagedFileError, RequestError, WorkError, in_a_line
from raycifar.machine import available_cpus
from raycifar.models import Architecture
from raycifar.models.recipe import Precision
from raycifar.redaction import redact
from raycifar.storage.files import read_file
from raycifar.storage.locations import join, parent_and_name
from raycifar.storage.run_folder import MODEL, RESULT, RunFolder

if TYPE_CHECKING:
    from torch import Tensor, nn

TOP = 5


@dataclass(frozen=True)
class Weights:
    """An architecture, and its weights by name, which fit it."""

    architecture: Architecture
    tensors: "dict[str, Tensor]"

    def build(self) -> "nn.Module":
        """Return the network."""
        network = self.architecture.build()
        network.load_state_dict(self.tensors)
        return network


def read_weights(location: str) -> Weights:
    """Return the final weights of a run's folder, or those of a weights file that raycifar wrote.

    Raises:
        RequestError: the file doesn't exist, is damaged, or was written by another program.
    """
    from raycifar.storage import weights

    file = location if parent_and_name(location)[1].endswith(".safetensors") else join(location, MODEL)
    try:
        content = read_file(file)
    except NotADirectoryError as error:
        raise RequestError(f"{location} is a file: give a finished run's folder, or its .safetensors file.") from error
    except FileNotFoundError as error:
        raise RequestError(f"{file} does not exist: give the folder of a finished run, or a weights file.") from error
    except OSError as error:
        raise RequestError(f"{file} can't be read: {error.strerror or error}.") from error
    folder, name = parent_and_name(file)
    RunFolder.at(folder).manifest.check(name, content)
    tensors, architecture = weights.from_file(content, file)
    if architecture is None:
        raise RequestError(f"{file} was not written by raycifar: it doesn't name the model of its weights.")
    if architecture.num_classes != CIFAR100.num_classes:
        raise RequestError(f"{file} tells {architecture.num_classes} classes apart, not CIFAR-100's.")
    return Weights(architecture, tensors)


def check_finite(logits: "Tensor", network: str) -> "Tensor":
    """Return the logits, or raise WorkError if some aren't finite numbers, as those of damaged weights."""
    if not logits.isfinite().all():
        raise WorkError(f"{network} gives answers that aren't finite numbers: its weights are damaged.")
    return logits


class Predictions(NamedTuple):
    """The likeliest class of each of n images, and (n, classes) float32 probabilities."""

    classes: list[str]
    probabilities: np.ndarray


class Model:
    """A trained network on a device.

    Args:
        location: a run's folder, or a weights file. device: auto, gpu, cpu or mps. precision: to compute in, by default
            float32. weights: those at `location`, where they are read already.

    Attributes:
        network: the `torch.nn.Module` that maps preprocessed images to logits, in evaluation mode.
        weights: the architecture, and the tensors by name.

    Raises:
        RequestError: the weights or the device don't exist.
    """

    def __init__(
        self,
        location: str,
        device: str = "auto",
        *,
        precision: Precision = "float32",
        weights: Weights | None = None,
    ) -> None:
        import torch

        from raycifar.engine.hardware import autocast_to, choose_precision, find_device, to_device

        self.location = location
        self.class_names = CIFAR100.class_names
        self.weights = weights or read_weights(location)
        torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
        self.device = find_device(device)
        self.network = to_device(self.weights.build(), self.device)
        self.autocast = autocast_to(choose_precision(precision, self.device), self.device)

    def logits(self, images: np.ndarray) -> "Tensor":
        """Return the logits (n, classes) float32, on the CPU, of `images` (n, 3, 32, 32) uint8."""
        import torch

        from raycifar.engine.scoring import predict

        pixels, preprocessing = torch.from_numpy(images).to(self.device), self.weights.architecture.preprocessing
        return predict(self.network, pixels, self.autocast, preprocessing).cpu()

    def features(self, images: np.ndarray) -> "Tensor":
        """Return the inputs of the last dense layer, (n, features) float32, on the CPU; see `logits`.

        Raises:
            RequestError: the network has no dense layer.
        """
        import torch

        found: list[Tensor] = []
        dense = [module for module in self.network.modules() if isinstance(module, torch.nn.Linear)]
        if not dense:
            raise RequestError(f"{self.weights.architecture.model} has no dense layer, whose inputs would be compared.")
        hook = dense[-1].register_forward_pre_hook(
            lambda module, inputs: found.append(inputs[0].flatten(1).float().cpu())
        )
        self.logits(images)
        hook.remove()
        if self.weights.architecture.tta_flip:  # the flipped images follow
            found = [part.unflatten(0, (2, -1)).mean(0) for part in found]
        return torch.cat(found)

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
        return check_finite(self.logits(pixels), self.location).softmax(1).numpy()

    def __repr__(self) -> str:
        return f"Model({self.weights.architecture.model!r}, from {redact(self.location)!r}, on {self.device})"


def read_images(images: Any) -> np.ndarray:
    """Return images of any type as (n, 3, 32, 32) uint8; see `Model.predict`."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    if isinstance(images, list | tuple):
        if not images:
            raise RequestError("the list of images is empty: give at least one.")
        return np.concatenate([as_pixels(image) for image in images])
    pixels = np.asarray(images.cpu() if hasattr(images, "cpu") else images)
    if pixels.dtype == object:
        raise RequestError(f"{type(images).__name__} is not a kind of image: give PIL images, paths or an array.")
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
    name = "a PIL image" if isinstance(image, Image.Image) else image
    try:
        match image:
            case Image.Image():
                return to_pixels(image)[None]
            case str() | os.PathLike():
                pixels = []
                for file in find_images(str(image))[0]:
                    name = file.name  # of one in a folder
                    pixels.append(read_image(file.filesystem, file.path))
                return np.stack(pixels)
    except (ValueError, OSError) as error:
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
            rows.append({"image": redact(file.name)})
        except (ValueError, OSError) as error:
            rows.append({"image": redact(file.name), "error": in_a_line(error)})
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
        if test and test["top1"] <= chance_level(test["images"]):
            return (
                f"This network is at the level of chance: it is right on {test['top1']:.2%} of its {test['images']:,} "
                f"test images, and a guess on {1 / CIFAR100.num_classes:.0%}. Its answers mean nothing."
            )
    return None


def likeliest(probabilities: np.ndarray, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the five classes with the highest probabilities (classes,), highest first."""
    order = np.argsort(-probabilities, kind="stable")[:TOP]
    return [{"class": class_names[label], "probability": float(probabilities[label])} for label in order]
