"""What Ray Train's controller does when workers fail: decided by the kind of the failure, not by its wording."""

import errno
import pickle
import uuid

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RpcError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.controller.state import ReschedulingState

from raycifar.cluster import failures as room
from raycifar.cluster import waiting, watch
from raycifar.cluster.failures import FailureCounter, StartFailureCounter, decisive
from raycifar.cluster.sizing import Workers
from raycifar.cluster.status import FailureCause, PartStatus, Phase, StatusStore, WorkerStatus
from raycifar.errors import PreemptedError, StorageError, WorkError

FULL = StorageError.of("/runs/a", OSError(errno.ENOSPC, "No space left on device"))
SLOW = StorageError.of("/runs/a", OSError(errno.ETIMEDOUT, "Connection timed out"))
DIED = WorkerHealthCheckFailedError("A worker health check failed.", failure=RayActorError())


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(room, "DRIVER_DEATH_SECONDS", 0)
    monkeypatch.setattr(room, "NODE_DEATH_SECONDS", 0)
    return StatusStore(uuid.uuid4().hex)


@pytest.fixture
def alive(monkeypatch):
    """The nodes that Ray holds for alive."""
    nodes = {"a", "b"}
    monkeypatch.setattr(room.ray, "nodes", lambda: [{"NodeID": node, "Alive": True} for node in nodes])
    return nodes


def fail(counter, store, attempt, **errors):
    """Let workers fail in an attempt; the names are rank0, rank1 and so on."""
    part = PartStatus(what="validating", done=1, total=2)
    store.put_worker(WorkerStatus(attempt=attempt, phase=Phase.TRAINING, nodes=["a", "b"], part=part))
    counter.after_exception(None, {int(name.removeprefix("rank")): error for name, error in errors.items()})


def test_failures_are_told_and_counted(store, alive):
    counter = FailureCounter(store, 1)
    fail(counter, store, 1, rank1=DIED)
    assert [failure.cause for failure in store.failures()] == [FailureCause.WORKER]
    assert store.failures()[0].ranks == [1]
    assert store.worker() == WorkerStatus(attempt=1, nodes=["a", "b"])
    with pytest.raises(WorkError, match="on worker 0, the loss"):
        fail(counter, store, 2, rank0=RuntimeError("the loss has no gradient"))


def test_one_failure_is_counted_once_however_often_ray_train_looks(store, alive, monkeypatch):
    monkeypatch.setattr(room, "NODE_DEATH_SECONDS", 15)
    counter = FailureCounter(store, 1)
    for _ in range(3):
        fail(counter, store, 1, rank0=DIED)
    assert len(store.failures()) == 1


def test_the_same_failure_counts_again_later_though_no_worker_has_reported_in_between(store, alive):
    counter = FailureCounter(store, 1)
    fail(counter, store, 1, rank0=DIED)
    with pytest.raises(WorkError, match="on worker 0"):
        fail(counter, store, 1, rank0=DIED)


def test_workers_that_die_while_they_start_are_counted_too(store, alive):
    counter = StartFailureCounter(store, 1)
    counter.on_controller_start_worker_group(num_workers=1)
    failed = WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize.")
    failed.__cause__ = RayActorError()
    for error in (WorkerGroupStartupTimeoutError(1), failed):  # the first is that of an elastic run without room
        state = ReschedulingState(ControllerError(error))
        for previous in (None, state):  # Ray sets it again while there is no room
            counter.after_controller_state_update(previous, state)
    assert [str(failure) for failure in store.failures()] == [
        "A worker that was starting failed (The actor experienced an error before finishing this task); the workers "
        "are restarted from the last checkpoint."
    ]
    with pytest.raises(WorkError, match="a worker died while it started: The actor experienced"):
        counter.after_controller_state_update(None, ReschedulingState(ControllerError(failed)))
    alive.remove("b")
    counter.after_controller_state_update(None, ReschedulingState(ControllerError(failed)))


def test_a_failure_under_which_a_node_died_is_not_counted(store, alive):
    counter = FailureCounter(store, 0)
    alive.remove("b")
    fail(counter, store, 1, rank1=DIED)
    assert len(store.failures()) == 1


def test_a_preempted_run_goes_on_and_nothing_is_counted(store, alive):
    counter = FailureCounter(store, 0)
    fail(counter, store, 1, rank0=PreemptedError(), rank1=PreemptedError("in any words"))
    assert [failure.cause for failure in store.failures()] == [FailureCause.PREEMPTED]
    assert "the run continues elsewhere from a new checkpoint" in str(store.failures()[0])


def test_a_disk_that_is_full_ends_the_run_at_once_and_a_storage_that_is_slow_does_not(store, alive):
    counter = FailureCounter(store, 3)
    fail(counter, store, 1, rank0=SLOW)
    assert [failure.cause for failure in store.failures()] == [FailureCause.WORKER]
    with pytest.raises(WorkError, match="on worker 0, /runs/a can't be written: No space left on device"):
        fail(counter, store, 2, rank0=FULL)


def test_what_a_worker_says_of_itself_comes_before_what_the_others_died_of():
    assert decisive({0: DIED, 1: PreemptedError()})[:2] == (1, FailureCause.PREEMPTED)
    assert decisive({0: DIED, 1: FULL, 2: PreemptedError()})[:2] == (1, FailureCause.STORAGE)
    assert decisive({3: RuntimeError("y"), 2: DIED})[:2] == (2, FailureCause.WORKER)


@pytest.mark.parametrize("error", [FULL, PreemptedError(), DIED])
def test_the_kind_survives_the_way_from_the_worker(error):
    assert room.classify(pickle.loads(pickle.dumps(error)))[0] == room.classify(error)[0]


def test_workers_start_again_once_memory_is_free_below_ray_s_limit(store, alive, monkeypatch):
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.5")
    told, used = [], iter([0.6, 0.45, 0.39])
    monkeypatch.setattr(room.ray_internals, "memory_used", lambda: next(used))
    monkeypatch.setattr(room.time, "sleep", lambda seconds: told.append(store.worker().detail))
    fail(FailureCounter(store, 1), store, 1, rank0=OutOfMemoryError("killed"))
    assert [detail for detail in told if detail] == [
        "once memory is free: 60% is in use",
        "once memory is free: 45% is in use",
    ]
    assert store.failures()[0].cause == FailureCause.MEMORY
    with pytest.raises(WorkError, match="fewer workers or more memory help"):
        fail(FailureCounter(store, 1), store, 2, rank0=OutOfMemoryError("killed"))


def test_a_run_that_waits_for_room_asks_again_where_ray_does_not_answer(monkeypatch):
    slept, answers = [], iter([RpcError("deadline exceeded"), RpcError("deadline exceeded"), "no room"])

    def lacking(workers):
        if isinstance(answer := next(answers), RpcError):
            raise answer
        return answer

    monkeypatch.setattr(waiting, "lacking", lacking)
    monkeypatch.setattr(watch.ray_internals, "control_service", lambda: ("GCS", ("127.0.0.1", 1)))
    monkeypatch.setattr(watch, "listens", lambda address: True)
    monkeypatch.setattr(watch.time, "sleep", slept.append)
    assert waiting.Waiting(Workers(1, 1), 5)() == "no room; for at most 5 s (--wait)"
    assert slept == [watch.RETRY_SECONDS] * 2
