"""Uses of PyTorch's private interfaces, each with its reason, and a test that fails when PyTorch changes."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer whose methods are never compiled.

    PyTorch wraps these methods so that torch.compile skips them, and the wrappers import the compiler on their first
    call: 1.1 of the 6 seconds that a start without workers takes (AMD Zen 5). This can't be switched off.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class EagerAdamW(EagerOptimizer, torch.optim.AdamW):
    """See `EagerOptimizer`."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def fused_sgd_(parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], **options: Any) -> None:
    """Take a step of SGD, in place, with PyTorch's fused kernel.

    torch.optim.SGD takes only parameters, not permuted views of them.
    """
    sgd(parameters, gradients, [*momenta], fused=True, **options)


def seed_cpu(value: int) -> None:
    """Seed the CPU's generator only: torch.manual_seed takes 0.1 ms for devices that don't exist."""
    torch.default_generator.manual_seed(value)


def waits_for_gpu(function: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """Return what the function returns, and whether it waits for the GPU: a CUDA graph can't.

    PyTorch tells so by a warning of no class of its own, so that its text has to be looked at.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            output = function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return output, any("synchronizing CUDA operation" in str(warning.message) for warning in caught)
