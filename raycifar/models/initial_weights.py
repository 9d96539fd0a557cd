"""The start of training: an architecture, and any weights that don't come from the seed.

The driver reads the weights once. Ray's object store brings them to each node, where all workers use one copy.
"""

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from raycifar import models
from raycifar.data.tables import Source, to_images
from raycifar.errors import RequestError, in_a_line
from raycifar.models import Architecture, Preprocessing
from raycifar.models.recipe import Recipe, model_options
from raycifar.storage.files import read_file

NUM_IMAGES = 1000  # training images from which an architecture may compute weights
MOST_NAMES = 3  # parameters in an error
STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")  # under which training scripts save a state dict
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class InitialWeights:
    """An architecture, and the weights it starts with, by name; the seed initializes all others.

    weights: without a head for other classes; None if the seed initializes all.
    from_images: the weights are computed from the training images.
    """

    architecture: Architecture
    weights: Mapping[str, np.ndarray] | None = None
    from_images: bool = False

    def fingerprint(self) -> str | None:
        """Return a digest of the weights; None if they follow from seed and images."""
        if self.weights is None or self.from_images:
            return None
        digest = hashlib.blake2b(digest_size=16)
        for name, values in sorted(self.weights.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()


def load_initial_weights(model: str, recipe: Recipe, source: Source) -> InitialWeights:
    """Return a model's architecture and first weights.

    Raises:
        RequestError: the weights can't be loaded, or don't fit the model.
    """
    info = source.info
    if recipe.pretrained == "none":
        preprocessing = Preprocessing(recipe.image_size, info.mean, info.std)
        options = model_options(recipe)
        architecture = Architecture(model, info.num_classes, False, preprocessing, recipe.tta_flip, options)
        weights = compute_weights(model, recipe, source.train, preprocessing)
        return InitialWeights(architecture, weights or None, from_images=True)
    check_no_options(model, recipe)
    preprocessing = models.find(model).imagenet_preprocessing(recipe.image_size)
    architecture = Architecture(model, info.num_classes, True, preprocessing, recipe.tta_flip)
    if recipe.pretrained == "imagenet":
        tensors = fetch_imagenet_weights(model)
    else:
        tensors, saved = read_state_dict(recipe.pretrained)
        if saved:
            architecture = adopt_architecture(saved, architecture, recipe.pretrained)
    return InitialWeights(architecture, select_weights(tensors, architecture, recipe.pretrained))


def compute_weights(
    model: str, recipe: Recipe, images: pa.Table, preprocessing: Preprocessing
) -> dict[str, np.ndarray]:
    """Return the weights that the architecture computes from training images, if any."""
    compute = models.find(model).initial_weights_from_images
    if compute is None:
        return {}
    pixels = to_images(images["image"].slice(0, NUM_IMAGES)).astype(np.float32) / 255
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return compute(recipe, (pixels - mean) / std)


def check_no_options(model: str, recipe: Recipe) -> None:
    """Refuse options of the architecture, which must fit the pretrained weights."""
    defaults = Architecture(model).options
    given = [f"--{name}" for name, value in model_options(recipe).items() if value != defaults[name]]
    if given:
        raise RequestError(
            f"{' and '.join(given)} can't be combined with --pretrained {recipe.pretrained}: the weights fit the "
            "default network only. Train another one from scratch, with --pretrained none."
        )


def fetch_imagenet_weights(model: str) -> Mapping[str, Any]:
    remedies = "give a weights file with --pretrained FILE, or train from scratch with --pretrained none"
    try:
        tensors = models.find(model).imagenet_weights()
    except Exception as error:  # urllib, huggingface_hub and timm raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].strip("<>. ")
        raise RequestError(f"the ImageNet weights of {model} can't be downloaded ({reason}): {remedies}.") from error
    if tensors is None:
        raise RequestError(f"--pretrained imagenet: there are no ImageNet weights of {model}; {remedies}.")
    return tensors


def adopt_architecture(saved: Architecture, wanted: Architecture, file: str) -> Architecture:
    """Return the architecture of weights that raycifar saved, adapted to this run's images and classes."""
    if saved.model != wanted.model:
        raise RequestError(f"--pretrained {file} holds weights of {saved.model}, not of {wanted.model}.")
    preprocessing = replace(saved.preprocessing, size=wanted.preprocessing.size)
    return replace(saved, num_classes=wanted.num_classes, preprocessing=preprocessing, tta_flip=wanted.tta_flip)


def select_weights(tensors: Mapping[str, Any], architecture: Architecture, origin: str) -> dict[str, np.ndarray]:
    """Return the tensors as arrays, without a head of another size.

    Raises:
        RequestError: names or shapes don't fit; the message lists the first few.
    """
    tensors = models.find(architecture.model).rescale(tensors, architecture.preprocessing.size)
    network = architecture.build()
    heads = architecture.heads(network)
    expected = {name: list(value.shape) for name, value in network.state_dict().items()}
    found = {name: list(value.shape) for name, value in tensors.items()}
    body = {name for name in expected.keys() | found.keys() if not name.startswith(heads)}
    problems = {
        # Early versions didn't save batch norm's num_batches_tracked, which is never used.
        "missing": [n for n in expected if n in body - found.keys() and not n.endswith("num_batches_tracked")],
        "unknown": [n for n in found if n in body - expected.keys()],
        "of another shape": [
            f"{n} {found[n]} instead of {expected[n]}"
            for n in expected
            if n in body & found.keys() and found[n] != expected[n]
        ],
    }
    if any(problems.values()):
        clauses = [f"{len(names)} {what}: {first_few(names)}" for what, names in problems.items() if names]
        raise RequestError(f"--pretrained {origin} doesn't fit {architecture.model}: {'; '.join(clauses)}.")
    same_head = all(found.get(name) == shape for name, shape in expected.items() if name.startswith(heads))
    kept = [name for name in expected if name in found and (name in body or same_head)]
    floats = {name: tensors[name].float() if tensors[name].is_floating_point() else tensors[name] for name in kept}
    return {name: tensor.contiguous().numpy() for name, tensor in floats.items()}


def first_few(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + " and others" * (len(names) > MOST_NAMES)


# Files ----------------------------------------------------------------------------------------------


def read_state_dict(file: str) -> tuple[dict[str, Any], Architecture | None]:
    """Return the tensors of a PyTorch or safetensors file by name, and their architecture if raycifar saved it.

    The format is detected from the content. A pickle may build tensors and containers, and nothing else.

    Raises:
        RequestError: the file can't be read, or holds no state dict.
    """
    try:
        content = read_file(file)
    except OSError as error:
        raise RequestError(f"--pretrained {file} can't be read: {in_a_line(error)}.") from error
    if content[8:9] == b"{":
        from raycifar.storage import weights  # imports PyTorch, which takes seconds

        return weights.from_file(content, f"--pretrained {file}")
    return extract_state_dict(read_pickle(content, file), file), None


def read_pickle(content: bytes, file: str) -> Any:
    import torch

    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may cause any
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise RequestError(
                f"--pretrained {file} is refused: its pickle asks for {asked[1]}, which no state dict needs."
            ) from error
        raise RequestError(f"--pretrained {file} is not a PyTorch or safetensors file, or is truncated.") from error


def extract_state_dict(content: Any, file: str) -> dict[str, Any]:
    """Return the state dict inside a training script's checkpoint, without the prefixes of wrapped models."""
    import torch

    for key in STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(value) for value in content.values()):
        raise RequestError(f"--pretrained {file} holds {kind_of(content)}, not a state dict of tensors by name.")
    for prefix in WRAPPER_PREFIXES:
        if all(str(name).startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return {str(name): value for name, value in content.items()}


def kind_of(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return f"a dictionary of {', '.join(sorted({type(value).__name__ for value in content.values()})) or 'nothing'}"
