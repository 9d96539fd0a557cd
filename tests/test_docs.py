"""README.md and docs/: every command and every line of Python is run, at a small size; every link leads somewhere."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from command import ROOT, Program, finish
from PIL import Image

from raycifar import models
from raycifar.analysis.diagnosis import PHRASES
from raycifar.cli import COMMANDS
from raycifar.engine.reporter import METRICS as METRICS_OF_RAY
from raycifar.storage.manifest import MANIFEST
from raycifar.storage.run_folder import (
    BEST,
    EVENTS,
    EXAMPLE_STATS,
    METRICS,
    MODEL,
    PICTURES,
    PREDICTIONS,
    RESULT,
    RUN,
    SUSPECTS,
)
from raycifar.storage.schemas import EpochRecord, ResultFile, Scores

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
DRAWN = sorted(path for path in (DOCS / "pictures").rglob("*") if path.suffix in (".png", ".svg"))
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]+) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(?:\]\(|src(?:set)?=")([^)"#:]+)(?:#[^)"]*)?[)"]')
SMALL = {"limit": 100, "val_size": 100, "epochs": 1, "batch_size": 20}

# What runs the steps of a page in one process: commands, of which each would end it, and Python.
RUNNER = """
import json, sys
from raycifar import api, cli, command

def leave(code, sentence="", *more, **options):
    raise SystemExit(f"{code}: {sentence}" if code else 0)

command.leave = leave
steps, small = json.loads(sys.argv[1])
train, names = api.train, {}
api.train = lambda *models, **options: train(*models, **{**options, **small, "report": False})
for kind, step in steps:
    print("$", step, flush=True)
    if kind == "python":
        exec(step, names)
        continue
    try:
        cli.main(step, standalone_mode=False)
    except SystemExit as end:
        if end.code:
            raise
    command.UNTIL_EXIT.close()
"""


def blocks(page: Path) -> list[re.Match]:
    return list(BLOCK.finditer(page.read_text()))


def is_run(block: re.Match) -> bool:
    return block["kind"] in ("bash", "python") and not (block["mark"] or "").startswith("not run: ")


def steps_of(page: Path, folder: Path, data: str, *, slow: bool) -> list[tuple[str, object]]:
    """Write the files that a page shows, and return its commands and its Python, made small, in their order."""
    steps: list[tuple[str, object]] = []
    for block in blocks(page):
        mark, text = block["mark"] or "", block["text"]
        if mark.startswith("file: "):
            (folder / mark.removeprefix("file: ")).write_text(text)
        elif not is_run(block):
            continue
        elif block["kind"] == "python":
            steps.append(("python", text))
        elif (mark == "slow") <= slow:
            steps += [("command", args) for line in text.splitlines() if (args := shrunk(line, data))]
    return steps


def shrunk(line: str, data: str) -> list[str]:
    """Return the arguments of `raycifar` that a line stands for, with options that make it small."""
    words = shlex.split(line.removeprefix("pip install -q uv && uv run "), comments=True)
    if words in ([], ["pytest"]):
        return []
    module = " ".join(words[:3]).removeprefix("python -m raycifar")
    name, *args = [module.lstrip("."), *words[3:]] if module.startswith(".") else words[1:]
    assert words[0] in ("raycifar", "python"), f"the test can't run {line!r}"
    more = [word for option, value in SMALL.items() for word in (f"--{option.replace('_', '-')}", str(value))]
    if name == "train":
        args += [*more, "--workers", "0", "--no-report", "--data", data]
    elif name == "compare" and "--models" in args:
        args += [*more, "--data", data]
    elif name == "bench":
        workers = "1" if "stream" in line and "--workers 0" not in line else "0"  # Ray streams to workers alone
        args += [*more, "--data", data, "--rounds", "1", "--workers", workers]
    elif name == "evaluate":
        args += ["--workers", "0"]
    return [name, *args]


def run_page(page: Path, folder: Path, data: str, trained: Path, *, slow: bool) -> None:
    if page.stem != "index":  # where it is trained
        shutil.copytree(trained, folder / "results/hello")
    (folder / "photos").mkdir()
    for picture in ("photos/cat.jpg", "cat.jpg"):
        Image.new("RGB", (50, 40)).save(folder / picture)
    env = {"RAYCIFAR_DATA": data, "RAY_AUTH_MODE": "disabled", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    steps = steps_of(page, folder, data, slow=slow)
    options = {**SMALL, "workers": 0, "data": data}
    finish(Program(folder / "page.py", RUNNER, json.dumps([steps, options]), env=env), timeout=120 * len(steps))


RUNNING = [page for page in PAGES if any(map(is_run, blocks(page)))]
RUNNING.remove(DOCS / "extending.md")
FAST = [page for page in RUNNING if page.stem in ("README", "data", "report")]


@pytest.mark.parametrize("page", FAST, ids=lambda page: page.stem)
def test_the_commands_of_a_page_work(page, tmp_path, small, trained):
    run_page(page, tmp_path, small, trained, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.stem)
def test_all_commands_of_a_page_work_also_those_that_start_ray(page, tmp_path, small, trained):
    run_page(page, tmp_path, small, trained, slow=True)


def test_what_extends_raycifar_is_trained_with(tmp_path, small):
    shutil.copytree(ROOT / "raycifar", tmp_path / "raycifar", ignore=shutil.ignore_patterns("__pycache__"))
    page = DOCS / "extending.md"
    steps = steps_of(page, tmp_path, small, slow=False)
    for block in blocks(page):
        if block["kind"] == "diff":
            apply(block["text"], tmp_path)
    command = [sys.executable, "-m", "raycifar", *dict(steps)["command"], "--report"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "extended.jsonl").read_text().splitlines()) == 2  # an epoch, and the scores
    assert (tmp_path / "results/extended/model.safetensors").exists()


def apply(diff: str, folder: Path) -> None:
    """Apply a diff whose hunks say enough to be found without line numbers."""
    for file, hunks in re.findall(r"^\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", diff, re.MULTILINE | re.DOTALL):
        text = (folder / file).read_text()
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / file).write_text(text)


@pytest.mark.slow
def test_the_notebook_of_the_study_runs(tmp_path, small, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("RAYCIFAR_DATA", small)
    notebook = nbformat.read(DOCS / "study.ipynb", 4)
    # 120 steps, after which a network that has learned nothing is called dead.
    smaller = {"limit": 200, "val_size": 100, "batch_size": 10}
    for cell in notebook["cells"]:
        for name, value in smaller.items():
            cell["source"] = re.sub(rf'"{name}": \d+', f'"{name}": {value}', cell["source"])
        cell["source"] = cell["source"].replace('"imagenet"', '"none"').replace("image_size=64", "image_size=32")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    dead = json.loads((tmp_path / "study/dead/report.json").read_text())
    assert "collapse" in [finding["kind"] for finding in dead["findings"]]


# What can be seen without running anything ----------------------------------------------------------


def test_the_readme_is_short_and_has_the_two_commands_on_a_line_each():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert sum(line.startswith("pip install -q uv && uv run ") for line in lines) == 2


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("index", COMMANDS),
        ("report", PHRASES),
        ("run-folder", [f.name for f in fields(EpochRecord)]),
        ("run-folder", [*ResultFile.__annotations__, *Scores.__annotations__]),
        ("run-folder", [RUN, METRICS, RESULT, MODEL, BEST, PREDICTIONS, EXAMPLE_STATS, PICTURES, MANIFEST, SUSPECTS]),
        ("run-folder", [EVENTS]),
        ("tracking", [f"ray_raycifar_{name}" for name in METRICS_OF_RAY]),
        ("training", [*models.names(), "study", "transfer", "scratch"]),
    ],
    ids=str,
)
def test_a_page_names_everything_that_there_is(page, names):
    missing = [name for name in names if f"`{name}`" not in (DOCS / f"{page}.md").read_text()]
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("picture", DRAWN, ids=lambda picture: picture.name)
def test_a_picture_is_small_and_there_in_light_and_dark(picture):
    assert picture.stat().st_size < 200_000
    kind, other = ("light", "dark") if picture.stem.endswith("light") else ("dark", "light")
    assert picture.with_stem(picture.stem.replace(kind, other)).exists()
    if picture.parent.name == "findings":
        assert "prefers-color-scheme: dark" in picture.read_text()
    assert any(picture.name in page.read_text() for page in PAGES)


def test_the_page_of_findings_quotes_what_is_found_in_the_runs_that_it_shows():
    text = " ".join((DOCS / "report.md").read_text().replace("\n>", "\n").split())
    for finding, _ in runpy.run_path(str(DOCS / "pictures/findings.py"))["found"]():
        section = text.partition(f"### `{finding.kind}`")[2].partition("###")[0]
        assert f"pictures/findings/{finding.kind}.svg" in section
        assert f"{finding.evidence} **{finding.advice}**" in section
