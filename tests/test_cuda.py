"""What keeps a GPU busy; without one, everything stays as it is."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from raycifar.engine import cuda
from raycifar.engine.cuda import (
    TOO_LARGE,
    WAITS,
    WARM_UP,
    CudaGraphRunner,
    Prefetcher,
    SideStream,
    cuda_graphed,
    map_on_streams,
    prefetched,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that PyTorch can use")
STEPS = WARM_UP + 5


def test_where_there_is_nothing_to_gain_a_function_stays_as_it_is():
    def function(x):
        return x

    assert cuda_graphed(function, CPU) is function
    said = []
    assert cuda_graphed(function, CUDA, "it can't", said.append) is function
    assert said == ["it can't"]
    assert prefetched(function, CPU) is function
    side, order = SideStream(CPU), []
    with side.beside():
        order.append("beside")
    order.append("after")
    side.join()
    assert order == ["beside", "after"]


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Pretend that there is a GPU with 100 bytes of memory, on which a replay does nothing."""

    def begin(share=1.0, allocated=10, waits=False):
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "graph_pool_handle": lambda: None,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "graph": lambda graph, **options: contextlib.nullcontext(),
            "reset_peak_memory_stats": lambda: None,
            "max_memory_allocated": lambda: allocated,
            "mem_get_info": lambda: (0, 100),
            "get_per_process_memory_fraction": lambda: share,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(cuda, "waits_for_gpu", lambda function: (function(), waits))

    return begin


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        ({}, []),
        ({"share": 0.5}, []),
        ({"share": 0.25}, [TOO_LARGE]),  # 10 bytes of 25
        ({"allocated": 40}, [TOO_LARGE]),
        ({"waits": True}, [WAITS]),
    ],
)
def test_what_can_not_be_captured_goes_on_as_it_is_and_says_why_once(pretend_gpu, gpu, why):
    pretend_gpu(**gpu)
    calls, said = [], []
    take = cuda_graphed(lambda x: calls.append(x) or x, CUDA, explain=said.append)
    for number in range(STEPS):
        assert take(torch.ones(3)).tolist() == [1] * 3
        assert len(calls) == (number + 1 if why else min(number + 1, WARM_UP + 1))  # the last one is the capture
    assert said == why


def test_a_closed_function_has_freed_its_graphs(pretend_gpu, monkeypatch):
    pretend_gpu()
    freed = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=int, reset=lambda: freed.append(1)))
    monkeypatch.setattr(torch.cuda, "synchronize", int)
    take = cuda_graphed(lambda x: x, CUDA)
    for size in (2, 3):
        for _ in range(STEPS):
            take(torch.ones(size))
    take.close()
    assert freed == [1, 1]
    assert not take.graphs


@pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=needs_gpu)], ids=str)
def test_tensors_abreast_keep_their_order(device):
    tensors = [torch.full((3,), float(k), device=device) for k in range(7)]
    results = map_on_streams(lambda x: 2 * x, tensors, device)
    assert [result[0].item() for result in results] == [2.0 * k for k in range(7)]


@needs_gpu
def test_each_shape_has_a_graph_and_each_seed_its_numbers():
    take = CudaGraphRunner(lambda x: torch.nn.functional.dropout(x).sum())
    drawn = []
    for number in range(2 * STEPS):
        torch.cuda.manual_seed(number // 2)
        drawn.append(take(torch.ones(1000 + 500 * (number // STEPS), device=CUDA)).item())
    assert len(take.graphs) == 2
    assert all(drawn[k] == drawn[k + 1] for k in range(0, len(drawn), 2))
    assert len(set(drawn)) > STEPS // 2


@needs_gpu
def test_what_waits_for_the_gpu_goes_on_as_it_is():
    total = torch.zeros(3, device=CUDA)

    def looks(x):
        total.add_(x)
        assert total.sum().item() >= 0
        return total.sum()

    take = CudaGraphRunner(looks)
    for _ in range(STEPS):
        take(torch.ones(3, device=CUDA))
    assert not take.capturable
    assert not take.graphs
    assert total.tolist() == [STEPS] * 3


@needs_gpu
def test_what_is_prepared_ahead_is_there_for_its_step():
    source = torch.arange(100_000, device=CUDA)
    prepare = Prefetcher(lambda k: (source * k, source + k))
    busy = torch.randn(2000, 2000, device=CUDA)
    for k in range(20):
        product, total = prepare(k)
        for _ in range(5):
            busy = busy @ busy / busy.norm()
        assert torch.equal(product, source * k)
        assert torch.equal(total, source + k)
