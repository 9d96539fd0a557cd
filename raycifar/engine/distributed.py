"""Communication between workers: gradients in each step, and sums and rows between steps."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raycifar.data.shards import shard_bounds

BUCKET_BYTES = 25 * 2**20  # of gradients sent together, as in DistributedDataParallel
LAST_BUCKET_BYTES = 2**20  # of the last layers' gradients, which are ready first


class GradientExchange:
    """Sums gradients over workers, bucket by bucket, during the backward pass.

    It works like DistributedDataParallel (Li et al., 2020, arXiv:2006.15704), with three differences: a CUDA graph can
    capture it; its buckets never change, so a resumed run adds in the same order as an uninterrupted one; and it
    doesn't import PyTorch's compiler, which takes seconds.

    Args:
        parameters: the trained parameters, in the order of the forward pass; the same on each worker.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.enabled = True
        self.buckets = [Bucket(group) for group in group_by_size(list(parameters)[::-1])]
        self.bucket_of = {parameter: bucket for bucket in self.buckets for parameter in bucket.parameters}
        self.hooks = [p.register_post_accumulate_grad_hook(self._gradient_is_ready) for p in self.bucket_of]
        self.num_sent = 0

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self.hooks:
            hook.remove()

    def _gradient_is_ready(self, parameter: Tensor) -> None:
        if not self.enabled:
            return
        self.bucket_of[parameter].num_ready += 1  # type: ignore[index]
        # All workers must send their buckets in the same order.
        while self.num_sent < len(self.buckets) and self.buckets[self.num_sent].complete:
            self._send()

    def _send(self) -> None:
        self.buckets[self.num_sent].send()
        self.num_sent += 1

    def wait(self) -> None:
        """Wait until each gradient is the sum over all workers; call this after the backward pass."""
        if not self.enabled:
            return
        while self.num_sent < len(self.buckets):  # unused parameters have no gradient, and leave buckets incomplete
            self._send()
        for bucket in self.buckets:
            bucket.receive()
        self.num_sent = 0


class Bucket:
    """Gradients that are sent together, from contiguous memory."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        ends = itertools.accumulate(p.numel() for p in parameters)
        # Views in the memory layout of the parameters, which may be channels_last.
        self.views = [
            self.flat[end - p.numel() : end].as_strided(p.size(), p.stride())
            for p, end in zip(parameters, ends, strict=True)
        ]
        self.num_ready = 0
        self.work: dist.Work | None = None

    @property
    def complete(self) -> bool:
        return self.num_ready == len(self.parameters)

    def send(self) -> None:
        used = [(view, p.grad) for view, p in zip(self.views, self.parameters, strict=True) if p.grad is not None]
        if len(used) < len(self.parameters):
            self.flat.zero_()
        if used:
            views, gradients = zip(*used, strict=True)
            torch._foreach_copy_(views, gradients)
        self.work = dist.all_reduce(self.flat, async_op=True)

    def receive(self) -> None:
        assert self.work is not None
        self.work.wait()
        self.work, self.num_ready = None, 0
        for view, parameter in zip(self.views, self.parameters, strict=True):
            if parameter.grad is not None:
                parameter.grad = view


def group_by_size(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the parameters in groups of at most BUCKET_BYTES, or of one parameter; the first group is smaller."""
    groups: list[list[nn.Parameter]] = [[]]
    for parameter in parameters:
        limit = BUCKET_BYTES if len(groups) > 1 else LAST_BUCKET_BYTES
        if groups[-1] and sum(p.nbytes for p in groups[-1]) + parameter.nbytes > limit:
            groups.append([])
        groups[-1].append(parameter)
    return groups


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copy the first worker's tensors to all workers, in place."""
    if dist.is_initialized():
        with torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def all_reduce_sum(*tensors: Tensor) -> None:
    """Sum each tensor over all workers, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def all_reduce_mean(*tensors: Tensor) -> None:
    """Replace each tensor by its mean over all workers, in place."""
    all_reduce_sum(*tensors)
    for tensor in tensors:
        tensor /= world_size()


def all_gather_objects(value: Any) -> list[Any]:
    """Return each worker's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def all_gather_rows(part: Tensor, num_rows: int) -> Tensor:
    """Return the rows of all workers' shards, (num_rows, …); `part` holds those of this worker's."""
    whole, first = part.new_zeros((num_rows, *part.shape[1:])), shard_bounds(num_rows, world_size())[rank()]
    whole[first : first + len(part)] = part
    all_reduce_sum(whole)
    return whole
