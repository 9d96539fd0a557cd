"""A step's kernels as one CUDA graph: a GPU is faster at small steps than Python is at launching them one by one."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls before a graph is captured: libraries are loaded in them, and algorithms chosen


class Replay:
    """A function of tensors on a GPU, captured once for each shape of its arguments, and replayed from then on.

    It must do the same work in each call: it may change tensors in place and draw random numbers, but not look at
    what a tensor holds. A function that can't be captured goes on as it is.

    Args:
        function: of tensors and numbers; it returns a tensor, which the next call may overwrite.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.calls: Counter[tuple[Any, ...]] = Counter()
        self.captured: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.possible = True

    def __call__(self, *arguments: Any) -> Tensor:
        key = tuple((a.shape, a.dtype) if torch.is_tensor(a) else a for a in arguments)
        self.calls[key] += 1
        if self.calls[key] <= WARM_UP or not self.possible:
            return self._call(arguments)
        if key not in self.captured and not self._capture(key, arguments):
            return self._call(arguments)
        graph, inputs, output = self.captured[key]
        for own, given in zip(inputs, filter(torch.is_tensor, arguments), strict=True):
            own.copy_(given)
        graph.replay()
        return output

    def _call(self, arguments: tuple[Any, ...]) -> Tensor:
        """Call the function on the stream that it is captured on."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            output = self.function(*arguments)
        here.wait_stream(self.stream)
        return output

    def _capture(self, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> bool:
        """Record what the function launches, without doing it; return whether that worked."""
        own = [a.clone() if torch.is_tensor(a) else a for a in arguments]
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, which write checkpoints and watch over NCCL, may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                output = self.function(*own)
        except RuntimeError:
            self.possible = False
            return False
        self.captured[key] = graph, [a for a in own if torch.is_tensor(a)], output
        return True


def replayed(function: Callable[..., Tensor], device: torch.device, world_size: int) -> Callable[..., Tensor]:
    """Return the function, replayed on one GPU; on a CPU, or where gradients are exchanged, it stays as it is."""
    return Replay(function) if device.type == "cuda" and world_size == 1 else function
