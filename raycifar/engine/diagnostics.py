"""A look inside a network that doesn't learn: dead ReLUs, and gradients that vanish or explode."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raycifar.storage.records import Diagnostics

PIXELS = 2**15  # of the images that pass at a time


def examine(model: nn.Module, inputs: Tensor, labels: Tensor) -> Diagnostics:
    """Return diagnostics of some images, in float32; the network and its gradients don't change.

    Args:
        model: stays in evaluation mode. inputs: (n, 3, H, W) float32, preprocessed. labels: (n,) int64.

    Returns:
        dead_relus: by layer name, the fraction of a ReLU's channels that are 0 for all images and positions;
        gradient_norms: by name, of each trained layer's weights, from the input to the head.
    """
    largest: dict[str, Tensor] = {}  # output of each channel, by layer
    found: dict[str, Tensor] = {}  # of the images that pass; a layer that is called again, as in ResNet, counts last

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        found[name] = output.detach().amax([0, *range(2, output.ndim)])

    relus = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in relus]
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
    gradients = [torch.zeros_like(p) for p in weights.values()]
    at_a_time = max(1, PIXELS // inputs.shape[-1] ** 2)
    for some, their_labels in zip(inputs.split(at_a_time), labels.split(at_a_time), strict=True):
        loss = nn.functional.cross_entropy(model.eval()(some).float(), their_labels, reduction="sum") / len(inputs)
        torch._foreach_add_(gradients, torch.autograd.grad(loss, list(weights.values())))
        largest = {name: torch.maximum(values, largest.get(name, values)) for name, values in found.items()}
    for hook in hooks:
        hook.remove()
    norms = {name: gradient.norm().item() for name, gradient in zip(weights, gradients, strict=True)}
    dead: dict[str, float | None] = {name: (values <= 0).float().mean().item() for name, values in largest.items()}
    return {"dead_relus": dead, "gradient_norms": norms}
