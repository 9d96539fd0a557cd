"""When a run looks whether it is to be left."""

import pytest

import raycifar.engine.interruption as interruption
from raycifar.engine.interruption import Interruption, InterruptionWatch


class FakeReporter:
    stop = False

    def stop_requested(self):
        return self.stop


@pytest.fixture
def ray_train(monkeypatch):
    """One worker of Ray Train's, whose node may be announced to go."""
    looks = []

    class Train:
        preempted = None

        def broadcast(self, value):
            looks.append(value)
            return value

    train = Train()
    monkeypatch.setattr(interruption.ray.train.collective, "broadcast_from_rank_zero", train.broadcast)
    monkeypatch.setattr(interruption.ray.train, "get_preemption_info", lambda: train.preempted)
    train.looks = looks
    return train


def test_in_one_process_a_request_to_stop_is_seen_after_the_next_step():
    reporter = FakeReporter()
    watch = InterruptionWatch(reporter, in_process=True)
    assert watch.look() is None
    reporter.stop = True
    assert watch.look() is Interruption.STOP


def test_workers_look_every_two_seconds_not_after_each_step(ray_train, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(interruption.time, "perf_counter", lambda: now[0])
    watch = InterruptionWatch(FakeReporter(), in_process=False)
    for _ in range(1000):
        now[0] += 0.01  # 100 steps a second, so 10 s
        assert watch.look() is None
    assert 5 <= len(ray_train.looks) <= 7


def test_a_request_to_stop_comes_before_a_preemption(ray_train):
    reporter = FakeReporter()
    ray_train.preempted = object()
    watch = InterruptionWatch(reporter, in_process=False)
    assert [watch.look() for _ in range(2)] == [None, Interruption.PREEMPTION]
    reporter.stop = True
    watch.next_look = 0
    assert watch.look() is Interruption.STOP
