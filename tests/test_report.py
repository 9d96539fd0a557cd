"""`raycifar report`: pages that open without a network, of runs in any state, and of comparisons."""

import csv
import html
import json
import os
import platform
import re
import shutil

import pytest
from browser import CHROMIUM, Browser
from command import Command, Compare, Report, finish
from conftest import RUN
from histories import made_up

from raycifar.api import open_run
from raycifar.storage.lock import locked
from raycifar.storage.run_folder import RunFolder
from raycifar.terminal import Screen
from raycifar.workflows.reporting import find_runs, forgiving, read_files, show_report
from raycifar.workflows.reporting import report as write_report

OUTSIDE = re.compile(
    r'<script(?!>for)|<link(?! rel="icon" href="data:)|(?:src|href)="(?!data:|#|[\w.-]+/report\.html)|url\((?!#)'
)


@pytest.fixture
def report(tmp_path):
    def run(*args, code=0, env=None):
        return finish(Report(*args, storage=None, env=env, cwd=tmp_path), code)

    return run


def open_in_browser(page):
    """Return what a page writes to its console, and its DOM.

    The page forbids itself to ask any host for anything; an attempt is an error on the console.
    """
    if CHROMIUM is None:
        pytest.skip("needs Chromium to open a page: apt-get install chromium")
    with Browser() as browser:
        browser.open(page)
        return [*browser.errors], browser.evaluate("document.documentElement.outerHTML")


def test_a_page_that_asks_a_host_for_something_is_noticed(tmp_path):
    page = tmp_path / "page.html"
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    page.write_text(f"<html><head>{policy}</head><body><img src='http://127.0.0.1:9/a.png'></body></html>")
    assert open_in_browser(page)[0] != []


# A run ----------------------------------------------------------------------------------------------


def test_training_leaves_a_page_that_holds_all_it_needs(trained):
    page = (trained / "report.html").read_text()
    assert not OUTSIDE.search(page)
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', page)
    assert len(labels) == 11  # accuracy, loss, steps, gap, rate, norm, speed, calibration, classes, two of confusion
    assert all(len(label) > 20 for label in labels)
    ids = re.findall(r' id="([^"]+)"', page)
    assert not {name for name in ids if ids.count(name) > 1 and f"#{name}" in page}
    assert len(re.findall(r'<img src="data:image/png;base64,[^"]+" alt="[^"]+"', page)) > 6
    top1 = json.loads((trained / "result.json").read_text())["test"]["top1"]
    assert f"<b>{top1:.4f}</b>" in page
    assert page.count('alt="augmented training image') == 16
    assert page.count("aquarium fish") > 1  # every class is named


def test_the_page_opens_in_a_browser_without_an_error_or_a_request(trained):
    console, dom = open_in_browser(trained / "report.html")
    assert console == []
    assert "default-src 'none'" in dom
    assert dom.count("<path") > 50
    assert dom.count('role="img"') == 11
    assert dom.count(">CSV</button>") == 11


def test_findings_and_suspects_are_files_too(trained):
    found = json.loads((trained / "report.json").read_text())["findings"]
    assert found
    assert all({"kind", "confidence", "evidence", "advice"} <= finding.keys() for finding in found)
    with (trained / "suspects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 200
    assert list(rows[0]) == ["index", "label", "suggested", "score", "network", "copy", "copy_label"]
    scores = [float(row["score"]) for row in rows]
    assert scores[0] == 1
    assert scores == sorted(scores, reverse=True)
    assert len({row["index"] for row in rows}) == 200


def test_other_formats_and_places(trained, report, small, tmp_path):
    report(trained, "--format", "md", "--out", tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert text.startswith("# a\n")
    assert "## Findings" in text
    report(trained, "--format", "json", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out/report.json").read_text()) == json.loads((trained / "report.json").read_text())
    assert not (tmp_path / "out/report.html").exists()


def test_a_report_goes_into_no_other_run_s_folder(trained, report, tmp_path):
    for name in "ab":
        shutil.copytree(trained, tmp_path / name)
    before = (tmp_path / "b/report.json").read_bytes()
    for folders in ("a",), ("a", "b"):
        done = report(*(tmp_path / name for name in folders), "--out", tmp_path / "b", code=2)
        assert "b is the folder of a run: give another --out" in done.stderr
    assert (tmp_path / "b/report.json").read_bytes() == before
    report(tmp_path / "b", "--format", "json", "--out", tmp_path / "b")


def test_a_report_opens_nothing_but_what_the_user_names(trained, report, small, tmp_path):
    """The run's images are said to be in a fifo, which whoever opens it waits for."""
    shutil.copytree(trained, tmp_path / "a")
    os.mkfifo(tmp_path / "fifo")
    run = json.loads((tmp_path / "a/run.json").read_text())
    run["data"]["source"] = str(tmp_path / "fifo")
    (tmp_path / "a/run.json").write_text(json.dumps(run))
    report(tmp_path / "a", env={"RAYCIFAR_DATA": str(tmp_path / "fifo")})
    shown = (tmp_path / "a/report.html").read_text().count("<img")
    assert shown > 6
    (tmp_path / "a/pictures.json").unlink()
    report(tmp_path / "a")
    page = (tmp_path / "a/report.html").read_text()
    assert "keeps no images" in page
    assert "<img" not in page
    report(tmp_path / "a", "--data", small)
    assert (tmp_path / "a/report.html").read_text().count("<img") == shown
    assert "holds other images" in report(tmp_path / "a", "--data", "synthetic:200", code=2).stderr


@pytest.mark.parametrize("state", ["just begun", "under way", "cut off while writing", "failed", "failed at once"])
def test_a_run_in_any_state_is_reported_as_what_it_is(trained, report, small, tmp_path, state):
    folder = tmp_path / "a"
    shutil.copytree(trained, folder)
    for name in ("result.json", "predictions.parquet", "example_stats.parquet", "report.html", "model.safetensors"):
        (folder / name).unlink()
    history = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(history[:2]))
    failure = {"status": "failed", "reason": "the loss is no longer finite: epoch 3, step 2. Try less", "epochs": 2}
    match state:
        case "just begun":
            (folder / "metrics.jsonl").unlink()
            said = "0 of 3 epochs recorded"
        case "under way":
            said = "2 of 3 epochs recorded"
        case "cut off while writing":
            (folder / ".result.json.part").write_text('{"sta')
            said = "is under way or was interrupted"
        case "failed":
            (folder / "result.json").write_text(json.dumps(failure))
            said = "failed after 2 of 3 epochs: the loss is no longer finite"
        case "failed at once":
            (folder / "metrics.jsonl").unlink()
            (folder / "result.json").write_text(json.dumps(failure))
            said = "failed after 0 of 3 epochs"
    done = report(folder)
    assert said in done.stdout
    assert said in (folder / "report.html").read_text()
    kinds = {finding["kind"] for finding in json.loads((folder / "report.json").read_text())["findings"]}
    assert ("divergence" in kinds) == state.startswith("failed")


def test_a_run_that_is_being_trained_is_not_to_be_continued(tmp_path):
    history, comparison = made_up(epochs=9, recipe={"epochs": 50}), RunFolder(str(tmp_path), "c")
    comparison.write_json("study.json", {})
    for run, trained in ((RunFolder(str(tmp_path), "a"),) * 2, (RunFolder(comparison.location, "cnn-s0"), comparison)):
        run.write_json("run.json", history.run)
        run.write_history(history.records)
        with locked(trained, print):
            found = write_report(run, Screen(quiet=True), kind="json")
            assert found["state"] == f"This run is being trained on {platform.node()}: 9 of 50 epochs recorded."
            assert found["next"] == []
            assert open_run(run.location).state == found["state"]
        found = write_report(run, Screen(quiet=True), kind="json")
        assert found["state"] == "This run is under way or was interrupted: 9 of 50 epochs recorded."
        assert found["next"][0]["reason"] == "the rest of this run, under the same name"


def test_what_is_known_of_each_image_is_read_under_its_old_name_too(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "a")
    (tmp_path / "a/example_stats.parquet").rename(tmp_path / "a/images.parquet")
    found = read_files(RunFolder.at(str(tmp_path / "a"))).example_stats
    assert found.equals(RunFolder.at(str(trained)).read_table("example_stats.parquet"))


def test_what_is_under_way_is_drawn_again_in_at_most_a_hundredth_of_the_time(monkeypatch):
    from raycifar.workflows import reporting

    now, drawn = [0.0], []

    def write():
        now[0] += 2.0
        drawn.append(now[0])

    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    refresh = reporting.Refresher(write)
    for _ in range(10_000):
        now[0] += 0.25
        refresh()
    assert 10 <= len(drawn) <= 13
    assert 2.0 * len(drawn) <= 0.01 * now[0] + 2.0


def test_a_report_that_fails_does_not_fail_the_run_and_debug_shows_why(caplog):
    said = []
    with forgiving(said.append):
        raise OSError("the disk is full")
    assert said == ["The report failed: OSError: the disk is full."]
    assert not caplog.records
    caplog.set_level("DEBUG", "raycifar")
    with forgiving():
        raise OSError("the disk is full")
    assert "Traceback" in caplog.text


def test_a_run_is_reported_from_within_its_folder_and_shows_images_that_were_named_from_elsewhere(
    small, report, tmp_path
):
    (tmp_path / "data.tar.gz").symlink_to(small)
    args = (*RUN[:-4], "--epochs", 1, "--batch-size", 20, "--workers", 0, "--no-report", "--name", "a")
    finish(Command(*args, "--data", "data.tar.gz", storage=tmp_path / "runs", cwd=tmp_path))
    finish(Report(".", storage=None, cwd=tmp_path / "runs/a", env={"RAYCIFAR_DATA": ""}))
    page = (tmp_path / "runs/a/report.html").read_text()
    assert "<title>a" in page
    assert '<img src="data:image/png' in page


def test_what_is_no_run_is_refused(report, tmp_path):
    assert "holds no run.json" in report(tmp_path, code=2).stderr
    assert "does not exist" in report(tmp_path / "nowhere", code=2).stderr


# A comparison ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(trained, tmp_path_factory):
    """A comparison of three runs that are copies except for their model, seed and scores."""
    storage = tmp_path_factory.mktemp("compared")
    runs = []
    for model, seed in (("cnn", 0), ("cnn", 1), ("vgg16", 0)):
        folder = storage / f"{model}-s{seed}"
        shutil.copytree(trained, folder)
        run = json.loads((folder / "run.json").read_text())
        run |= {"name": folder.name, "model": model, "seed": seed}
        run["architecture"]["model"] = model
        (folder / "run.json").write_text(json.dumps(run))
        runs.append(folder)
    finish(Compare(*runs, "--name", "c", storage=storage))
    return storage / "c"


def test_a_comparison_has_a_page_of_its_own(compared):
    page = (compared / "report.html").read_text()
    assert not OUTSIDE.search(page)
    sentence = json.loads((compared / "report.json").read_text())["sentences"][0]
    assert {"cnn", "vgg16"} <= set(re.findall(r"\w+", sentence))
    assert sentence in html.unescape(page)
    console, dom = open_in_browser(compared / "report.html")
    assert console == []
    assert dom.count('role="img"') == 6  # three curves, accuracy against time and size, the differences


def test_the_verdict_is_printed_and_any_runs_are_drawn_side_by_side(compared, trained, report, tmp_path):
    sentence = json.loads((compared / "report.json").read_text())["sentences"][0]
    said = report(compared, "--format", "json", "--out", tmp_path / "c").stdout
    assert " ".join(said.split()).count(sentence) == 1
    done = report(trained, compared / "vgg16-s0")
    assert "2 runs side by side, without a verdict." in done.stdout
    page = (tmp_path / "overlay/report.html").read_text()
    assert "<h1>a and vgg16-s0</h1>" in page
    assert "Conditions: 3 epochs" in page
    assert "holds no run.json" in report(trained, tmp_path, code=2).stderr
    assert "--data is for one run" in report(trained, compared, "--data", "x", code=2).stderr


def test_a_comparison_under_way_shows_the_runs_that_it_has(compared, trained, report, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c/study.json").write_text("{}")
    shutil.copytree(trained, tmp_path / "c/cnn-s0")
    shutil.copytree(trained, tmp_path / "c/cnn-s1", ignore=lambda *_: ["result.json"])
    done = report(tmp_path / "c")
    assert "1 of 2 runs finished; the comparison is under way or was interrupted" in done.stdout
    assert '<a href="cnn-s0/report.html">' in (tmp_path / "c/report.html").read_text()


def test_what_an_earlier_version_called_images_is_read(trained, report, tmp_path):
    shutil.copytree(trained, tmp_path / "a", ignore=lambda *_: ["suspects.csv"])
    (tmp_path / "a/example_stats.parquet").rename(tmp_path / "a/images.parquet")
    report(tmp_path / "a")
    assert (tmp_path / "a/suspects.csv").read_bytes() == (trained / "suspects.csv").read_bytes()


def test_the_trials_of_a_search_are_left_out_by_what_they_record(trained, tmp_path):
    folder = RunFolder(str(tmp_path), "c")
    for name, values in (
        ("cnn-search-1", {"search": False}),  # a name proves nothing
        ("cnn-2", {"search": True}),
        ("cnn-search-3", {}),  # as the first versions wrote it
        ("cnn-4", {}),
    ):
        RunFolder(folder.location, name).write_json("run.json", {"name": name, **values})
    assert [run.name for run in find_runs(folder, None)] == ["cnn-4", "cnn-search-1"]


def test_a_report_that_fails_says_why_in_one_line_and_does_not_point_to_itself(capfd):
    def fail():
        raise RuntimeError("CUDA error: unspecified launch failure\nSearch for it elsewhere.")

    show_report(fail, Screen())
    said = capfd.readouterr().out
    assert said.endswith("The report failed: RuntimeError: CUDA error: unspecified launch failure.\n")
    assert "See report.html" not in said
