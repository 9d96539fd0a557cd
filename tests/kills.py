"""Kill a run's processes at random moments; it must end as if nothing had happened: `python tests/kills.py --help`.

Each run is killed once with SIGKILL. If it doesn't go on by itself, the same command is given again.
"""

import json
import os
import random
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import psutil

ROOT = Path(__file__).parent.parent
RUN = ["--model", "cnn", "--limit", "200", "--val-size", "100", "--epochs", "3", "--batch-size", "20"]
RUN += ["--checkpoint-steps", "4", "--no-report"]
MARK = "RAYCIFAR_KILLS"  # in the environment of a run's processes
PROCESSES = {
    "driver": "raycifar.train",
    "worker": "RayTrainWorker",
    "controller": "ray::TrainController",
    "raylet": "raylet/raylet",
    "gcs": "gcs_server",
}
HANG_SECONDS = 240
LEAVE_SECONDS = 15  # for the processes of a run that has ended to end
TIMES = {"seconds", "training_seconds", "images_per_second", "time", "restarts"}


@dataclass
class Outcome:
    """What a kill did.

    codes: exit codes of the run, and of the commands given again. said: what the run printed as it ended. left: files
    and processes that no undisturbed run leaves.
    """

    target: str
    moment: float
    codes: list[int | None] = field(default_factory=list)
    said: str = ""
    seconds: float = 0.0
    equal: bool = False
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        codes = ", ".join("hang" if code is None else str(code) for code in self.codes)
        left = f"; left: {', '.join(self.left)}" if self.left else ""
        return (
            f"{self.target:10} at {self.moment:5.1f} s: {'equal' if self.equal else 'NOT EQUAL'}, exit {codes}, "
            f"{self.seconds:.0f} s to the end{left}\n{self.said}"
        )


def processes(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
            yield process


def find(mark: str, target: str) -> list[psutil.Process]:
    return [process for process in processes(mark) if PROCESSES[target] in " ".join(process.cmdline())]


class Run:
    """The command, begun."""

    def __init__(self, storage: Path, name: str, options: list[str]) -> None:
        self.mark, self.log = uuid.uuid4().hex, storage / f"{name}.log"
        command = [sys.executable, "-m", "raycifar.train", *RUN, *options, "--storage", str(storage), "--name", name]
        environ = {**os.environ, MARK: self.mark, "PYTHONPATH": str(ROOT)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT)

    def finish(self) -> int | None:
        """Return the exit code, or None if the run hangs, and is ended."""
        try:
            return self.process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            for process in processes(self.mark):
                process.kill()
            return None

    def left(self) -> list[str]:
        """Return the processes that outlive the run, and end them."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while (alive := list(processes(self.mark))) and time.monotonic() < deadline:
            time.sleep(0.5)
        names = [f"process {' '.join(process.cmdline())[:60]}" for process in alive]
        for process in alive:
            process.kill()
        return names


def content(folder: Path) -> tuple[bytes, list[dict]]:
    """Return a run's weights, and its history without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return (folder / "model.safetensors").read_bytes(), rows


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def last_lines(log: Path, count: int = 4) -> str:
    return "".join(f"    | {line[:300]}\n" for line in log.read_text().splitlines()[-count:])


def disturb(storage: Path, name: str, options: list[str], target: str, moment: float) -> Outcome:
    """Start a run, kill a process `moment` seconds later, let it end, and compare it with the run `reference`."""
    outcome, folder = Outcome(target, moment), storage / name
    run = Run(storage, name, options)
    time.sleep(moment)
    while not (victims := find(run.mark, target)) and run.process.poll() is None:
        time.sleep(0.05)
    killed = time.monotonic()
    for victim in victims[-1:]:
        victim.kill()
    outcome.codes.append(run.finish())
    outcome.said = last_lines(run.log)
    for number in range(3):
        if outcome.codes[-1] == 0:
            break
        again = Run(storage, name, options)
        outcome.codes.append(again.finish())
        if outcome.codes[-1]:
            outcome.said += f"  again ({number + 1}):\n" + last_lines(again.log)
        outcome.left += again.left()
    outcome.seconds = time.monotonic() - killed
    outcome.left += run.left()
    if outcome.codes[-1] == 0:
        outcome.equal = content(folder) == content(storage / "reference")
        outcome.left += sorted(names(folder) - names(storage / "reference"))
    return outcome


def kill_runs(storage: Path, options: list[str], targets: list[str], kills: int, seed: int) -> Iterator[Outcome]:
    """Disturb a number of runs, each at another moment and in a process of the next kind."""
    began, randomness = time.monotonic(), random.Random(seed)
    reference = Run(storage, "reference", options)
    assert reference.finish() == 0, reference.log.read_text()
    duration = time.monotonic() - began
    for number in range(kills):
        moment = randomness.uniform(0, duration)
        yield disturb(storage, f"killed-{number}", options, targets[number % len(targets)], moment)


@click.command()
@click.option("--workers", default=0)
@click.option("--kills", default=10)
@click.option("--seed", default=0)
@click.option("--target", "targets", multiple=True, type=click.Choice(list(PROCESSES)), help="[all that there are]")
@click.option("--data", default="synthetic", envvar="RAYCIFAR_DATA")
@click.option("--cpus-per-worker", default=None)
def main(workers: int, kills: int, seed: int, targets: list[str], data: str, cpus_per_worker: str | None) -> None:
    """Print what each kill did, and the sums."""
    options = ["--workers", str(workers), "--data", data]
    options += ["--cpus-per-worker", cpus_per_worker] if cpus_per_worker else []
    targets = list(targets) or (list(PROCESSES) if workers else ["driver"])
    sums: Counter[str] = Counter()
    with TemporaryDirectory() as storage:
        for outcome in kill_runs(Path(storage), options, targets, kills, seed):
            print(outcome, flush=True)
            sums["runs"] += 1
            sums["equal bytes"] += outcome.equal
            sums["went on by themselves"] += outcome.codes == [0]
            sums["hangs"] += outcome.codes.count(None)
            sums["left something behind"] += bool(outcome.left)
    print(", ".join(f"{count} {what}" for what, count in sums.items()))


if __name__ == "__main__":
    main()
