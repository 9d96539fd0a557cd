"""Pages: what a name or a path says never becomes a part of the page."""

import base64
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from browser import CHROMIUM, Browser
from histories import GUESSES, OVERFITS, made_up

from raycifar.analysis import run_files
from raycifar.analysis.comparison_report import comparison_page, report_comparison, report_overlay
from raycifar.analysis.markdown import to_markdown
from raycifar.analysis.reports import ROWS, report_run, run_page
from raycifar.analysis.run_files import RunFiles
from raycifar.data.synthetic import synthetic
from raycifar.models.recipe import TRANSFER, Recipe
from raycifar.storage.run_folder import METRICS, REPORT_PAGE, RUN, STUDY, RunFolder
from raycifar.workflows.reporting import write_comparison, write_run

HOSTILE = "javascript:alert(1)"
TAGS = '"><script>alert(1)</script>'


def page_of(history, name="a"):
    files = RunFiles(name, history, None, None)
    return run_page(files, report_run(files))


def test_names_are_escaped():
    page = page_of(made_up(epochs=2), TAGS)
    assert page.count("<script") == 1
    assert "&lt;script&gt;" in page


def test_a_page_runs_its_own_script_and_no_other():
    page = page_of(made_up(epochs=2))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    (allowed,) = re.findall(r"script-src 'sha256-([^']+)'", page)
    assert base64.b64decode(allowed) == hashlib.sha256(script.encode()).digest()


@pytest.mark.parametrize("name", [HOSTILE, "data:text/html,x", 'a" onclick="alert(1)'])
def test_a_folder_s_name_never_becomes_a_scheme_or_an_attribute(name):
    runs = [RunFiles(name, made_up(epochs=2), None, None)]
    links = {name: f"{name}/report.html"}
    page = comparison_page(report_comparison("c", runs, None), runs, None, links)
    (href,) = re.findall(r'<a href="([^"]*)"', page)
    assert ":" not in href
    assert href.endswith("/report.html")
    assert "onclick=" not in re.sub(r">[^<]*<", "><", page)


def test_an_ordinary_link_stays_as_it_is():
    runs = [RunFiles("cnn-s0.1", made_up(epochs=2), None, None)]
    page = comparison_page(report_comparison("c", runs, None), runs, None, {"cnn-s0.1": "cnn-s0.1/report.html"})
    assert '<a href="cnn-s0.1/report.html">' in page


def test_links_are_on_the_page_in_the_comparison_s_folder_alone(tmp_path):
    folder, history = RunFolder(str(tmp_path), "c"), made_up(epochs=2)
    folder.write_json(STUDY, {})
    run = RunFolder(folder.location, "cnn-s0")
    run.write_json(RUN, history.run)
    run.write(REPORT_PAGE, b"")
    for out, links in ((None, True), (RunFolder.at(folder.location), True), (RunFolder(str(tmp_path), "d"), False)):
        write_comparison(folder, out)
        assert (b'<a href="cnn-s0/report.html">' in (out or folder).read(REPORT_PAGE)) == links


@pytest.mark.parametrize(("source", "says"), [("synthetic", True), ("synthetic:1000", True), ("/data/cifar", False)])
def test_of_synthetic_images_the_page_says_that_they_are(source, says):
    data = {"source": source, "train": 900, "val": 100, "test": 100}
    page = page_of(made_up(epochs=2, run={"data": data}))
    assert ("These images are synthetic, so the accuracy says nothing about CIFAR-100." in page) == says


def test_the_table_of_epochs_is_bounded():
    page = page_of(made_up(epochs=1000))
    table = page[page.index("<h2>Epochs</h2>") :]
    assert table.count("<tr>") == ROWS + 1
    assert "<td>1000</td>" in table
    assert f"The last {ROWS} epochs" in table
    assert "The last" not in page_of(made_up(epochs=2))


def test_what_is_not_known_is_a_dash():
    page = page_of(made_up(epochs=2, val=0, train_loss=lambda e: None if e == 1 else 4.0))
    assert "<td>–</td>" in page


def test_the_page_says_how_to_train_the_same_network_again():
    page = page_of(made_up(epochs=2, recipe={"lr": 0.1}, run={"seed": 3, "versions": {"torch": "2.15"}}))
    (command,) = re.findall(r"<code>(<span>raycifar train.*?)</code>", page)
    assert re.sub("<.*?>", "", command) == "raycifar train --model cnn --recipe study --epochs 2 --lr 0.1 --seed 3"
    assert "<span>--lr 0.1</span>" in command  # no line breaks between an option and its value
    assert "batch size 128" in page
    assert "torch 2.15" in page


def test_test_scores_have_intervals():
    names = ("top1", "top5", "superclass_top1", "loss", "ece")
    test = {"images": 10_000, **dict.fromkeys(names, 0.5)}
    page = page_of(made_up(result={"status": "finished", "images_per_second": 100.0, "test": test}))
    assert page.count("95%: 0.4902 to 0.5098") == 3


def test_a_run_without_an_epoch_has_a_page():
    assert "No epoch is finished yet" in page_of(made_up(epochs=0, recipe={"epochs": 3}))


def test_the_markdown_has_findings_and_commands():
    text = to_markdown(report_run(RunFiles("a", made_up(), None, None)))
    assert text.startswith("# a\n\nThis run has recorded 20 of 20 epochs, but no result yet.")
    assert "\n## Findings\n" in text
    assert "      raycifar compare --models cnn" in text


def pair_of(**changed):
    pair = {"a": "cnn", "b": "vgg16", "difference": 0.01, "low": -0.01, "high": 0.03, "sentence": "Nothing is certain."}
    return pair | {"verdict": "undecided", "seeds_needed": 12, "immature": True} | changed


@pytest.mark.parametrize(
    ("pair", "options"),
    [
        ({}, "--epochs 4 --lr 0.1 --seeds 12"),
        ({"verdict": "better", "immature": False}, "--epochs 2 --lr 0.1 --seeds 3"),
    ],
)
def test_what_comes_after_a_comparison_is_a_comparison(pair, options):
    runs = [
        RunFiles(model, made_up(epochs=2, recipe={"lr": 0.1}, run={"model": model, "limit": 2000}), None, None)
        for model in ("cnn", "vgg16")
    ]
    comparison = {"models": {}, "pairs": [pair_of(**pair)]}
    (step,) = report_comparison("c", runs, comparison)["next"]
    assert step["command"] == f"raycifar compare --models cnn,vgg16 --recipe study {options}"
    assert step["reason"].endswith("all images")


@pytest.mark.parametrize(
    ("pair", "steps"),
    [
        ({"verdict": "better", "runs": [3, 3]}, 0),
        ({"seeds_needed": None, "runs": [3, 3]}, 0),
        ({"seeds_needed": 5, "runs": [3, 3]}, 1),
        ({"verdict": "better", "runs": [1, 3]}, 1),
    ],
)
def test_nothing_comes_after_a_comparison_with_enough_seeds_of_mature_networks(pair, steps):
    runs = [RunFiles(model, made_up(run={"model": model}), None, None) for model in ("cnn", "vgg16")]
    comparison = {"models": {}, "pairs": [pair_of(immature=False, **pair)]}
    assert len(report_comparison("c", runs, comparison)["next"]) == steps


def test_labels_are_doubted_only_by_a_network_that_knows_something():
    said = "The network has learned too little for its doubts about labels to mean anything."
    assert said in page_of(made_up(epochs=2, train_eval_loss=lambda e: 4.5))
    assert said not in page_of(made_up())


def pages(folder):
    """Write a page of every kind, and return them by name."""
    predictions = pa.table(
        {"label": np.arange(200) % 100, "top5": [[k % 100] * 5 for k in range(1, 201)]}
        | {"probabilities": np.roll(np.eye(100, dtype=np.float32), 1, 1)[np.arange(200) % 100].tolist()}
    )
    losses = [4.0, 3.5, 3.0]
    interrupted = made_up(epochs=4, recipe={"epochs": 9}, step_losses=lambda e: losses, run={"name": "a"})
    test = {"images": 10_000, "top1": 0.6, "top5": 0.9, "loss": 1.5}
    finished = {"status": "finished", "images_per_second": 100.0, "test": test}
    runs = {
        "one-epoch": made_up(epochs=1),
        "interrupted": interrupted,
        "overfits": made_up(**OVERFITS),
        "collapses": made_up(**GUESSES),
        "healthy": made_up(epochs=200, result=finished, step_losses=lambda e: losses),
    }
    for name, history in runs.items():
        files = RunFiles(name, history, predictions if name == "healthy" else None)
        (folder / f"{name}.html").write_text(run_page(files, report_run(files)))
    files = [RunFiles(name, history) for name, history in runs.items()]
    (folder / "overlay.html").write_text(comparison_page(report_overlay(files), files, None, {}, overlay=True))
    return {page.stem: page for page in folder.glob("*.html")}


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_pages_in_a_browser(tmp_path):
    """No page writes to the console, asks for anything, or is wider than a telephone; values are there for keys."""
    made = pages(tmp_path)
    axe = Path(os.environ.get("AXE_CORE", ""))  # axe.min.js, of `npm pack axe-core`
    with Browser() as browser:
        for name, page in made.items():
            for width, dark in ((1280, False), (1280, True), (390, False)):
                browser.open(page, width, dark=dark)
                assert browser.errors == [], name
                assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == [], name
                assert browser.evaluate("document.documentElement.scrollWidth") == width, name
                if axe.is_file():
                    assert browser.violations(axe) == [], (name, width, dark)
        browser.open(made["healthy"])
        browser.evaluate("document.querySelector('figure').focus()")
        browser.press("ArrowRight", 2)
        said = browser.evaluate("document.querySelector('output').textContent")
        assert re.fullmatch(r"epoch 3: training, as trained 0\.\d+; .*; validation 0\.\d+", said)
        figure = "document.querySelector('figure.largest')"
        browser.evaluate(f"{figure}.focus()")
        browser.press("ArrowRight")
        assert (
            browser.evaluate(f"{figure}.querySelector('output').textContent")
            == "apple, taken for aquarium fish: 2 of 2 images"
        )
        saved = browser.evaluate(
            """(async () => { const saved = [];
            HTMLAnchorElement.prototype.click = () => {};
            URL.createObjectURL = blob => { saved.push(blob); return ""; };
            for (const button of document.querySelector(".tools").children) button.click();
            while (saved.length < 3) await new Promise(done => setTimeout(done, 20));
            return [saved.map(blob => blob.type), await saved.find(blob => blob.type === "text/csv").text()]; })()"""
        )
        assert sorted(saved[0]) == ["image/png", "image/svg+xml", "text/csv"]
        head, first, *_ = saved[1].splitlines()
        assert head == 'epoch,"training, as trained","training, as validation",validation'
        assert first.startswith("1,0.1")
        assert saved[1].count("\n") == 201


def test_each_of_several_runs_is_diagnosed_once(monkeypatch):
    diagnosed, diagnose = [], run_files.diagnose
    monkeypatch.setattr(run_files, "diagnose", lambda history: diagnosed.append(history) or diagnose(history))
    files = [RunFiles(name, made_up(epochs=3)) for name in "ab"]
    comparison_page(report_overlay(files), files, None, {}, overlay=True)
    assert diagnosed == [run.history for run in files]


def test_a_report_with_pictures_diagnoses_the_run_once(tmp_path, monkeypatch):
    history, folder = made_up(epochs=3), RunFolder(str(tmp_path), "a")
    folder.write_json(RUN, history.run)
    folder.write(METRICS, b"".join(json.dumps(record.to_json()).encode() + b"\n" for record in history.records))
    diagnosed, diagnose = [], run_files.diagnose
    monkeypatch.setattr(run_files, "diagnose", lambda history: diagnosed.append(history) or diagnose(history))
    write_run(folder, synthetic(train=200, test=100))
    assert len(diagnosed) == 1
    assert "What the network sees" in (tmp_path / "a/report.html").read_text()


def test_one_model_with_two_recipes_is_drawn_as_two_and_its_runs_are_no_seeds_of_one():
    runs = []
    for augment, top1 in (("crop", 0.6), ("none", 0.3)):
        result = {
            "status": "finished",
            "epochs": 20,
            "test": {"images": 10_000, "top1": top1, "top5": 0.9, "superclass_top1": 0.8, "loss": 1.5, "ece": 0.1},
        }
        runs.append(RunFiles(augment, made_up(result=result, recipe={"augment": augment}), None, None))
    report = report_comparison("c", runs, None)
    assert not report["findings"]
    page = comparison_page(report, runs, None, {})
    assert "cnn augment=crop ends at" in page
    assert "cnn augment=none ends at" in page


def test_no_command_compares_two_recipes_of_a_model():
    runs = [RunFiles(name, made_up(epochs=2, recipe={"augment": name}), None, None) for name in ("crop", "none")]
    assert report_comparison("c", runs, {"models": {}, "pairs": [pair_of()]})["next"] == []


def test_no_command_compares_models_whose_recipes_have_other_names():
    plain, own = (
        made_up(epochs=2),
        made_up(epochs=2, recipe=vars(Recipe(**TRANSFER | {"epochs": 2})), run={"model": "resnet50"}),
    )
    runs = [RunFiles("a", plain, None, None), RunFiles("b", own, None, None)]
    assert report_comparison("c", runs, {"models": {}, "pairs": [pair_of()]})["next"] == []


def test_a_comparison_says_its_verdict_once():
    runs = [RunFiles(model, made_up(epochs=2, run={"model": model}), None, None) for model in ("cnn", "vgg16")]
    scores = {key: {"mean": 0.5, "low": None, "high": None, "n": 1} for key in ("top1", "top5", "loss")}
    costs = {"parameters": 1, "flops": 1, "images_per_second": 1.0, "device_seconds": 1.0, "cost": None}
    models = {run.name: {"runs": [run.name], "seeds": [0], **scores, **costs} for run in runs}
    comparison = {"models": models, "pairs": [pair_of()]}
    page = comparison_page(report_comparison("c", runs, comparison), runs, comparison, {})
    assert re.sub("<svg.*?</svg>", "", page, flags=re.DOTALL).count("Nothing is certain.") == 1
