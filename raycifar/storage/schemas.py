"""What the files of a run and of a comparison hold, with types and ranges; pydantic checks what is read.

Fields that a version lacks are NotRequired, and fields that this version doesn't know are kept.
"""

import functools
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, Self

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import TypedDict, is_typeddict  # pydantic wants this one before Python 3.12

from raycifar.data import CIFAR100

MAX_STEP_LOSSES = 2000
MAX_LINE_BYTES, MAX_LINES = 2**20, 200_000  # of `metrics.jsonl`, which has a line for each epoch
MAX_FLOAT32 = 3.5e38  # nearly
Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Positive = Annotated[int, Field(strict=True, ge=1, le=2**53)]
Whole = Annotated[int, Field(strict=True, ge=-(2**63), le=2**64)]
Flag = Annotated[bool, Field(strict=True)]
Real = Annotated[float, Field(strict=True, ge=-MAX_FLOAT32, le=MAX_FLOAT32)]
Amount = Annotated[float, Field(strict=True, ge=0, le=MAX_FLOAT32)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Image = Annotated[str, Field(max_length=2**14, pattern=r"^[A-Za-z0-9+/]+=*$")]

# Names that earlier versions gave to columns.
RENAMED = {
    "clean_loss": "train_eval_loss",
    "clean_top1": "train_eval_top1",
    "clean_images": "train_eval_images",
    "signals": "diagnostics",
}


class Rise(TypedDict):
    """How concentrated a rise of the training loss is: see `describe_rise`."""

    fraction: Fraction
    indices: list[Count]


class Diagnostics(TypedDict):
    """Of a network that isn't learning: see `examine`."""

    dead_relus: dict[str, Amount | None]
    gradient_norms: dict[str, Amount | None]


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """The record of a finished epoch, a row of `metrics.jsonl`. None stands for what is unknown or not finite."""

    epoch: Positive
    train_loss: Real | None  # mean cross-entropy of the augmented images, in training mode
    train_top1: Fraction | None  # accuracy on the augmented images
    val_loss: Real | None = None  # mean cross-entropy of the validation images
    val_top1: Fraction | None = None
    val_top5: Fraction | None = None
    val_loss_se: Amount | None = None  # standard error of val_loss over the validation images
    val_gained: Count | None = None  # validation images that became correct since the last epoch
    val_lost: Count | None = None  # validation images that are no longer correct
    train_eval_loss: Real | None = None  # of training images scored like validation images
    train_eval_top1: Fraction | None = None
    train_eval_images: Positive | None = None  # how many these are
    step_losses: list[Real | None] | None = None  # training loss of the steps in `sampled_steps`
    lr: Amount  # of the last step
    stage: str | None = None  # "head" or "whole": what was trained
    grad_norm: Amount | None = None  # mean over the steps
    grad_norm_max: Amount | None = None
    grad_norm_max_step: Count | None = None  # from 0
    rise: Rise | None = None  # of the images' losses since the last epoch
    diagnostics: Diagnostics | None = None
    restarts: Count = 0  # of the run during the epoch
    images_per_second: Amount  # over all workers
    training_seconds: Amount = 0.0  # of the training steps
    seconds: Amount  # of the epoch, scoring included
    workers: Count  # at the end of the epoch
    time: Real | None = None  # Unix time at the end of the epoch

    def to_json(self) -> dict[str, Any]:
        """Return a row of `metrics.jsonl`: JSON has no NaN and no infinity."""
        return finite(vars(self))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the record of a row, whichever version wrote it.

        Raises:
            ValueError: a value is missing, or has another type or range; the message names it.
        """
        named = {RENAMED.get(name, name): value for name, value in values.items()}
        row = {name: value for name, value in named.items() if name in cls.__dataclass_fields__}
        if isinstance(rise := row.get("rise"), dict) and "share" in rise:
            row["rise"] = {"fraction": rise["share"], "indices": rise.get("images")}
        return checked(cls, finite(row))


def parse_history(content: bytes) -> Iterator[tuple[EpochRecord, set[str]]]:
    """Yield the records of `metrics.jsonl`, each with the fields of its row that this version doesn't know.

    Raises:
        ValueError: a row is damaged, or doesn't follow the one before it; the message names its line.
    """
    for number, line in enumerate(io.BytesIO(content), 1):
        try:
            if number > MAX_LINES:
                raise ValueError(f"at most {MAX_LINES:,} epochs are read")
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"it has more than {MAX_LINE_BYTES:,} bytes")
            values = parse(line, dict)
            record = EpochRecord.from_json(values)
            if record.epoch != number:
                raise ValueError(f"epoch {record.epoch} follows epoch {number - 1}")
        except ValueError as error:
            raise ValueError(f"line {number}, {error}") from error
        yield record, values.keys() - EpochRecord.__dataclass_fields__.keys() - RENAMED.keys()


def sampled_steps(epoch: int, steps: int, epochs: int) -> range:
    """Return the steps, from 0, of an epoch (from 1) whose losses are recorded: at most 2,000 in all epochs."""
    stride = -(-epochs * steps // MAX_STEP_LOSSES)
    return range(-(epoch - 1) * steps % stride, steps, stride)


# Documents ------------------------------------------------------------------------------------------


class Data(TypedDict):
    """The data set of a run, and how many of its images are in each split."""

    source: str
    fingerprint: NotRequired[str]
    train: Positive
    val: Count
    test: Count


class RunFile(TypedDict, total=False):
    """`run.json`."""

    name: str
    model: str
    recipe: dict[str, Flag | Whole | Real | str]
    data: Data
    val_size: Count
    limit: Positive | None
    architecture: dict[str, Any]
    weights: Any
    seed: Whole
    compile: Flag
    search: Flag
    workers: Count
    least_workers: Count
    cpus_per_worker: Amount
    gpus_per_worker: Amount
    checkpoint_steps: Count
    device: str | None
    created: str
    versions: dict[str, str | None]
    parameters: Count
    threads: Count
    precision: Literal["auto", "bfloat16", "float32"]
    training_began: Real


# What a `run.json` of the first versions, or of other programs, lacks.
RUN_DEFAULTS = {"seed": 0, "val_size": 5000, "limit": None, "workers": 1, "device": None}


class Scores(TypedDict):
    """Of a network on the test set."""

    images: Positive
    loss: Amount | None
    top1: Fraction
    top5: Fraction
    superclass_top1: NotRequired[Fraction]
    ece: NotRequired[Fraction]
    near_duplicates: NotRequired[Count]
    top1_without_near_duplicates: NotRequired[Fraction | None]


class ResultFile(TypedDict):
    """`result.json`."""

    status: Literal["finished", "stopped", "failed"]
    epochs: NotRequired[Count]
    best_epoch: NotRequired[Positive | None]
    train_seconds: NotRequired[Amount]
    images_per_second: NotRequired[Amount]
    test: NotRequired[Scores]
    reason: NotRequired[str | None]
    failure: NotRequired[str | None]


class Mean(TypedDict):
    """Over the seeds, with a 95% interval where there are several."""

    mean: Real
    low: Real | None
    high: Real | None
    n: Positive


class ModelSummary(TypedDict):
    """A model of a comparison."""

    runs: Annotated[list[str], Field(min_length=1)]
    folders: list[str]
    seeds: list[Whole]
    top1: Mean
    top5: Mean
    loss: Mean
    parameters: Count
    flops: Count
    images_per_second: Amount
    device_seconds: Amount
    cost: Amount | None
    at_equal_time: Fraction | None


class Pair(TypedDict):
    """Two models of a comparison."""

    a: str
    b: str
    difference: Real
    low: Real
    high: Real
    verdict: Literal["better", "worse", "undecided"]
    sentence: str
    seeds_needed: Count | None
    immature: NotRequired[Flag]
    too_early: NotRequired[Flag]


class Search(TypedDict):
    """The search for a model's recipe."""

    sentence: str


class WithoutNearDuplicates(TypedDict):
    """How a comparison ranks the models without near duplicates."""

    images: Count
    sentence: str


class ComparisonFile(TypedDict):
    """`comparison.json`."""

    name: NotRequired[str]
    synthetic: NotRequired[Flag]
    models: dict[str, ModelSummary]
    pairs: list[Pair]
    equal_device_seconds: NotRequired[Amount]
    search: NotRequired[dict[str, Search]]
    without_near_duplicates: NotRequired[WithoutNearDuplicates]
    failed: NotRequired[list[dict[str, Any]]]


class Pixels(TypedDict):
    """Of a split's images, from 0 to 1."""

    mean: Fraction
    std: Fraction


class PicturesFile(TypedDict):
    """`pictures.json`: what a report shows of the data set. The images are PNG files in base64, by row."""

    train: dict[str, Image]
    test: dict[str, Image]
    superclass_of: list[Annotated[int, Field(strict=True, ge=-1, lt=CIFAR100.num_superclasses)]]
    pixels: dict[Literal["train", "test"], Pixels]
    augmented: NotRequired[list[Image]]


# Reading --------------------------------------------------------------------------------------------


adapter = functools.cache(TypeAdapter)


def checked(kind: Any, value: Any) -> Any:
    """Return a value of JSON as `kind`.

    Raises:
        ValueError: it is of another kind; the message names the field and what is wrong with it.
    """
    try:
        return adapter(kind).validate_python(value, extra="allow")
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(key)[:80] for key in first["loc"])
        raise ValueError(f"{where + ': ' if where else ''}{first['msg'][:1].lower()}{first['msg'][1:]}") from error


def parse(content: bytes, kind: Any = Any) -> Any:
    """Return the value of a JSON text as `kind`, with None for each number that isn't finite.

    Raises:
        ValueError: it is no JSON, nested too deeply, or of another kind.
    """
    if not content.strip():
        raise ValueError("it is empty")
    return checked(kind, finite(from_json(content)))


def unknown_fields(kind: Any, value: Mapping[str, Any]) -> set[str]:
    """Return the fields of a document that this version doesn't know."""
    return value.keys() - kind.__annotations__.keys() if is_typeddict(kind) else set()


def finite(value: Any) -> Any:
    """Return a value with each float that isn't finite replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value
