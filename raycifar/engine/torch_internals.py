"""Uses of PyTorch's private interfaces, each with its reason, and a test that fails when PyTorch changes."""

import inspect
import os
import pickle
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd
from torch.profiler import ProfilerActivity, profile

MEMORY_EVENTS = 100_000  # allocations, and what frees them
SHAPES = 64  # for which a function is compiled


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


def start_tracer(activities: Iterable[ProfilerActivity]) -> None:
    """Start PyTorch's tracer for a moment, and keep it quiet from now on.

    It reports its steps to standard error, and in any thread but the one that imported PyTorch an error of no
    consequence, which can't be switched off.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        with profile(activities=activities):
            pass
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, compiled for each shape of its arguments.

    PyTorch gives up after eight shapes in a process, of all functions that are made by the same line.
    """
    import torch._dynamo  # takes 1 s, which other runs save

    torch._dynamo.config.recompile_limit = SHAPES
    return torch.compile(function, dynamic=False)


def record_memory() -> None:
    """Record from now on who allocates a GPU's memory; there is no public way."""
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=MEMORY_EVENTS)


def memory_snapshot() -> bytes:
    """Return the record and what is allocated now, for https://pytorch.org/memory_viz, and record no more."""
    snapshot = pickle.dumps(torch.cuda.memory._snapshot())
    torch.cuda.memory._record_memory_history(enabled=None)
    return snapshot


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
