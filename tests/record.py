"""Runs on real images whose recorded histories the tests read: `python tests/record.py NAME DATA` records one again."""

import json
import sys
import tempfile
from pathlib import Path

from command import Command

from raycifar.analysis.history import RunHistory
from raycifar.storage.run_folder import RESULT, RUN, RunFolder
from raycifar.storage.schemas import EpochRecord

FOLDER = Path(__file__).with_name("recorded")
CNN = ("--model", "cnn", "--workers", 0, "--no-report")

# Options, the kinds that an expert finds, and kinds that would be wrong.
RECORDED = {
    "overfits": (
        (*CNN, "--limit", 500, "--val-size", 1000, "--epochs", 25),
        {"overfitting"},
        {"healthy", "plateau", "generalization-gap"},
    ),
    "short": (
        (*CNN, "--limit", 5000, "--val-size", 5000, "--epochs", 8),
        {"improving"},
        {"validation-noise", "overfitting", "plateau"},
    ),
    "constant": (
        (*CNN, "--limit", 3000, "--val-size", 1000, "--epochs", 14, "--schedule", "constant", "--lr", 0.1),
        {"generalization-gap"},
        {"healthy"},
    ),
}
LEFT_OUT = ("time", "rise", "images_per_second", "seconds", "training_seconds")  # what differs from time to time


def keep(folder: RunFolder, name: str) -> None:
    """Write what the tests read of a run."""
    run, result = folder.read_json(RUN), folder.read_json(RESULT)
    about = {key: run[key] for key in ("model", "seed", "recipe", "val_size", "limit", "device", "workers")}
    about |= {"name": name, "data": {**run["data"], "source": "cifar100"}}
    rows = [{k: v for k, v in record.to_json().items() if k not in LEFT_OUT} for record in folder.history()]
    content = {"run": about, "result": result, "records": rows}
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def recorded(name: str) -> RunHistory:
    content = json.loads((FOLDER / f"{name}.json").read_text())
    records = [EpochRecord(**row, images_per_second=1000.0, seconds=1.0) for row in content["records"]]
    return RunHistory(content["run"], records, content["result"])


if __name__ == "__main__":
    name, data = sys.argv[1:]
    with tempfile.TemporaryDirectory() as storage:
        done = Command(*RECORDED[name][0], "--data", data, "--name", name, storage=storage).finish(timeout=1800)
        assert done.returncode == 0, done.stderr
        keep(RunFolder(storage, name), name)
