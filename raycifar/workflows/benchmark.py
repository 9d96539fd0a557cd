"""Where the time goes on this machine or cluster, compared with the bare compute limit."""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from raycifar.errors import RequestError, WorkError, in_a_line
from raycifar.machine import processor
from raycifar.storage.files import ask
from raycifar.storage.locations import check_location
from raycifar.storage.run_folder import BENCH, BENCH_CHART, PLAN_CHART, RUN, RunFolder
from raycifar.terminal import Screen
from raycifar.words import count, listed
from raycifar.workflows import planning
from raycifar.workflows.datasets import warn_of_leaks
from raycifar.workflows.planning import INTERCONNECTS, Measured, Place, Plan
from raycifar.workflows.requests import TrainingRequest, checked_option, to_arguments
from raycifar.workflows.training import allocate_workers, begin, fit, read_inputs
from raycifar.workflows.training_run import TrainingRun

if TYPE_CHECKING:
    from raycifar.cluster.sizing import Workers

Show = Callable[[dict[str, Any]], None]

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
MAX_SECONDS = 290  # of a bench: all of it takes five minutes
WORKERS_START = 15  # of them that worker processes take to start
SECONDS_OF_ROUND = 4  # in which steps of a number of workers are timed, at most
FEW_WORKERS = 3  # are run on CPUs, however few these are
IMPOSSIBLE = 1.05  # of the bare step's rate: more can only be noise
UNSTEADY = 0.2  # by which rounds may differ
POLL_SECONDS = 0.02  # between checks whether a run has begun


@dataclass(frozen=True)
class BenchRequest:
    """What to time, and how.

    Raises:
        RequestError: a value makes no sense.
    """

    training: TrainingRequest
    rounds: int = 5  # how often each stage is timed, at most
    against: Sequence[str] = ()  # other ways of training, timed as well
    startup: bool = False  # time the start, up to the first step, as well
    plan: str | None = None  # numbers of workers to predict, such as `1,2,4`
    interconnect: str | None = None  # the link between them, instead of the measured one
    price_per_hour: float | None = None  # of one device
    out: str = "bench"  # a folder or URI
    storage: str | None = None  # where runs are kept while they are timed; None is a temporary folder here

    def __post_init__(self) -> None:
        workers = self.training.workers
        if self.storage is not None:
            check_location(self.storage, "--storage", to_write=True)
        if unknown := set(self.against) - set(WAYS):
            raise RequestError(f"--against {sorted(unknown)[0]}: choose from {', '.join(WAYS)}.")
        if "stream" in self.against and workers == 0:
            raise RequestError("--against stream streams to workers: give --workers 1 or more.")
        if isinstance(workers, tuple):
            raise RequestError("an elastic run can't be timed: give --workers one number.")
        if self.plan is None and (self.interconnect or self.price_per_hour is not None):
            raise RequestError(
                "--interconnect and --price-per-hour are for a plan: give --plan, such as --plan 1,2,4,8."
            )
        checked_option("price_per_hour", float | None, self.price_per_hour, least=0)
        if self.counts and self.counts[-1] > 1 and workers == 0 and self.interconnect is None:
            raise RequestError(
                "a plan can't measure the network with --workers 0: give --interconnect "
                f"{', '.join(INTERCONNECTS)}, or --workers 2."
            )

    @cached_property
    def counts(self) -> list[int]:
        """The numbers of workers of the plan."""
        return [] if self.plan is None else planning.parse_plan(self.plan, self.training.recipe)


def bench(request: BenchRequest, screen: Screen, connection: ExitStack, show: Show, *, debug: bool = False) -> None:
    """Time a model's training, for at most five minutes; write `bench.json` and its charts, and show the first.

    If an error or Ctrl-C ends it early, what was timed so far is still written and shown.

    Args:
        connection: enters the connection to Ray. show: called at the end.
    """
    found: dict[str, Any] = {}
    training, machine = request.training, processor()
    if 0 < training.recipe.head_epochs < training.recipe.epochs:
        training = replace(training, recipe=replace(training.recipe, head_epochs=0))
    out = RunFolder.for_output(request.out)
    seconds = shares_of_time(1 + bool(request.counts) + request.startup, time.monotonic() + MAX_SECONDS)
    try:
        with scratch(request.storage) as storage:
            timed = replace(training, name="bench", storage=storage, checkpoint_steps=0, test=False)
            folder, inputs = RunFolder(storage, timed.name), read_inputs(timed, screen)
            warn_of_leaks(inputs.source, screen)
            workers = allocate_workers(timed, folder, screen, connection, debug=debug)
            run = TrainingRun(timed, folder, inputs, workers, debug=debug)
            begin(run, screen)
            machine = f"{run.workers}, {processor()}"
            place = find_place(run, request) if request.counts else None
            screen.say(
                f"This takes at most about {MAX_SECONDS / 60:.0f} minutes; Ctrl-C ends it, and what is timed is shown."
            )
            time_stages(run, request, screen, next(seconds), found)
            if place:
                time_plan(run, request, place, screen, next(seconds), found)
        if request.startup:
            connection.close()  # this process's Ray would take its share of the cores
            found["startup"] = time_startup(request, run.workers, screen, next(seconds))
    except KeyboardInterrupt:
        if not found:
            screen.say("No round is complete yet, so there is nothing to show.")
        raise
    finally:
        if found:
            about = {"model": training.model, "machine": machine, "recipe": asdict(training.recipe)}
            show(found)  # first, so that no figure is lost where a file can't be written
            keep(about | found, out)
            screen.say(f"Written to {out.location}: {BENCH} and charts")


@contextmanager
def scratch(storage: str | None) -> Iterator[str]:
    """Yield a folder for the runs that are timed, in `storage` or on this machine, which is deleted at the end."""
    if storage is None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as here:  # interrupted, workers still write
            yield here
        return
    folder = RunFolder(storage, f"bench-{uuid4().hex[:8]}")
    try:
        yield folder.location
    finally:
        with suppress(OSError):
            ask(folder.filesystem, lambda: folder.filesystem.delete_dir(folder.path()))


def keep(found: dict[str, Any], out: RunFolder) -> None:
    out.write_json(BENCH, found)
    if "stages" in found:
        out.write(BENCH_CHART, draw(found).encode())
    if len(found.get("plan", {}).get("workers", {})) > 1:
        out.write(PLAN_CHART, draw_plan(found).encode())


def shares_of_time(parts: int, ends: float) -> Iterator[float]:
    """Yield the seconds of each part of a bench as it begins: an equal share of what is left until `ends`."""
    for left in range(parts, 0, -1):
        yield max(0.0, ends - time.monotonic()) / left


# Timing ----------------------------------------------------------------------------------------------


def time_stages(run: TrainingRun, request: BenchRequest, screen: Screen, seconds: float, found: dict[str, Any]) -> None:
    """Add to `found` what came of the stages, as far as whole rounds were timed."""
    from raycifar.engine.bench import bench_loop_per_worker

    num_images = len(run.inputs.splits.train)
    screen.say(
        f"{run.request.model} on {run.workers}, {num_images:,} images and {count(request.rounds, 'round')} at most"
    )
    seconds -= WORKERS_START if run.workers.count else 0
    options = {"rounds": request.rounds, "baselines": tuple(request.against), "seconds": seconds}
    try:
        time_on_workers(run, screen, bench_loop_per_worker, **options)
    finally:
        if rates := run.status_store.timings():
            found.update(summarize(rates, request.against))
        run.status_store.delete()


def time_plan(
    run: TrainingRun, request: BenchRequest, place: Place, screen: Screen, seconds: float, found: dict[str, Any]
) -> None:
    """Add to `found` what each number of workers would take, from what is measured with those that fit here."""
    from raycifar.cluster.sizing import size_workers
    from raycifar.engine.step_times import step_times_loop_per_worker

    measured: dict[int, Measured] = {}
    training, counts = run.request, request.counts
    num_images, to_run = len(run.inputs.source.train) - training.val_size, planning.counts_to_measure(counts, place)
    ends = time.monotonic() + seconds
    for number, several in enumerate(to_run):
        left = (ends - time.monotonic()) / (len(to_run) - number) - (WORKERS_START if run.workers.count else 0)
        if number > 1 and left < SECONDS_OF_ROUND:
            break
        sizes = tuple(planning.sizes_to_time(counts, several, place, training.recipe.batch_size))
        timed = replace(training, name=f"plan-{several}", workers=run.workers.count and several)
        workers = size_workers(several, *training.sizing) if run.workers.count else run.workers
        few = TrainingRun(timed, RunFolder(timed.storage, timed.name), run.inputs, workers)
        begin(few, Screen(quiet=True))
        seconds = min(SECONDS_OF_ROUND * request.rounds, max(SECONDS_OF_ROUND, left))
        options = {"batch_sizes": sizes, "rounds": request.rounds, "seconds": seconds}
        screen.say(f"Timing steps on {workers}, {number + 1} of {len(to_run)}")
        try:
            measured[several] = Measured(**time_on_workers(few, screen, step_times_loop_per_worker, **options))
        finally:
            few.status_store.delete()
        plan = Plan(training.recipe, counts, num_images, place, measured, request.interconnect)
        found["plan"] = planning.summarize(plan, request.price_per_hour)


def time_on_workers(run: TrainingRun, screen: Screen, loop: Callable[..., Any], **options: Any) -> Any:
    """Run a timing loop on the workers, and return what the first one returns; see `fit`."""
    from raycifar.cluster.waiting import Waiting

    waiting = Waiting(run.workers, run.request.wait)
    return fit(run, lambda running: screen.follow_phase(run.status_store, running, waiting), loop, **options)


def find_place(run: TrainingRun, request: BenchRequest) -> Place:
    """Return what the workers of a plan would run on.

    Raises:
        RequestError: the link between workers can't be measured, and isn't given.
    """
    from raycifar.cluster.sizing import alive_nodes, placeable, usable_cpus

    use_gpu = run.workers.use_gpu
    if request.interconnect:
        return Place(use_gpu, shared=False, most=1)
    nodes = alive_nodes() if run.workers.count else []
    cpus = [usable_cpus(node["CPU"]) for node in nodes if node.get("CPU")]
    shared = len(cpus) == 1 and not use_gpu
    if use_gpu:
        most = placeable(nodes, {"GPU": 1})
    elif shared:
        each = run.request.cpus_per_worker
        most = int(cpus[0] / each) if each else max(FEW_WORKERS, int(cpus[0]))
    else:
        most = len(cpus)
    if most < min(2, request.counts[-1]):
        raise RequestError(
            "only one worker fits here, so the link between several can't be measured: give --interconnect "
            f"{', '.join(INTERCONNECTS)}."
        )
    return Place(use_gpu, shared, max(1, most))


def time_startup(request: BenchRequest, workers: "Workers", screen: Screen, seconds: float) -> dict[str, Any]:
    """Return the seconds from a command to its first optimizer step, and the least that Ray takes to start.

    There are as many rounds as fit into `seconds`, at least one and at most the request's.
    """
    rounds, timed = request.rounds, replace(request.training, workers=workers.count)
    took: dict[str, list[float]] = {"first_step_seconds": [], "floor_seconds": []}
    ends = time.monotonic() + seconds
    for number in range(rounds):
        if number and time.monotonic() + sum(values[-1] for values in took.values()) > ends:
            break
        with screen.waiting(f"Timing the start, {number + 1} of {rounds}"):
            took["first_step_seconds"].append(time_first_step(timed, request.storage))
            took["floor_seconds"].append(time_floor(workers))
    return {name: spread(values) for name, values in took.items()} | {"ratio": spread(ratios(*took.values()))}


def time_first_step(request: TrainingRequest, storage: str | None = None) -> float:
    """Return the seconds from the command to the moment at which its run records that training begins."""
    with scratch(storage) as folder:
        timed = replace(request, name="timed", storage=folder, report=False)
        command, run = [sys.executable, "-m", "raycifar.train", *to_arguments(timed)], RunFolder(folder, "timed")
        began = time.time()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                while process.poll() is None:
                    if training_began := (run.read_json(RUN) or {}).get("training_began"):
                        return training_began - began
                    time.sleep(POLL_SECONDS)
                assert process.stderr is not None
                raise WorkError(f"the timed run did not begin: {process.stderr.read().strip()}")
            finally:
                process.terminate()


EMPTY = """
import json, sys, time
import fsspec
from pyarrow import fs
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

memory = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))  # as in ray_train.py
run, workers = RunConfig(storage_path="/empty", storage_filesystem=memory), ScalingConfig(**json.loads(sys.argv[1]))
print(TorchTrainer(lambda: time.time(), scaling_config=workers, run_config=run).fit().return_value)
"""


def time_floor(workers: "Workers") -> float:
    """Return how long an empty trainer takes to its loop; without workers, how long Ray Train takes to import.

    Raises:
        WorkError: it failed.
    """
    code = EMPTY if workers.count else "import time, ray.train.torch; print(time.time())"
    scaling = {"num_workers": workers.count, "use_gpu": workers.use_gpu, "resources_per_worker": workers.resources}
    command, begun = [sys.executable, "-c", code, json.dumps(scaling)], time.time()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise WorkError(f"an empty trainer, timed beside this one, failed: {in_a_line(RuntimeError(done.stderr))}.")
    return float(done.stdout.split()[-1]) - begun


# Results ---------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the ratio of each value to the other of the same round."""
    return [a / b for a, b in zip(values, others, strict=True)]


def summarize(rates: dict[str, list[float]], against: Sequence[str]) -> dict[str, Any]:
    shares = {name: ratios(values, rates["bare"]) for name, values in rates.items()}
    speedups = {name: spread(ratios(rates["train"], rates[name])) for name in against}
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
        "following_share": spread(ratios(rates["train"], rates["following"])),
        "checkpoint_share": spread(ratios(rates["train"], rates["checkpoint"])),
        "against": {
            name: {
                "images_per_second": statistics.median(rates[name]),
                "speedup": speedups[name]["median"],
                "spread": {"images_per_second": spread(rates[name]), "speedup": speedups[name]},
            }
            for name in against
        },
    }


def sentences(bench: dict[str, Any]) -> list[str]:
    """Return where the time goes and what would help, in words."""
    share = {name: stage["share"]["median"] for name, stage in bench["stages"].items()}
    costs = {name: 1 / share[name] - 1 / share[before] for before, name in itertools.pairwise(share)}
    lines = [f"train runs at {bench['ratio']:.3f} of the bare step's rate (median of {count(bench['n'], 'round')})."]
    if max(costs.values()) < 0.02:
        lines.append(
            "Nothing that surrounds the step costs 2% of it: only a cheaper step would help (--compile, --precision)."
        )
    else:
        most = max(costs, key=costs.__getitem__)
        lines.append(
            f"Most is lost to {STAGES[most].removeprefix('and ')}, {costs[most]:.1%} of a bare step: {HELP[most]}."
        )
    lines += noise(bench)
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


def noise(bench: dict[str, Any]) -> list[str]:
    """Return warnings of noise: of rates that are impossible, and of rounds that differ too much."""
    stages, lines = bench["stages"], []
    faster = [name for name, stage in stages.items() if stage["share"]["median"] > IMPOSSIBLE]
    if faster:
        share = max(stages[name]["share"]["median"] for name in faster)
        were = "was" if len(faster) == 1 else "were"
        lines.append(
            f"This is noise: {listed(faster)} can't be faster than the bare step alone, but {were} timed at up to "
            f"{share:.2f} of its rate. Something else used the machine: time it again while it is idle."
        )
    rates = {name: stage["images_per_second"] for name, stage in stages.items()}
    spreads = {name: rate["high"] / rate["low"] - 1 for name, rate in rates.items() if rate["low"]}
    if spreads and max(spreads.values()) > UNSTEADY:
        most = max(spreads, key=spreads.__getitem__)
        lines.append(
            f"This is noise: the rounds of {most} differ by {spreads[most]:.0%}, more than a fifth. Read nothing into "
            "smaller differences: time it again on an idle machine, with more --rounds."
        )
    return lines


def draw(bench: dict[str, Any]) -> str:
    from raycifar.analysis.charts import bars

    rates = {name: stage["images_per_second"] for name, stage in bench["stages"].items()}
    rates |= {name: way["spread"]["images_per_second"] for name, way in bench["against"].items()}
    description = "; ".join(f"{name}: {rate['median']:,.0f} images per second" for name, rate in rates.items())
    bare = bench["bare_images_per_second"]
    rows = [(name, rate["median"], rate["low"], rate["high"]) for name, rate in rates.items()]
    title = f"Where the time goes: {bench['model']} on {bench.get('machine', 'an unknown machine')}"
    limit = (f"the bare step: {bare:,.0f} images per second", bare)
    return bars(rows, limit, "images per second", title, f"{title}. {description}.")


def draw_plan(bench: dict[str, Any]) -> str:
    from raycifar.analysis.charts import scaling

    plan = bench["plan"]
    predicted = {count: figures["images_per_second"] for count, figures in plan["workers"].items()}
    measured = {check["workers"]: (check["low"], check["measured"]) for check in plan["checked"]}
    description = "; ".join(f"{count} workers: {rate:,.0f} images per second" for count, rate in predicted.items())
    return scaling(predicted, measured, f"{bench['model']}. {description}.")
