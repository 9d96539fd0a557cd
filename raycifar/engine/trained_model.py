"""A trained network, from a run's folder or a weights file."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raycifar.engine.evaluate import predict
from raycifar.engine.hardware import choose_precision, to_device
from raycifar.errors import RequestError
from raycifar.models import Architecture
from raycifar.models.recipe import Precision
from raycifar.storage import weights as weights_file
from raycifar.storage.files import read_file
from raycifar.storage.locations import join, parent_and_name
from raycifar.storage.run_folder import MODEL


@dataclass(frozen=True)
class Weights:
    """An architecture, and its weights by name."""

    architecture: Architecture
    tensors: dict[str, Tensor]

    def build(self) -> nn.Module:
        """Return the network.

        Raises:
            RequestError: the weights don't fit the architecture.
        """
        network = self.architecture.build()
        try:
            network.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise RequestError(f"the weights don't fit {self.architecture.model}: {error}") from error
        return network


class Trained:
    """A trained network on a device.

    Args:
        device: auto, gpu or cpu. precision: to compute in.

    Raises:
        RequestError: the weights don't fit their architecture, or there is no such device.
    """

    def __init__(self, weights: Weights, device: str = "auto", precision: Precision = "auto") -> None:
        if device == "gpu" and not torch.cuda.is_available():
            raise RequestError("--device gpu: this machine has no GPU that PyTorch can use.")
        self.weights = weights
        self.device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        self.network = to_device(weights.build(), self.device)
        dtype = choose_precision(precision, self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits (n, classes) float32, on the CPU, of `images` (n, 3, 32, 32) uint8."""
        preprocessing = self.weights.architecture.preprocessing
        return predict(self.network, images.to(self.device), self.autocast, preprocessing).cpu()


def read_weights(location: str) -> Weights:
    """Return the final weights of a run's folder, or those of a weights file that raycifar wrote.

    Args:
        location: a path or URI.

    Raises:
        RequestError: the file doesn't exist, or was written by another program.
    """
    file = location if parent_and_name(location)[1].endswith(".safetensors") else join(location, MODEL)
    try:
        content = read_file(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RequestError(f"{file} does not exist: give the folder of a finished run, or a weights file.") from error
    tensors, architecture = weights_file.from_file(content, file)
    if architecture is None:
        raise RequestError(f"{file} was not written by raycifar: it doesn't name the model of its weights.")
    return Weights(architecture, tensors)
