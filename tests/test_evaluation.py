"""`raycifar evaluate`: the scores of a run's own test set, to the last image, in one process and on Ray."""

import json
import os
import re
import shutil
import signal

import pyarrow.parquet as pq
import pytest
from command import Command, finish
from conftest import ps, wait_until


class Evaluate(Command):
    command = "raycifar.evaluate"


@pytest.fixture
def evaluate(tmp_path):
    def run(*args, env=None):
        return finish(Evaluate(*args, storage=None, env=env, cwd=tmp_path))

    return run


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_scores_are_the_run_s_own(trained, evaluate, small, cluster, tmp_path, workers):
    shutil.copytree(trained, tmp_path / "a")
    before = pq.read_table(tmp_path / "a/predictions.parquet")
    (tmp_path / "a/predictions.parquet").unlink()
    done = evaluate(tmp_path / "a", "--data", small, "--workers", workers, env=cluster)
    assert "300 images: top-1 " in done.stdout
    assert not done.stderr  # no line of Ray's
    test = json.loads((tmp_path / "a/result.json").read_text())["test"]
    found = json.loads((tmp_path / "a/evaluation.json").read_text())
    assert {key: found[key] for key in test} == pytest.approx(test, abs=1e-6)
    assert found["low"] < found["top1"] < found["high"]
    assert len(found["classes"]) == 100
    after = pq.read_table(tmp_path / "a/predictions.parquet")
    assert after["label"] == before["label"]
    assert [row[0] for row in after["top5"].to_pylist()] == [row[0] for row in before["top5"].to_pylist()]


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_nothing_is_seen_of_it(trained, small, cluster, tmp_path):
    shutil.copytree(trained, tmp_path / "a")
    command = Evaluate(tmp_path / "a", "--data", small, "--workers", 1, storage=None, env=cluster, cwd=tmp_path)
    worker = wait_until(lambda: [line for line in ps() if "ray::MapWorker" in line], 60, "a worker")[0]
    os.kill(int(worker.split()[0]), signal.SIGKILL)
    done = finish(command)
    assert "300 images: top-1 " in done.stdout
    assert not done.stderr


def test_the_page_needs_nothing_from_anywhere(trained, evaluate, small, tmp_path):
    evaluate(trained, "--data", small, "--workers", 0, "--out", tmp_path / "out")
    page = (tmp_path / "out/evaluation.html").read_text()
    assert len(re.findall(r'<svg role="img" aria-label="[^"]+"', page)) == 3
    ids = re.findall(r' id="([^"]+)"', page)
    assert not {name for name in ids if ids.count(name) > 1 and f"#{name}" in page}
    assert not re.search(r'<script(?!>for)|<link(?! rel="icon" href="data:)|(?:src|href)="(?!data:|#)', page)
    top1 = json.loads((tmp_path / "out/evaluation.json").read_text())["top1"]
    assert f"<b>{top1:.4f}</b>" in page
    for name in ("aquarium fish", "wolf"):
        assert f"<td>{name}</td>" in page


def test_another_data_set_leaves_the_run_as_it_was(trained, evaluate, small, tmp_path):
    shutil.copytree(trained, tmp_path / "a")
    before = (tmp_path / "a/predictions.parquet").read_bytes()
    evaluate(tmp_path / "a", "--data", small, "--split", "train", "--workers", 0)
    assert (tmp_path / "a/predictions.parquet").read_bytes() == before
    found = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    assert found["images"] == 800
    assert found["split"] == "train"
    evaluate(tmp_path / "a/best.safetensors", "--data", small, "--workers", 0, "--out", tmp_path / "elsewhere")
    assert json.loads((tmp_path / "elsewhere/evaluation.json").read_text())["images"] == 300


def test_a_run_is_evaluated_on_its_own_images_without_being_told_where_they_are(trained, evaluate, tmp_path):
    nowhere = {"RAYCIFAR_DATA": "", "RAYCIFAR_CACHE": str(tmp_path / "empty")}
    evaluate(trained, "--workers", 0, "--out", tmp_path / "out", env=nowhere)
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert found["images"] == 300
    shutil.copytree(trained, tmp_path / "a")
    run = json.loads((tmp_path / "a/run.json").read_text())
    run["data"]["source"] = str(tmp_path / "gone.tar.gz")
    (tmp_path / "a/run.json").write_text(json.dumps(run))
    refused = finish(Evaluate(tmp_path / "a", "--workers", 0, storage=None, env=nowhere, cwd=tmp_path), 2)
    assert "gone.tar.gz: give --data" in refused.stderr
