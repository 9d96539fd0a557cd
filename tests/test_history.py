"""A run as its files tell it."""

import numpy as np
import pytest
from histories import made_up

from raycifar.analysis.history import RunHistory


def test_a_column_is_not_a_number_where_nothing_is_known():
    history = made_up(epochs=3, val_gained=lambda e: None if e == 1 else 10 * e)
    assert np.isnan(history.column("val_gained")[0])
    assert history.column("val_gained")[1:].tolist() == [20, 30]
    assert len(RunHistory(history.run, [], None).column("val_top1")) == 0


def test_steps_are_counted_up():
    assert made_up(train=45_000).steps_per_epoch == 352


@pytest.mark.parametrize(
    ("status", "epochs", "cut_short", "unfinished"),
    [
        (None, 5, True, True),
        ("failed", 5, True, True),
        ("stopped", 5, True, False),  # no command continues what a search stopped
        ("finished", 20, False, False),
        (None, 20, False, False),
    ],
)
def test_a_run_that_a_search_stopped_is_cut_short_and_yet_not_continued(status, epochs, cut_short, unfinished):
    history = made_up(epochs, result=status and {"status": status}, recipe={"epochs": 20})
    assert (history.cut_short, history.unfinished) == (cut_short, unfinished)
    assert history.stopped_by_search == (status == "stopped")


@pytest.mark.parametrize(
    ("result", "became_not_finite"),
    [
        ({"failure": "not-finite", "reason": None}, True),
        ({"failure": "worker-died", "reason": "the loss is no longer finite"}, False),
        ({"reason": "the loss is no longer finite: epoch 3, step 2. Try a smaller --lr"}, True),
        ({"reason": "a node can't take part: it has another torch"}, False),
        ({"reason": None}, False),
        ({}, False),
    ],
)
def test_failures_of_earlier_versions_are_told_by_their_reason(result, became_not_finite):
    assert made_up(result={"status": "failed", **result}).became_not_finite is became_not_finite


def test_only_a_failed_run_has_become_not_finite():
    assert not made_up(result={"status": "finished", "reason": "no longer finite"}).became_not_finite
    assert not made_up(result=None).became_not_finite
