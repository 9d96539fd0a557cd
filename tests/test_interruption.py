"""When a run is interrupted."""

from types import SimpleNamespace

import pytest

import raycifar.engine.interruption as interruption
from raycifar.engine.interruption import Interruption, InterruptionWatch
from raycifar.engine.train_loop import TrainWorker
from raycifar.errors import PreemptedError


class FakeReporter:
    stop = False

    def stop_requested(self):
        return self.stop


@pytest.fixture
def ray_train(monkeypatch):
    """One worker of Ray Train's, whose node may be announced to go."""
    checks = []

    class Train:
        preempted = None

        def broadcast(self, value):
            checks.append(value)
            return value

    train = Train()
    monkeypatch.setattr(interruption.ray.train.collective, "broadcast_from_rank_zero", train.broadcast)
    monkeypatch.setattr(interruption.ray.train, "get_preemption_info", lambda: train.preempted)
    train.checks = checks
    return train


def test_in_one_process_a_request_to_stop_is_seen_after_the_next_step():
    reporter = FakeReporter()
    watch = InterruptionWatch(reporter, in_process=True)
    assert watch.check() is None
    reporter.stop = True
    assert watch.check() is Interruption.STOP


def test_workers_look_every_two_seconds_not_after_each_step(ray_train, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(interruption.time, "perf_counter", lambda: now[0])
    watch = InterruptionWatch(FakeReporter(), in_process=False)
    for _ in range(1000):
        now[0] += 0.01  # 100 steps a second, so 10 s
        assert watch.check() is None
    assert 5 <= len(ray_train.checks) <= 7


def test_a_request_to_stop_comes_before_a_preemption(ray_train):
    reporter = FakeReporter()
    ray_train.preempted = object()
    watch = InterruptionWatch(reporter, in_process=False)
    assert [watch.check() for _ in range(2)] == [None, Interruption.PREEMPTION]
    reporter.stop = True
    watch.next_check = 0
    assert watch.check() is Interruption.STOP


def test_all_workers_leave_a_node_that_is_preempted_once_the_checkpoint_is_stored(monkeypatch):
    """Ray ends all workers as soon as one of them has raised, also the one that still writes."""
    done = []
    monkeypatch.setattr(interruption.ray.train.collective, "barrier", lambda: done.append("met"))
    waits = SimpleNamespace(wait=lambda: done.append("stored"))
    worker = SimpleNamespace(checkpointer=waits, reporter=SimpleNamespace(phase=lambda *args: None))
    with pytest.raises(PreemptedError):
        TrainWorker.prepare_to_leave(worker, Interruption.PREEMPTION)
    assert done == ["stored", "met"]
    TrainWorker.prepare_to_leave(worker, Interruption.STOP)
    assert done == ["stored", "met", "stored"]
