"""Snapshots, and their way to the storage while training goes on."""

import threading

import pytest
import torch
from safetensors.torch import load
from test_cuda import needs_gpu

import raycifar.engine.checkpoint
from raycifar.engine.checkpoint import MAX_PENDING, Checkpointer, HostCopy, Snapshot
from raycifar.engine.state import TENSORS, TrainingState
from raycifar.models import Architecture
from raycifar.models.recipe import Recipe
from raycifar.storage.checkpoints import KEPT, Checkpoints, checkpoint_name
from raycifar.storage.run_folder import BEST, RunFolder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def run(tmp_path):
    return RunFolder(str(tmp_path), "a")


@pytest.fixture
def state():
    return TrainingState(Architecture("cnn"), None, Recipe(), 0, CPU)


@pytest.fixture
def reported(monkeypatch):
    """What Ray Train is told, without a run of its own."""
    metrics = []
    monkeypatch.setattr(raycifar.engine.checkpoint.ray.train, "report", lambda values, **_: metrics.append(values))
    return metrics


@pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=needs_gpu)], ids=str)
def test_copies_are_of_the_moment_and_contiguous(device):
    filters = torch.rand(8, 4, 3, 3, device=device).to(memory_format=torch.channels_last)
    before = filters.clone()
    copy = HostCopy({"filters": filters})
    filters.zero_()
    assert torch.equal(copy.wait()["filters"], before.cpu())
    assert copy.wait()["filters"].is_contiguous()


def test_a_snapshot_is_of_its_moment_with_the_best_weights_beside_it(run, state):
    before = state.model.head[2].weight.detach().clone()
    snapshot = Snapshot(state, best=True)
    with torch.no_grad():
        state.model.head[2].weight.zero_()
    snapshot.write(run)
    assert torch.equal(load(run.read(BEST))["head.2.weight"], before)
    (name,) = Checkpoints(run).names()
    assert torch.equal(load(Checkpoints(run).read(name)[TENSORS])["model.head.2.weight"], before)


def test_those_trained_furthest_are_kept_and_metrics_are_reported(run, state, reported):
    checkpointer = Checkpointer(run)
    for epoch in range(KEPT + 2):
        state.progress.epoch = epoch
        checkpointer.save({"epoch": epoch}, Snapshot(state))
    checkpointer.wait()
    assert Checkpoints(run).names() == [checkpoint_name(epoch, 0) for epoch in reversed(range(2, KEPT + 2))]
    assert [metrics["epoch"] for metrics in reported] == list(range(KEPT + 2))


def test_an_epoch_is_shown_once_its_checkpoint_is_stored(run, state, reported):
    seen = []
    checkpointer = Checkpointer(run)
    checkpointer.save({}, Snapshot(state), stored=lambda: seen.extend(Checkpoints(run).sound(pytest.fail)))
    checkpointer.wait()
    assert [name for name, _ in seen] == Checkpoints(run).names()


class Stuck:
    """A snapshot whose storage is slow, or full."""

    def __init__(self, error=None):
        self.go, self.error = threading.Event(), error

    def write(self, run):
        self.go.wait(10)
        if self.error:
            raise self.error


def test_training_waits_for_a_storage_that_is_slower_only_when_enough_is_under_way(run, reported):
    checkpointer = Checkpointer(run)
    slow = [Stuck() for _ in range(MAX_PENDING + 1)]
    for snapshot in slow[:MAX_PENDING]:
        checkpointer.save({}, snapshot)
    last = threading.Thread(target=checkpointer.save, args=({}, slow[-1]))
    last.start()
    last.join(0.2)
    assert last.is_alive()
    for snapshot in slow:
        snapshot.go.set()
    last.join(10)
    assert not last.is_alive()
    checkpointer.wait()


def test_what_goes_wrong_is_raised_by_the_next_save(run, reported):
    checkpointer = Checkpointer(run)
    full = Stuck(OSError("No space left on device"))
    full.go.set()
    checkpointer.save({}, full)
    with pytest.raises(OSError, match="No space left"):
        checkpointer.wait()
