"""Run folders that are damaged, of another version or made to do harm: told in a sentence, and never obeyed."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from histories import made_up
from markdown_it import MarkdownIt
from scipy import stats

from raycifar.analysis.comparison_report import comparison_page, report_comparison
from raycifar.analysis.findings import robust_slope
from raycifar.analysis.markdown import to_markdown
from raycifar.analysis.prose import next_steps
from raycifar.analysis.reports import report_run, run_page
from raycifar.analysis.run_files import RunFiles
from raycifar.api import open_comparison, open_run
from raycifar.errors import DamagedFileError, RequestError
from raycifar.storage.run_folder import RunFolder
from raycifar.storage.schemas import EpochRecord
from raycifar.storage.spreadsheets import to_csv
from raycifar.terminal import Screen
from raycifar.workflows import reporting
from raycifar.workflows.comparing import compare_runs, read_finished
from raycifar.workflows.prediction import read_weights
from raycifar.workflows.requests import ComparisonRequest
from raycifar.workflows.training_run import earlier_result

QUIET = Screen(quiet=True)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run, as a version before manifests left it."""
    ignored = shutil.ignore_patterns("checkpoint_*", "best.safetensors", "manifest.json", "report.*")
    shutil.copytree(trained, tmp_path / "runs/a", copy_function=os.link, ignore=ignored)
    return tmp_path / "runs/a"


def rewrite(path, content):
    path.unlink()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edited(**fields):
    return lambda content: json.dumps({**json.loads(content), **fields})


def rows(*changes):
    """Change the last row of a history."""

    def change(content):
        first, last = content.splitlines()[:-1], json.loads(content.splitlines()[-1])
        for each in changes:
            last |= each
        return b"\n".join([*first, json.dumps(last).encode()]) + b"\n"

    return change


DEEP = b"[" * 100_000
DAMAGE = {  # file, its damage, and what a report then says: None where it is refused
    "run empty": ("run.json", lambda c: b"", None),
    "run a list": ("run.json", lambda c: b"[]", None),
    "run deep": ("run.json", lambda c: DEEP, None),
    "run without data": ("run.json", lambda c: b'{"model": "cnn", "recipe": {}}', None),
    "run with a string for a number": ("run.json", edited(limit="200"), None),
    "run of no model": ("run.json", edited(model="nothing"), None),
    "run with a huge number": ("run.json", edited(recipe={"epochs": 10**30}), None),
    "metrics cut": ("metrics.jsonl", lambda c: c[:-40], "The lines before it are used."),
    "metrics without a column": ("metrics.jsonl", lambda c: c.replace(b"train_loss", b"loss"), "train_loss: field"),
    "metrics out of order": ("metrics.jsonl", rows({"epoch": 7}), "epoch 7 follows epoch 2"),
    "metrics not finite": ("metrics.jsonl", rows({"lr": float("nan")}), "line 3, lr: input should be a valid number"),
    "metrics with a string": ("metrics.jsonl", rows({"seconds": "3"}), "line 3, seconds: "),
    "metrics deep": ("metrics.jsonl", lambda c: DEEP, "line 1, recursion limit"),
    "metrics empty": ("metrics.jsonl", lambda c: b"", "Only 0 of 3 epochs recorded."),
    "result empty": ("result.json", lambda c: b"", "result.json is damaged: it is empty. It is left out."),
    "result without a test": ("result.json", edited(test={"images": 300}), "test.loss: field required"),
    "result of strings": ("result.json", edited(epochs="3"), "epochs: input should be a valid integer"),
    "predictions cut": ("predictions.parquet", lambda c: c[:400] + b"\xff" * 8, "predictions.parquet is damaged: "),
    "statistics cut": ("example_stats.parquet", lambda c: c[:-9], "example_stats.parquet is damaged: "),
    "pictures of text": ("pictures.json", edited(train={"1": "<b>"}), "pictures.json is damaged: train.1: "),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_rest_is_shown(run, name):
    file, damage, says = DAMAGE[name]
    rewrite(run / file, damage((run / file).read_bytes()))
    folder = RunFolder.at(str(run))
    if says is None:
        with pytest.raises(DamagedFileError, match=rf"{file} is damaged"):
            reporting.report(folder, QUIET, kind="json")
        with pytest.raises(RequestError, match=file):
            open_run(run)
    else:
        report = reporting.report(folder, QUIET, kind="json")
        assert says in " ".join(report["notes"])
        assert open_run(run).findings == report["findings"]
    if file not in ("example_stats.parquet", "pictures.json"):  # what compares or resumes a run never guesses
        with pytest.raises(RequestError, match=str(run)):
            read_finished(str(run))


def test_each_note_stands_in_the_page_and_in_the_markdown(run):
    rewrite(run / "metrics.jsonl", (run / "metrics.jsonl").read_bytes()[:-40])
    reporting.report(RunFolder.at(str(run)), QUIET)
    assert "The lines before it are used." in (run / "report.html").read_text()
    reporting.report(RunFolder.at(str(run)), QUIET, kind="md")
    assert "Note: " in (run / "report.md").read_text()


def test_fields_of_tomorrow_are_passed_over_with_a_notice_each(run):
    about = json.loads((run / "run.json").read_text())
    about |= {"new": 1, "recipe": {**about["recipe"], "a_field_of_tomorrow": 1}}
    rewrite(run / "run.json", json.dumps(about))
    rewrite(run / "metrics.jsonl", rows({"new_column": [1]})((run / "metrics.jsonl").read_bytes()))
    report = reporting.report(RunFolder.at(str(run)), QUIET)
    assert len(report["notes"]) == 3
    assert all("ignores: " in note for note in report["notes"])
    assert report["state"] == "This run is finished, after 3 epochs."


def test_a_run_of_an_earlier_version_has_the_defaults_of_what_it_lacks(run):
    about = json.loads((run / "run.json").read_text())
    for name in ("limit", "val_size", "workers", "device", "seed", "name", "versions", "threads", "created"):
        about.pop(name)
    rewrite(run / "run.json", json.dumps(about))
    shutil.copytree(run, run.parent / "b")
    rewrite(run.parent / "b/run.json", edited(seed=1)((run / "run.json").read_bytes()))
    both = [str(run), str(run.parent / "b")]
    compare_runs(both, ComparisonRequest.of([], storage=str(run.parent), name="c"), QUIET, lambda c: None)
    assert reporting.report(RunFolder.at(str(run)), QUIET)["notes"] == []
    assert "| cnn | 2 |" in reporting.read_comparison(RunFolder.at(str(run.parent / "c")))[0]["results"]


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl", "result.json", "predictions.parquet"])
@pytest.mark.parametrize("kind", ["fifo", "link", "huge", "folder"])
def test_what_is_no_file_of_the_folder_is_not_read(run, file, kind, tmp_path):
    (run / file).rename(tmp_path / "moved")
    match kind:
        case "fifo":
            os.mkfifo(run / file)
        case "link":
            (run / file).symlink_to(tmp_path / "moved")
        case "huge":
            with (run / file).open("wb") as sparse:
                sparse.truncate(2**30)
        case _:
            (run / file).mkdir()
    with pytest.raises(DamagedFileError, match=f"{file} can't be read: ") as refused:
        read_finished(str(run))
    assert str(refused.value).count(file) == 1
    if file != "run.json":
        assert f"{file} can't be read" in " ".join(reporting.read_files(RunFolder.at(str(run))).notes)


def test_a_finished_run_whose_result_says_little_is_not_called_finished(run, capsys):
    rewrite(run / "result.json", '{"status": "finished"}')
    folder = RunFolder.at(str(run))
    with pytest.raises(DamagedFileError, match="it has no epochs and no train_seconds and no images_per_second"):
        earlier_result(folder, json.loads((run / "run.json").read_text()))
    assert not any("result" in note for note in reporting.read_files(folder).notes)


# What has changed -----------------------------------------------------------------------------------


@pytest.fixture
def sealed(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs/a", ignore=shutil.ignore_patterns("checkpoint_*"))
    return tmp_path / "runs/a"


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl", "result.json"])
def test_a_digit_that_has_changed_is_told(sealed, file):
    assert reporting.read_files(RunFolder.at(str(sealed))).notes == []
    before = (sealed / file).read_bytes()
    after = re.sub(rb"\.(\d)", lambda digit: b".%d" % ((int(digit[1]) + 1) % 10), before, count=1)
    assert after != before
    (sealed / file).write_bytes(after)
    assert "has changed since manifest.json was written" in reporting.read_files(RunFolder.at(str(sealed))).notes[0]


def test_what_has_just_been_sealed_is_watched(tmp_path):
    folder = RunFolder.at(str(tmp_path))
    for file in ("first", "second"):
        folder.write(file, b"as it was")
        folder.manifest.seal(file)
    folder.delete("second")
    assert folder.manifest.lost("first", "second") == ["second"]
    with pytest.raises(DamagedFileError, match=r"first is damaged: it has changed since manifest\.json was written"):
        folder.manifest.check("first", b"another")


def test_a_byte_of_weights_or_of_predictions_that_has_changed_is_refused(sealed):
    for file in ("model.safetensors", "predictions.parquet"):
        content = bytearray((sealed / file).read_bytes())
        content[-1000] ^= 1
        (sealed / file).write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"model.safetensors is damaged: it has changed"):
        read_weights(str(sealed))
    with pytest.raises(DamagedFileError, match=r"predictions.parquet is damaged: it has changed"):
        read_finished(str(sealed))


def test_a_file_that_is_gone_is_told(sealed):
    (sealed / "predictions.parquet").unlink()
    assert reporting.read_files(RunFolder.at(str(sealed))).notes == [f"{sealed}/predictions.parquet is missing."]


# A comparison ---------------------------------------------------------------------------------------


@pytest.fixture
def compared(run):
    shutil.copytree(run, run.parent / "b", copy_function=os.link)
    rewrite(run.parent / "b/run.json", edited(seed=1, name="b")((run / "run.json").read_bytes()))
    request = ComparisonRequest.of([], storage=str(run.parent), name="c")
    compare_runs([str(run), str(run.parent / "b")], request, QUIET, lambda comparison: None)
    return run.parent / "c"


def test_a_comparison_holds_what_its_report_needs_of_its_runs(compared, run):
    shutil.rmtree(run)
    shutil.rmtree(run.parent / "b")
    assert [each.name for each in open_comparison(compared).runs] == ["a", "b"]
    assert reporting.report(RunFolder.at(str(compared)), QUIET)["notes"] == []
    assert "<svg" in (compared / "report.html").read_text()


def test_a_comparison_looks_into_no_other_folder(compared, run):
    shutil.rmtree(compared / "a")
    shutil.rmtree(compared / "b")
    (compared / "b").symlink_to(run.parent / "b")
    for folders in (["../a", "../b"], [str(run)] * 2):
        comparison = json.loads((compared / "comparison.json").read_text())
        comparison["models"]["cnn"]["folders"] = folders
        (compared / "comparison.json").write_text(json.dumps(comparison))
        report = reporting.report(RunFolder.at(str(compared)), QUIET)
        assert "which are left out: a, b." in " ".join(report["notes"])
        assert report["runs"] == []


@pytest.mark.parametrize(
    "content", [b"", b"[]", DEEP, b'{"models": {}, "pairs": [{}]}', b'{"models": {"cnn": 3}, "pairs": []}']
)
def test_a_damaged_comparison_is_told(compared, content):
    rewrite(compared / "comparison.json", content)
    report = reporting.report(RunFolder.at(str(compared)), QUIET)
    assert "comparison.json is damaged: " in report["notes"][0]
    assert len(report["runs"]) == 2
    with pytest.raises(DamagedFileError, match=r"comparison.json is damaged"):
        open_comparison(compared)


# What is written ------------------------------------------------------------------------------------

EVIL = '"><script>alert(1)</script><base href="//x"><form>[a](javascript:b)|`\n# $x$ {{ 7*7 }}'


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def evil_comparison():
    history = made_up(
        epochs=3, run={"model": "cnn", "name": EVIL, "data": {"source": EVIL, "train": 9, "val": 5, "test": 4}}
    )
    runs = [RunFiles(name, history, notes=[EVIL]) for name in (EVIL, "javascript:alert(1)")]
    mean = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 2}
    cost = {"parameters": 1, "flops": 1, "images_per_second": 1.0, "device_seconds": 1.0, "cost": None}
    model = {"runs": [EVIL], "seeds": [0], "top1": mean, "top5": mean, "loss": mean, "at_equal_time": None, **cost}
    pair = {"a": EVIL, "b": "b", "difference": 0.1, "low": 0.0, "high": 0.2, "sentence": EVIL, "verdict": "undecided"}
    return runs, {"models": {EVIL: model, "b": model}, "pairs": [{**pair, "seeds_needed": 3}]}


def test_no_name_or_sentence_becomes_html(evil_comparison):
    runs, comparison = evil_comparison
    report = report_comparison(EVIL, runs, comparison, notes=[EVIL])
    pages = [comparison_page(report, runs, comparison, {run.name: f"{run.name}/report.html" for run in runs})]
    pages += [run_page(runs[0], report_run(runs[0]))]
    for page in pages:
        elements = Elements(page).found
        assert not {"base", "form", "iframe", "object"} & {tag for tag, _ in elements}
        assert [attrs for tag, attrs in elements if tag == "script"] == [{}]  # the page's own, by its hash
        assert not [attrs for _, attrs in elements if any(name.startswith("on") for name in attrs)]
        assert not [attrs for tag, attrs in elements if tag == "a" and ":" in attrs["href"]]
        (policy,) = [attrs["content"] for _, attrs in elements if attrs.get("http-equiv")]
        assert "base-uri 'none'" in policy
        assert "form-action 'none'" in policy


def test_no_name_or_sentence_becomes_markdown(evil_comparison):
    text = to_markdown(report_comparison(EVIL, *evil_comparison, notes=[EVIL]))
    elements = Elements(MarkdownIt().enable("table").render(text)).found  # as HTML in Markdown would be
    assert not {"a", "base", "form", "script"} & {tag for tag, _ in elements}
    lines = text.splitlines()
    assert not [line for line in lines if line.startswith("# $x$")]
    rows = [line for line in lines if line.startswith("|")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {10}


def test_no_cell_of_a_table_is_a_formula():
    text = to_csv(["a"], [["=1+1"], ["+1"], ["-1"], ["@x"], ["\tx"], [-1.5], ["a=b"]])
    assert text.splitlines() == ["a", "'=1+1", "'+1", "'-1", "'@x", "'\tx", "-1.5", "a=b"]


def test_commands_that_are_suggested_say_where_and_on_what_the_run_was():
    history = made_up(
        epochs=2, recipe={"epochs": 5}, run={"workers": 0, "name": "n", "compile": True, "checkpoint_steps": 4}
    )
    (step,) = next_steps(history, [], "/elsewhere")
    assert "--workers 0 --checkpoint-steps 4 --compile" in step["command"]
    assert step["command"].endswith("--storage /elsewhere")
    elastic = made_up(epochs=2, recipe={"epochs": 5}, run={"workers": 4, "least_workers": 2, "name": "n"})
    assert "--workers 2:4 " in next_steps(elastic, [])[0]["command"]


# Growth ---------------------------------------------------------------------------------------------


def test_a_slope_of_up_to_a_thousand_epochs_is_theil_and_sen_s():
    values = np.random.default_rng(0).normal(size=1000).cumsum()
    slope, _, low, high = stats.theilslopes(values, alpha=0.95)
    assert robust_slope(values) == (slope, low, high)
    assert robust_slope(np.linspace(0, 1, 50_001))[0] == pytest.approx(2e-5)


def test_the_findings_of_a_long_history_take_seconds_and_little_memory(run):
    values = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, (20_000, 2)) + 5 * (rng.random((20_000, 2)) < 0.02)  # with hundreds of spikes
    with (run / "metrics.jsonl").with_suffix(".new").open("w") as file:
        for epoch, (a, b) in enumerate(noise, 1):
            scores = {"val_loss": 2 + a, "train_loss": 2 + b, "val_top1": 0.5 - abs(a) / 20, "train_top1": 0.5}
            file.write(
                json.dumps({**values, **scores, "epoch": epoch, "rise": {"fraction": 0.5, "indices": [1] * 12}}) + "\n"
            )
    (run / "metrics.new").rename(run / "metrics.jsonl")
    program = "import sys; from raycifar.report import main; main(sys.argv[1:])"
    limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))  # noqa: E731
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, str(run)], capture_output=True, text=True, preexec_fn=limit, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "spike (" in done.stdout
    assert time.monotonic() - start < 15


def test_a_record_is_read_as_it_was_written():
    record = made_up(epochs=1).records[0]
    assert EpochRecord.from_json(record.to_json()) == record


def test_a_weights_file_notices_a_byte_that_has_changed(trained, tmp_path):
    content = bytearray((trained / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(RequestError, match="it has changed since it was written"):
        read_weights(str(tmp_path / "w.safetensors"))
