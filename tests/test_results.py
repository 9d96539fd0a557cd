"""The table of results, and the job that makes it."""

import os
import re
import subprocess
import sys
from html import unescape

import pytest
from command import ROOT
from conftest import write_archive
from markdown_it import MarkdownIt

from raycifar.analysis.history import RunHistory
from raycifar.analysis.markdown import code, results_table
from raycifar.analysis.prose import to_command
from raycifar.models.recipes import options_for
from raycifar.storage.schemas import EpochRecord


def history(name, seed, **run):
    common = {"train_loss": 1.0, "train_top1": 0.5, "lr": 0.1, "images_per_second": 10.0, "workers": 1}
    records = [EpochRecord(epoch=e, seconds=30.0, **common) for e in (1, 2)]
    data = {"source": "cifar100", "train": 45000, "val": 5000, "test": 10000}
    about = {"name": name, "model": "cnn", "recipe": {"epochs": 2}, "data": data, "seed": seed, "val_size": 5000}
    about |= {"limit": None, "workers": 0, "device": "cpu", "threads": 2} | run
    return RunHistory(about, records, {"status": "finished", "epochs": 2})


def score(mean, half=None):
    ends = {"low": None, "high": None} if half is None else {"low": mean - half, "high": mean + half}
    return {"mean": mean, **ends, "n": 1 if half is None else 3}


def test_a_row_has_what_it_takes_to_reproduce_it():
    scores = {"top1": score(0.7, 0.01), "top5": score(0.9), "loss": score(1.1)}
    comparison = {"models": {"cnn": {"runs": ["cnn-s0"], "seeds": [0, 1, 2], **scores}}}
    *_, row = results_table(comparison, {"cnn-s0": history("cnn-s0", 0)}).splitlines()
    assert row == (
        "| cnn | 3 | 0.7000 ± 0.0100 | 0.9000 | 1.1000 | 2 | 2-thread CPU | 60 | "
        "`raycifar train --model cnn --workers 0 --recipe study --epochs 2`, seeds 0, 1, 2 |"
    )


@pytest.mark.parametrize("path", ["/a&b/<c>[d]", "/a|b", "/a`b``c", "a`"])
def test_a_command_is_shown_as_it_is_and_the_other_cells_hold_no_markup(path):
    data = {"source": path, "train": 45000, "val": 5000, "test": 10000}
    run = history("a", 0, data=data, device="<x>")
    scores = dict.fromkeys(("top1", "top5", "loss"), score(1.0))
    comparison = {"models": {"[cnn](b)": {"runs": ["a"], "seeds": [0], **scores}}}
    page = MarkdownIt().enable("table").render(results_table(comparison, {"a": run}))
    *cells, last = re.findall("<td>(.*?)</td>", page)
    assert [unescape(cells[k]) for k in (0, 6)] == ["[cnn](b)", "<x>"]
    (command,) = re.findall("<code>(.*)</code>, seeds 0", last)
    assert unescape(command) == to_command(run.run, "train", options_for("cnn", run.recipe))


def test_code_that_begins_or_ends_with_a_backtick_is_kept_apart_from_its_fence():
    assert code("a`") == "`` a` ``"


@pytest.mark.slow
def test_the_job_makes_the_table_and_goes_on_after_a_kill(small_files, tmp_path):
    data = write_archive(tmp_path / "cifar-100-binary.tar.gz", small_files)
    env = {**os.environ, "PYTHON": sys.executable, "RAYCIFAR_STORAGE": str(tmp_path / "runs"), "RAYCIFAR_DATA": data}
    env |= {"MODELS": "cnn", "SEEDS": "2", "EPOCHS": "2"}
    job = ["jobs/reproduce.sh", "--limit", "200", "--val-size", "100", "--batch-size", "20"]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(job, cwd=ROOT, env=env, capture_output=True, timeout=25, check=False)
    done = subprocess.run(job, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| cnn ")]
    assert row.split(" | ")[1] == "2"
    assert "raycifar train --model cnn" in row
