"""A trained network, from a run's folder or a weights file."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raycifar.data import CIFAR100
from raycifar.engine.evaluate import predict
from raycifar.engine.hardware import autocast_to, choose_precision, find_device, to_device
from raycifar.errors import RequestError, WorkError
from raycifar.machine import available_cpus
from raycifar.models import Architecture
from raycifar.models.recipe import Precision
from raycifar.storage import weights as weights_file
from raycifar.storage.files import read_file
from raycifar.storage.locations import join, parent_and_name
from raycifar.storage.run_folder import MODEL, RunFolder


@dataclass(frozen=True)
class Weights:
    """An architecture, and its weights by name, which fit it."""

    architecture: Architecture
    tensors: dict[str, Tensor]

    def build(self) -> nn.Module:
        """Return the network."""
        network = self.architecture.build()
        network.load_state_dict(self.tensors)
        return network


class Trained:
    """A trained network on a device.

    Args:
        device: auto, gpu, cpu or mps, as `find_device` takes it. precision: to compute in.
    """

    def __init__(self, weights: Weights, device: str = "auto", precision: Precision = "auto") -> None:
        torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
        self.weights = weights
        self.device = find_device(device)
        self.network = to_device(weights.build(), self.device)
        self.autocast = autocast_to(choose_precision(precision, self.device), self.device)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits (n, classes) float32, on the CPU, of `images` (n, 3, 32, 32) uint8."""
        preprocessing = self.weights.architecture.preprocessing
        return predict(self.network, images.to(self.device), self.autocast, preprocessing).cpu()

    def features(self, images: Tensor) -> Tensor:
        """Return what the last dense layer is given, (n, features) float32, on the CPU; see `logits`."""
        found: list[Tensor] = []
        *_, last = (module for module in self.network.modules() if isinstance(module, nn.Linear))
        hook = last.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].flatten(1).float().cpu()))
        self.logits(images)
        hook.remove()
        if self.weights.architecture.tta_flip:  # the flipped images follow
            found = [part.unflatten(0, (2, -1)).mean(0) for part in found]
        return torch.cat(found)


def read_weights(location: str) -> Weights:
    """Return the final weights of a run's folder, or those of a weights file that raycifar wrote.

    Raises:
        RequestError: the file doesn't exist, is damaged, or was written by another program.
    """
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
    tensors, architecture = weights_file.from_file(content, file)
    if architecture is None:
        raise RequestError(f"{file} was not written by raycifar: it doesn't name the model of its weights.")
    if architecture.num_classes != CIFAR100.num_classes:
        raise RequestError(f"{file} tells {architecture.num_classes} classes apart, not CIFAR-100's.")
    return Weights(architecture, tensors)


def check_finite(logits: Tensor, network: str) -> Tensor:
    """Return the logits, or raise WorkError if some aren't finite numbers, as those of damaged weights."""
    if not torch.isfinite(logits).all():
        raise WorkError(f"{network} gives answers that aren't finite numbers: its weights are damaged.")
    return logits
