"""The commands, in processes of their own, forked from one that has imported PyTorch and Ray: that takes seconds."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from ray._private.authentication_test_utils import reset_auth_token_state

ROOT = Path(__file__).parent.parent
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    [
        *("pytest", "raycifar", "ray.train.torch", "raycifar.engine.train_loop"),
        *("torch._dynamo", "torchvision", "raycifar.workflows.training", "raycifar.workflows.evaluation"),
        *("raycifar.workflows.ray_train", "raycifar.analysis.reports", "raycifar.terminal"),
    ]
)


class Command:
    """`python -m raycifar.train`, begun."""

    command = "raycifar.train"
    begun: ClassVar[list["Command"]] = []  # in this test

    def __init__(
        self, *args: object, storage: Path | str | None, env: dict[str, str] | None = None, cwd: Path = ROOT
    ) -> None:
        self.args = [self.command, *map(str, args), *(["--storage", str(storage)] if storage else [])]
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / name for name in ("out", "err")]
        self.process = FORK.Process(target=run, args=(self.args, {**os.environ, **(env or {})}, cwd, self.files))
        self.process.start()
        self.begun.append(self)

    @property
    def ended(self) -> bool:
        return not self.process.is_alive()

    def said(self) -> list[str]:
        """Return what it has written to its output, and to its errors."""
        return [file.read_text() if file.exists() else "" for file in self.files]

    def finish(self, timeout: float = 240) -> subprocess.CompletedProcess:
        self.process.join(timeout)
        if not self.ended:  # what hangs must not hold the CPUs of the tests after it
            self.process.kill()
            raise AssertionError(f"not ended after {timeout} s:\n{''.join(self.said())}")
        return subprocess.CompletedProcess(self.args, self.process.exitcode, *self.said())

    def kill(self, number: int = signal.SIGKILL) -> subprocess.CompletedProcess:
        os.kill(self.process.pid, number)
        return self.finish()


class Program(Command):
    """A program of its own: a file of Python."""

    def __init__(self, file: Path, code: str, *args: object, env: dict[str, str] | None = None) -> None:
        file.write_text(code)
        self.command = str(file)
        super().__init__(*args, storage=None, env=env, cwd=file.parent)


def named(command: str) -> type[Command]:
    """Return the command of a name: `python -m raycifar.NAME`."""
    return type(command.capitalize(), (Command,), {"command": f"raycifar.{command}"})


Bench, Compare, Evaluate, Export = map(named, ("bench", "compare", "evaluate", "export"))
Data, Predict, Recipes, Report, Speedrun = map(named, ("data", "predict", "recipes", "report", "speedrun"))


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def run(args: list[str], env: dict[str, str], cwd: Path, files: list[Path]) -> None:
    """Be the command: what `python -m`, or `python FILE`, does."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    take_environment(env)
    sys.argv = args
    if args[0].endswith(".py"):
        runpy.run_path(args[0], run_name="__main__")
    else:
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)


def take_environment(env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    reset_auth_token_state()  # the one thing that Ray has read from the environment when it was imported


def finish(command: Command, code: int = 0, timeout: float = 240) -> subprocess.CompletedProcess:
    """Wait for a command's end; it must end with the exit code `code`, and without a traceback."""
    done = command.finish(timeout)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    return done
