"""What workers exchange, by processes that meet over gloo."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from command import FORK, free_ports
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raycifar.engine.distributed import (
    BUCKET_BYTES,
    GradientExchange,
    all_gather_objects,
    all_gather_rows,
    all_reduce_mean,
    broadcast,
    group_by_size,
)


def meet(rank, function, world_size, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    function(rank, world_size)
    dist.destroy_process_group()


def on_workers(function, world_size):
    """Call `function(rank, world_size)` in as many processes; raise what one raises."""
    assert FORK.get_start_method() == "forkserver"  # which has imported PyTorch
    mp.start_processes(meet, (function, world_size, *free_ports(1)), nprocs=world_size, start_method="forkserver")


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def loss_of(model, rank):
    generator = torch.Generator().manual_seed(rank)
    return model(torch.randn(4, 3, 8, 8, generator=generator)).square().sum()


def sums_gradients(rank, world_size):
    model, expected = network(), network()
    exchange = GradientExchange(model.parameters())
    for _ in range(3):
        model.zero_grad()
        loss_of(model, rank).backward()
        exchange.wait()
        expected.zero_grad()
        sum(loss_of(expected, other) for other in range(world_size)).backward()
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5)
            assert p.grad.stride() == p.stride()


def equals_ddp(rank, world_size):
    model = network()
    theirs = DistributedDataParallel(copy.deepcopy(model))
    exchange = GradientExchange(model.parameters())
    loss_of(model, rank).backward()
    exchange.wait()
    (loss_of(theirs, rank) * world_size).backward()  # it takes the mean
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def leaves_what_is_unused(rank, world_size):
    model = network()
    unused = nn.Parameter(torch.ones(3))
    exchange = GradientExchange([*model.parameters(), unused])
    for _ in range(2):
        model.zero_grad()
        loss_of(model, rank).backward()
        exchange.wait()
        assert unused.grad is None
        assert all(p.grad is not None for p in model.parameters())


def pauses_and_closes(rank, world_size):
    model = network()
    loss_of(model, rank).backward()
    alone = [p.grad.clone() for p in model.parameters()]
    exchange = GradientExchange(model.parameters())
    exchange.enabled = False
    for leave_alone in (lambda: None, exchange.close):
        leave_alone()
        model.zero_grad()
        loss_of(model, rank).backward()
        exchange.wait()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), alone, strict=True))


def gathers(rank, world_size):
    assert all_gather_objects({"rank": rank}) == [{"rank": k} for k in range(world_size)]
    rows = all_gather_rows(torch.full((2, 3), float(rank)), 2 * world_size)
    assert rows[:, 0].tolist() == [float(k) for k in range(world_size) for _ in range(2)]
    value = torch.tensor([float(rank)])
    all_reduce_mean(value)
    assert value.item() == (world_size - 1) / 2
    value.fill_(rank)
    broadcast([value])
    assert value.item() == 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_are_summed_over_workers_in_the_layout_of_their_parameters(world_size):
    on_workers(sums_gradients, world_size)


def test_with_two_workers_the_sum_is_that_of_ddp_bit_for_bit():
    on_workers(equals_ddp, 2)


def test_a_parameter_that_is_not_used_has_no_gradient_and_holds_nobody_up():
    on_workers(leaves_what_is_unused, 2)


def test_an_exchange_that_is_paused_or_closed_leaves_gradients_alone():
    on_workers(pauses_and_closes, 2)


def test_rows_values_and_means_are_those_of_all_workers():
    on_workers(gathers, 2)


def test_without_workers_everything_stays_as_it_is():
    value = torch.tensor([3.0])
    all_reduce_mean(value)
    broadcast([value])
    assert value.item() == 3.0
    assert all_gather_objects("alone") == ["alone"]


def test_buckets_hold_all_parameters_in_order_and_the_first_is_small():
    parameters = [nn.Parameter(torch.zeros(count)) for count in (50_000, 200_000, 3_000_000, 5_000_000, 2_000_000, 9)]
    groups = group_by_size(parameters)
    assert [p for group in groups for p in group] == parameters
    assert len(groups[0]) == 2
    assert all(sum(p.nbytes for p in group) <= BUCKET_BYTES or len(group) == 1 for group in groups)
