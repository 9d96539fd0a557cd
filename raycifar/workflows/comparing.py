"""Comparing finished runs: checks that they are comparable, and writes the verdict."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from raycifar import models
from raycifar.analysis.comparison import (
    Finished,
    by_model,
    compare,
    conclusions,
    leave_out_near_duplicates,
    not_comparable,
    whether_the_order_changes,
)
from raycifar.analysis.history import RunHistory
from raycifar.errors import RequestError
from raycifar.models import Architecture
from raycifar.storage.parquet import from_lists
from raycifar.storage.run_folder import (
    COMPARISON,
    COMPARISON_TABLE,
    METRICS,
    PREDICTIONS,
    RESULT,
    RUN,
    STUDY,
    RunFolder,
)
from raycifar.storage.spreadsheets import to_csv
from raycifar.terminal import Screen
from raycifar.workflows.reporting import show_report, write_comparison
from raycifar.workflows.requests import ComparisonRequest
from raycifar.workflows.training import lock
from raycifar.workflows.training_run import read_run

Show = Callable[[dict[str, Any]], None]

SCORES = ("top1", "top5", "loss")


def compare_runs(locations: Sequence[str], request: ComparisonRequest, screen: Screen, show: Show) -> None:
    """Compare finished runs, given by paths or URIs; write and show the comparison, and write its report.

    Raises:
        RequestError: a run isn't finished, or the runs can't be compared.
    """
    if unused := request.only_for_training():
        raise RequestError(f"{unused[0]} is for --models to train: finished runs are compared as they are.")
    if len(locations) < 2:
        raise RequestError(f"{locations[0]} is a single run: give at least two to compare.")
    folder = RunFolder(request.storage, request.name)
    folder.check_holds_none(RUN, STUDY)
    finished = [read_finished(location) for location in locations]
    check_comparable(finished)
    with ExitStack() as until_end:
        folder = lock(folder, screen, until_end, folder.runs)
        show(conclude(keep_files(finished, folder), folder, request, {}))
        if request.report:
            show_report(lambda: write_comparison(folder), screen)


def read_finished(path: str) -> Finished:
    """Return the finished run at a path or URI.

    Raises:
        RequestError: the folder holds no run, the run isn't finished, or a file of it is damaged.
    """
    folder = RunFolder.at(path)
    about, result, predictions = read_run(folder), folder.read_json(RESULT), folder.read_table(PREDICTIONS)
    if about is None:
        raise RequestError(f"{path} is not a run's folder: it holds no {RUN}.")
    if not result or result["status"] != "finished":
        state = result["status"] if result else "not finished"
        raise RequestError(f"{path} can't be compared: it is {state}.")
    if predictions is None or "test" not in result:
        raise RequestError(f"{path} can't be compared: it has no {PREDICTIONS}; train it with the test set.")
    history = folder.history()
    wrong = [f"no {name} in its {RUN}" for name in ("architecture", "parameters") if name not in about]
    known = result["test"] | {"images_per_second": result.get("images_per_second")}
    wrong += [f"no {name} in its {RESULT}" for name in ("images_per_second", "loss") if known.get(name) is None]
    if not history or len(history) != result.get("epochs", len(history)):
        wrong.append(f"{len(history)} epochs in its {METRICS}, not {result.get('epochs', 'any')}")
    if len(predictions) != (images := about["data"]["test"]):
        wrong.append(f"{len(predictions):,} images in its {PREDICTIONS}, not {images:,}")
    if wrong:
        raise RequestError(f"{path} can't be compared: it has {' and '.join(wrong)}.")
    labels = predictions["label"].to_numpy()
    correct = from_lists(predictions["top5"]) == labels[:, None]
    likelihood = np.take_along_axis(from_lists(predictions["probabilities"]), labels[:, None], 1)[:, 0]
    loss = -np.log(likelihood.clip(np.finfo(np.float32).tiny))
    copies = predictions["near_duplicate"].to_numpy() > 0 if "near_duplicate" in predictions.column_names else None
    whole = RunHistory(about, history, result)
    return Finished(folder.name, folder.location, whole, correct[:, 0], correct.any(1), loss, copies)


def keep_files(finished: Sequence[Finished], folder: RunFolder) -> list[Finished]:
    """Copy what the comparison's report needs of runs that are elsewhere into its folder, each under its own name.

    Raises:
        RequestError: the folder can't be written, or holds another run of that name.
    """
    kept: list[Finished] = []
    places: dict[str, str] = {}
    for run in finished:
        name = run.name
        while places.setdefault(name, run.folder) != run.folder:
            name += "-again"
        source, copy = RunFolder.at(run.folder), RunFolder(folder.location, name)
        if source != copy:
            if copy.exists(RUN) and copy.read(RUN) != source.read(RUN):
                raise RequestError(f"{copy.location} holds another run: give another --name.")
            for file in (RUN, METRICS, RESULT):
                copy.write(file, source.read(file) or b"")
            copy.manifest.seal(RUN, METRICS, RESULT)
        kept.append(replace(run, name=name))
    return kept


def conclude(
    finished: list[Finished], folder: RunFolder, request: ComparisonRequest, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Compare the runs, and write and return the comparison.

    Raises:
        RequestError: the runs can't be compared.
    """
    check_comparable(finished)
    without = request.without_near_duplicates
    if unknown := [run.folder for run in finished if run.near_duplicate is None and without]:
        raise RequestError(
            f"{unknown[0]}/{PREDICTIONS} doesn't say which test images are near duplicates of training images: "
            f"run `raycifar evaluate {unknown[0]}` to find them."
        )
    groups = by_model(leave_out_near_duplicates(finished) if without else finished)
    architectures = {name: read_architecture(runs[0]) for name, runs in groups.items()}
    flops = {name: models.flops(architecture) for name, architecture in architectures.items()}
    synthetic = finished[0].run["data"]["source"].startswith("synthetic")
    price = request.price_per_hour
    comparison = {"name": folder.name, "synthetic": synthetic, **compare(groups, flops, price), **more}
    if without:
        before, images = compare(by_model(finished), flops, price)["models"], len(finished[0].correct)
        left = len(next(iter(groups.values()))[0].correct)
        told = whether_the_order_changes(before, comparison["models"], images, left)
        comparison["without_near_duplicates"] = {"images": left, "sentence": told}
    folder.write_json(COMPARISON, comparison)
    rows = to_rows(comparison)
    folder.write(COMPARISON_TABLE, to_csv([*rows[0]], (row.values() for row in rows)).encode())
    folder.manifest.seal(STUDY, COMPARISON)
    return comparison


def check_comparable(finished: Sequence[Finished]) -> None:
    if reasons := not_comparable(finished):
        raise RequestError(f"these runs can't be compared: {'; '.join(reasons)}.")


def read_architecture(run: Finished) -> Architecture:
    try:
        return Architecture.from_json(run.run["architecture"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{run.folder}/{RUN} is damaged: its architecture lacks {error}.") from error


def sentences(comparison: Mapping[str, Any]) -> list[str]:
    lines = []
    if any(model["top1"]["n"] == 1 for model in comparison["models"].values()):
        lines.append("An interval needs several seeds.")
    lines += conclusions(comparison)
    if comparison.get("synthetic"):
        lines.append("These are synthetic images: the accuracies say nothing about CIFAR-100.")
    return lines


def to_rows(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each model: its scores with 95% intervals, and its costs."""
    rows = []
    for name, model in comparison["models"].items():
        row = {"model": name, "runs": model["top1"]["n"]}
        for score in SCORES:
            row |= {score: model[score]["mean"]} | {f"{score}_{end}": model[score][end] for end in ("low", "high")}
        keys = ("parameters", "flops", "images_per_second", "device_seconds", "cost", "at_equal_time")
        rows.append(row | {key: model[key] for key in keys})
    return rows
