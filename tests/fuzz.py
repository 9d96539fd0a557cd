"""Files of runs, comparisons, data sets and weights, damaged at random, through the commands that read them.

    python tests/fuzz.py SECONDS [SEED]        as `make_subjects` makes them, in a temporary folder

Each case damages one file and runs one command, in a process of its own: forked, as imports take seconds. Its outcome:

    right     the answer of the undamaged files; another one, with a sentence about the damage; a refusal in a sentence
    defect    a traceback, or "This is a bug"
    crash     ended by a signal, as for memory above `MEMORY`
    hang      not ended within `SECONDS`
    wrong     another answer, given as right
"""

import collections
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from raycifar.cli import COMMANDS, main
from raycifar.data.dataset import to_images
from raycifar.data.synthetic import synthetic
from raycifar.terminal import Screen
from raycifar.workflows.datasets import write_parquet

SECONDS, MEMORY = 20, 2 << 30  # of a case
TRAIN = ("train", "--model", "cnn", "--epochs", "2", "--limit", "100", "--val-size", "100", "--batch-size", "20")
TRAIN = (*TRAIN, "--workers", "0", "--cpus-per-worker", "1", "--no-report")
JUNK = (
    None,
    True,
    -1,
    0,
    7,
    10**30,
    1e308,
    float("nan"),
    "x",
    "7",
    "=1+1",
    "<b>",
    [],
    [1],
    {},
    {"a": 1},
    "../x",
    "é" * 999,
)


@dataclass(frozen=True)
class Door:
    """A command on a folder or file, and where its answer stands besides its output."""

    arguments: tuple[str, ...]
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """What is damaged: the files `damaged` of a folder, read by `doors`; if `sealed`, a change must be noticed."""

    folder: Path
    damaged: tuple[str, ...]
    doors: tuple[Door, ...]
    sealed: bool = True
    without: tuple[str, ...] = ()  # files that are taken away first


# What is damaged ------------------------------------------------------------------------------------


def make_subjects(root: Path) -> list[Subject]:
    """Make two runs, a comparison of them, a data set in each layout and some pictures; return what is damaged."""
    source = synthetic(400, 200)
    data = root / "data"
    for layout in ("binary", "python", "archive", "parquet"):
        (data / layout).mkdir(parents=True)
    write_parquet(source, str(data / "parquet"), Screen(quiet=True))
    (root / "pictures").mkdir()
    for split in ("train", "test"):
        table = getattr(source, split)
        images = to_images(table["image"]).reshape(len(table), -1)
        fine, coarse = (table[name].to_numpy().astype(np.uint8) for name in ("fine", "coarse"))
        rows = np.concatenate([coarse[:, None], fine[:, None], images], axis=1)
        (data / "binary" / f"{split}.bin").write_bytes(rows.tobytes())
        python = {b"data": images, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
        (data / "python" / split).write_bytes(pickle.dumps(python, 2))
    with tarfile.open(data / "archive" / "cifar.tar.gz", "w:gz") as archive:
        for split in ("train", "test"):
            archive.add(data / "binary" / f"{split}.bin", f"cifar-100-binary/{split}.bin")
    for k in range(3):
        Image.fromarray(to_images(source.test["image"])[k].transpose(1, 2, 0)).save(root / "pictures" / f"{k}.png")
    binary, pictures = str(data / "binary"), str(root / "pictures")
    for name, seed in (("a", "0"), ("b", "1")):
        begin(*TRAIN, "--data", binary, "--storage", str(root / "runs"), "--name", name, "--seed", seed)
    begin("compare", str(root / "runs/a"), str(root / "runs/b"), "--storage", str(root / "compared"), "--name", "c")
    shutil.copytree(root / "runs/a", root / "alone/a", ignore=shutil.ignore_patterns("checkpoint_*"))
    (root / "weights").mkdir()
    shutil.copy(root / "runs/a/model.safetensors", root / "weights/w.safetensors")

    run = (
        Door(("report", "{}"), ("report.json", "report.html", "suspects.csv")),
        Door(("report", "{}", "--format", "md"), ("report.md",)),
        Door(("compare", "{}", str(root / "runs/b"), "--storage", "{}/..", "--name", "cc"), ("../cc/comparison.json",)),
        Door((*TRAIN, "--data", binary, "--storage", "{}/..", "--name", "a")),
        Door(("predict", "{}", pictures, "--json", "--device", "cpu")),
        Door(("evaluate", "{}", "--workers", "0", "--cpus-per-worker", "1"), ("evaluation.json",)),
    )
    files = ("run.json", "metrics.jsonl", "result.json", "predictions.parquet", "example_stats.parquet")
    files += ("pictures.json", "model.safetensors", "manifest.json")
    alone, compared = root / "alone/a", root / "compared/c"
    network = (Door(("predict", "{}/w.safetensors", pictures, "--json", "--device", "cpu")), run[-1])
    checkpoint = max((root / "runs/a").glob("checkpoint_*"))
    of_comparison = ("comparison.json", "manifest.json", "a/run.json", "b/metrics.jsonl", "a/result.json")
    inside = tuple(f"{checkpoint.name}/{file.name}" for file in checkpoint.iterdir())
    return [
        Subject(alone, files, run),
        Subject(alone, files[:-1], run, sealed=False, without=("manifest.json",)),
        Subject(root / "runs/a", inside, (run[3],), without=("result.json", "manifest.json")),
        Subject(compared, of_comparison, run[:2]),
        Subject(root / "weights", ("w.safetensors",), (network[0],)),
        Subject(data / "binary", ("train.bin", "test.bin"), describe("{}"), sealed=False),
        Subject(data / "python", ("train", "test"), describe("{}"), sealed=False),
        Subject(data / "archive", ("cifar.tar.gz",), describe("{}/cifar.tar.gz"), sealed=False),
        Subject(data / "parquet", tuple(p.name for p in (data / "parquet").iterdir()), describe("{}"), sealed=False),
    ]


def describe(path: str) -> tuple[Door, ...]:
    return Door(("data", "describe", "--data", path)), Door((*TRAIN, "--dry-run", "--data", path))


def damage(content: bytes, name: str, rng: random.Random) -> tuple[str, bytes]:
    """Return what is done to a file, in words, and its new content."""
    ways: list[Callable[[], bytes]] = [lambda: flip(content, rng), lambda: content[: rng.randrange(len(content))]]
    words = ["flipped", "cut", "doubled", "repeated", "zeroed", "emptied"]
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 8, 100, 5000]))
    ways += [lambda: content + content, lambda: content[:end] + content[start:]]
    ways += [lambda: content[:start] + bytes(end - start) + content[end:], lambda: b""]
    if name.endswith((".json", ".jsonl")):
        ways += [lambda: exchange(content, name.endswith("l"), rng)] * 6
        words += ["exchanged"] * 6
    k = rng.randrange(len(ways))
    return words[k], ways[k]()


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        # The ends of a file hold most of its structure.
        place = (
            rng.randrange(len(changed))
            if rng.random() < 0.5
            else rng.randrange(min(400, len(changed))) * rng.choice([1, -1])
        )
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def exchange(content: bytes, lines: bool, rng: random.Random) -> bytes:
    """Return a JSON file in which one value is another, of any type, or is gone."""
    documents = [json.loads(line) for line in content.splitlines()] if lines else [json.loads(content)]
    places = list(walk(documents))
    holder, key = rng.choice(places)
    if rng.random() < 0.2:
        del holder[key]
    elif rng.random() < 0.1 and isinstance(holder, dict):
        holder["of tomorrow"] = rng.choice(JUNK)
    else:
        holder[key] = rng.choice(JUNK)
    return ("\n".join(map(json.dumps, documents)) + "\n").encode()


def walk(value: object) -> Iterator[tuple[object, object]]:
    """Yield each place in a value: a list or dictionary, and the index or key in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from walk(inner)


# Cases ----------------------------------------------------------------------------------------------


def begin(*arguments: str, memory: int = 0, seconds: float = 120) -> tuple[int | None, str]:
    """Run a command in a forked process; return its exit code (below 0: a signal; None: a hang), and what it wrote."""
    with tempfile.TemporaryFile() as said:
        process = os.fork()
        if not process:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            if memory:
                used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
                resource.setrlimit(resource.RLIMIT_DATA, (used + memory,) * 2)
            try:
                main(arguments, standalone_mode=False)
            except BaseException as error:  # what the command itself lets through: click's own refusals
                print(f"Error: {error}", flush=True)
                os._exit(getattr(error, "exit_code", 1))
            os._exit(0)
        deadline, ended = time.monotonic() + seconds, (0, 0)
        while not ended[0] and time.monotonic() < deadline:
            ended = os.waitpid(process, os.WNOHANG)
            time.sleep(0.005)
        if not ended[0]:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        said.seek(0)
        return (os.waitstatus_to_exitcode(ended[1]) if ended[0] else None), said.read().decode(errors="replace")


def copy_of(subject: Subject, target: Path) -> None:
    """Copy a subject's folder by links: the commands replace files, and never change one."""
    shutil.rmtree(target.parent, ignore_errors=True)
    shutil.copytree(subject.folder, target, copy_function=os.link)
    for file in subject.without:
        (target / file).unlink()


def answer(door: Door, target: Path, said: str) -> list[str]:
    """Return what a command answered: its output, without times and rates, and its files."""
    output = re.sub(r"[\d,.]+ (s|images/s|seconds)\b", "", said)
    files = [target / name for name in door.answers]
    return [output, *(file.read_text(errors="replace") for file in files if file.exists())]


def judge(code: int | None, said: str, found: list[str], right: list[str], sealed: bool) -> str:
    if code is None:
        return "hang"
    if code < 0:
        return "crash"
    if "Traceback" in said or "This is a bug" in said or "This is a defect" in said:
        return "defect"
    if code == 0 and sealed and found != right and not re.search(r"Note: |is skipped: ", said):
        return "wrong"
    return "right"


def fuzz(root: Path, seconds: float, seed: int, most: int | None = None) -> tuple[collections.Counter, list[str]]:
    """Run cases until a time or number is reached; return the counts of outcomes, and a line for each wrong one."""
    subjects, rng = make_subjects(root), random.Random(seed)
    counts: collections.Counter = collections.Counter()
    bad, rights, deadline = [], {}, time.monotonic() + seconds
    while time.monotonic() < deadline and sum(counts.values()) != most:
        number = rng.randrange(len(subjects))
        subject = subjects[number]
        door, file = rng.choice(subject.doors), rng.choice(subject.damaged)
        target = root / "case" / subject.folder.name
        arguments = [argument.format(target) for argument in door.arguments]
        if (number, door) not in rights:
            copy_of(subject, target)
            code, said = begin(*arguments)
            assert code == 0, f"{arguments} on what isn't damaged: {code}\n{said}"
            rights[number, door] = answer(door, target, said)
        copy_of(subject, target)
        before = (target / file).read_bytes()
        how, content = damage(before, file, rng)
        if content == before:
            continue
        (target / file).unlink()
        (target / file).write_bytes(content)
        code, said = begin(*arguments, memory=MEMORY, seconds=SECONDS)
        outcome = judge(code, said, answer(door, target, said), rights[number, door], subject.sealed)
        counts[outcome] += 1
        if outcome != "right":
            kept = root / "kept" / str(sum(counts.values()))
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(content)
            last = "".join(said.strip().splitlines()[-1:])[-300:]
            bad.append(f"{outcome}: {door.arguments[0]}, {subject.folder.name}/{file} {how}, {kept}: {last}")
            print(bad[-1], flush=True)
    return counts, bad


if __name__ == "__main__":
    for name in COMMANDS:  # once, and not in each process
        main.get_command(None, name)

    import raycifar.analysis.reports
    import raycifar.engine.train_loop
    import raycifar.workflows.study  # noqa: F401

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(f"in {folder}")
    found, _ = fuzz(folder, float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(dict(found), f"of {found.total()} cases")
