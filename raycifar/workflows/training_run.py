"""A run that is under way, and its identity: written to `run.json`, and compared when the run is resumed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from raycifar.cluster.status import StatusStore
from raycifar.data.dataset import Source, Splits
from raycifar.data.sources import absolute_name
from raycifar.errors import DamagedFileError, RequestError, notice
from raycifar.models.initial_weights import InitialWeights
from raycifar.models.recipe import Recipe, changes, describe_changes
from raycifar.models.recipes import RENAMED, nearest_recipe, recipe_from_json
from raycifar.storage.run_folder import COMPARISON, RESULT, RUN, STUDY, RunFolder
from raycifar.workflows.duplicates import known_duplicates
from raycifar.workflows.requests import TrainingRequest

if TYPE_CHECKING:
    from raycifar.cluster.sizing import Workers

# What may differ when a run is resumed: the same images and weights may have moved in the meantime, and so may
# the run itself. The architecture follows from model, recipe and weights; `val` is reported as `val_size`.
MAY_DIFFER = ("name", "source", "pretrained", "recipe", "data", "architecture", "val")
# Always shown; other fields are shown only if they differ from their defaults, which switch them off.
ALWAYS_SHOWN = (
    "epochs", "batch_size", "optimizer", "lr", "momentum", "schedule", "warmup", "weight_decay", "label_smoothing",
    "augment",
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """A run's data set, its splits, and the initial weights."""

    source: Source
    splits: Splits
    initial: InitialWeights

    def near_duplicates(self) -> np.ndarray | None:
        """Return the rows of test images that are near duplicates of training images, or None if they aren't known."""
        found = known_duplicates(self.source)
        return None if found is None else found.test_copies(self.splits.train["index"].to_numpy())


@dataclass(frozen=True)
class TrainingRun:
    """What is asked for, where it is kept, what it trains on, and with which workers."""

    request: TrainingRequest
    folder: RunFolder
    inputs: Inputs
    workers: "Workers"
    status_store: StatusStore = field(default_factory=StatusStore)
    debug: bool = False  # show Ray's log


def identify(request: TrainingRequest, inputs: Inputs) -> dict[str, Any]:
    """Return everything that determines the weights, which must be the same for a run to be resumed."""
    source = inputs.source
    return {
        "name": request.name,
        "model": request.model,
        "recipe": asdict(inputs.initial.resolve(request.recipe)),
        "data": {
            "source": absolute_name(source.name),
            "fingerprint": source.fingerprint,
            **{name: len(table) for name, table in vars(inputs.splits).items()},
        },
        "val_size": request.val_size,
        "limit": request.limit,
        "architecture": inputs.initial.architecture.to_json(),
        "weights": inputs.initial.fingerprint(),
        "seed": request.seed,
        "compile": request.compile,
    }


def read_run(folder: RunFolder, warn: Callable[[str], None] = notice) -> dict[str, Any] | None:
    """Return the content of a run's `run.json`, whichever version wrote it, or None if there is none.

    Args:
        warn: called with a sentence about ignored fields.

    Raises:
        DamagedFileError: it lacks what a run has, or has another type, range or model.
    """
    run = folder.read_json(RUN, warn)
    if run is None:
        return None
    where = f"{folder.location}/{RUN}"
    if missing := [name for name in ("model", "recipe", "data") if name not in run]:
        raise DamagedFileError(f"{where} is damaged: it has no {' and no '.join(missing)}.")
    try:
        recipe = recipe_from_json(run["model"], run["recipe"])
    except RequestError as error:
        raise DamagedFileError(f"{where} is damaged, or of another version: {error}") from error
    if unknown := run["recipe"].keys() - vars(recipe).keys() - RENAMED.keys():
        warn(f"{where} has a recipe with fields that this version ignores: {', '.join(sorted(unknown))[:200]}.")
    return run


def earlier_result(folder: RunFolder, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of the folder's run, or None if it isn't finished.

    Raises:
        RequestError: the folder holds another run; the message lists the differences.
    """
    earlier = read_run(folder)
    if earlier is None:
        folder.check_holds_none(STUDY, COMPARISON)
        return None
    before, now = flatten(earlier), flatten(identity)
    if differences := [f"{key} {before.get(key)} there, {now[key]} here" for key in now if before.get(key) != now[key]]:
        raise RequestError(
            f"{folder.location} is another run: {'; '.join(differences)}. Give another --name, or the options of that "
            "run."
        )
    result = folder.read_json(RESULT)
    if not result or result["status"] != "finished":
        return None
    if missing := [name for name in ("epochs", "train_seconds", "images_per_second") if name not in result]:
        raise DamagedFileError(f"{folder.location}/{RESULT} is damaged: it has no {' and no '.join(missing)}.")
    return result


def flatten(identity: dict[str, Any]) -> dict[str, Any]:
    architecture = identity.get("architecture") or {}  # whose options earlier versions didn't also write to the recipe
    values = identity["recipe"] | architecture.get("options", {})
    recipe = recipe_from_json(identity["model"], values)  # with the fields of this version
    values = {**identity, **asdict(recipe), **identity["data"], "val_size": identity["data"]["val"]}
    return {name: value for name, value in values.items() if name not in MAY_DIFFER}


def write_run_json(folder: RunFolder, request: TrainingRequest, identity: dict[str, Any], workers: "Workers") -> None:
    """Write `run.json`, and delete leftovers of failed attempts; a resumed run keeps its creation time."""
    from raycifar.cluster.nodes import versions

    folder.delete_leftovers()
    folder.delete(RESULT)
    folder.manifest.delete()
    now = f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}"
    folder.write_json(
        RUN,
        {
            **identity,
            "search": request.search,
            "workers": workers.count,
            **({} if workers.min_workers is None else {"least_workers": workers.min_workers}),
            "cpus_per_worker": workers.cpus,
            **({"gpus_per_worker": workers.gpus} if workers.use_gpu else {}),
            "checkpoint_steps": request.checkpoint_steps,
            "device": workers.device,
            "created": (folder.read_json(RUN) or {}).get("created", now),
            "versions": versions(),
        },
    )


def describe_recipe(model: str, recipe: Recipe) -> str:
    """Return the fields of a recipe that have an effect, those that differ from the model's nearest recipe first."""
    base = nearest_recipe(model, recipe)
    differs, differing = describe_changes(recipe, base.recipe), changes(recipe, base.recipe)
    shown = dict.fromkeys(ALWAYS_SHOWN) | changes(recipe, type(recipe)())
    same = ", ".join(f"{name} {getattr(recipe, name)}" for name in shown if name not in differing)
    return f"{differs}; else {base}: {same}" if differs else f"{base}: {same}"


def overview(identity: dict[str, Any], workers: object, folder: str) -> dict[str, str]:
    recipe, data = recipe_from_json(identity["model"], identity["recipe"]), identity["data"]
    return {
        "model": f"{identity['model']}, seed {identity['seed']}",
        "data": data["source"],
        "images": f"{data['train']:,} training, {data['val']:,} validation, {data['test']:,} test",
        "workers": str(workers),
        "recipe": describe_recipe(identity["model"], recipe),
        "folder": folder,
    }
