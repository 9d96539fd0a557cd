"""What keeps a GPU busy; without one, everything stays as it is."""

import pytest
import torch

from raycifar.engine.cuda import (
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

    assert cuda_graphed(function, CPU, capturable=True) is function
    assert cuda_graphed(function, CUDA, capturable=False) is function
    assert prefetched(function, CPU) is function
    side, order = SideStream(CPU), []
    with side.beside():
        order.append("beside")
    order.append("after")
    side.join()
    assert order == ["beside", "after"]


@pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=needs_gpu)], ids=str)
def test_tensors_abreast_keep_their_order(device):
    tensors = [torch.full((3,), float(k), device=device) for k in range(7)]
    results = map_on_streams(lambda x: 2 * x, tensors)
    assert [result[0].item() for result in results] == [2.0 * k for k in range(7)]


@needs_gpu
def test_each_shape_has_a_graph_and_each_seed_its_numbers():
    take = CudaGraphRunner(lambda x: torch.nn.functional.dropout(x).sum())
    drawn = []
    for number in range(2 * STEPS):
        torch.cuda.manual_seed(number // 2)
        drawn.append(take(torch.ones(1000 + 500 * (number // STEPS), device=CUDA)).item())
    assert len(take.captured) == 2
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
    assert not take.possible
    assert not take.captured
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
