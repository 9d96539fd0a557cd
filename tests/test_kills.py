"""A process of a run is killed at a random moment: see `kills`, which does it by the dozen."""

import pytest
from kills import kill_runs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("workers", "targets"), [(0, ["driver"]), (1, ["driver", "worker", "controller", "raylet", "gcs"])]
)
def test_a_run_that_is_killed_ends_as_if_nothing_had_happened(tmp_path, small, workers, targets):
    options = ["--workers", str(workers), "--data", small]
    outcomes = list(kill_runs(tmp_path, options, targets, max(3, len(targets)), seed=0))
    for outcome in outcomes:
        print(outcome)
    assert all(outcome.equal for outcome in outcomes)
    assert not any(outcome.left for outcome in outcomes)
    assert None not in [code for outcome in outcomes for code in outcome.codes]
