"""The optimiser of a recipe."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from raycifar.recipes import Recipe


def build_optimizer(model: nn.Module, layers: Sequence[Sequence[str]], recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimiser of the parameters that are not frozen.

    Weight decay is for weights alone, not for norms and biases. Each layer's learning rate is the next one's
    times `layer_decay`: the nearer to the input, the more general what was learned, the less it should move
    (Howard and Ruder, 2018, arXiv:1801.06146).

    Args:
        layers: names of the parameters of each layer, from the input to the head.
    """
    distance = {name: k for k, names in enumerate(reversed(layers)) for name in names}  # from the head
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (recipe.layer_decay ** distance[name], parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    options: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": recipe.weight_decay if decayed else 0.0, "lr_scale": scale}
        for (scale, decayed), parameters in groups.items()
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(options, lr=recipe.lr, betas=(recipe.momentum, 0.999), fused=True)
    return torch.optim.SGD(options, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the head's learning rate, and those of the layers before it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
