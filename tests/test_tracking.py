"""Trackers, read back by their own APIs: offline, with the real packages."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from histories import made_up

from raycifar.errors import RequestError
from raycifar.storage.run_folder import MODEL, REPORT_PAGE, RUN, RunFolder
from raycifar.workflows import tracking
from raycifar.workflows.tracking import TRACKING, Tracking

HISTORY = made_up(epochs=4, train_loss=lambda e: 4.0 / e, time=lambda e: 1e9).records
DATA = {"source": "synthetic", "train": 100, "val": 0, "test": 100, "fingerprint": "0"}
CONFIG = {"name": "a", "model": "cnn", "seed": 3, "recipe": {"lr": 0.1}, "data": DATA}
SCORES = {"images": 100, "loss": 2.0, "top1": 0.5, "top5": 0.8, "superclass_top1": 0.6, "ece": 0.1}
RESULT = {"status": "finished", "epochs": 4, "test": SCORES}


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(str(tmp_path / "results"), "a")
    folder.write_json(RUN, CONFIG)
    folder.write(REPORT_PAGE, b"<html>")
    folder.write(MODEL, b"weights")
    return folder


def follow(track, run, history, *, result=None, parent=None):
    """Track a run as a command does; return what was said."""
    said = []
    with Tracking(track, said.append) as tracking:
        if parent:
            tracking.log(parent)
        for count in range(len(history) + 1):
            tracking.log(run, history[:count], parent)
        if result:
            run.write_json("result.json", result)
    return said


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    client = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return client.MlflowClient()


def test_mlflow_has_recipe_epochs_result_and_files_over_a_restart(mlflow, run, tmp_path):
    where = f"mlflow logs to sqlite:///{tmp_path}/mlflow.db, experiment raycifar."
    assert follow("mlflow", run, HISTORY[:2]) == [where]
    (experiment,) = [each for each in mlflow.search_experiments() if each.name == "raycifar"]
    (found,) = mlflow.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name) == ("KILLED", "a")
    assert follow("mlflow", run, HISTORY, result=RESULT) == [where]
    (found,) = mlflow.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params.items() >= {"model": "cnn", "seed": "3", "lr": "0.1", "data.source": "synthetic"}.items()
    points = mlflow.get_metric_history(found.info.run_id, "train_loss")
    assert [(point.step, point.value) for point in points] == [(1, 4.0), (2, 2.0), (3, 4 / 3), (4, 1.0)]
    assert found.data.metrics["test_top1"] == 0.5
    assert {file.path for file in mlflow.list_artifacts(found.info.run_id)} == {RUN, REPORT_PAGE, MODEL}


def test_mlflow_takes_more_parameters_than_in_a_batch(mlflow):
    config = {f"p{number}": number for number in range(230)}
    key = tracking.MLflow().start("a", config, None, None)
    assert mlflow.get_run(key).data.params == {name: str(value) for name, value in config.items()}


def test_the_runs_of_a_comparison_are_children_of_it(mlflow, run, tmp_path):
    comparison = RunFolder(str(tmp_path), "results")
    assert len(follow("mlflow", run, HISTORY, result=RESULT, parent=comparison)) == 1  # where it logs, once
    (experiment,) = [each for each in mlflow.search_experiments() if each.name == "raycifar"]
    runs = {found.info.run_name: found for found in mlflow.search_runs([experiment.experiment_id])}
    assert runs["a"].data.tags["mlflow.parentRunId"] == runs["results"].info.run_id


def test_a_comparison_may_have_the_name_of_a_trial(run, monkeypatch):
    begun = []
    monkeypatch.setitem(
        tracking.TRACKERS, "mlflow", lambda: SimpleNamespace(start=lambda *run: begun.append(run) or "1")
    )
    parent, noted = RunFolder(run.storage, "t"), Tracking("mlflow", pytest.fail)
    trial = RunFolder(parent.location, "t")
    noted._log(parent, [], None)
    noted._log(trial, [], parent)
    assert [parent for *_, parent in begun] == [None, "1"]


def test_wandb_has_recipe_epochs_and_result_over_a_restart(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for history, result in ((HISTORY[:2], None), (HISTORY, RESULT)):
        (where,) = follow("wandb", run, history, result=result)
        assert where.startswith(f"wandb logs to {tmp_path}/")
    identity = run.read_json(TRACKING)["wandb"]["id"]
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{identity}.wandb"))
    assert len(files) == 2  # one for each start, of one run
    points = [point["item"] for file in files for point in records(file, "history")]
    losses = [point["train_loss"] for point in points]
    assert losses == [4.0, 2.0, 4 / 3, 1.0]
    assert [point["_step"] for point in points] == [1, 2, 3, 4]
    (artifact,) = [found for file in files for found in records(file, "artifact")]
    assert {entry["path"] for entry in artifact["manifest"]["contents"]} == {RUN, REPORT_PAGE, MODEL}


def records(file, kind):
    """Return a file's records of a kind, as W&B's own program shows them."""
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", file]
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    return [line[kind] for line in map(json.loads, lines) if line["type"] == kind]


class Broken:
    def start(self, name, config, known, parent):
        return "a"

    def epoch(self, record):
        raise ConnectionError("the server is away")


def test_a_tracker_that_fails_is_given_up_with_one_notice(run, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", Broken)
    said = follow("mlflow", run, HISTORY)
    assert said == ["mlflow is given up, and the run goes on without it: the server is away."]


class Slow(Broken):
    def epoch(self, record):
        time.sleep(30)


def test_a_tracker_that_hangs_delays_nothing(run, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", Slow)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.1)
    began = time.monotonic()
    (said,) = follow("mlflow", run, HISTORY)
    assert time.monotonic() - began < 2
    assert said == "mlflow takes longer than 0.1 s: what is left is not logged there."


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'raycifar\[wandb\]'"):
        tracking.check_tracker("wandb")
