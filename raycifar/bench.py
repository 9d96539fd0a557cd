"""Where the time goes, beside the bare compute limit: `python -m raycifar.bench --model cnn --limit 5000`."""

import dataclasses
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.table import Table

from raycifar import models
from raycifar.cluster.status import StatusStore
from raycifar.errors import RequestError, WorkError
from raycifar.models.initial_weights import load_initial_weights
from raycifar.options import Model, command, pick_recipe, recipe_options, training_options
from raycifar.storage.run_folder import BENCH, BENCH_CHART, RunFolder
from raycifar.terminal import Screen
from raycifar.train import Request, and_weights, build_trainer, fit, identify, place, read, record
from raycifar.train import main as train_command

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
FIRST_STEP = "training …"  # what `train` says when it takes its first step


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.option("--model", type=Model(), required=True, help=f"{', '.join(models.names())}, or timm:NAME.")
@click.option("--workers", type=click.IntRange(min=0), help="0: this process.  [one for each GPU, else 1]")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Times that everything is timed, in turn.")
@click.option("--against", default="", help=f"Comma-separated ways of others to time too: {', '.join(WAYS)}.")
@click.option("--startup", is_flag=True, help="Time the way to the first step too, beside an empty trainer's.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--out", default="bench", help="Folder or URI for bench.json and bench.svg.")
@training_options
@recipe_options
@command
def main(debug: bool, **options: Any) -> None:
    """Time a model's training on this machine or cluster, beside the bare step, and say where the time goes.

    A round times each stage on --limit images; the figures are medians over the rounds, and shares are medians of
    what a round's own bare step made, so that a machine that slows down slows both.
    """
    screen, out = Screen(), RunFolder.at(options["out"])
    against = tuple(name.strip() for name in options["against"].split(",") if name.strip())
    if unknown := set(against) - set(WAYS):
        raise RequestError(f"--against {sorted(unknown)[0]}: choose from {', '.join(WAYS)}.")
    if "stream" in against and options["workers"] == 0:
        raise RequestError("--against stream streams to workers: give --workers 1 or more.")
    recipe = pick_recipe(options["model"], options)

    rates = time_stages(options, recipe, against, screen, debug=debug)
    bench = {"model": options["model"], "recipe": dataclasses.asdict(recipe), **summarise(rates, against)}
    if options["startup"]:
        import ray

        ray.shutdown()  # this process's Ray would take its share of the cores
        bench["startup"] = time_startup(options, screen)
    out.write_json(BENCH, bench)
    out.write(BENCH_CHART, draw(bench).encode())
    screen.console.print(to_table(bench))
    screen.lines(sentences(bench))
    screen.say(f"Written to {out.folder}: {BENCH}, {BENCH_CHART}")


# Timing ----------------------------------------------------------------------------------------------


def time_stages(
    options: dict[str, Any], recipe: Any, against: Sequence[str], screen: Screen, *, debug: bool
) -> dict[str, list[float]]:
    """Return images per second of each stage, a figure for each round."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # interrupted, workers still write
        given = {key: options[key] for key in Request.__annotations__ if key in options}
        fixed = {"recipe": recipe, "name": "bench", "storage": folder, "checkpoint_steps": 0, "test": False}
        request = Request(**{**given, **fixed})
        with screen.waiting(f"Reading {request.data}{and_weights([recipe])}"):
            source, splits = read(request.data, request.val_size, request.limit, request.seed)
            start = load_initial_weights(request.model, recipe, source)
        with screen.waiting("Starting Ray" if request.workers != 0 else "Loading PyTorch"):
            workers = place(request, RunFolder(request.storage, request.name), debug=debug)
            from raycifar.cluster.sizing import Waiting
            from raycifar.engine.bench import Plan, bench_loop_per_worker
        screen.say(f"{request.model} on {workers}, {len(splits.train):,} images, {options['rounds']} rounds")
        run, status_store = RunFolder(request.storage, request.name), StatusStore(uuid.uuid4().hex)
        record(run, identify(request, source, splits, start), workers)

        def plan(job: Any) -> tuple[Any, dict[str, Any]]:
            return bench_loop_per_worker, {"plan": Plan(job, options["rounds"], tuple(against))}

        trainer = build_trainer(request, run, status_store, source, splits, start, workers, debug=debug, plan=plan)
        return fit(trainer, lambda running: screen.follow_phase(status_store, running, Waiting(workers, request.wait)))


def time_startup(options: dict[str, Any], screen: Screen) -> dict[str, Any]:
    """Return the seconds from a command to its first optimiser step, and those of the least that Ray takes."""
    workers = options["workers"] if options["workers"] is not None else 1
    seconds: dict[str, list[float]] = {"first_step_seconds": [], "floor_seconds": []}
    for number in range(options["rounds"]):
        with screen.waiting(f"Timing the start, {number + 1} of {options['rounds']}"):
            seconds["first_step_seconds"].append(time_first_step(options, workers))
            seconds["floor_seconds"].append(time_floor(workers))
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {name: spread(values) for name, values in seconds.items()} | {"ratio": spread(ratios)}


def time_first_step(options: dict[str, Any], workers: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "raycifar.train"]
        given = {**options, "workers": workers, "storage": folder, "report": False}
        for option in train_command.params:
            value = given.get(option.name or "")
            if isinstance(value, bool):
                command += option.opts if value else option.secondary_opts
            elif value is not None:
                command += [option.opts[0], str(value)]
        begun = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == FIRST_STEP:
                    took = time.perf_counter() - begun
                    process.terminate()
                    process.wait()
                    return took
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


def to_table(bench: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("stage", "", "images/s", "low to high", "share of bare"):
        table.add_column(heading, justify="left" if heading in ("stage", "") else "right")
    rows = dict(bench["stages"])
    bare = bench["bare_images_per_second"]
    for name, way in bench["against"].items():
        rate = way["spread"]["images_per_second"]
        rows[name] = {"images_per_second": rate, "share": {"median": rate["median"] / bare}}
    for name, row in rows.items():
        rate = row["images_per_second"]
        ends = f"{rate['low']:,.0f} to {rate['high']:,.0f}"
        table.add_row(name, STAGES[name], f"{rate['median']:,.0f}", ends, f"{row['share']['median']:.3f}")
    return table


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


if __name__ == "__main__":
    main()
