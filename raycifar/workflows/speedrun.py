"""Many runs of a recipe in one process, timed by the public rules of the CIFAR-100 speedrun."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import psutil

from raycifar.errors import RequestError, WorkError
from raycifar.machine import available_cpus
from raycifar.storage.run_folder import SPEEDRUN, RunFolder
from raycifar.terminal import Screen
from raycifar.workflows.requests import TrainingRequest
from raycifar.workflows.training import read_inputs

MEANS = ("top1", "top1_flip", "seconds", "whole_seconds")


def speedrun(
    request: TrainingRequest, screen: Screen, show: Callable[[dict[str, Any]], None], *, runs: int, out: str
) -> None:
    """Train with `runs` seeds, one after the other; write `speedrun.json`, and show it.

    If an error or Ctrl-C ends it early, the runs so far are still written and shown.

    Args:
        show: called at the end. out: a folder or URI.

    Raises:
        RequestError: the request is wrong; nothing was started.
        WorkError: a run's loss is no longer finite.
    """
    recipe = request.recipe
    for name, usual in (("pretrained", "none"), ("head_epochs", 0)):
        if (value := getattr(recipe, name)) != usual:
            raise RequestError(f"{name} is {value}: the clock is for training from scratch, so for {name} {usual}.")
    folder = RunFolder.for_output(out)
    inputs = read_inputs(request, screen)
    source, architecture = inputs.source, replace(inputs.initial.architecture, tta_flip=False)
    with screen.waiting("Loading PyTorch"):
        import torch

        from raycifar.analysis.statistics import mean_interval
        from raycifar.cluster.nodes import versions
        from raycifar.data.shards import to_shard
        from raycifar.engine.hardware import device_name, find_device
        from raycifar.engine.speedrun import TIMED, UNTIMED, SpeedRun

        device = find_device(request.device)
    scored = "val" if request.val_size else "test"
    tables, cpu = inputs.splits.tables(), torch.device("cpu")
    train_set, scored_set = (to_shard([tables[name]], cpu) for name in ("train", scored))
    threads = int(request.cpus_per_worker or available_cpus())
    trainer = SpeedRun(architecture, recipe, train_set, scored_set, device, threads, compile=request.compile)
    began = time.perf_counter()
    with screen.waiting("Preparing the steps"):
        trainer.prepare()
        prepared = time.perf_counter() - began
    found: dict[str, Any] = {
        "model": request.model,
        "recipe": asdict(recipe),
        "data": source.fingerprint,
        "train_images": len(train_set),
        "scored": {"split": scored, "images": len(scored_set)},
        "device": device_name(device),
        "precision": str(trainer.state.dtype).removeprefix("torch."),
        "compile": request.compile,
        "versions": versions(),
        "clock": {"timed": TIMED, "not_timed": UNTIMED},
        "work": asdict(trainer.work()),
        "preparation_seconds": prepared,
        "runs": [],
    }
    try:
        for number in range(runs):
            seed = request.seed + number
            doing = f"Training with seed {seed}"  # not shown on a GPU, where it takes seconds and costs time
            with screen.progress(doing) if device.type == "cpu" else nullcontext(lambda _: None) as progress:
                run = trainer.run(seed, progress)
            if not number:
                found["first_result_seconds"] = time.time() - psutil.Process().create_time()
            found["runs"].append(run)
            screen.say(
                f"seed {run['seed']}: top-1 {run['top1']:.4f}, with the mirror image {run['top1_flip']:.4f}, "
                f"{run['seconds']:.3f} s by the clock, {run['whole_seconds']:.3f} s with scoring"
            )
            if not math.isfinite(run["train_loss"]):
                raise WorkError(
                    f"With seed {seed}, the training loss is no longer finite, so the run doesn't count. Try a smaller "
                    f"--lr{', or run without --compile' if request.compile else ''}."
                )
    finally:
        if found["runs"]:
            found |= {name: possible(name, mean_interval([run[name] for run in found["runs"]])) for name in MEANS}
            show(found)  # first, so that no figure is lost where the file can't be written
            folder.write_json(SPEEDRUN, found)
            screen.say(f"Written to {folder.location}: {SPEEDRUN}")


def possible(name: str, interval: dict[str, Any]) -> dict[str, Any]:
    """Return an interval without impossible values: Student's of a few runs may hold times below 0."""
    if interval["low"] is None:
        return interval
    most = math.inf if "seconds" in name else 1.0
    return {**interval, "low": max(0.0, interval["low"]), "high": min(most, interval["high"])}


def facts(found: dict[str, Any]) -> dict[str, str]:
    """Return what was computed, on what, and what took time outside the clock, in words."""
    work, clock = found["work"], found["clock"]
    scored = {"test": "test", "val": "validation"}[found["scored"]["split"]]
    by_size = ", ".join(f"{count / 1e6:.1f} M at {size} px" for size, count in work["multiply_adds"].items())
    return {
        "device": f"{found['device']}, {found['precision']}",
        "images": f"{found['train_images']:,} to train on, {found['scored']['images']:,} {scored} images scored",
        "network": f"{work['parameters']:,} parameters; multiply-adds an image: {by_size}, mean "
        f"{work['multiply_adds_mean'] / 1e6:.1f} M",
        "a run": f"{work['steps']:,} steps, {work['images']:,} images, {work['petaflop']:.3g} PFLOP",
        "timed": "; ".join(clock["timed"]),
        "not timed": "; ".join(clock["not_timed"]),
        "the user's clock": f"{found['first_result_seconds']:.1f} s from the command to the first run's scores, "
        f"{found['preparation_seconds']:.1f} s of them to prepare the steps",
    }
