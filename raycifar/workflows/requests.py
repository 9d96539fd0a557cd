"""Requests: each option once, with its default and its help, for the commands and the Python API alike."""

import difflib
import os
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from datetime import datetime
from typing import Any, Literal, Self, get_args

from raycifar import models
from raycifar.errors import RequestError
from raycifar.models.recipe import MAX_NUMBER, Recipe, checked_value
from raycifar.models.recipes import choose_recipe, model_of, recipe_fields, recipe_for, recipe_from_json
from raycifar.storage.locations import check_location
from raycifar.workflows.tracking import check_tracker

WorkerCount = int | tuple[int, int] | None
Device = Literal["auto", "gpu", "cpu", "mps"]

MIN_SHARE = 0.0001  # Ray's unit
MAX_ELASTIC_WORKERS = 64  # the images are cut wherever a shard of any of the numbers begins
MAX_WORKERS = MAX_TRIALS = 10_000  # more is a slip
MAX_SEED = 2**63 - 1  # of PyTorch's generators
MAX_NAME_BYTES = 200  # file systems take 255
# The options that a comparison of finished runs uses; RAYCIFAR_DATA may be set for other commands.
OF_FINISHED_RUNS = ("storage", "name", "report", "price_per_hour", "without_near_duplicates", "data")


def setting(
    default: Any,
    help: str,  # noqa: A002 (click's own word)
    *,
    least: float | None = None,
    most: float = MAX_NUMBER,
    env: str | None = None,
    metavar: str | None = None,
) -> Any:
    """Return a field that is also an option of the commands.

    Args:
        least, most: the smallest and the largest value that make sense. env: an environment variable that sets the
            default.
    """
    metadata = {"help": help, "least": least, "most": most, "env": env, "metavar": metavar, "default": default}
    if env:
        return field(default_factory=lambda: os.environ.get(env) or default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What each worker computes on, and how long to wait for that."""

    device: Device = setting("auto", "auto: GPUs, if there are any; mps: Apple's GPU, in this process only.")
    cpus_per_worker: float | None = setting(None, "CPUs (and threads) per worker.  [fair share]")
    gpus_per_worker: float = setting(1.0, "GPUs per worker: 1, or a fraction of one.")
    accelerator: str | None = setting(None, "Kind of GPU, such as H100.  [any]")
    wait: float = setting(1800, "Seconds to wait for nodes to start or to be free.", least=0)

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.metadata:
                value = checked_option(f.name, f.type, getattr(self, f.name), f.metadata["least"], f.metadata["most"])
                self.settle(**{f.name: value})
        if self.cpus_per_worker is not None and self.cpus_per_worker < MIN_SHARE:
            raise RequestError(f"--cpus-per-worker {self.cpus_per_worker:g}: it must be at least {MIN_SHARE}.")
        if not MIN_SHARE <= self.gpus_per_worker <= 1:
            raise RequestError(
                f"--gpus-per-worker {self.gpus_per_worker:g}: it must be a share of a GPU, above 0 "
                f"({MIN_SHARE} at least) and at most 1."
            )
        if self.device == "cpu":
            self.check_no_gpu_is_chosen("--device cpu")

    @property
    def sizing(self) -> tuple[str, float | None, float, str | None]:
        """What each worker is to have, as `cluster.sizing` takes it."""
        return self.device, self.cpus_per_worker, self.gpus_per_worker, self.accelerator

    def check_no_gpu_is_chosen(self, where: str) -> None:
        share, kind = self.gpus_per_worker, self.accelerator
        if share != 1 or kind:
            option = f"--gpus-per-worker {share:g}" if share != 1 else f"--accelerator {kind}"
            raise RequestError(f"{option} is for workers on GPUs, and {where} has none: leave one of them out.")

    def check_workers(self, workers: WorkerCount) -> None:
        """Check that this number of workers can have what is asked for; 0 is this process."""
        if workers == 0:
            self.check_no_gpu_is_chosen("--workers 0")
            if self.cpus_per_worker and self.cpus_per_worker > (most := os.cpu_count() or 1):
                raise RequestError(f"--cpus-per-worker {self.cpus_per_worker:g}: this machine has {most} CPUs.")
        elif self.device == "mps":
            raise RequestError("--device mps is for --workers 0: Ray's workers can't use Apple's GPU.")

    def settle(self, **values: Any) -> None:
        """Settle a default that depends on other values."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class Settings(WorkerSettings):
    """What training one model and comparing several have in common."""

    seed: int = setting(0, "Seed of the split, the initial weights and every epoch.", least=0, most=MAX_SEED)
    data: str = setting("cifar100", "cifar100, synthetic, a path or a URI.", env="RAYCIFAR_DATA")
    val_size: int = setting(5000, "Images held out for validation, the same number of each class.", least=0)
    limit: int | None = setting(None, "Train on this many images, the same number of each class.", least=1)
    storage: str = setting("results", "Where runs are kept: a folder or a URI.", env="RAYCIFAR_STORAGE")
    max_failures: int = setting(3, "Restarts after worker failures, at most.", least=0)
    report: bool = setting(True, "Write a report, and update it during the run.")
    track: str | None = setting(None, "Also log the run to MLflow or Weights & Biases.  [none]", metavar="mlflow|wandb")
    compile: bool = setting(False, "Compile the network and its loss with torch.compile, for training only.")
    record: bool = setting(True, "Record statistics of each image, and the gradient norm.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_location(self.storage, "--storage", to_write=True)
        check_location(self.data, "--data")
        check_tracker(self.track)


@dataclass(frozen=True)
class TrainingRequest(Settings):
    """One model to be trained; the model alone must be given.

    Raises:
        RequestError: a value makes no sense.
    """

    model: str
    recipe: Recipe = None  # type: ignore[assignment]  # the model's default
    name: str = setting("", "The run's name; the same name resumes it.  [model, seed and time]")
    workers: WorkerCount = setting(
        None,
        "Number of workers, or MIN:MAX for elastic training; 0 trains in this process.  [one per GPU, else 1]",
        metavar="N|MIN:MAX",
    )
    checkpoint_steps: int = setting(0, "Steps between checkpoints; 0: only after each epoch.", least=0)
    profile: bool = setting(False, "Trace some steps, and show what takes longest.")
    test: bool = True  # score the test set at the end
    search: bool = False  # a trial that looks for a recipe
    rungs: tuple[int, ...] = ()  # epochs after which the status store is asked whether to stop

    def __post_init__(self) -> None:
        models.find_family(self.model)
        name = self.name or f"{models.slug(self.model)}-s{self.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        recipe = recipe_from_json(self.model, vars(self.recipe)) if self.recipe else recipe_for(self.model)
        self.settle(recipe=recipe, name=name, workers=parse_workers(self.workers))
        super().__post_init__()
        self.check_workers(self.workers)
        if recipe.optimizer == "muon" and recipe.batch_norm == "frozen":
            raise RequestError("--optimizer muon rescales filters, so --batch-norm can't be frozen: change one.")
        if self.workers:
            check_batch_size(self.recipe, self.workers[1] if isinstance(self.workers, tuple) else self.workers)
        if isinstance(self.workers, tuple) and self.gpus_per_worker < 1:  # Ray Train would miscount the shares
            raise RequestError(
                f"--gpus-per-worker {self.gpus_per_worker:g}: an elastic run takes whole GPUs; leave it out, or give "
                "--workers one number."
            )
        check_name(name)

    @classmethod
    def of(cls, model: str | None, **options: Any) -> Self:
        """Return the request for these options: `lr`, `epochs`, … belong to the recipe; None is the default."""
        model = model or model_of(options.get("recipe"))
        models.find_family(model)
        settings, recipe = sort_options(cls, options)
        return cls(model, choose_recipe(model, **recipe), **settings)


@dataclass(frozen=True)
class ComparisonRequest(Settings):
    """Several models to be trained with several seeds, and compared.

    Raises:
        RequestError: a value makes no sense.
    """

    recipes: Mapping[str, Recipe]  # by model
    fixed: frozenset[str] = frozenset()  # fields of the recipe that are given, and so not searched
    _: KW_ONLY
    seed: int = setting(0, "Seed of each model's first run.", least=0, most=MAX_SEED)
    seeds: int = setting(3, "Runs of each model, with seeds from --seed on.", least=1, most=MAX_TRIALS)
    search: int = setting(0, "Trials to search for each model's best recipe.", least=0, most=MAX_TRIALS)
    space: str | None = setting(
        None, "TOML file of the fields that --search varies.  [lr, weight_decay, batch_size, label_smoothing, augment]"
    )
    price_per_hour: float | None = setting(None, "Price of one device per hour; shows the cost of training.", least=0)
    without_near_duplicates: bool = setting(False, "Leave out test images that are near duplicates of training images.")
    name: str = setting("", "The comparison's name; the same name continues it.  [compare and time]")
    device: Literal["auto", "gpu", "cpu"] = setting("auto", "auto: GPUs, if there are any.")
    workers: int = setting(1, "Workers of each trial.", least=1, most=MAX_WORKERS)
    max_trials: int | None = setting(None, "Trials at once, at most.  [as many as fit]", least=1)
    checkpoint_steps: int = setting(200, "Steps between checkpoints; 0: only after each epoch.", least=0)

    def __post_init__(self) -> None:
        self.settle(name=self.name or f"compare-{datetime.now():%Y%m%d-%H%M%S-%f}")
        super().__post_init__()
        check_name(self.name)
        self.check_workers(self.workers)
        if self.space and not self.search:
            raise RequestError(f"--space {self.space} is for a search: give --search, or leave it out.")
        if self.search and not self.val_size:
            raise RequestError("--search chooses by validation accuracy: it needs --val-size above 0.")
        for recipe in self.recipes.values():
            check_batch_size(recipe, self.workers)

    @classmethod
    def of(cls, names: Iterable[str], **options: Any) -> Self:
        """Return the request for these options; what isn't given comes from each model's default recipe."""
        names = [name.strip() if isinstance(name, str) else name for name in names or ()]
        for name in names:
            models.find_family(name)
        if len(set(names)) < len(names):
            raise RequestError(f"--models {','.join(names)} names a model twice: --seeds takes several runs of it.")
        settings, recipe = sort_options(cls, options)
        return cls({name: choose_recipe(name, **recipe) for name in names}, frozenset(recipe), **settings)

    def only_for_training(self) -> list[str]:
        """Return the given options that a comparison of finished runs doesn't use."""
        given = {
            f.name: getattr(self, f.name)
            for f in settings_of(type(self))
            if f.name not in OF_FINISHED_RUNS and getattr(self, f.name) != f.metadata["default"]
        }
        names = [f"no-{name}" if value is False else name for name, value in given.items()]
        return [f"--{name.replace('_', '-')}" for name in (*names, *sorted(self.fixed))]

    def training(self, model: str) -> TrainingRequest:
        """Return this request for one of the models."""
        names = {f.name for f in settings_of(TrainingRequest)} & {f.name for f in settings_of(type(self))}
        return TrainingRequest(model, self.recipes[model], **{name: getattr(self, name) for name in names})


# From options to values -----------------------------------------------------------------------------


def settings_of(kind: type[WorkerSettings]) -> list[Any]:
    """Return the fields that are options, those of the kind itself first."""
    shared = {f.name for f in fields(Settings)}
    return sorted((f for f in fields(kind) if f.metadata), key=lambda f: f.name in shared and f.name != "seed")


def sort_options(kind: type[Settings], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that are settings, and those that are the recipe's.

    Raises:
        RequestError: an option is neither; the message has the nearest name.
    """
    settings = {f.name for f in settings_of(kind)}
    recipe = recipe_fields().keys() | {"recipe"}
    for name in options:
        if name not in settings | recipe:
            near = difflib.get_close_matches(name, settings | recipe, 1)
            raise RequestError(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
    return (
        {
            name: os.fspath(value) if isinstance(value, os.PathLike) else value
            for name, value in options.items()
            if name in settings
        },
        {name: value for name, value in options.items() if name in recipe and value is not None},
    )


def checked_option(name: str, kind: Any, value: Any, least: float | None = None, most: float = MAX_NUMBER) -> Any:
    """Return the value of an option as one of `kind`.

    Raises:
        RequestError: it is of another kind, empty, not finite, too small or too large.
    """
    if kind == WorkerCount:
        return value
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = get_args(kind)[0]
    try:
        value = checked_value(name, value, kind, most)
    except ValueError as error:
        raise RequestError(f"{error}.") from error
    if kind is str and not value and name != "name":  # an empty name is the default one
        raise RequestError(f"{name} is empty: give a value, or leave it out.")
    if least is not None and value < least:
        raise RequestError(f"{name} is {value}: it must be at least {least:g}.")
    return value


def parse_workers(value: Any) -> WorkerCount:
    """Return a number of workers, or the least and the most, of `4`, `"4"`, `"1:4"` or `(1, 4)`."""
    if value is None:
        return None
    least, colon, most = (":".join(map(str, value)) if isinstance(value, tuple) else str(value)).partition(":")
    try:
        counts = (int(least), int(most)) if colon else (int(least), int(least))
    except ValueError as error:
        raise RequestError(
            f"--workers {value!r} is neither a number of workers, such as 4, nor a range, such as 1:4."
        ) from error
    if counts[1] > MAX_WORKERS:
        raise RequestError(f"--workers {value!r}: there can be at most {MAX_WORKERS:,}.")
    if counts[0] < bool(colon) or counts[1] < counts[0]:
        raise RequestError(f"--workers {value!r}: give 0 or more, or MIN:MAX with 1 ≤ MIN ≤ MAX.")
    if colon and counts[1] > MAX_ELASTIC_WORKERS:
        raise RequestError(f"--workers {value!r}: an elastic run takes at most {MAX_ELASTIC_WORKERS} workers.")
    return counts if counts[0] < counts[1] else counts[0]


def check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise RequestError(f"--name {name!r} is not a folder name: use letters, digits, '-', '_' and '.'.")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise RequestError(
            f"--name {name[:20]}… takes {len(name.encode())} bytes: a folder's name may have at most {MAX_NAME_BYTES}."
        )


def check_batch_size(recipe: Recipe, workers: int) -> None:
    if recipe.batch_size < 2 * workers:
        raise RequestError(
            f"--batch-size {recipe.batch_size} leaves fewer than 2 images for each of {workers} workers."
        )


def to_arguments(request: TrainingRequest) -> list[str]:
    """Return the arguments of `raycifar train` that ask for this."""
    arguments = ["--model", request.model]
    values = {f.name: getattr(request, f.name) for f in settings_of(TrainingRequest)} | vars(request.recipe)
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments += [f"--{option}"] if value else [f"--no-{option}"] * (name not in ("compile", "profile"))
        elif value is not None:
            arguments += [f"--{option}", ":".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return arguments
