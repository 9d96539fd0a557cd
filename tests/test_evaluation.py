"""`raycifar evaluate`: the scores of a run's own test set, to the last image, in one process and on Ray."""

import json
import os
import pickle
import re
import shutil
import signal
from contextlib import ExitStack

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command import Evaluate, finish
from conftest import RUN, ps, wait_until, write_archive

from raycifar import evaluate as command
from raycifar.cluster.sizing import Workers
from raycifar.data import CIFAR100
from raycifar.data.corruptions import find_corruptions
from raycifar.data.dataset import Source, split_rows, to_table
from raycifar.data.sources import load
from raycifar.data.synthetic import synthetic
from raycifar.data.trees import RECORD
from raycifar.errors import RequestError
from raycifar.storage.run_folder import RunFolder
from raycifar.terminal import Screen
from raycifar.terminal_tables import evaluation_table
from raycifar.workflows import evaluation
from raycifar.workflows.duplicates import find_duplicates
from raycifar.workflows.evaluation import EvaluationRequest
from raycifar.workflows.reporting import load_images


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
    assert found["intervals"]["top1"] == {"low": found["low"], "high": found["high"]}
    for name in ("top1", "loss"):
        assert found["intervals"][name]["low"] < found[name] < found["intervals"][name]["high"]
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
    best = tmp_path / "a/best.safetensors"
    refused = finish(Evaluate(best, "--data", small, "--workers", 0, storage=None, cwd=tmp_path), 2).stderr
    what = f"{tmp_path}/evaluation holds the evaluation of {tmp_path}/a on the train images of {small}"
    assert f"{what}: give another --out." in refused
    assert json.loads((tmp_path / "evaluation/evaluation.json").read_text()) == found
    evaluate("a/", "--data", small, "--split", "train", "--workers", 0)  # the same again
    evaluate(best, "--data", small, "--workers", 0, "--out", tmp_path / "elsewhere")
    assert json.loads((tmp_path / "elsewhere/evaluation.json").read_text())["images"] == 300


def test_an_evaluation_by_an_earlier_version_may_be_repeated(tmp_path, monkeypatch):
    """It wrote the network and the data as they were given."""
    monkeypatch.chdir(tmp_path)
    out, request = RunFolder.for_output("evaluation"), EvaluationRequest("runs/a", data="./c")
    out.write_json("evaluation.json", {"network": "runs/a", "data": "c", "split": "test"})
    evaluation.check_replaces_no_other(out, evaluation.identify(request, "./c"))
    with pytest.raises(RequestError, match="holds the evaluation of runs/a on the test images of c: give another"):
        evaluation.check_replaces_no_other(out, evaluation.identify(request, "synthetic"))


def test_only_a_run_s_own_test_set_is_scored_into_its_folder(trained, evaluate, small, tmp_path):
    for name in "ab":
        shutil.copytree(trained, tmp_path / name)
    before = (tmp_path / "a/predictions.parquet").read_bytes()
    for network, more in (("b", ()), ("a", ("--split", "train"))):
        request = EvaluationRequest(
            str(tmp_path / network),
            data=str(small),
            split="train" if more else "test",
            count=0,
            out=str(tmp_path / "a"),
        )
        with pytest.raises(RequestError, match=r"--out"):
            evaluation.evaluate(request, Screen(quiet=True), ExitStack())
    assert (tmp_path / "a/predictions.parquet").read_bytes() == before


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


def evaluate_here(network, data, out):
    """Evaluate in this process, and return the content of evaluation.json and the page."""
    request = EvaluationRequest(str(network), data=str(data), count=0, out=str(out))
    with ExitStack() as connection:
        evaluation.evaluate(request, Screen(quiet=True), connection)
    return json.loads((out / "evaluation.json").read_text()), (out / "evaluation.html").read_text()


def test_a_page_that_can_not_be_drawn_leaves_no_file(trained, small, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "to_page", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_here(trained, small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Near duplicates in both sets -----------------------------------------------------------------------

PLANTED = 60  # the first test images are the first training images


@pytest.fixture
def leaking(small_files, tmp_path, monkeypatch):
    """A data set of whose test images some are training images, and a cache that knows."""
    monkeypatch.setenv("RAYCIFAR_CACHE", str(tmp_path / "cache"))
    train, test = (small_files[name] for name in ("train.bin", "test.bin"))
    files = {"train.bin": train, "test.bin": train[: PLANTED * RECORD] + test[PLANTED * RECORD :]}
    path = write_archive(tmp_path / "leaking.tar.gz", files)
    find_duplicates(load(path), Screen(quiet=True))
    return path


def test_near_duplicates_of_the_run_s_training_images_are_left_out(leaking, train, tmp_path):
    train(*RUN, "--epochs", 1, "--workers", 0, "--data", leaking, "--name", "a", "--no-report")
    folder = tmp_path / "runs/a"
    test = json.loads((folder / "result.json").read_text())["test"]
    predictions = pq.read_table(folder / "predictions.parquet")
    marked = predictions["near_duplicate"].to_numpy() == 1
    trained, _ = split_rows(load(leaking), 100, 200, 0)
    assert np.array_equal(marked[:PLANTED], np.isin(np.arange(PLANTED), trained))
    assert 5 < test["near_duplicates"] == marked.sum() < 40
    correct = np.array([row[0] for row in predictions["top5"].to_pylist()]) == predictions["label"].to_numpy()
    assert test["top1_without_near_duplicates"] == pytest.approx(correct[~marked].mean())

    found, page = evaluate_here(folder, leaking, tmp_path / "out")
    assert {key: found[key] for key in test} == pytest.approx(test, abs=1e-6)
    ends = found["intervals"]["top1_without_near_duplicates"]
    assert ends["low"] <= found["top1_without_near_duplicates"] <= ends["high"]
    assert f"without near duplicates of training images ({300 - marked.sum()} left)" in page


def test_a_data_set_whose_pairs_are_not_known_is_scored_as_ever(trained):
    test = json.loads((trained / "result.json").read_text())["test"]
    assert "near_duplicates" not in test
    assert "near_duplicate" not in pq.read_schema(trained / "predictions.parquet").names


# Other test sets ------------------------------------------------------------------------------------


def test_a_test_set_may_lack_classes():
    pixels, fine = np.zeros((2, *CIFAR100.image_shape), np.uint8), np.array([3, 7])
    table = to_table(pixels, {"fine": fine}, "few")
    source = Source("few", table[:0], table)
    assert source.superclass_of() == CIFAR100.superclass_of
    evaluated, _ = evaluation.score_predictions(torch.eye(100)[[4, 8]], table, source)
    assert {*evaluation_table(evaluated).columns[0].cells} == {"bear", "beetle"}
    page = evaluation.to_page({"network": "a", "data": "few", "split": "test", **evaluated}, "a")
    assert page.index("<td>bear</td>") < page.index("<td>apple</td>")


def test_the_table_has_the_hardest_classes_also_where_none_are_confused():
    table = to_table(np.zeros((2, *CIFAR100.image_shape), np.uint8), {"fine": np.array([3, 7])}, "few")
    evaluated, _ = evaluation.score_predictions(torch.eye(100)[[3, 7]], table, Source("few", table[:0], table))
    hardest, recall, easiest, *_, confused, _ = (list(column.cells) for column in evaluation_table(evaluated).columns)
    assert (hardest, recall, easiest) == (["bear", "beetle"], ["1.00"] * 2, ["beetle", "bear"])
    assert confused == ["", ""]


def test_of_synthetic_images_the_page_says_that_they_are():
    source = synthetic(100, 100)
    evaluated, _ = evaluation.score_predictions(torch.eye(100), source.test, source)
    page = evaluation.to_page({"network": "a", "data": source.name, "split": "test", **evaluated}, "a")
    assert source.name == "synthetic:100"
    assert "These images are synthetic, so the accuracy says nothing about CIFAR-100." in page


@pytest.mark.parametrize("default", ["", "nowhere.tar.gz"])
def test_why_the_images_of_a_run_cannot_be_read_is_said(default, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYCIFAR_CACHE", str(tmp_path / "file/cache"))
    monkeypatch.setenv("RAYCIFAR_DATA", default)
    with pytest.raises(
        RequestError, match=r"no longer at cifar100: give --data\. CIFAR-100 can't be kept in"
    ) as caught:
        load_images({"data": {"source": "cifar100"}}, None)
    assert isinstance(caught.value.__cause__, RequestError)


def write_pickle(path, arrays):
    images, fine, coarse = arrays["test"]
    labels = {"fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
    path.write_bytes(pickle.dumps({"data": images.reshape(len(images), -1), **labels}))


def test_a_test_set_alone_is_scored_like_the_same_images_beside_training_images(trained, small_arrays, tmp_path):
    write_pickle(tmp_path / "test", small_arrays)
    found, _ = evaluate_here(trained, tmp_path / "test", tmp_path / "out")
    test = json.loads((trained / "result.json").read_text())["test"]
    assert {key: found[key] for key in test} == pytest.approx(test, abs=1e-6)
    assert found["findings"] == []


def test_labels_in_another_order_than_the_run_s_are_told_of_any_data(trained, small_arrays, tmp_path):
    shutil.copytree(trained, tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    rows[-1]["val_top1"] = 0.9  # as if it had learned something
    (tmp_path / "a/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images, fine, coarse = small_arrays["test"]
    write_pickle(tmp_path / "test", {"test": (images, (fine + 1) % 100, coarse)})
    found, page = evaluate_here(tmp_path / "a", tmp_path / "test", tmp_path / "out")
    assert [finding["kind"] for finding in found["findings"]] == ["test-differs"]
    assert "which sampling can&#39;t explain" in page


def write_corruptions(folder, arrays, count=20, **changes):
    """Write a small CIFAR-100-C: darker and darker images, and images with more and more noise."""
    folder.mkdir()
    images, fine = (values[:count] for values in arrays["test"][:2])
    images, rng = images.transpose(0, 2, 3, 1).astype(float), np.random.default_rng(0)
    made = {
        "contrast": [images * (1 - 0.19 * k) for k in range(5)],
        "saturate": [images] * 5,
        "gaussian_noise": [images + 20 * k * rng.standard_normal(images.shape) for k in range(5)],
    }
    files = {name: np.concatenate(each).clip(0, 255).astype(np.uint8) for name, each in made.items()}
    for name, array in {**files, "labels": np.tile(fine, 5), **changes}.items():
        np.save(folder / f"{name}.npy", array)


def test_corrupted_images_are_scored_by_corruption_and_severity(trained, evaluate, small_arrays, tmp_path):
    write_corruptions(tmp_path / "CIFAR-100-C", small_arrays)
    over = EvaluationRequest(network=str(trained), data=str(tmp_path / "CIFAR-100-C"), count=0, out=str(trained))
    with ExitStack() as connection, pytest.raises(RequestError, match="for its own test set: give another folder"):
        evaluation.evaluate(over, Screen(quiet=True), connection)
    done = evaluate(trained, "--data", tmp_path / "CIFAR-100-C", "--workers", 0)
    found = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    predictions = pq.read_table(trained / "predictions.parquet").slice(0, 20)
    clean = np.mean([row[0] for row in predictions["top5"].to_pylist()] == predictions["label"].to_numpy())
    assert [row["top1"] for row in found["corruptions"]["saturate"]["severities"]] == pytest.approx([clean] * 5)
    contrast = found["corruptions"]["contrast"]
    assert contrast["error"] == pytest.approx(1 - np.mean([row["top1"] for row in contrast["severities"]]))
    assert found["counted"] == ["contrast", "gaussian_noise"]
    assert found["mean_error"] == pytest.approx(
        (contrast["error"] + found["corruptions"]["gaussian_noise"]["error"]) / 2
    )
    assert f"Mean error {found['mean_error']:.4f} over 2 corruptions" in done.stdout
    assert "gaussian noise" in done.stdout
    page = (tmp_path / "evaluation/evaluation.html").read_text()
    assert page.count('<svg role="img"') == 1
    assert "the mean leaves out the corruptions that are meant for tuning:\nsaturate." in page


def test_a_location_that_cannot_be_looked_into_is_named():
    with pytest.raises(RequestError, match=r"^n{300} can't be read: File name too long\.$"):
        find_corruptions("n" * 300)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": np.arange(99)}, "has 99 labels, which 5 severities can't share equally"),
        ({"labels": np.arange(50)}, "contrast.npy has 100 images, and labels.npy 50 labels"),
        ({"labels": np.arange(100) + 50}, "the fine label of image 50 is 100"),
        ({"fog": np.zeros((100, 32, 32), np.uint8)}, "fog.npy is uint8 of shape"),
        ({"fog": np.zeros((100, 28, 28, 3), np.uint8)}, "fog.npy is uint8 of shape"),
        ({"fog": np.zeros((100, 32, 32, 3))}, "fog.npy is float64 of shape"),
    ],
)
def test_corrupted_images_that_do_not_fit_are_refused(trained, small_arrays, tmp_path, changes, words):
    write_corruptions(tmp_path / "C", small_arrays, **changes)
    with pytest.raises(RequestError) as refusal:
        evaluate_here(trained, tmp_path / "C", tmp_path / "out")
    assert words in str(refusal.value)
    assert str(refusal.value).endswith(".")
    assert not (tmp_path / "out").exists()


def test_workers_have_as_long_to_find_room_as_wait_says(monkeypatch):
    seconds = []
    monkeypatch.setattr(evaluation, "connect", lambda *args, **options: Workers(1, 1))
    monkeypatch.setattr("raycifar.cluster.waiting.make_room", lambda workers, show, wait: seconds.append(wait))
    with ExitStack() as connection:
        request = EvaluationRequest(network="a", wait=7)
        evaluation.allocate_workers(request, Screen(quiet=True), connection, debug=False)
    assert seconds == [7]
    assert "--wait" in {name for option in command.main.params for name in option.opts}


def test_an_evaluation_is_not_written_into_the_data_set(tmp_path):
    for out in (tmp_path, f"{tmp_path}/x/.."):
        with pytest.raises(RequestError, match=r"--out .* is the data set: give another folder\.$"):
            evaluation.evaluate(
                EvaluationRequest("run", data=str(tmp_path), out=str(out)), Screen(quiet=True), ExitStack()
            )
