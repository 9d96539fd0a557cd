"""What training begins with: an architecture and, unless it is trained from scratch, weights that fit it.

The driver reads them once. Ray's object store carries them to each node, where all workers share one copy.
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
from raycifar.data.tables import to_numpy
from raycifar.errors import RequestError
from raycifar.models import Architecture, Preprocessing
from raycifar.recipes import Recipe
from raycifar.storage.files import locate

WHITENED = 1000  # images that the first layer is made from
WHITENING = "whiten.weight"  # its filters
NAMED = 3  # of the parameters that don't fit
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which training scripts save a state dict
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class InitialWeights:
    """An architecture, and the weights it begins with, by name; None draws all of them from the seed.

    A head for other classes is left out of `weights`, and is drawn from the seed.
    """

    architecture: Architecture
    weights: Mapping[str, np.ndarray] | None = None

    def fingerprint(self) -> str | None:
        """Return a digest of the weights, equal for equal weights."""
        if self.weights is None or self.weights.keys() == {WHITENING}:  # made of images, which have a fingerprint
            return None
        digest = hashlib.blake2b(digest_size=16)
        for name, values in sorted(self.weights.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()


def load_initial_weights(model: str, recipe: Recipe, images: pa.Table | None = None) -> InitialWeights:
    """Return what a model's training begins with.

    Args:
        images: to be trained on, for recipes that make a layer from them.

    Raises:
        RequestError: the weights can't be had, or aren't those of the model; the message says what to do.
    """
    if (recipe.whiten or recipe.depth > 1) and (model != "cnn" or recipe.pretrained != "none"):
        raise RequestError("--whiten and --depth are for the cnn, trained from scratch (--pretrained none).")
    if recipe.pretrained == "none":
        preprocessing = Preprocessing(recipe.image_size)
        architecture = Architecture(
            model, preprocessing=preprocessing, whiten=recipe.whiten, depth=recipe.depth, mirror=recipe.mirror
        )
        return InitialWeights(architecture, {WHITENING: whitening(images, preprocessing)} if recipe.whiten else None)
    family = models.find(model)
    preprocessing = family.imagenet_preprocessing(recipe.image_size)
    architecture = Architecture(model, large_stem=True, preprocessing=preprocessing, mirror=recipe.mirror)
    if recipe.pretrained == "imagenet":
        tensors = fetch(model)
    else:
        tensors, theirs = read_state_dict(recipe.pretrained)
        if theirs:
            architecture = adopt(theirs, architecture, recipe.pretrained)
    return InitialWeights(architecture, fit(tensors, architecture, recipe.pretrained))


def whitening(images: pa.Table | None, preprocessing: Preprocessing) -> np.ndarray:
    """Return the filters of the CNN's first layer that whiten these images."""
    assert images is not None
    from raycifar.models.cnn import whitening_filters

    pixels = to_numpy(images["image"].slice(0, WHITENED).combine_chunks(), "image").astype(np.float32) / 255
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return whitening_filters((pixels - mean) / std)


def fetch(model: str) -> dict[str, Any]:
    ways_out = "give a weights file with --pretrained FILE, or train from scratch with --pretrained none"
    try:
        tensors = models.find(model).imagenet_weights()
    except Exception as error:  # of whichever library fetches them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].strip("<>. ")
        raise RequestError(f"the ImageNet weights of {model} can't be fetched ({reason}): {ways_out}.") from error
    if tensors is None:
        raise RequestError(f"--pretrained imagenet: there are no ImageNet weights of {model}; {ways_out}.")
    return tensors


def adopt(theirs: Architecture, ours: Architecture, place: str) -> Architecture:
    """Return the architecture of raycifar's own weights, for images of the size that ours takes."""
    if theirs.model != ours.model:
        raise RequestError(f"--pretrained {place} holds the weights of a {theirs.model}, not of a {ours.model}.")
    preprocessing = replace(theirs.preprocessing, size=ours.preprocessing.size)
    return replace(theirs, classes=ours.classes, preprocessing=preprocessing, mirror=ours.mirror)


def fit(tensors: Mapping[str, Any], architecture: Architecture, place: str) -> dict[str, np.ndarray]:
    """Return the weights that go into the architecture: all of them, but for a head of another size.

    Raises:
        RequestError: names or shapes don't fit; the message names the first few.
    """
    tensors = models.find(architecture.model).rescale(tensors, architecture.preprocessing.size)
    network = architecture.build()
    heads = architecture.heads(network)
    expected = {name: list(value.shape) for name, value in network.state_dict().items()}
    found = {name: list(value.shape) for name, value in tensors.items()}
    body = {name for name in expected.keys() | found.keys() if not name.startswith(heads)}
    problems = {
        # Files of the first years of batch norm lack its counter, which nothing reads.
        "missing": [n for n in expected if n in body - found.keys() and not n.endswith("num_batches_tracked")],
        "unknown": [n for n in found if n in body - expected.keys()],
        "of another shape": [
            f"{n} {found[n]} instead of {expected[n]}"
            for n in expected
            if n in body & found.keys() and found[n] != expected[n]
        ],
    }
    if any(problems.values()):
        clauses = [f"{len(names)} {what}: {shorten(names)}" for what, names in problems.items() if names]
        raise RequestError(f"--pretrained {place} doesn't fit {architecture.model}: {'; '.join(clauses)}.")
    same_head = all(found.get(name) == shape for name, shape in expected.items() if name.startswith(heads))
    kept = [name for name in expected if name in found and (name in body or same_head)]
    return {name: to_array(tensors[name]) for name in kept}


def shorten(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + " and others" * (len(names) > NAMED)


def to_array(tensor: Any) -> np.ndarray:
    """Return a tensor as float32, or as it is where it counts something."""
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()


# Files ----------------------------------------------------------------------------------------------


def read_state_dict(place: str) -> tuple[dict[str, Any], Architecture | None]:
    """Return the tensors of a PyTorch or safetensors file by name, and their architecture if raycifar wrote it.

    Which of both it is, is told by its content. A pickle may build tensors and containers, and nothing else.

    Raises:
        RequestError: it can't be read, or holds something else.
    """
    filesystem, path = locate(place)
    try:
        with filesystem.open_input_stream(path) as stream:
            content = stream.read()
    except OSError as error:
        raise RequestError(f"--pretrained {place} can't be read: {error}.") from error
    if content[8:9] == b"{":
        from raycifar.storage import weights  # and with it PyTorch, which a command's --help can do without

        return weights.from_file(content, f"--pretrained {place}")
    return unwrap(read_pickle(content, place), place), None


def read_pickle(content: bytes, place: str) -> Any:
    import torch

    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever it stumbles over
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise RequestError(
                f"--pretrained {place} is refused: its pickle asks for {asked[1]}, which no state dict needs."
            ) from error
        raise RequestError(f"--pretrained {place} is no PyTorch or safetensors file, or a truncated one.") from error


def unwrap(content: Any, place: str) -> dict[str, Any]:
    """Return the state dict in what a training script saved, without the prefixes of wrapped models."""
    import torch

    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(value) for value in content.values()):
        raise RequestError(f"--pretrained {place} holds {describe(content)}, not a state dict of tensors by name.")
    for prefix in PREFIXES:
        if all(str(name).startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return {str(name): value for name, value in content.items()}


def describe(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return f"a dictionary of {', '.join(sorted({type(value).__name__ for value in content.values()})) or 'nothing'}"
