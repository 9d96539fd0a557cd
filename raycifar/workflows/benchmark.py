"""Where the time goes on this machine or cluster, beside the bare compute limit."""

import dataclasses
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycifar.errors import RequestError, WorkError
from raycifar.storage.run_folder import BENCH, BENCH_CHART, RUN, RunFolder
from raycifar.workflows.requests import TrainingRequest, to_arguments
from raycifar.workflows.training import fit, prepare

if TYPE_CHECKING:
    from raycifar.terminal import Screen

WAYS = ("dataloader", "stream")
STAGES = {
    "bare": "the step alone, on tensors that are there",
    "gradients": "and gradients exchanged between workers",
    "images": "and images, augmented",
    "train": "an epoch as train runs it",
    "epoch": "and validation, a line and a checkpoint",
    "dataloader": "the common way: PIL, DataLoader, float32",
    "stream": "Ray's documented ingest, our step",
}
HELP = {
    "images": "a simpler --augment, or more --cpus-per-worker, would help",
    "gradients": "a larger --batch-size, fewer workers or a faster network between them would help",
    "train": "a larger --batch-size would help: what is done for each step weighs less",
    "epoch": "fewer validation images (--val-size) would help",
}
POLL_SECONDS = 0.02  # between two looks whether a run has begun


def bench(
    request: TrainingRequest,
    screen: "Screen",
    connection: ExitStack,
    *,
    rounds: int,
    against: Sequence[str] = (),
    startup: bool = False,
    out: str = "bench",
    debug: bool = False,
) -> dict[str, Any]:
    """Time a model's training, write `bench.json` and its chart, and return the first.

    Args:
        connection: enters the connection to Ray.
        rounds: how often each stage is timed. against: ways of others to time, too.
        startup: time the way to the first step, too. out: a folder or URI.

    Raises:
        RequestError: the request is wrong; nothing was started.
    """
    if unknown := set(against) - set(WAYS):
        raise RequestError(f"--against {sorted(unknown)[0]}: choose from {', '.join(WAYS)}.")
    if "stream" in against and request.workers == 0:
        raise RequestError("--against stream streams to workers: give --workers 1 or more.")
    if isinstance(request.workers, tuple):
        raise RequestError("an elastic run can't be timed: give --workers one number.")
    rates = time_stages(request, rounds, against, screen, connection, debug=debug)
    found = {"model": request.model, "recipe": dataclasses.asdict(request.recipe), **summarise(rates, against)}
    if startup:
        connection.close()  # this process's Ray would take its share of the cores
        found["startup"] = time_startup(request, rounds, screen)
    folder = RunFolder.at(out)
    folder.write_json(BENCH, found)
    folder.write(BENCH_CHART, draw(found).encode())
    return found


# Timing ----------------------------------------------------------------------------------------------


def time_stages(
    request: TrainingRequest,
    rounds: int,
    against: Sequence[str],
    screen: "Screen",
    connection: ExitStack,
    *,
    debug: bool,
) -> dict[str, list[float]]:
    """Return images per second of each stage, a figure for each round."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # interrupted, workers still write
        timed = dataclasses.replace(request, name="bench", storage=folder, checkpoint_steps=0, test=False)
        run = prepare(timed, screen, connection, debug=debug)
        from raycifar.cluster.waiting import Waiting
        from raycifar.engine.bench import BenchmarkJob, bench_loop_per_worker

        screen.say(f"{request.model} on {run.workers}, {len(run.inputs.splits.train):,} images, {rounds} rounds")
        return fit(
            run,
            lambda running: screen.follow_phase(run.status_store, running, Waiting(run.workers, request.wait)),
            lambda job: (bench_loop_per_worker, {"job": BenchmarkJob(job, rounds, tuple(against))}),
        )


def time_startup(request: TrainingRequest, rounds: int, screen: "Screen") -> dict[str, Any]:
    """Return the seconds from a command to its first optimizer step, and those of the least that Ray takes."""
    workers = request.workers if isinstance(request.workers, int) else 1
    seconds: dict[str, list[float]] = {"first_step_seconds": [], "floor_seconds": []}
    for number in range(rounds):
        with screen.waiting(f"Timing the start, {number + 1} of {rounds}"):
            seconds["first_step_seconds"].append(time_first_step(dataclasses.replace(request, workers=workers)))
            seconds["floor_seconds"].append(time_floor(workers))
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {name: spread(values) for name, values in seconds.items()} | {"ratio": spread(ratios)}


def time_first_step(request: TrainingRequest) -> float:
    """Return the seconds from the command to the moment at which its run records that training begins."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        timed = dataclasses.replace(request, name="timed", storage=folder, report=False)
        command, run = [sys.executable, "-m", "raycifar.train", *to_arguments(timed)], RunFolder(folder, "timed")
        began = time.time()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                if training_began := (run.read_json(RUN) or {}).get("training_began"):
                    process.terminate()
                    process.wait()
                    return training_began - began
                time.sleep(POLL_SECONDS)
            assert process.stderr is not None
            raise WorkError(f"the run that was to be timed did not begin: {process.stderr.read().strip()}")


EMPTY = """
import sys, time, ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

def loop(config):
    with open(config["file"], "w") as file:
        file.write(str(time.time()))

workers = ScalingConfig(num_workers=int(sys.argv[2]))
TorchTrainer(loop, train_loop_config={"file": sys.argv[1]}, scaling_config=workers).fit()
"""


def time_floor(workers: int) -> float:
    """Return how long an empty trainer takes to its loop; without workers, how long Ray Train takes to import."""
    begun = time.time()
    if workers == 0:
        subprocess.run([sys.executable, "-c", "import ray.train.torch"], check=True, capture_output=True)
        return time.time() - begun
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "began"
        command = [sys.executable, "-c", EMPTY, str(file), str(workers)]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        return float(file.read_text()) - begun


# What came of it -------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median of figures, their least and most, and how many there are."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def summarise(rates: dict[str, list[float]], against: Sequence[str]) -> dict[str, Any]:
    """Return what `bench.json` holds of the stages."""
    shares = {name: [a / b for a, b in zip(values, rates["bare"], strict=True)] for name, values in rates.items()}
    following, checkpoint = (
        [a / b for a, b in zip(rates["train"], rates[name], strict=True)] for name in ("following", "checkpoint")
    )
    speedups = {name: [a / b for a, b in zip(rates["train"], rates[name], strict=True)] for name in against}
    return {
        "n": len(rates["bare"]),
        "bare_images_per_second": statistics.median(rates["bare"]),
        "train_images_per_second": statistics.median(rates["train"]),
        "ratio": statistics.median(shares["train"]),
        "stages": {
            name: {"images_per_second": spread(rates[name]), "share": spread(shares[name])}
            for name in rates
            if name in STAGES and name not in against
        },
        "following_share": spread(following),
        "checkpoint_share": spread(checkpoint),
        "against": {
            name: {
                "images_per_second": statistics.median(rates[name]),
                "speedup": statistics.median(speedups[name]),
                "spread": {"images_per_second": spread(rates[name]), "speedup": spread(speedups[name])},
            }
            for name in against
        },
    }


def sentences(bench: dict[str, Any]) -> list[str]:
    """Return where the time goes and what would help, in words."""
    share = {name: stage["share"]["median"] for name, stage in bench["stages"].items()}
    costs = {name: 1 / share[name] - 1 / share[before] for before, name in itertools.pairwise(share)}
    lines = [f"train runs at {bench['ratio']:.3f} of the bare step's rate (median of {bench['n']} rounds)."]
    if max(costs.values()) < 0.02:
        lines.append(
            "Nothing that surrounds the step costs 2 % of it: only a cheaper step would help (--compile, --precision)."
        )
    else:
        most = max(costs, key=costs.__getitem__)
        lines.append(
            f"Most is lost to {STAGES[most].removeprefix('and ')}, {costs[most]:.1%} of a bare step: {HELP[most]}."
        )
    following, checkpoint = (bench[f"{name}_share"]["median"] for name in ("following", "checkpoint"))
    lines.append(f"Following every image takes {following:.2%} of this epoch, a checkpoint {checkpoint:.2%}.")
    for name, way in bench["against"].items():
        lines.append(f"train is {way['speedup']:.2f} times as fast as {STAGES[name].partition(':')[0]} ({name}).")
    if startup := bench.get("startup"):
        first, floor = startup["first_step_seconds"], startup["floor_seconds"]
        lines.append(
            f"The first step comes after {first['median']:.1f} s, {startup['ratio']['median']:.2f} times the least "
            f"that Ray takes ({floor['median']:.1f} s)."
        )
    return lines


def draw(bench: dict[str, Any]) -> str:
    """Return the bar chart."""
    from raycifar.analysis.charts import bars

    rates = {name: stage["images_per_second"] for name, stage in bench["stages"].items()}
    rates |= {name: way["spread"]["images_per_second"] for name, way in bench["against"].items()}
    description = "; ".join(f"{name}: {rate['median']:,.0f} images per second" for name, rate in rates.items())
    bare = bench["bare_images_per_second"]
    rows = [(name, rate["median"], rate["low"], rate["high"]) for name, rate in rates.items()]
    return bars(rows, bare, "images per second", f"{bench['model']}. {description}.")
