"""Every door writes its own lines and nothing else: both streams of a real process, on a run without its checkpoints.

What libraries and Ray say on the way is a fault, so standard error is empty.
"""

import re
import shutil

import pytest
from command import Command, finish
from conftest import RUN
from PIL import Image

from raycifar.storage.checkpoints import Checkpoints
from raycifar.storage.run_folder import RUN as RUN_FILE
from raycifar.storage.run_folder import RunFolder
from raycifar.workflows.inventory import removable, remove

TINY = ("--limit", 200, "--val-size", 100, "--batch-size", 50, "--epochs", 1)
# What Ray, PyTorch and Python's logging and warnings say.
OTHERS = re.compile(r"Warning|WARN|INFO|DEBUG|Traceback|pid=|\(raylet|core_worker|[EWI]\d{4} |\d\d:\d\d:\d\d,\d{3}")


class Door(Command):
    def __init__(self, door, *args, **options):
        self.command = f"raycifar.{door}"
        super().__init__(*args, storage=None, **options)


@pytest.fixture(scope="module")
def cleaned(trained, tmp_path_factory):
    """A finished run without its checkpoints."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("cleaned") / "a")
    for what in removable(str(folder)):
        remove(what, print)
    assert not Checkpoints(RunFolder.at(str(folder))).names()
    return folder


@pytest.fixture(scope="module")
def other(cleaned, tmp_path_factory):
    """A run like that one, of another seed."""
    folder = RunFolder.at(str(shutil.copytree(cleaned, tmp_path_factory.mktemp("other") / "b")))
    folder.write_json(RUN_FILE, folder.read_json(RUN_FILE) | {"seed": 1})
    folder.manifest.renew(RUN_FILE)
    return folder.location


SLOW = pytest.mark.slow
DOORS = [
    pytest.param("train", ("--storage", "{parent}", "--name", "a", *RUN, "--workers", 0), id="train-finished"),
    pytest.param("train", ("--model", "cnn", *TINY, "--workers", 1, "--storage", "{out}"), id="train", marks=SLOW),
    pytest.param("compare", ("--models", "cnn", "--seeds", 2, *TINY, "--storage", "{out}"), id="compare", marks=SLOW),
    pytest.param("compare", ("{run}", "{other}", "--storage", "{out}", "--name", "c"), id="compare-runs"),
    pytest.param("report", ("{run}", "--out", "{out}"), id="report"),
    pytest.param("evaluate", ("{run}", "--workers", 0, "--cpus-per-worker", 1, "--out", "{out}"), id="evaluate-here"),
    pytest.param("evaluate", ("{run}", "--workers", 1, "--out", "{out}"), id="evaluate", marks=SLOW),
    pytest.param("predict", ("{run}", "{out}/cat.png", "--device", "cpu"), id="predict"),
    pytest.param("export", ("{run}", "--to", "safetensors", "--out", "{out}/a"), id="export"),
    pytest.param("export", ("{run}", "--to", "torchscript", "--out", "{out}/a"), id="torchscript", marks=SLOW),
    pytest.param("export", ("{run}", "--to", "onnx", "--out", "{out}/a"), id="onnx", marks=SLOW),
    pytest.param("data", ("describe",), id="data"),
    pytest.param("recipes", ("cnn",), id="recipes"),
    pytest.param("runs", ("{parent}",), id="runs"),
    pytest.param("clean", ("{parent}", "--yes"), id="clean"),
    pytest.param(
        "bench",
        ("--model", "cnn", *TINY, "--workers", 0, "--rounds", 1, "--against", "dataloader", "--out", "{out}"),
        id="bench", marks=SLOW,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("door", "args"), DOORS)
def test_a_door_writes_nothing_but_its_own_lines(door, args, cleaned, other, small, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "cat.png")
    places = {"run": cleaned, "other": other, "parent": cleaned.parent, "out": tmp_path}
    args = [str(arg).format(**places) for arg in args]
    done = finish(Door(door, *args, env={"RAYCIFAR_DATA": small}, cwd=tmp_path))
    of_chance = "This network is at the level of chance: "  # as `predict` says of these runs
    assert [line for line in done.stderr.splitlines() if door != "predict" or not line.startswith(of_chance)] == []
    assert done.stdout
    assert not OTHERS.search(done.stdout), done.stdout
