"""The report of a comparison, and of runs side by side."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raycifar.analysis import charts, prose
from raycifar.analysis.comparison import by_model, conclusions
from raycifar.analysis.diagnosis import seed_variance
from raycifar.analysis.markdown import results_table
from raycifar.analysis.page import render
from raycifar.analysis.reports import report_run
from raycifar.analysis.run_files import RunFiles
from raycifar.models.recipe import MAX_NUMBER
from raycifar.models.recipes import shared_options
from raycifar.words import count, listed

MIN_SEEDS = 3  # of each model, for a verdict to rest on


def report_comparison(
    name: str,
    runs: Sequence[RunFiles],
    comparison: dict[str, Any] | None,
    storage: str = "results",
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the report of a comparison as `report.json` holds it; `comparison` is None while it is under way."""
    found = []
    for model, same in by_model(runs).items():
        tested = [test for run in same if (test := run.history.test)]
        limited = bool(same[0].history.run["limit"])
        if tested and (
            finding := seed_variance(model, [test["top1"] for test in tested], tested[0]["images"], limited=limited)
        ):
            found.append(finding)
    done = sum((run.history.result or {}).get("status") == "finished" for run in runs)
    sentences = conclusions(comparison) if comparison else []
    finished = f"{done} of {count(len(runs), 'run')} finished"
    state = f"{finished}." if comparison else f"{finished}; the comparison is under way or was interrupted."
    return {
        "name": name,
        "state": state,
        "notes": [*notes, *(note for run in runs for note in run.notes)],
        "headline": prose.headline(found) if found else "",
        "findings": [finding.to_json() for finding in found],
        "paragraph": " ".join([state, *sentences, *(finding.evidence for finding in found)]),
        "sentences": sentences,
        "results": results_table(comparison, {run.name: run.history for run in runs}) if comparison else None,
        "conditions": shared_conditions(runs),
        "runs": [about_run(run) for run in runs],
        "next": next_comparison(runs, comparison, storage),
    }


def about_run(files: RunFiles) -> dict[str, Any]:
    """Return what a page of several runs says of each."""
    report, history = report_run(files), files.history
    return {key: report[key] for key in ("name", "state", "headline", "findings")} | {
        "model": history.model,
        "seed": history.run["seed"],
        "images": history.num_train,
        "epochs": f"{len(history.records)} of {history.recipe.epochs}",
        "top1": (history.test or {}).get("top1"),
    }


def shared_conditions(runs: Sequence[RunFiles]) -> str:
    """Return what all runs have in common, in a sentence; empty where they share nothing that matters."""
    histories = [run.history for run in runs]
    values = {
        "epoch": {history.recipe.epochs for history in histories},
        "training image": {history.num_train for history in histories},
        "validation image": {history.num_val for history in histories},
        "test image": {history.run["data"]["test"] for history in histories},
    }
    shared = [count(numbers.pop(), noun) for noun, numbers in values.items() if len(numbers) == 1]
    seeds = sorted({history.run["seed"] for history in histories})
    shared.append(f"seed{'s' * (len(seeds) > 1)} {listed(list(map(str, seeds)))}")
    return f"Conditions: {', '.join(shared)}." if runs else ""


def report_overlay(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Return the report of any runs side by side, without a verdict."""
    return report_comparison(listed([run.name for run in runs]), runs, None) | {
        "state": f"{count(len(runs), 'run')} side by side, without a verdict.",
        "headline": "",
        "findings": [],
        "paragraph": "\n\n".join(f"{run.name}: {prose.paragraph(run.history, run.findings)}" for run in runs),
    }


def next_comparison(runs: Sequence[RunFiles], comparison: dict[str, Any] | None, storage: str) -> list[prose.Step]:
    """Return the comparison that would tell more: of networks that are trained for longer, or with more seeds."""
    if not comparison or not comparison["pairs"] or not runs:
        return []
    pairs, histories = comparison["pairs"], [run.history for run in runs]
    run, epochs = histories[0].run, max(history.recipe.epochs for history in histories)
    undecided = [pair for pair in pairs if pair["verdict"] == "undecided"]
    had = min(min(pair.get("runs", [1])) for pair in pairs)
    needed = [max(pair["seeds_needed"], 1 + max(pair.get("runs", [1]))) for pair in undecided if pair["seeds_needed"]]
    seeds = max(MIN_SEEDS, had, *needed)
    models = list(dict.fromkeys(history.model for history in histories))
    reasons = [f"{count(seeds, 'seed')} of each model"] if seeds > had else []
    if any(pair.get("immature") for pair in pairs):
        epochs = min(MAX_NUMBER, 2 * epochs)
        reasons.append(f"{epochs} epochs")
    if run["limit"]:
        run = {**run, "limit": None}
        reasons.append("all images")
    options = shared_options((history.model, replace(history.recipe, epochs=epochs)) for history in histories)
    if options is None or not reasons:
        return []
    options |= {"seeds": seeds, **prose.at(storage)}
    command = prose.to_command(run, "compare", options, models)
    return [{"command": command, "reason": listed(reasons)}]


def comparison_page(
    report: dict[str, Any],
    runs: Sequence[RunFiles],
    comparison: dict[str, Any] | None,
    links: dict[str, str],
    *,
    overlay: bool = False,
) -> str:
    """Return the `report.html` of a comparison, or of runs side by side.

    Args:
        links: the paths of the runs' pages from this one, by name. overlay: draw each run by itself.
    """
    drawn: dict[str, str] = {}
    groups = {run.name: [run] for run in runs} if overlay else by_model(runs)
    for score, words in charts.COMPARED.items():
        curves = {model: [run.history.column(score) for run in same] for model, same in groups.items()}
        curves = {model: those for model, those in curves.items() if np.isfinite(np.concatenate(those)).any()}
        if curves:
            ends = "; ".join(f"{model} ends at {last_mean(those):.3f}" for model, those in curves.items())
            averaged = "" if overlay else ", mean over the seeds, and the runs"
            description = f"{words.capitalize()} by epoch{averaged}: {ends}."
            drawn[score] = charts.bands(curves, words, description)
    if comparison:
        models = comparison["models"]
        for key, words in (("device_seconds", "device-seconds to train"), ("parameters", "parameters")):
            spots = {name: (m[key], top1_of(m, runs)) for name, m in models.items()}
            ends = "; ".join(f"{name}: {np.mean(top1):.3f} at {cost:,.0f}" for name, (cost, top1) in spots.items())
            drawn[key] = charts.scatter(spots, words, f"Test accuracy against {words}. {ends}.")
        if comparison["pairs"]:
            drawn["pairs"] = charts.differences(comparison["pairs"], " ".join(report["sentences"]))
    several = max(map(len, groups.values()), default=0)
    return render(
        "compared.html",
        drawn,
        title=report["name"],
        report=report,
        comparison=comparison,
        models={name: prose.cells(model) for name, model in (comparison or {"models": {}})["models"].items()},
        links=links,
        several=several,
        overlay=overlay,
    )


def top1_of(model: dict[str, Any], runs: Sequence[RunFiles]) -> list[float]:
    """Return the test accuracy of each run of a model of a comparison; the mean alone where a run is gone."""
    top1 = [test["top1"] for run in runs if run.name in model["runs"] and (test := run.history.test)]
    return top1 if len(top1) == len(model["runs"]) else [model["top1"]["mean"]]


def last_mean(curves: Sequence[np.ndarray]) -> float:
    """Return the mean of the curves' last known values."""
    return float(np.mean([curve[np.isfinite(curve)][-1] for curve in curves if np.isfinite(curve).any()]))
