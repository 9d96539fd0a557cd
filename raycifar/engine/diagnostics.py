"""A look inside a network that doesn't learn: dead ReLUs, and gradients that vanish or explode."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raycifar.storage.records import Diagnostics


def examine(model: nn.Module, inputs: Tensor, labels: Tensor) -> Diagnostics:
    """Return diagnostics of one batch, in float32; the network and its gradients don't change.

    Args:
        model: stays in evaluation mode. inputs: (n, 3, H, W) float32, preprocessed. labels: (n,) int64.

    Returns:
        dead_relus: by layer name, the fraction of a ReLU's channels that are 0 for all images and positions;
        gradient_norms: by name, of each trained layer's weights, from the input to the head.
    """
    dead: dict[str, float | None] = {}

    def record(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        largest = output.detach().amax([0, *range(2, output.ndim)])  # of each channel
        dead[name] = (largest <= 0).float().mean().item()

    relus = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    hooks = [module.register_forward_hook(partial(record, name)) for name, module in relus]
    logits = model.eval()(inputs).float()
    for hook in hooks:
        hook.remove()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
    gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), list(weights.values()))
    norms = {name: gradient.norm().item() for name, gradient in zip(weights, gradients, strict=True)}
    return {"dead_relus": dead, "gradient_norms": norms}
