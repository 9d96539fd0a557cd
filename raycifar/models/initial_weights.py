"""The start of training: an architecture, and any weights that don't come from the seed.

The driver reads the weights once. Ray's object store brings them to each node, where all workers use one copy.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raycifar import models
from raycifar.data.dataset import Source, to_images
from raycifar.errors import RequestError, first_few, in_a_line
from raycifar.models import CIFAR, Architecture, Preprocessing
from raycifar.models.recipe import MAX_IMAGE_SIZE, Recipe, model_options, parse_sizes
from raycifar.storage.files import read_file

if TYPE_CHECKING:
    from torch import Tensor

NUM_IMAGES = 1000  # of 32×32 pixels in the data's training set, from which an architecture may compute weights
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of DistributedDataParallel, torch.compile, Lightning


@dataclass(frozen=True)
class InitialWeights:
    """An architecture, and the weights it starts with, by name; the seed initializes all others."""

    architecture: Architecture
    weights: Mapping[str, np.ndarray] | None = None  # without a head for other classes; None: the seed initializes all
    from_images: bool = False  # computed from the training images
    notes: tuple[str, ...] = ()  # on what was left out of a file, and what was chosen by it

    def resolve(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the image size and the architecture's options that were chosen by the weights."""
        return replace(recipe, image_size=self.architecture.preprocessing.size, **self.architecture.options)

    def architecture_for(self, recipe: Recipe) -> Architecture:
        """Return the architecture for another recipe, which has the same `pretrained`.

        Raises:
            RequestError: the weights, or the network, don't allow the recipe's options or image sizes.
        """
        architecture, size = replace(self.architecture, tta_flip=recipe.tta_flip), recipe.image_size
        if recipe.pretrained == "none":
            architecture = replace(architecture, options=model_options(recipe))
        else:
            check_options(recipe, architecture.options)
        if size:
            architecture = replace(architecture, preprocessing=replace(architecture.preprocessing, size=size))
        check_sizes(architecture, recipe)
        if self.weights and not self.from_images and architecture.preprocessing != self.architecture.preprocessing:
            self.check_shapes(architecture)
        return architecture

    def check_shapes(self, architecture: Architecture) -> None:
        """Raise RequestError unless the weights fit: some depend on the image size, such as a transformer's."""
        from raycifar.storage.weights import compare  # imports PyTorch, which takes seconds

        wanted = architecture.build_on_meta().state_dict()
        if differences := compare(self.weights or {}, {name: wanted[name] for name in self.weights or {}}):
            raise RequestError(f"the initial weights don't fit {architecture.model}: {differences}.")

    def adapt(self, recipe: Recipe, source: Source) -> "InitialWeights":
        """Return the initial weights for another recipe, which has the same `pretrained`."""
        if recipe.pretrained == "none":
            return from_scratch(self.architecture.model, recipe, source)
        return replace(self, architecture=self.architecture_for(recipe))

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
    """Return a model's architecture and initial weights.

    Raises:
        RequestError: the weights can't be loaded, or don't fit the model, or the images don't.
    """
    scratch = recipe.pretrained == "none"
    initial = from_scratch(model, recipe, source) if scratch else from_weights(model, recipe)
    check_sizes(initial.architecture, recipe)
    return initial


def check_sizes(architecture: Architecture, recipe: Recipe) -> None:
    """Raise RequestError unless the network can take images of all of the recipe's sizes."""
    for size in {architecture.preprocessing.size, *(size for size, _ in parse_sizes(recipe.progressive))}:
        architecture.check_size(size)


def from_scratch(model: str, recipe: Recipe, source: Source) -> InitialWeights:
    preprocessing, options = cifar_preprocessing(recipe), model_options(recipe)
    architecture = Architecture(model, preprocessing=preprocessing, tta_flip=recipe.tta_flip, options=options)
    images = to_images(source.train["image"].slice(0, NUM_IMAGES))
    weights = {name: value.numpy() for name, value in compute_weights(model, recipe, images, preprocessing).items()}
    return InitialWeights(architecture, weights or None, from_images=True)


def from_weights(model: str, recipe: Recipe) -> InitialWeights:
    family, origin = models.find_family(model), recipe.pretrained
    preprocessing = family.imagenet_preprocessing(recipe.image_size or MAX_IMAGE_SIZE)
    architecture = Architecture(model, large_stem=True, preprocessing=preprocessing, tta_flip=recipe.tta_flip)
    notes = []
    if origin == "imagenet":
        tensors = fetch_imagenet_weights(model)
    else:
        found, others, saved = read_tensors(origin)
        prefix = find_prefix(found, architecture.build_on_meta().state_dict().keys(), origin)
        tensors = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        others += [name for name in found if not name.startswith(prefix)]
        if others:
            notes.append(f"{origin} holds more than the weights of {model}; left out: {first_few(others)}.")
        if saved:
            architecture = adopt_architecture(saved, architecture, recipe)
        elif family.is_for_small_images({name: value.shape for name, value in tensors.items()}):
            preprocessing = cifar_preprocessing(recipe)
            architecture = replace(architecture, large_stem=False, preprocessing=preprocessing)
            notes.append(
                f"{origin} was trained on small images, so images have {preprocessing.size} pixels a side here, too, "
                "and are normalized by this data set's mean and standard deviation."
            )
    check_options(recipe, architecture.options)
    weights, left_out = select_weights(tensors, architecture, origin)
    return InitialWeights(architecture, weights, notes=(*notes, *left_out))


def cifar_preprocessing(recipe: Recipe) -> Preprocessing:
    return replace(CIFAR, size=recipe.image_size or CIFAR.size)


def compute_weights(
    model: str, recipe: Recipe, images: "np.ndarray | Tensor", preprocessing: Preprocessing
) -> "dict[str, Tensor]":
    """Return the weights that the architecture computes from training images (N, 3, H, W) uint8, if any.

    Of larger images, fewer are used: as many pixels.
    """
    compute = models.find_family(model).initial_weights_from_images
    if compute is None:
        return {}
    import torch  # takes seconds

    from raycifar.models.preprocess import preprocess

    number = max(1, len(images) * CIFAR.size**2 // max(CIFAR.size, preprocessing.size) ** 2)
    return compute(recipe, preprocess(torch.asarray(images[:number]), preprocessing))


def check_options(recipe: Recipe, fixed: Mapping[str, Any]) -> None:
    """Raise RequestError if the recipe changes options of the architecture that its pretrained weights fix."""
    defaults = model_options(type(recipe)())
    given = [f"--{name}" for name, value in model_options(recipe).items() if value not in (fixed[name], defaults[name])]
    if given:
        raise RequestError(
            f"{' and '.join(given)} can't be combined with --pretrained {recipe.pretrained}: its weights fit another "
            "network. Leave the option out, or train from scratch with --pretrained none."
        )


def fetch_imagenet_weights(model: str) -> Mapping[str, Any]:
    remedies = "give a weights file with --pretrained FILE, or train from scratch with --pretrained none"
    try:
        tensors = models.find_family(model).imagenet_weights()
    except Exception as error:  # urllib, huggingface_hub and timm raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].strip("<>. ")
        raise RequestError(f"the ImageNet weights of {model} can't be downloaded ({reason}): {remedies}.") from error
    if tensors is None:
        raise RequestError(f"--pretrained imagenet: there are no ImageNet weights of {model}; {remedies}.")
    return tensors


# Fitting a file's weights to the model --------------------------------------------------------------


def read_tensors(file: str) -> tuple[dict[str, Any], list[str], Architecture | None]:
    """Return the tensors of a PyTorch or safetensors file.

    The format is detected from the content.

    Returns:
        The tensors by name, the names of what else is among them, and the architecture if raycifar saved it.

    Raises:
        RequestError: the file can't be read, or holds no state dict.
    """
    origin = f"--pretrained {file}"
    try:
        content = read_file(file)
    except OSError as error:
        raise RequestError(f"{origin} can't be read: {in_a_line(error)}.") from error
    if content[8:9] == b"{":
        from raycifar.storage import weights  # imports PyTorch, which takes seconds

        tensors, architecture = weights.from_file(content, origin)
        return tensors, [], architecture
    from raycifar.storage.torch_files import read_state_dict

    return *read_state_dict(content, file), None


def find_prefix(tensors: Iterable[str], names: Iterable[str], origin: str) -> str:
    """Return the prefix of a network's `names` in most `tensors`, or raise RequestError if there are two networks."""
    known = set(names)
    counts: Counter[str] = Counter()
    for tensor in tensors:
        prefix, name = "", tensor
        while name not in known and (wrapper := next(filter(name.startswith, WRAPPER_PREFIXES), None)):
            prefix, name = prefix + wrapper, name.removeprefix(wrapper)
        counts[prefix] += name in known
    ranked = counts.most_common(2)
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1] > 0:
        raise RequestError(
            f"--pretrained {origin} holds two networks, {ranked[0][0]}* and {ranked[1][0]}*: save one in a file."
        )
    return ranked[0][0] if ranked else ""


def adopt_architecture(saved: Architecture, wanted: Architecture, recipe: Recipe) -> Architecture:
    """Return the architecture of weights that raycifar saved, adapted to this run's images and classes."""
    if saved.model != wanted.model:
        raise RequestError(f"--pretrained {recipe.pretrained} holds weights of {saved.model}, not of {wanted.model}.")
    preprocessing = replace(saved.preprocessing, size=recipe.image_size or saved.preprocessing.size)
    return replace(saved, num_classes=wanted.num_classes, preprocessing=preprocessing, tta_flip=wanted.tta_flip)


def select_weights(
    tensors: Mapping[str, Any], architecture: Architecture, origin: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the tensors as arrays, without a head that isn't the model's, and a note if it is left out.

    Raises:
        RequestError: names or shapes don't fit, or numbers aren't finite; the message lists the first few.
    """
    from raycifar.storage.weights import check_finite, compare

    tensors = models.find_family(architecture.model).rescale(tensors, architecture.preprocessing.size)
    network = architecture.build_on_meta()
    wanted, heads = network.state_dict(), architecture.heads(network)
    body, head, wanted_body, wanted_head = (
        {name: value for name, value in values.items() if name.startswith(heads) == of_head}
        for values in (tensors, wanted)
        for of_head in (False, True)
    )
    if differences := compare(body, wanted_body):
        raise RequestError(f"--pretrained {origin} doesn't fit {architecture.model}: {differences}.")
    notes = []
    if not compare(head, wanted_head):
        body |= head
    elif head:
        num_classes = len(last) if (last := [*head.values()][-1]).ndim else None
        other_classes = head.keys() == wanted_head.keys() and num_classes not in (None, architecture.num_classes)
        reason = f"is for {num_classes:,} classes" if other_classes else "has other layers"
        notes.append(f"The head of {origin} is left out: it {reason}.")
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in body.items()}
    try:
        check_finite(floats)
    except ValueError as error:
        raise RequestError(f"--pretrained {origin} is refused: {error}.") from error
    return {name: floats[name].contiguous().numpy() for name in wanted if name in floats}, notes
