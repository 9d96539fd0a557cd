"""A network that has been trained, from a run's folder or a weights file, ready to be asked."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raycifar.engine.evaluate import predict
from raycifar.engine.hardware import choose_precision, to_device
from raycifar.errors import RequestError
from raycifar.models import Architecture
from raycifar.models.recipe import Precision
from raycifar.storage import weights as weights_file
from raycifar.storage.files import locate
from raycifar.storage.run_folder import MODEL


@dataclass(frozen=True)
class Weights:
    """An architecture, and the tensors of a network of it by name."""

    architecture: Architecture
    tensors: dict[str, Tensor]

    def build(self) -> nn.Module:
        """Return the network.

        Raises:
            RequestError: the tensors are not those of the architecture.
        """
        network = self.architecture.build()
        try:
            network.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise RequestError(f"these are not the weights of a {self.architecture.model}: {error}") from error
        return network


class Trained:
    """A network that answers, on a device.

    Args:
        weights: of the network. device: auto, gpu or cpu. precision: to compute in.

    Raises:
        RequestError: the weights are not those of the model, or there is no such device.
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
        """Return (n, classes) float32, on the CPU, of `images` (n, 3, 32, 32) uint8."""
        preprocessing = self.weights.architecture.preprocessing
        return predict(self.network, images.to(self.device), self.autocast, preprocessing).cpu()


def read_weights(place: str) -> Weights:
    """Return the final weights of a run's folder, or a weights file that raycifar wrote.

    Args:
        place: a path or URI.

    Raises:
        RequestError: there is none, or it isn't raycifar's; the message says what it is.
    """
    filesystem, path = locate(place)
    if not path.endswith(".safetensors"):
        place, path = f"{place.rstrip('/')}/{MODEL}", f"{path}/{MODEL}"
    try:
        with filesystem.open_input_stream(path) as stream:
            content = stream.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RequestError(f"{place} is not there: give the folder of a finished run, or a weights file.") from error
    tensors, architecture = weights_file.from_file(content, place)
    if architecture is None:
        raise RequestError(f"{place} doesn't say which model's weights it holds: it was not written by raycifar.")
    return Weights(architecture, tensors)
