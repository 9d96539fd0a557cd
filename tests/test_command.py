"""How commands end: an exit code and one sentence."""

import errno
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError

import click
import pytest
from click.testing import CliRunner

from raycifar import api, cli, command, predict
from raycifar.command import CLOSED_OUTPUT, ending
from raycifar.errors import RayDiedError, RequestError, ResumableError, StorageError, WorkError
from raycifar.terminal import Screen


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


@pytest.mark.parametrize("kind", [ResumableError, RayDiedError, WorkError])
def test_what_may_be_continued_says_with_which_name(kind):
    may = kind is not WorkError
    with pytest.raises(kind) as raised, command.resumable("a-1"):
        raise kind("training failed: no memory.")
    assert (
        str(raised.value)
        == "training failed: no memory." + " To continue, give the same command with --name a-1." * may
    )
    with pytest.raises(kind) as raised, api.telling_how_to_continue(Screen(), "a-1"):
        raise kind("training failed: no memory.")
    assert str(raised.value) == "training failed: no memory." + " The same call with name='a-1' continues it." * may


def test_a_misspelt_command_is_answered_with_the_nearest():
    for args, nearest in ((["trian"], "'train'"), (["data", "descibe"], "'describe'")):
        done = CliRunner().invoke(cli.main, args)
        assert done.exit_code == 2
        assert f"Did you mean {nearest}?" in done.stderr


def test_an_argument_that_is_empty_is_called_as_the_help_calls_it(in_process):
    code, said = in_process(predict.main, "", "x.png")
    assert (code, said) == (2, "Error: RUN|WEIGHTS is empty: give a value, or leave it out.\n")


STUCK = """
import ctypes, click
from raycifar.options import Command

@click.command(cls=Command, example="")
def main(debug):
    lock, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    library.pthread_mutex_lock(lock)
    print("stuck", flush=True)
    library.pthread_mutex_lock(lock)

main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_command_that_hangs_in_a_library(number):
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "stuck\n"
    time.sleep(0.5)  # until it is
    for _ in range(2):  # one, which `timeout` and `uv run` pass on twice
        process.send_signal(number)
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(5) == 130


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_lacks_a_character_gets_a_question_mark(encoding, tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    for args, code in ((("train", "--help"), 0), (("recipes",), 0), (("data", "describe", "--data", "ünï"), 2)):
        command = [sys.executable, "-m", "raycifar", *args]
        done = subprocess.run(command, env=env, capture_output=True, check=False, cwd=tmp_path)
        assert done.returncode == code, done.stderr.decode(encoding)
        assert b"Traceback" not in done.stderr
    assert done.stdout == "Reading ünï ?\n".encode(encoding, "replace")


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


HOSTILE = """
import logging, click
from raycifar import terminal
from raycifar.options import Command
from raycifar.storage.remote import tell

@click.command(cls=Command, example="")
def main(debug):
    terminal.LINE_SECONDS = 0
    for said in ("", "told \x1b[2J"):
        tell.get()(said)
    logging.getLogger("raycifar").debug("logged \x1b[2J")
    raise OSError("raised \x1b[2J")

main()
"""


def test_a_terminal_obeys_nothing_that_a_storage_says():
    done = subprocess.run([sys.executable, "-c", HOSTILE, "--debug"], capture_output=True, text=True, check=False)
    for verb in ("told", "logged", "OSError: raised", "Error: raised"):
        assert rf"{verb} \x1b[2J" in done.stderr
    assert "\x1b" not in done.stderr


def test_the_library_has_no_need_of_click_and_workers_none_of_the_terminal():
    program = "import sys; sys.modules['click'] = None; import raycifar.workflows.{0}"
    for name in ("training", "study", "reporting", "evaluation", "exporting", "benchmark", "prediction", "datasets"):
        subprocess.run([sys.executable, "-c", program.format(name)], check=True)


def test_a_command_whose_output_nobody_reads_ends_without_a_word():
    command = subprocess.Popen(
        [sys.executable, "-m", "raycifar.recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    command.stdout.close()
    assert command.stderr.read() == b""
    assert command.wait() == CLOSED_OUTPUT
