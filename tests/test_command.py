"""How commands end: an exit code and one sentence."""

import errno
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import click
import pytest

from raycifar.command import ending
from raycifar.errors import RequestError, StorageError, WorkError


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (RequestError("too few."), 2, "Error: too few."),
        (WorkError("it failed."), 1, "Error: it failed."),
        (StorageError.of("a", OSError(28, "No space left")), 1, "Error: a can't be written: No space left."),
        (click.UsageError("no such option"), 2, "Error: no such option"),
    ],
)
def test_each_error_has_its_code_and_is_its_own_sentence(error, code, sentence):
    assert ending(error) == (code, sentence)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (RuntimeError("Could not determine home directory."), "Could not determine home directory: set HOME"),
        (ModuleNotFoundError("No module named 'x'"), "a package is missing or damaged: No module named 'x'"),
        (PackageNotFoundError("ray"), "a package is missing or damaged: No package metadata was found for ray"),
        (UnicodeEncodeError("ascii", "ü", 0, 1, "ordinal not in range(128)"), "isn't in the encoding"),
        (MemoryError(), "memory ran out"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_its_surroundings_cause_is_no_defect_of_the_program(error, says):
    code, sentence = ending(error)
    assert code == 1
    assert says in sentence
    assert "This is a bug" not in sentence
    assert "\n" not in sentence


def test_what_nobody_foresaw_is_called_a_defect():
    code, sentence = ending(KeyError("test"))
    assert code == 1
    assert "KeyError: 'test'" in sentence
    assert "--debug" in sentence


@pytest.mark.parametrize("debug", [False, True])
def test_a_traceback_is_shown_for_debugging_alone(debug, tmp_path):
    command = [sys.executable, "-m", "raycifar.report", str(tmp_path), *["--debug"] * debug]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert ("Traceback" in done.stderr) == debug
    assert "holds no run.json" in done.stderr


def test_the_library_has_no_need_of_click_and_workers_none_of_the_terminal():
    program = "import sys; sys.modules['click'] = None; import raycifar.workflows.{0}"
    for name in ("training", "study", "reporting", "evaluation", "exporting", "benchmark", "prediction", "datasets"):
        subprocess.run([sys.executable, "-c", program.format(name)], check=True)
