"""Train several models, seeds and settings, and say which is better: `raycifar compare --models cnn,vgg16`."""

import csv
import dataclasses
import io
from datetime import datetime
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.table import Table

from raycifar import models
from raycifar.analysis.comparison import Finished, by_model, compare, not_comparable
from raycifar.data.tables import Source, from_lists
from raycifar.errors import RequestError, WorkError
from raycifar.models import Architecture
from raycifar.models.initial_weights import InitialWeights, load_initial_weights
from raycifar.models.recipes import recipe_from_json
from raycifar.options import Interrupted, check_name, command, pick_recipe, recipe_options, training_options
from raycifar.recipes import Recipe, changes, describe_changes
from raycifar.report import Refresher, explain, write_comparison, write_run
from raycifar.storage.run_folder import (
    COMPARISON,
    COMPARISON_TABLE,
    PREDICTIONS,
    REPORT_PAGE,
    RESULT,
    RUN,
    STUDY,
    RunFolder,
)
from raycifar.terminal import Screen, alongside
from raycifar.train import Request, and_weights, check_batch_size, read, storing_in

SCORES = ("top1", "top5", "loss")


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--models", "names", help=f"Comma-separated, of {', '.join(models.names())}, timm:NAME.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="Runs of each model, with seeds from --seed on.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="The first seed.")
@click.option("--search", type=click.IntRange(min=0), default=0, help="Trials that look for each model's best recipe.")
@click.option("--space", help="TOML file of what a search varies.  [lr, weight decay, batch size, smoothing, augment]")
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="Of one device: shows what training cost.")
@click.option("--name", help="The comparison's name; the same name continues it.  [compare and time]")
@click.option("--workers", type=click.IntRange(min=1), default=1, help="Of each trial.")
@click.option("--max-trials", type=click.IntRange(min=1), help="Trials at once.  [as many as the cluster holds]")
@click.option("--checkpoint-steps", type=click.IntRange(min=0), default=200, help="0: at the end of each epoch alone.")
@training_options
@recipe_options
@command
def main(debug: bool, **options: Any) -> None:
    """Train several models and seeds, orchestrated by Ray Tune, and say which is better and how sure that is.

    Given the folders of finished runs, compare those, and train nothing.

    The options from --epochs on are the recipe's: what isn't given is each model's own.
    """
    name = options["name"] or f"compare-{datetime.now():%Y%m%d-%H%M%S}"
    check_name(name)
    screen, folder = Screen(), RunFolder(options["storage"], name)
    price = options["price_per_hour"]
    if bool(options["runs"]) == bool(options["names"]):
        raise RequestError("either --models to train, or the folders of finished runs: one of both is needed.")
    if options["runs"]:
        conclude([read_run(path) for path in options["runs"]], folder, price, screen, {})
        show_report(options, folder, screen)
    else:
        train_and_compare(options, name, folder, screen, debug=debug)


# Training -------------------------------------------------------------------------------------------


def train_and_compare(options: dict[str, Any], name: str, folder: RunFolder, screen: Screen, *, debug: bool) -> None:
    names = [model.strip() for model in options["names"].split(",")]
    for model in names:
        models.find(model)
    if len(set(names)) < len(names):
        raise RequestError(f"--models {options['names']} names a model twice: --seeds takes several runs of it.")
    if options["search"] and not options["val_size"]:
        raise RequestError("--search chooses by validation accuracy: it needs --val-size above 0.")
    recipes = {model: pick_recipe(model, options) for model in names}
    for recipe in recipes.values():
        check_batch_size(recipe, options["workers"])
    spaces = build_spaces(options, recipes) if options["search"] else {}
    seeds = list(range(options["seed"], options["seed"] + options["seeds"]))

    with screen.waiting(f"Reading {options['data']}{and_weights(recipes.values())}"):
        source, splits = read(options["data"], options["val_size"], options["limit"], options["seed"])
        starts = {model: load_initial_weights(model, recipe, source) for model, recipe in recipes.items()}
    agreement = agree(folder, options, recipes, spaces, source, starts)

    given = {key: options[key] for key in Request.__annotations__ if key in options}
    base = Request(**{**given, "name": name, "model": names[0], "recipe": recipes[names[0]]})
    with screen.waiting("Starting Ray"):
        from raycifar.cluster import sizing as cluster
        from raycifar.workflows.tuning import AshaByModel, Plan, Study, orchestrate

        cluster.connect(debug=debug, dashboard=True)
        # The costliest first: what is left at the end then fills the cluster best.
        cost = {model: models.flops(start.architecture) for model, start in starts.items()}.__getitem__
        recipes = {model: recipes[model] for model in sorted(names, key=cost, reverse=True)}
        trials = len(names) * (options["search"] + len(seeds))
        workers, fit = cluster.size_trials(options["workers"], options["device"], options["cpus_per_worker"], trials)
        most = options["max_trials"] or fit
        with folder.marker() as file:
            cluster.check_nodes(workers, file)
    screen.facts(
        name,
        {
            "models": ", ".join(names),
            "trials": f"{len(seeds)} of each" + f", after {options['search']} to search" * bool(options["search"]),
            "data": source.name,
            "images": f"{len(splits.train):,} training, {len(splits.val):,} validation, {len(splits.test):,} test",
            "at once": f"{most} trial{'s' * (most > 1)}, each with {workers}",
            "folder": folder.folder,
        },
    )
    with storing_in(folder, screen):
        folder.write_json(STUDY, agreement)

    refresh = Refresher(lambda: write_comparison(folder)) if options["report"] else lambda: None
    study = Study(base, folder.folder, recipes, starts, seeds, options["search"], spaces)
    plan = Plan(study, most, AshaByModel({model: recipe.epochs for model, recipe in recipes.items()}))
    if done := sum(task.over for task in plan.tasks):
        screen.say(f"{done} trials are over already, and not run again.")
    try:
        alongside(
            lambda: orchestrate(study, plan, source, workers),
            lambda running: screen.follow_trials(lambda: plan.tasks, running, refresh),
        )
    except Interrupted:
        screen.say(f"To continue, give the same command with --name {name}")
        raise

    finals = [task for tasks in plan.finals.values() for task in tasks]
    finished = [read_run(study.run(task).folder) for task in finals if task.status == "finished"]
    failed = [{"run": task.name, "reason": task.reason} for task in plan.tasks if task.status == "failed"]
    search = {model: describe_search(plan, model) for model in names if options["search"]}
    order = {model: rank for rank, model in enumerate(names)}
    finished.sort(key=lambda run: (order[run.run["model"]], run.run["seed"]))
    if options["report"]:
        with screen.waiting("Drawing the reports of the runs"):
            for run in finished:
                explain(lambda run=run: write_run(RunFolder.at(run.folder), source))  # type: ignore[misc]
    if finished:
        conclude(finished, folder, options["price_per_hour"], screen, {"search": search, "failed": failed})
    show_report(options, folder, screen)
    missing = [task.name for task in finals if task.status != "finished"]
    if missing:
        reasons = "; ".join(f"{task.name}: {task.reason}" for task in finals if task.status != "finished")
        raise WorkError(
            f"{len(missing)} of {len(finals)} trials failed: {reasons} The same command with --name {name} tries again."
        )


def build_spaces(options: dict[str, Any], recipes: dict[str, Recipe]) -> dict[str, Any]:
    """Return each model's search space; what is given as an option is not searched."""
    from raycifar.workflows.search_space import default_space, read_space

    spaces = {
        model: read_space(options["space"], model) if options["space"] else default_space(recipe)
        for model, recipe in recipes.items()
    }
    spaces = {
        model: {field: where for field, where in space.items() if options.get(field) is None}
        for model, space in spaces.items()
    }
    if not all(spaces.values()):
        raise RequestError("--search has nothing to vary: every field of its space is given as an option.")
    return spaces


def agree(
    folder: RunFolder,
    options: dict[str, Any],
    recipes: dict[str, Recipe],
    spaces: dict[str, Any],
    source: Source,
    starts: dict[str, InitialWeights],
) -> dict[str, Any]:
    """Return what must be the same for a comparison of the same name to be continued.

    More models or seeds may be asked for: what has been trained for it is still right.

    Raises:
        RequestError: a comparison of that name was begun otherwise; the message names the differences.
    """
    from raycifar.workflows.search_space import space_to_json

    now: dict[str, Any] = {
        "data": source.fingerprint(),
        **{key: options[key] for key in ("val_size", "limit", "compile", "seed", "search")},
    }
    for model, recipe in recipes.items():
        now[model] = dataclasses.asdict(recipe)
        now[f"{model} weights"] = starts[model].fingerprint()
        if options["search"]:
            now[f"{model} space"] = space_to_json(spaces[model])
    earlier = folder.read_json(STUDY) or {}
    for key in now.keys() & earlier.keys():
        if earlier[key] != now[key]:
            there, here = (recipe_from_json(key, value[key]) if key in recipes else None for value in (earlier, now))
            if there and there == here:  # which an earlier version wrote with other fields
                continue
            what = (
                f"{key} {describe_changes(there, here)} there, {describe_changes(here, there)} here"
                if there and here
                else f"{key} {earlier[key]} there, {now[key]} here"
            )
            raise RequestError(f"{folder.folder} is another comparison: {what}. Give another --name, or its options.")
    return {**earlier, **now}


def describe_search(plan: Any, model: str) -> dict[str, Any]:
    """Return how the search for a model's recipe went, and what came of it."""
    trials = []
    base = plan.study.recipes[model]
    for task in plan.searches[model]:
        top1 = plan.val_top1(task)
        trials.append(
            {
                "run": task.name,
                "status": task.status,
                "changes": changes(task.recipe, base),
                "epochs": len(top1),
                "val_top1": top1[-1] if top1 else None,
            }
        )
    best, recipe = plan.best(model), trials[0]["val_top1"]
    if best is None:
        sentence = f"The search for {model} failed in every trial; its recipe was kept."
    elif best.recipe == base:
        sentence = (
            f"The search for {model} found nothing better than its recipe in {len(trials)} trials: validation top-1 "
            f"{recipe:.4f}."
        )
    else:
        against = "which failed" if recipe is None else f"{recipe:.4f}"
        sentence = (
            f"The search for {model} found {describe_changes(best.recipe, base)}: validation top-1 "
            f"{plan.val_top1(best)[-1]:.4f}, against its recipe's {against} (one run each, the best of {len(trials)})."
        )
    return {"trials": trials, "best": best and best.name, "sentence": sentence}


# The result -----------------------------------------------------------------------------------------


def read_run(path: str) -> Finished:
    """Return a finished run by its folder, or URI.

    Raises:
        RequestError: it is none, or wasn't finished.
    """
    run = RunFolder.at(path)
    about, result, predictions = run.read_json(RUN), run.read_json(RESULT), run.read(PREDICTIONS)
    if about is None:
        raise RequestError(f"{path} is no run's folder: it holds no {RUN}.")
    if not result or result["status"] != "finished":
        state = result["status"] if result else "not finished"
        raise RequestError(f"{path} can't be compared: it is {state}.")
    if predictions is None or "test" not in result:
        raise RequestError(f"{path} can't be compared: it has no {PREDICTIONS}, so its test images aren't known.")
    table = pq.read_table(pa.BufferReader(predictions), columns=["label", "top5"])
    right = from_lists(table["top5"])[:, 0] == table["label"].to_numpy()
    return Finished(run.name, run.folder, about, run.history(), result, right)


def conclude(
    finished: list[Finished], folder: RunFolder, price_per_hour: float | None, screen: Screen, more: dict[str, Any]
) -> None:
    """Compare the runs, write the comparison, and show it.

    Raises:
        RequestError: they can't be compared.
    """
    if reasons := not_comparable(finished):
        raise RequestError(f"these runs can't be compared: {'; '.join(reasons)}.")
    groups = by_model(finished)
    architectures = {name: Architecture.from_json(runs[0].run["architecture"]) for name, runs in groups.items()}
    flops = {name: models.flops(architecture) for name, architecture in architectures.items()}
    comparison = {"name": folder.name, **compare(groups, flops, price_per_hour), **more}
    folder.write_json(COMPARISON, comparison)
    folder.write(COMPARISON_TABLE, to_csv(comparison).encode())

    for table in to_tables(comparison):
        screen.console.print(table)
    if any(model["top1"]["n"] == 1 for model in comparison["models"].values()):
        screen.say("An interval needs several seeds.")
    screen.lines(pair["sentence"] for pair in comparison["pairs"])
    screen.lines(search["sentence"] for search in comparison.get("search", {}).values())
    if finished[0].run["data"]["source"].startswith("synthetic"):
        screen.say("These are synthetic images: the accuracies say nothing about CIFAR-100.")
    screen.say(f"Comparison: {folder.folder}")


def show_report(options: dict[str, Any], folder: RunFolder, screen: Screen) -> None:
    if options["report"]:
        with screen.waiting("Drawing the report"):
            report = explain(lambda: write_comparison(folder))
        shown = f"What the curves show: {report['headline']}. " if report["headline"] else ""
        screen.say(f"{shown}See {REPORT_PAGE}")


def to_csv(comparison: dict[str, Any]) -> str:
    """Return a line for each model."""
    rows = []
    for name, model in comparison["models"].items():
        row = {"model": name, "runs": model["top1"]["n"]}
        for score in SCORES:
            row |= {score: model[score]["mean"]} | {f"{score}_{end}": model[score][end] for end in ("low", "high")}
        keys = ("parameters", "flops", "images_per_second", "device_seconds", "cost", "at_equal_time")
        rows.append(row | {key: model[key] for key in keys})
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_tables(comparison: dict[str, Any]) -> list[Table]:
    """Return what the models reached, and what they cost; both fit a terminal of 80 columns."""
    budget = comparison["equal_device_seconds"]
    priced = any(model["cost"] is not None for model in comparison["models"].values())
    scores, costs = Table(box=box.SIMPLE_HEAD, pad_edge=False), Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ("parameters", "GFLOPs", "images/s", "device-s", *["cost"] * priced, f"val top-1 at {budget:,.0f} s")
    for table, columns in ((scores, ("runs", "test top-1", "test top-5", "test loss")), (costs, headings)):
        table.add_column("model")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
    for name, model in comparison["models"].items():
        scores.add_row(name, str(model["top1"]["n"]), *(interval(model[score]) for score in SCORES))
        costs.add_row(
            name,
            f"{model['parameters'] / 1e6:.1f} M",
            f"{model['flops'] / 1e9:.2f}",
            f"{model['images_per_second']:,.0f}",
            f"{model['device_seconds']:,.0f}",
            *([f"{model['cost']:.4g}"] if priced else []),
            "no epoch" if model["at_equal_time"] is None else f"{model['at_equal_time']:.4f}",
        )
    return [scores, costs]


def interval(score: dict[str, Any]) -> str:
    if score["low"] is None:
        return f"{score['mean']:.4f}"
    return f"{score['mean']:.4f} ± {score['high'] - score['mean']:.4f}"


if __name__ == "__main__":
    main()
