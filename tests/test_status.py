"""What the processes of a run tell each other: whole, typed, and tolerant of keys of another version."""

import uuid

import pytest

from raycifar.cluster.status import (
    Failure,
    FailureCause,
    ModelFacts,
    PartStatus,
    Phase,
    StatusStore,
    StepStatus,
    WorkerStatus,
)
from raycifar.engine.reporter import Gauges, Reporter
from raycifar.storage.schemas import EpochRecord, checked

STEP = {"epoch": 2, "step": 3, "steps": 10, "lr": 0.1, "loss": 2.5, "top1": 0.25}
STEP |= {"images_per_second": 1000.0, "seconds_of_epoch": 2.0, "seconds_left": 18.0}
MODEL = {"parameters": 1000, "device": "cpu", "threads": 2, "precision": "bfloat16"}
RECORD = {"epoch": 1, "train_loss": 3.0, "train_top1": 0.2, "lr": 0.1, "images_per_second": 900.0}
RECORD |= {"seconds": 5.0, "workers": 1}


@pytest.fixture
def reporter(store):
    return Reporter(store, Gauges("a", "cnn"), leader=True)


def test_what_is_put_comes_back_the_same(store):
    status = WorkerStatus(
        attempt=7,
        phase=Phase.TIMING,
        detail="round 1 of 2",
        notices=["Note."],
        step=StepStatus(**STEP),
        part=PartStatus(what="validating", done=2400, total=5000),
        model=ModelFacts(**MODEL),
        nodes=[None, "abc"],
    )
    failures = [Failure(FailureCause.WORKER, "out of memory", [1]), Failure(FailureCause.DRIVER, "it died")]
    assert store.worker() is None
    assert store.history() == []
    store.put_worker(status)
    store.put_history([EpochRecord(**RECORD)])
    for failure in failures:
        store.add_failure(failure)
    assert store.worker() == status
    assert store.history() == [EpochRecord(**RECORD)]
    assert store.failures() == failures
    assert StatusStore(uuid.uuid4().hex).failures() == []


def test_what_is_deleted_is_gone_and_nothing_else(store):
    other = StatusStore()
    for each in (store, other):
        each.put_worker(WorkerStatus(attempt=7))
        each.put_stop_decision(3, stop=True)
    store.delete()
    assert (store.worker(), store.stop_decision(3)) == (None, None)
    assert (other.worker(), other.stop_decision(3)) == (WorkerStatus(attempt=7), True)
    other.delete()


def test_keys_of_another_version_are_ignored():
    values = {"phase": "training", "step": {**STEP, "temperature": 1}, "mood": 1}
    assert checked(WorkerStatus, values) == WorkerStatus(phase=Phase.TRAINING, step=StepStatus(**STEP))


def test_a_decision_to_stop_is_of_its_epoch_and_a_request_to_stop_stays(store):
    store.put_stop_decision(3, stop=False)
    assert store.stop_decision(3) is False
    assert store.stop_decision(9) is None
    assert not store.stop_requested()
    store.request_stop()
    assert store.stop_requested()


def test_the_reporter_tells_all_that_it_was_told_so_far(store, reporter):
    reporter.put(model=ModelFacts(**MODEL))
    reporter.notice("One.")
    reporter.notice("Two.")
    reporter.phase(Phase.TRAINING)
    reporter.step(**STEP)
    told = store.worker()
    assert told.attempt
    assert told.notices == ["One.", "Two."]
    assert told.doing == "training"
    assert told.step == StepStatus(**STEP)
    assert told.model == ModelFacts(**MODEL)
    reporter.part("validating", 2400, 5000)
    assert str(store.worker().part) == "validating 2,400 of 5,000"
    reporter.put(step=None, part=None)
    assert store.worker().part is None
    reporter.history([EpochRecord(**RECORD)])
    assert store.worker().step is None
    assert store.history() == [EpochRecord(**RECORD)]


def test_after_a_report_none_is_due_for_a_while(reporter):
    assert reporter.due()
    assert not reporter.due()
    reporter.reported -= 1
    assert reporter.due()


def test_only_the_leader_speaks_and_looks(store):
    other = Reporter(store, Gauges("a", "cnn"), leader=False)
    other.phase(Phase.TRAINING)
    other.put(step=None, part=None)
    store.request_stop()
    assert store.worker() is None
    assert not other.due()
    assert not other.stop_requested()


def test_the_store_is_asked_for_a_stop_twice_a_second_at_most(store, reporter, monkeypatch):
    looks = []
    monkeypatch.setattr(StatusStore, "stop_requested", lambda self: looks.append(1) or False)
    for _ in range(1000):
        assert not reporter.stop_requested()
    assert len(looks) <= 2
    monkeypatch.undo()
    store.request_stop()
    reporter.checked = 0.0
    assert reporter.stop_requested()
