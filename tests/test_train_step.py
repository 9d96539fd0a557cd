"""One optimizer step: what it computes, on one worker and on several, launched and captured."""

import copy
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_cuda import needs_gpu
from test_distributed import on_workers

from raycifar.cluster.status import StatusStore
from raycifar.data.shards import Shard
from raycifar.engine import cuda, train_step
from raycifar.engine.cuda import WARM_UP, cuda_graphed
from raycifar.engine.example_stats import LOSS, SEEN, blank_stats
from raycifar.engine.optimizers import set_learning_rate
from raycifar.engine.order import Batch
from raycifar.engine.reporter import Gauges, Reporter
from raycifar.engine.state import TrainingState
from raycifar.engine.train_step import TrainStep
from raycifar.errors import WorkError
from raycifar.models import Architecture
from raycifar.models.recipe import Recipe
from raycifar.terminal import Screen
from raycifar.workflows import training
from raycifar.workflows.requests import TrainingRequest

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN = {"augment": "none", "precision": "float32"}


def build(model="cnn", device=CPU, num_images=64, first=0, notice=print, record=True, compile=False, **recipe):  # noqa: A002
    """Return the step of a network that begins with the weights of seed 0, on random images."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 100, (256,), generator=generator)
    mine = slice(first, first + num_images)
    shard = Shard(pixels, labels, labels // 5, torch.arange(256)).map(lambda values: values[mine].to(device))
    recipe = Recipe(**PLAIN | recipe)
    state = TrainingState(Architecture(model), None, recipe, 0, device)
    state.train_mode()
    stats = blank_stats(num_images, device) if record else None
    return TrainStep(state, shard, stats, exchange=dist.is_initialized(), compile=compile, notice=notice)


def batch(step, num_images=None):
    rows = torch.arange(len(step.train_set)).numpy()
    return Batch(0, rows, num_images or len(rows))


def losses(step, steps, lr=0.02, num_images=None, size=None):
    """Return the mean loss of each of some steps on the same images, scaled to `size` pixels a side."""
    result = []
    for number in range(steps):
        torch.manual_seed(number)
        set_learning_rate(step.state.optimizer, lr)
        metrics = step(batch(step, num_images), size)
        result.append((metrics[1] / metrics[0]).item())
    return torch.tensor(result)


def test_a_step_is_the_textbook_s():
    step = build(label_smoothing=0.1, weight_decay=0.0, momentum=0.0, clip_norm=0.5)
    model, labels = copy.deepcopy(step.state.model), step.train_set.labels
    set_learning_rate(step.state.optimizer, 0.1)
    num_images, loss, num_correct, norm = step(batch(step)).tolist()

    logits = model(step.augment_and_normalize(step.train_set.images))
    F.cross_entropy(logits, labels, label_smoothing=0.1).backward()
    expected_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert num_images == 64
    assert loss == pytest.approx(F.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-5)
    assert num_correct == (logits.argmax(1) == labels).sum()
    assert norm == pytest.approx(expected_norm.item(), rel=1e-4)
    for p, q in zip(step.state.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q - 0.1 * q.grad, atol=1e-6)
    stats = step.example_stats
    assert torch.allclose(stats[:, LOSS], F.cross_entropy(logits, labels, reduction="none"), atol=1e-4)
    assert (stats[:, SEEN] == 1).all()


def test_a_share_that_has_run_out_changes_nothing_but_batch_norm():
    step = build()
    before = copy.deepcopy(dict(step.state.model.named_parameters()))
    set_learning_rate(step.state.optimizer, 0.1)
    metrics = step(Batch(0, torch.arange(0).numpy(), 64))
    assert metrics[:3].tolist() == [0, 0, 0]
    assert metrics[3] == 0
    assert (step.example_stats[:, SEEN] == 0).all()
    weight = "head.2.weight"
    decayed = before[weight] * (1 - 0.1 * 5e-4 * 1.9)  # Nesterov's first step of weight decay alone
    assert torch.allclose(dict(step.state.model.named_parameters())[weight], decayed)


def test_a_step_that_records_nothing_trains_alike_and_still_tells_a_loss_that_is_not_finite():
    recorded, other = build(), build(record=False)
    for step in (recorded, other):
        set_learning_rate(step.state.optimizer, 0.1)
    metrics, others = recorded(batch(recorded)), other(batch(other))
    assert torch.equal(metrics[:3], others[:3])
    assert (metrics[3] > 0, others[3]) == (True, 0)
    assert all(map(torch.equal, recorded.parameters, other.parameters))
    with torch.no_grad():
        other.parameters[0].fill_(torch.nan)
    assert other(batch(other))[3].isnan()


def test_images_are_scaled_to_the_size_of_the_step_and_flip_by_epoch():
    step = build("speedrun", augment="alternate")
    for size, expected in ((20, 20), (None, 32)):
        torch.manual_seed(0)
        first = step.prepare(batch(step).rows, size)[1]
        assert first.shape == (64, 3, expected, expected)
        step.state.progress.epoch += 1
        torch.manual_seed(0)
        second = step.prepare(batch(step).rows, size)[1]
        assert not torch.equal(first, second)
        step.state.progress.epoch += 1
        torch.manual_seed(0)
        assert torch.equal(first, step.prepare(batch(step).rows, size)[1])


def test_a_worker_with_a_single_image_trains_on_it():
    step = build(num_images=1)
    metrics = step(batch(step))
    assert metrics[0] == 1
    assert step(Batch(0, torch.arange(0).numpy(), 64))[0] == 0


def finds_a_loss_that_is_not_finite(rank, world_size):
    step = build(num_images=32, first=32 * rank, record=False)
    found = step.loss_and_counts

    def loss_and_counts(*args):
        loss, counts = found(*args)
        return (loss * torch.nan if rank else loss), counts

    step.loss_and_counts = loss_and_counts
    assert step(batch(step, 64))[3].isnan()  # on the other worker, too, which would wait for this one for ever


def test_what_one_worker_finds_not_finite_all_are_told():
    on_workers(finds_a_loss_that_is_not_finite, 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_train_as_one_does(world_size, tmp_path):
    on_workers(Trains(tmp_path / "losses", CPU), world_size)
    alone = losses(build(num_images=32 * world_size, batch_norm="frozen"), 5)
    assert torch.allclose(torch.load(tmp_path / "losses"), alone, rtol=1e-3)
    assert alone[-1] < alone[0]


class Trains:
    """What each of several workers does: a few steps on its own 32 images; the first writes the mean losses."""

    def __init__(self, file, device, steps=5):
        self.file, self.device, self.steps = file, device, steps

    def __call__(self, rank, world_size):
        step = build(device=self.device, num_images=32, first=32 * rank, batch_norm="frozen")
        together = losses(step, self.steps, num_images=32 * world_size)
        mine = torch.cat([p.detach().flatten() for p in step.state.model.parameters()])
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first)  # all workers keep the same weights
        dist.all_reduce(together)
        if rank == 0:
            torch.save(together / world_size, self.file)


def test_workers_that_share_a_gpu_say_once_that_their_steps_are_not_captured(monkeypatch):
    def on_a_gpu(function, device, obstacle=None, explain=print):
        return cuda_graphed(function, CUDA if obstacle else device, obstacle, explain)

    monkeypatch.setattr(train_step, "cuda_graphed", on_a_gpu)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        reporter = Reporter(StatusStore("shared"), Gauges("a", "cnn"), leader=True)
        for _ in range(2):  # each stage of fine-tuning has a step of its own
            assert build(notice=reporter.notice).run_update.__name__ == "update"
    finally:
        dist.destroy_process_group()
    (notice,) = reporter.status.notices
    assert notice.startswith("Steps run without CUDA graphs")
    assert "over gloo, which a graph can't capture." in notice


@pytest.mark.parametrize("model", ["cnn", "speedrun"])
def test_a_compiled_step_is_one_graph_for_each_size_and_trains_as_a_plain_one(model, monkeypatch):
    from torch._dynamo.backends.debugging import aot_eager  # takes 2 s, which other tests save

    graphs = []

    def backend(graph, inputs):  # the real one takes a minute for each graph
        graphs.append(graph)
        return aot_eager(graph, inputs)

    plain = losses(build(model, num_images=8), 3)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    step = build(model, num_images=8, compile=True)
    assert torch.allclose(losses(step, 3), plain, rtol=1e-3)
    assert len(graphs) == 2  # the network and its loss
    step.prepare_and_update(*step.on_device(batch(step).rows), 40, 8, 8)
    assert len(graphs) == 3


@pytest.fixture
def one_rank_over_nccl():
    store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda:0"))
    yield
    dist.destroy_process_group()


@needs_gpu
@pytest.mark.parametrize("model", ["cnn", "vgg16", "resnet50"])
def test_a_captured_step_exchanges_gradients_and_trains_as_a_launched_one(model, one_rank_over_nccl):
    captured, launched = (build(model, CUDA, precision="bfloat16") for _ in range(2))
    launched.run_update = launched.prepare_and_update if launched.is_one_graph else launched.update
    assert captured.exchange
    theirs, ours = losses(launched, 50), losses(captured, 50)
    assert captured.run_update.capturable
    assert len(captured.run_update.graphs) == 1
    assert torch.allclose(ours, theirs, rtol=0.05)
    assert ours[-1] < ours[0] - 0.5


@needs_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_captured_step_trains_as_a_launched_one_with_each_optimizer(optimizer):
    lr = {"sgd": 0.05, "adamw": 0.001, "muon": 0.05}[optimizer]
    captured, launched = (build("cnn", CUDA, optimizer=optimizer, precision="bfloat16") for _ in range(2))
    launched.run_update = launched.prepare_and_update if launched.is_one_graph else launched.update
    theirs, ours = losses(launched, WARM_UP + 5, lr), losses(captured, WARM_UP + 5, lr)
    assert captured.run_update.capturable
    assert torch.allclose(ours, theirs, rtol=0.02)
    assert ours[-1] < ours[0] - 0.5
    before = captured.state.model.head[2].weight.detach().clone()
    losses(captured, 1, lr=0.0)  # the learning rate is read again in each step
    assert torch.equal(captured.state.model.head[2].weight, before) or optimizer == "muon"


@needs_gpu
@pytest.mark.parametrize(("model", "size"), [("cnn", 32), ("speedrun", 32), ("speedrun", 24), ("speedrun", 20)])
def test_a_compiled_and_captured_step_trains_as_a_plain_one(model, size):
    compiled, plain = (build(model, CUDA, compile=compile, precision="bfloat16") for compile in (True, False))  # noqa: A001
    theirs, ours = losses(plain, WARM_UP + 5, size=size), losses(compiled, WARM_UP + 5, size=size)
    assert torch.allclose(ours, theirs, rtol=0.02)
    assert compiled.run_update.graphs


@needs_gpu
@pytest.mark.parametrize("record", [True, False])
def test_each_size_of_image_has_a_graph_that_trains_as_a_launched_step(record):
    recipe = {"optimizer": "muon", "muon_steps": 3, "augment": "alternate", "precision": "bfloat16"}
    captured, launched = (build("speedrun", CUDA, record=record, **recipe) for _ in range(2))
    launched.run_update = launched.prepare_and_update if launched.is_one_graph else launched.update
    found = []
    for step in (captured, launched):
        set_learning_rate(step.state.optimizer, 0.01)
        found.append([])
        for number in range(3 * (WARM_UP + 5)):
            torch.manual_seed(number)
            step.state.progress.epoch = 1 + number % 2
            metrics = step(batch(step), (20, 24, None)[number % 3])
            found[-1].append((metrics[1] / metrics[0]).item())
    assert captured.run_update.capturable
    assert len(captured.run_update.graphs) == 3
    assert torch.allclose(*map(torch.tensor, found), rtol=0.05)


@needs_gpu
def test_a_captured_step_flips_other_images_in_the_next_epoch():
    step = build(device=CUDA, augment="alternate")
    drawn = []
    for number in range(WARM_UP + 7):
        torch.manual_seed(0)
        step.state.progress.epoch = 1 + number % 2
        drawn.append(step.prepare(batch(step).rows)[1])
    assert step.run_inputs.graphs
    assert torch.equal(drawn[-1], drawn[-3])
    assert not torch.equal(drawn[-1], drawn[-2])


@needs_gpu
@pytest.mark.parametrize("augment", ["crop", "cutout", "trivial", "rand"])
def test_captured_inputs_are_those_of_a_launched_preparation(augment):
    step = build(device=CUDA, augment=augment, erasing=0.5)
    rows = batch(step).rows
    drawn = []
    for number in range(WARM_UP + 7):
        torch.manual_seed(number // 2)  # the last ones, replayed, in pairs
        drawn.append(step.prepare(rows)[1])
    assert step.run_inputs.graphs
    assert torch.equal(drawn[-1], drawn[-2]) != torch.equal(drawn[-1], drawn[-3])
    assert all(abs(inputs.mean() - drawn[0].mean()) < 0.3 for inputs in drawn)
    assert step.prepare(rows)[1].is_contiguous(memory_format=torch.channels_last)


@needs_gpu
def test_two_workers_share_a_gpu_over_gloo_and_train_as_one_does(tmp_path):
    on_workers(Trains(tmp_path / "losses", CUDA, steps=50), 2)
    alone = losses(build(device=CUDA, num_images=64, batch_norm="frozen"), 50)
    assert torch.allclose(torch.load(tmp_path / "losses").cpu(), alone, rtol=0.02, atol=0.02)


def test_graphs_are_freed_however_a_run_of_several_workers_ends(tmp_path, monkeypatch):
    """NCCL's communicators would wait for them."""

    class Runner:
        closed = 0

        def close(self):
            self.closed += 1

    runner = Runner()
    monkeypatch.setattr(cuda, "RUNNERS", {runner})
    options = {"data": "synthetic:200", "limit": 100, "val_size": 0, "workers": 0, "epochs": 1, "report": False}
    for group, lr, closed in ((False, 0.01, 0), (True, 1e9, 1)):
        request = TrainingRequest.of("cnn", **options, lr=lr, storage=str(tmp_path))
        monkeypatch.setattr(cuda, "dist", SimpleNamespace(is_initialized=lambda group=group: group))
        with ExitStack() as connection, suppress(WorkError):
            training.train(replace(request, test=False, name=f"{group}"), Screen(quiet=True), connection)
        assert runner.closed == closed
