"""What a run is made of between two steps."""

import json

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from test_distributed import on_workers

from raycifar.engine.state import TENSORS, Progress, TrainingState
from raycifar.models import Architecture
from raycifar.models.recipe import Recipe
from raycifar.storage.checkpoints import PROGRESS
from raycifar.storage.schemas import EpochRecord

CPU = torch.device("cpu")


def record(epoch, val_top1):
    return EpochRecord(
        epoch=epoch,
        train_loss=1.0,
        train_top1=0.5,
        val_top1=val_top1,
        lr=0.1,
        images_per_second=1,
        seconds=1,
        workers=1,
    )


def state(**recipe):
    return TrainingState(Architecture("cnn"), None, Recipe(**recipe), 0, CPU)


def step(own):
    own.model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    own.optimizer.step()
    own.optimizer.zero_grad()
    if own.ema:
        own.ema.update_parameters(own.model)


def files(own):
    return {
        TENSORS: safetensors.torch.save({k: v.contiguous() for k, v in own.tensors().items()}),
        PROGRESS: own.progress.to_json(),
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_state_comes_back_as_it_was_and_takes_the_same_next_step(optimizer):
    ours, theirs = state(optimizer=optimizer, ema=0.9), state(optimizer=optimizer, ema=0.9)
    ours.example_stats, ours.val_correct = torch.rand(5, 6), torch.ones(3)
    step(ours)
    theirs.load_checkpoint(files(ours))
    for own in (ours, theirs):
        torch.manual_seed(1)
        step(own)
    assert ours.tensors().keys() == theirs.tensors().keys()
    assert all(torch.equal(value, theirs.tensors()[name]) for name, value in ours.tensors().items())


def statistics(own):
    return torch.cat([buffer.flatten() for buffer in own.running_statistics()])


def resumes_with_its_own_statistics(rank, world_size):
    ours, theirs = state(ema=0.9), state(ema=0.9)
    torch.manual_seed(rank)
    step(ours)
    ours.gather_buffers()
    content = [files(ours)]
    dist.broadcast_object_list(content)  # only the first worker writes
    theirs.load_checkpoint(content[0])
    mine = statistics(ours)
    assert torch.equal(statistics(theirs), mine)
    ours.average_buffers()
    assert not torch.equal(statistics(ours), mine)
    assert "worker_buffers" not in ours.tensors()
    dist.barrier()
    dist.destroy_process_group()
    alone = state(ema=0.9)
    alone.load_checkpoint(content[0])
    assert torch.allclose(statistics(alone), statistics(ours))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # `on_workers` ends it


def test_in_mid_epoch_each_worker_resumes_with_its_own_statistics_and_one_alone_with_their_mean():
    on_workers(resumes_with_its_own_statistics, 2)


def keeps_what_is_frozen(rank, world_size):
    own = state(batch_norm="frozen")
    for buffer in own.running_statistics():
        buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(1)))
    own.train_mode()
    before = statistics(own)
    own.average_buffers()
    assert torch.equal(statistics(own), before)  # the sum of three, divided by three, may differ in the last bit


def test_frozen_statistics_stay_the_same_bit_for_bit():
    on_workers(keeps_what_is_frozen, 3)


def test_checkpoints_of_earlier_versions_are_read():
    ours, theirs = state(), state()
    ours.example_stats, ours.val_correct = torch.rand(5, 6), torch.ones(3)
    content = files(ours)
    earlier = safetensors.torch.load(content[TENSORS])
    earlier |= {"images": earlier.pop("example_stats"), "val_right": earlier.pop("val_correct")}
    theirs.load_checkpoint({**content, TENSORS: safetensors.torch.save(earlier)})
    assert torch.equal(theirs.example_stats, ours.example_stats)
    assert torch.equal(theirs.val_correct, ours.val_correct)


def test_what_an_optimizer_keeps_beside_tensors_is_refused_not_lost():
    own = state()
    step(own)
    parameter = next(p for p in own.model.parameters() if p in own.optimizer.state)
    own.optimizer.state[parameter]["count"] = 3
    with pytest.raises(TypeError, match="SGD keeps count as int"):
        own.tensors()


def test_the_best_epoch_is_the_first_with_the_highest_validation_accuracy():
    assert Progress(history=[record(1, 0.2), record(2, 0.4), record(3, 0.4)]).best.epoch == 2
    assert Progress(history=[record(1, None)]).best is None


def test_each_stage_trains_its_own_parameters():
    own = state(epochs=3, head_epochs=1)
    trained = {name for name, p in own.model.named_parameters() if p.requires_grad}
    assert trained == set(own.layers[-1])
    own.progress.epoch = 2
    assert own.enter_stage()
    assert all(p.requires_grad for p in own.model.parameters())
    assert not own.enter_stage()


def test_progress_is_json():
    progress = Progress(epoch=2, history=[record(1, float("nan"))])
    assert "NaN" not in progress.to_json().decode()
    assert json.loads(progress.to_json())["history"][0]["val_top1"] is None
