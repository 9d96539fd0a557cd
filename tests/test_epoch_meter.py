"""What is counted of an epoch."""

import json

import numpy as np
import pytest
import torch

from raycifar.engine import epoch_meter
from raycifar.engine.epoch_meter import EpochMeter, EpochTotals
from raycifar.engine.state import Progress
from raycifar.errors import StopTrainingError
from raycifar.storage.schemas import sampled_steps

CPU = torch.device("cpu")
STEPS = torch.tensor([[10, 40.0, 1, 2.0], [10, 30.0, 3, 5.0], [9, 20.0, 4, 3.0]], dtype=torch.float64)


def add(meter, steps):
    for step in steps:
        meter.add(step, STEPS[step])


def test_totals_are_sums_and_the_largest_norm_has_its_step():
    meter = EpochMeter(1, 3, 0, EpochTotals(), CPU)
    add(meter, (0, 1))
    assert meter.running(2)["loss"] == pytest.approx(3.5)
    assert meter.running(2)["top1"] == pytest.approx(0.2)
    add(meter, (2,))
    meter.collect()
    totals = meter.totals
    assert (totals.num_images, totals.loss, totals.num_correct) == (29, 90, 8)
    assert (totals.grad_norm, totals.grad_norm_max, totals.grad_norm_max_step) == (10, 5, 1)
    assert totals.seconds > 0


def test_steps_per_second_leave_out_what_comes_before_the_timing(monkeypatch):
    clock = iter([0.0, 100.0, 101.0, 102.0])
    monkeypatch.setattr(epoch_meter.time, "perf_counter", lambda: next(clock))
    meter = EpochMeter(1, 10, 2, EpochTotals(), CPU)  # begins at 0 s, after two steps of an earlier attempt
    meter.restart_timer(3)
    assert meter.running(4)["steps_per_second"] == 1
    assert meter.running(6)["steps_per_second"] == 1.5


def test_an_epoch_that_is_resumed_counts_as_one_that_is_not():
    whole = EpochMeter(1, 3, 0, EpochTotals(), CPU, sampled=(0, 2))
    add(whole, (0, 1, 2))
    whole.collect()
    assert whole.totals.step_losses == [4.0, 20 / 9]
    first = EpochMeter(1, 3, 0, EpochTotals(), CPU, sampled=(0, 2))
    add(first, (0, 1))
    first.collect()
    first.totals.seconds = 100.0
    rest = EpochMeter(1, 3, 2, EpochTotals(**json.loads(json.dumps(vars(first.totals)))), CPU, sampled=(0, 2))
    add(rest, (2,))
    rest.collect()
    assert rest.totals.seconds > 100
    rest.totals.seconds = whole.totals.seconds
    assert rest.totals == whole.totals


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (8, 3), (352, 200), (7, 999), (90_000, 3)])
def test_the_sampled_steps_are_evenly_spaced_over_the_whole_run_and_at_most_2000(steps, epochs):
    taken = [
        (epoch - 1) * steps + step for epoch in range(1, epochs + 1) for step in sampled_steps(epoch, steps, epochs)
    ]
    assert 1 <= len(taken) <= 2000
    assert taken[0] == 0
    assert len(set(np.diff(taken))) <= 1
    assert steps * epochs > 2000 or len(taken) == steps * epochs


def test_a_gradient_that_is_not_finite_is_named_by_its_step():
    meter = EpochMeter(4, 3, 0, EpochTotals(), CPU)
    meter.add(1, torch.tensor([10, 1.0, 1, torch.nan], dtype=torch.float64))
    with pytest.raises(StopTrainingError, match="epoch 4, step 2") as raised:
        meter.collect()
    assert raised.value.kind == "not-finite"


def test_progress_of_earlier_versions_is_read():
    old = {"epoch": 2, "segments": [{"world_size": 1, "steps": 4}], "sums": [20.0, 60.0, 3.0], "norms": [8.0, 3.0, 2.0]}
    old |= {"restarts": 1, "seconds": 7.5, "history": []}
    progress = Progress.from_json(json.dumps(old).encode())
    assert progress.totals == EpochTotals(20, 60, 3, 8, 3, 2, 7.5)
    assert (progress.epoch, progress.step, progress.restarts) == (2, 4, 1)
    assert Progress.from_json(progress.to_json()) == progress
