"""What keeps a GPU busy; without one, everything stays as it is."""

import pytest
import torch

from raycifar.engine.bench import step
from raycifar.engine.cuda import (
    WARM_UP,
    CudaGraphRunner,
    Prefetcher,
    SideStream,
    cuda_graphed,
    map_on_streams,
    prefetched,
)
from raycifar.engine.optimizers import set_learning_rate
from raycifar.engine.state import TrainingState, copies
from raycifar.models import Architecture
from raycifar.recipes import Recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that PyTorch can use")
STEPS = WARM_UP + 5


def test_where_there_is_nothing_to_gain_a_function_stays_as_it_is():
    def function(x):
        return x

    assert cuda_graphed(function, CPU, 1) is function
    assert cuda_graphed(function, CUDA, 2) is function
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


@pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=needs_gpu)], ids=str)
def test_copies_are_of_the_moment_and_contiguous(device):
    filters = torch.rand(8, 4, 3, 3, device=device).to(memory_format=torch.channels_last)
    before = filters.clone()
    copied = copies({"filters": filters})
    filters.zero_()
    assert torch.equal(copied()["filters"], before.cpu())
    assert copied()["filters"].is_contiguous()


def train(optimizer, replay):
    """Return the losses of a few steps on the same images, the last two at a learning rate of 0, and the state."""
    torch.manual_seed(0)
    lr = {"sgd": 0.05, "adamw": 0.001, "muon": 0.05}[optimizer]
    state = TrainingState(Architecture("cnn"), None, Recipe(optimizer=optimizer, lr=lr), 0, CUDA)
    images = torch.randn(64, 3, 32, 32, device=CUDA).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(64, device=CUDA)
    autocast = torch.autocast("cuda", torch.bfloat16)
    state.train_mode()

    def take_step(images, labels):
        return step(state.model, state.optimizer, images, labels, autocast, 0.0)

    take_step, losses, weights = CudaGraphRunner(take_step) if replay else take_step, [], []
    for number in range(STEPS):
        set_learning_rate(state.optimizer, lr if number < STEPS - 2 else 0.0)
        losses.append(take_step(images, labels).item())
        weights.append(state.model.head[2].weight.detach().clone())
    assert not torch.equal(weights[-4], weights[-3])
    assert torch.equal(weights[-3], weights[-1])
    return torch.tensor(losses), take_step


@needs_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_replayed_step_trains_as_one_that_is_launched(optimizer):
    launched, _ = train(optimizer, replay=False)
    losses, take_step = train(optimizer, replay=True)
    assert take_step.possible
    assert len(take_step.captured) == 1
    assert torch.allclose(losses, launched, rtol=0.02)
    assert losses[-1] < losses[0] - 0.5


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
