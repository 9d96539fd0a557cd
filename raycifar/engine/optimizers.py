"""The optimizers, by the names that a recipe knows them by. A new one is a line in OPTIMIZERS."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from raycifar.engine.cuda import map_on_streams
from raycifar.engine.torch_internals import EagerAdamW, EagerOptimizer, fused_sgd_
from raycifar.models.recipe import Recipe


def build_optimizer(model: nn.Module, layers: Sequence[Sequence[str]], recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters that are not frozen.

    Weight decay is for weights alone, not for norms and biases. Each layer's learning rate is the next one's
    times `layer_decay`: the nearer to the input, the more general what was learned, the less it should move
    (Howard and Ruder, 2018, arXiv:1801.06146).

    Args:
        layers: names of the parameters of each layer, from the input to the head.
    """
    distance = {name: k for k, names in enumerate(reversed(layers)) for name in names}  # from the head
    by_kind: dict[tuple[float, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = recipe.layer_decay ** distance[name] * (recipe.norm_lr if parameter.ndim == 1 else 1)
            by_kind.setdefault((scale, parameter.ndim), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": recipe.weight_decay if ndim > 1 else 0.0, "lr_scale": scale}
        for (scale, ndim), parameters in by_kind.items()
    ]
    optimizer = OPTIMIZERS[recipe.optimizer](groups, recipe)
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if device.type == "cuda":  # a captured step reads its learning rate there
            group["lr"] = torch.tensor(group["lr"], device=device)
    return optimizer


class SGD(EagerOptimizer, torch.optim.SGD):
    """PyTorch's, given filters in the order of their memory: on a CPU it would copy other gradients first."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters, gradients, momenta = (list(map(memory_order, tensors)) for tensors in step_tensors(group, self))
            names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
            if parameters:
                fused_sgd_(parameters, gradients, momenta, **{name: group[name] for name in names})


def memory_order(tensor: Tensor) -> Tensor:
    """Return filters, which are channels_last, as a view in the order of their memory, and all else as it is."""
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def step_tensors(group: dict[str, Any], optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], ...]:
    """Return a group's parameters that have gradients, their gradients, and their momenta, which begin as 0."""
    parameters = [p for p in group["params"] if p.grad is not None]
    for p in parameters:
        if "momentum_buffer" not in optimizer.state[p]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return parameters, [p.grad for p in parameters], [optimizer.state[p]["momentum_buffer"] for p in parameters]


class Muon(EagerOptimizer):
    """Steps of the same length in all directions, for filters (Jordan et al., 2024); SGD for all else.

    The update of a convolution's filters, as a matrix (filters, values of a filter), is replaced by the nearest
    matrix with orthogonal rows or columns, and the filters are kept at one norm, for batch norm makes their scale
    meaningless. torch.optim.Muon has neither convolutions nor this norm.

    Args:
        lr: of filters, relative to their norm; times REST for all else.
        steps: of the Newton–Schulz iteration.
    """

    REST = 0.5

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, steps: int = 5) -> None:
        self.steps = steps
        for group in groups:
            group["filters"] = group["params"][0].ndim == 4
            if not group["filters"]:
                group["lr_scale"] *= self.REST
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters, gradients, momenta = step_tensors(group, self)
            if not parameters:
                continue
            if not group["filters"] and group["weight_decay"]:
                torch._foreach_add_(gradients, parameters, alpha=group["weight_decay"])
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, gradients)
            updates = list(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))  # Nesterov's
            if group["filters"]:
                updates = orthogonalize(updates, self.steps)
            torch._foreach_mul_(updates, group["lr"])
            torch._foreach_sub_(parameters, updates)
            if group["filters"]:
                scales = torch._foreach_norm(parameters)
                torch._foreach_reciprocal_(scales)
                torch._foreach_mul_(scales, [len(p) ** 0.5 for p in parameters])
                torch._foreach_mul_(parameters, scales)


def orthogonalize(updates: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Return for each update the nearest matrix with orthogonal rows or columns, nearly, and in the update's shape.

    By some steps of a Newton–Schulz iteration whose coefficients bring all singular values near one, not to it.
    Bfloat16 is enough for that, and is taken where autocast is on. Matrices of one shape are multiplied together.
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for k, update in enumerate(updates):
        by_shape.setdefault(update.shape, []).append(k)
    device, dtype = updates[0].device, updates[0].dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    stacks = [[updates[k] for k in same] for same in by_shape.values()]
    # Autocast would take the norms in float32, and then cast what is divided by them.
    with torch.autocast(device.type, enabled=False):
        found = map_on_streams(partial(newton_schulz, steps=steps, dtype=dtype), stacks, device)
    matrix_of = dict(zip(chain(*by_shape.values()), chain(*found), strict=True))
    return [matrix_of[k] for k in range(len(updates))]


def newton_schulz(updates: Sequence[Tensor], steps: int, dtype: torch.dtype) -> Tensor:
    """Return updates of one shape, (n, *shape), nearly orthogonal and computed in `dtype`; see `orthogonalize`."""
    matrices = list(map(memory_order, updates))
    stack = torch.empty((len(matrices), *matrices[0].shape), dtype=dtype, device=updates[0].device)
    torch.stack(matrices, out=stack)
    wide = stack.flatten(2)  # (n, filters, values of a filter)
    if high := wide.shape[1] > wide.shape[2]:
        wide = wide.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = wide @ wide.mT
        factor = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        wide = torch.baddbmm(wide, factor, wide, beta=3.4445)
    return (wide.mT if high else wide).view(stack.shape).to(updates[0].dtype).permute(0, 1, 4, 2, 3)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Recipe], torch.optim.Optimizer]] = {
    "sgd": lambda groups, recipe: SGD(
        groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True
    ),
    "adamw": lambda groups, recipe: EagerAdamW(
        groups, lr=recipe.lr, betas=(recipe.momentum, 0.999), fused=True, capturable=groups[0]["params"][0].is_cuda
    ),
    "muon": lambda groups, recipe: Muon(groups, recipe.lr, recipe.momentum, recipe.muon_steps),
}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the head's learning rate, and those of the layers before it."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]
