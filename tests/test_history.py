"""A run as its files tell it."""

import numpy as np
import pytest
from histories import made_up

from raycifar.analysis.history import RunHistory, failure_kind
from raycifar.errors import FailureKind


def test_a_column_is_not_a_number_where_nothing_is_known():
    history = made_up(epochs=3, val_gained=lambda e: None if e == 1 else 10 * e)
    assert np.isnan(history.column("val_gained")[0])
    assert history.column("val_gained")[1:].tolist() == [20, 30]
    assert len(RunHistory(history.run, [], None).column("val_top1")) == 0


def test_steps_are_counted_up():
    assert made_up(train=45_000).steps_per_epoch == 352


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        ({"failure": "worker-died", "reason": "the loss is no longer finite"}, FailureKind.OTHER),
        ({"reason": "the loss is no longer finite: epoch 3, step 2. Try a smaller --lr"}, FailureKind.NOT_FINITE),
        ({"reason": "a node can't take part: it has another torch"}, FailureKind.NODE_MISMATCH),
        ({"reason": "its driver died."}, FailureKind.OTHER),
        ({"reason": None}, FailureKind.OTHER),
        ({}, FailureKind.OTHER),
    ],
)
def test_failures_of_earlier_versions_are_told_by_their_reason(result, kind):
    assert failure_kind(result) is kind


def test_only_a_failed_run_has_a_failure():
    assert made_up(result={"status": "finished"}).failure is None
    assert made_up(result=None).failure is None
    assert made_up(result={"status": "failed"}).failure is FailureKind.OTHER
