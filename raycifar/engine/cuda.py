"""CUDA graphs and streams, which keep a GPU busy: it computes a small step faster than Python launches its kernels."""

import functools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from raycifar.engine.torch_internals import waits_for_gpu

T = TypeVar("T")
WARM_UP = 3  # calls before a graph is captured: libraries are loaded in them, and algorithms chosen
MEMORY = 1 / 3  # of the process's GPU memory: a captured step may need no more, since its graph needs as much again
AHEAD = 3  # batches prepared before their step's turn, at most: each takes memory
SIDE_STREAMS = 4  # that take turns
WAITS = "something in it waits for the GPU"
TOO_LARGE = "it needs more than a third of this process's GPU memory, and capturing it as much again"


class CudaGraphRunner:
    """A function of tensors on a GPU, captured once for each shape of its arguments, and replayed from then on.

    It must do the same work in each call: it may change tensors in place and draw random numbers, but not look at
    what a tensor holds. A function that waits for the GPU goes on as it is, as does one that needs so much memory that
    its kernels must be long.

    Args:
        function: of tensors and numbers; it returns a tensor, which the next call may overwrite.
        explain: called with the reason, if the function goes on as it is.
    """

    def __init__(self, function: Callable[..., Tensor], explain: Callable[[str], None] = lambda why: None) -> None:
        self.function, self.explain = function, explain
        self.calls: Counter[tuple[Any, ...]] = Counter()
        self.graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.capturable = True
        RUNNERS.add(self)

    def __call__(self, *arguments: Any) -> Tensor:
        key = tuple((a.shape, a.dtype) if torch.is_tensor(a) else a for a in arguments)
        self.calls[key] += 1
        if self.capturable and self.calls[key] == WARM_UP:
            output, obstacle = self._try(arguments)
            if obstacle:
                self.capturable = False
                self.explain(obstacle)
            return output
        if not self.capturable or self.calls[key] < WARM_UP:
            return self._call(arguments)
        if key not in self.graphs:
            self.graphs[key] = self._capture(arguments)
        graph, inputs, output = self.graphs[key]
        for own, given in zip(inputs, filter(torch.is_tensor, arguments), strict=True):
            own.copy_(given)
        graph.replay()
        return output

    def close(self) -> None:
        """Free the graphs."""
        with suppress(RuntimeError):  # the GPU has failed, of which the run is told already
            torch.cuda.synchronize()
            for graph, _, _ in self.graphs.values():
                graph.reset()
        self.graphs.clear()

    def _call(self, arguments: tuple[Any, ...]) -> Tensor:
        """Call the function on the stream that it is captured on."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            output = self.function(*arguments)
        here.wait_stream(self.stream)
        return output

    def _try(self, arguments: tuple[Any, ...]) -> tuple[Tensor, str | None]:
        """Call the function, and return with its output why it can't be captured, or None."""
        torch.cuda.reset_peak_memory_stats()  # of what was scored before
        output, waits = waits_for_gpu(lambda: self._call(arguments))
        mine = torch.cuda.get_per_process_memory_fraction() * torch.cuda.mem_get_info()[1]
        if waits:
            return output, WAITS
        return output, None if torch.cuda.max_memory_allocated() < MEMORY * mine else TOO_LARGE

    def _capture(self, arguments: tuple[Any, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        """Record what the function launches, without doing it; return that, where it reads, and what it writes."""
        own = [a.clone() if torch.is_tensor(a) else a for a in arguments]
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog and the writer of checkpoints, may use the GPU during capture.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            output = self.function(*own)
        return graph, [a for a in own if torch.is_tensor(a)], output


RUNNERS: WeakSet[CudaGraphRunner] = WeakSet()


@contextmanager
def graphs_freed() -> Iterator[None]:
    """Free all graphs before a process group ends: NCCL waits for those that hold its operations."""
    try:
        yield
    finally:
        for runner in list(RUNNERS) if dist.is_initialized() else ():
            runner.close()


def cuda_graphed(
    function: Callable[..., Tensor],
    device: torch.device,
    obstacle: str | None = None,
    explain: Callable[[str], None] = lambda why: None,
) -> Callable[..., Tensor]:
    """Return the function, replayed on a GPU; on a CPU, or where there is an obstacle, it stays as it is.

    `explain` is called with the obstacle, this one or what `CudaGraphRunner` finds.
    """
    if device.type != "cuda":
        return function
    if obstacle:
        explain(obstacle)
        return function
    return CudaGraphRunner(function, explain)


class Prefetcher:
    """A function that prepares a step's tensors on a GPU while the steps before it are still under way."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self.function, self.stream = function, torch.cuda.Stream()
        self.under_way: deque[torch.cuda.Event] = deque()

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        here = torch.cuda.current_stream()
        self.under_way.append(here.record_event())
        if len(self.under_way) > AHEAD:
            self.under_way.popleft().synchronize()
        with torch.cuda.stream(self.stream):
            prepared = self.function(*arguments)
        here.wait_stream(self.stream)
        for tensor in prepared:
            tensor.record_stream(here)  # its memory is not given away before the step has seen it
        return prepared


def prefetched(function: Callable[..., tuple[Tensor, ...]], device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """Return the function, which must depend on no step before; on a CPU it stays as it is."""
    return Prefetcher(function) if device.type == "cuda" else function


class SideStream:
    """A stream beside the current one; on a CPU, where everything waits its turn, nothing."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.busy = False

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run the block on the side stream, beside what follows, until `join`; keep its tensors alive until then."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        self.busy = True
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        if self.stream is not None and self.busy:  # a graph that is captured has no part in an idle stream
            torch.cuda.current_stream().wait_stream(self.stream)
            self.busy = False


def map_on_streams(function: Callable[[T], Tensor], arguments: Sequence[T], device: torch.device) -> list[Tensor]:
    """Call the function on each argument, on a GPU on several streams at a time, and return the results."""
    sides, results = side_streams(device), []
    for k, argument in enumerate(arguments):
        with sides[k % SIDE_STREAMS].beside():
            results.append(function(argument))
    for side in sides:
        side.join()
    return results


@functools.cache
def side_streams(device: torch.device) -> list[SideStream]:
    return [SideStream(device) for _ in range(SIDE_STREAMS)]
