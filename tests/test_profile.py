"""`--profile`: a trace and a table for each worker, and the same weights as without."""

import gzip
import json

import pytest
from conftest import RUN

from raycifar.storage.run_folder import MODEL

STEPS = [f"ProfilerStep#{step}" for step in range(7, 15)]  # 5 are waited for, 2 warm up


def traced(folder, rank):
    """Return the names of the traced steps of a worker."""
    trace = json.loads(gzip.decompress((folder / f"profile/worker{rank}.pt.trace.json.gz").read_bytes()))
    assert any(event["name"] == "aten::convolution" for event in trace["traceEvents"])
    return [event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep")]


def test_a_profiled_run_has_the_weights_of_any_other_and_says_what_takes_longest(trained, train, small, tmp_path):
    args = (*RUN, "--workers", 0, "--data", small, "--name", "a", "--no-report", "--profile")
    done = train(*args)
    assert done.stderr == ""
    assert (trained / MODEL).read_bytes() == (tmp_path / "runs/a" / MODEL).read_bytes()
    assert traced(tmp_path / "runs/a", 0) == STEPS
    table = (tmp_path / "runs/a/profile/worker0.txt").read_text()
    assert table.startswith("8 steps of ")
    assert "aten::convolution_backward" in table
    assert table in done.stdout
    assert max(map(len, table.splitlines())) <= 100


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_each_worker_has_a_trace(train, small, cluster, tmp_path, workers):
    train(*RUN, "--workers", workers, "--data", small, "--name", "a", "--no-report", "--profile", env=cluster)
    assert [traced(tmp_path / "runs/a", rank) for rank in range(workers)] == [STEPS] * workers


def test_a_run_of_too_few_steps_says_so(train, small, tmp_path):
    args = ("--model", "cnn", "--limit", 200, "--val-size", 0, "--batch-size", 20, "--epochs", 1, "--workers", 0)
    done = train(*args, "--data", small, "--name", "a", "--no-report", "--profile")
    assert "Nothing is traced: --profile needs 15 steps in one go." in done.stdout
    assert not (tmp_path / "runs/a/profile").exists()
