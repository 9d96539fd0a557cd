"""The optimiser of a recipe."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from raycifar.engine.cuda import map_on_streams
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
    groups: dict[tuple[float, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((recipe.layer_decay ** distance[name], parameter.ndim), []).append(parameter)
    options: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": recipe.weight_decay if ndim > 1 else 0.0, "lr_scale": scale}
        for (scale, ndim), parameters in groups.items()
    ]
    on_gpu = next(model.parameters()).device.type == "cuda"
    if recipe.optimizer == "muon":
        optimizer: torch.optim.Optimizer = Muon(options, recipe.lr, recipe.momentum)
    elif recipe.optimizer == "adamw":
        betas = (recipe.momentum, 0.999)
        optimizer = AdamW(options, lr=recipe.lr, betas=betas, fused=True, capturable=on_gpu)
    else:
        optimizer = SGD(options, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True)
    if on_gpu:  # a step that is replayed there reads its learning rate there
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
    return optimizer


class Eager(torch.optim.Optimizer):
    """An optimiser that is never compiled: PyTorch's own import its compiler all the same, 1.4 s of a start."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class SGD(Eager, torch.optim.SGD):
    """PyTorch's, given filters in the order in which they lie; else it copies their gradients first, on a CPU."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters, gradients, momenta = (list(map(as_it_lies, tensors)) for tensors in tensors_of(group, self))
            names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
            if parameters:
                sgd(parameters, gradients, [*momenta], fused=True, **{name: group[name] for name in names})


def as_it_lies(tensor: Tensor) -> Tensor:
    """Return a view of filters, which are channels_last, in the order of their memory, and all else as it is."""
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def tensors_of(group: dict[str, Any], optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], ...]:
    """Return a group's parameters that have gradients, their gradients, and their momenta, which begin as 0."""
    parameters = [p for p in group["params"] if p.grad is not None]
    for p in parameters:
        if "momentum_buffer" not in optimizer.state[p]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return parameters, [p.grad for p in parameters], [optimizer.state[p]["momentum_buffer"] for p in parameters]


class AdamW(Eager, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(Eager):
    """Steps of the same length in all directions, for filters (Jordan et al., 2024); SGD for all else.

    The update of a convolution's filters, as a matrix (filters, values of a filter), is replaced by the nearest
    matrix with orthogonal rows or columns, and the filters are kept at one norm, for batch norm makes their scale
    meaningless. torch.optim.Muon has neither convolutions nor this norm.

    Args:
        lr: of filters, relative to their norm; times REST for all else.
    """

    REST = 0.5

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float) -> None:
        for group in groups:
            group["filters"] = group["params"][0].ndim == 4
            if not group["filters"]:
                group["lr_scale"] *= self.REST
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters, gradients, momenta = tensors_of(group, self)
            if not parameters:
                continue
            if not group["filters"] and group["weight_decay"]:
                torch._foreach_add_(gradients, parameters, alpha=group["weight_decay"])
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, gradients)
            updates = list(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))  # Nesterov's
            if group["filters"]:
                updates = map_on_streams(orthogonal, updates)
            torch._foreach_mul_(updates, group["lr"])
            torch._foreach_sub_(parameters, updates)
            if group["filters"]:
                norms = torch._foreach_norm(parameters)
                torch._foreach_mul_(
                    parameters, [len(p) ** 0.5 / norm for p, norm in zip(parameters, norms, strict=True)]
                )


def orthogonal(update: Tensor) -> Tensor:
    """Return the nearest matrix with orthogonal rows or columns, nearly, and in the shape that `update` has.

    By five steps of a Newton–Schulz iteration whose coefficients bring all singular values near one, not to it.
    Bfloat16 is enough for that, and is taken where autocast is on.
    """
    matrix = update.flatten(1)
    if torch.is_autocast_enabled(matrix.device.type):
        matrix = matrix.to(torch.get_autocast_dtype(matrix.device.type))
    wide = matrix.mT if len(matrix) > matrix.shape[1] else matrix
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        factor = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        wide = torch.addmm(wide, factor, wide, beta=3.4445)
    matrix = wide.mT if len(matrix) > matrix.shape[1] else wide
    return matrix.to(update.dtype).view(update.shape)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the head's learning rate, and those of the layers before it."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]
