"""The run folder, STORAGE/NAME/, and its files.

    run.json            the request: model, recipe, data, hardware and versions
    metrics.jsonl       a line for each finished epoch
    result.json         the run's status, with the scores on the test set
    model.safetensors   the final weights
    predictions.parquet the final network's predictions for each test image
    example_stats.parquet  statistics of each training image over the epochs
    report.*            what the curves show; suspects.csv ranks the labels that are probably wrong
    events.out.tfevents.raycifar*  the history for TensorBoard
    profile/            of each worker, what takes longest in a step: a trace and a table, where asked for
    best.safetensors    the weights of the epoch with the best validation top-1
    checkpoint_EPOCH_STEP  what the run resumes from: see `checkpoints`
    pictures.json       the few images that the report shows
    manifest.json       what a finished run's files were: see `manifest`
    .lock-*             the claim of the process that trains the run: see `lock`

`schemas` has the types and ranges of what the JSON files hold.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Self

import pyarrow as pa

from raycifar.data import CIFAR100
from raycifar.errors import DamagedFileError, RequestError, notice
from raycifar.storage import schemas
from raycifar.storage.folder import Folder
from raycifar.storage.locations import check_location
from raycifar.storage.manifest import Manifest
from raycifar.storage.parquet import read_parquet, read_schema

RUN, METRICS, RESULT = "run.json", "metrics.jsonl", "result.json"
MODEL, BEST = "model.safetensors", "best.safetensors"
PREDICTIONS, EXAMPLE_STATS = "predictions.parquet", "example_stats.parquet"
OLD_EXAMPLE_STATS = "images.parquet"  # their name in earlier versions
EVALUATION, EVALUATION_PAGE = "evaluation.json", "evaluation.html"  # written by `evaluate`
SPEEDRUN = "speedrun.json"  # written by `speedrun`
BENCH, BENCH_CHART, PLAN_CHART = "bench.json", "bench.svg", "plan.svg"  # written by `bench`
REPORT_PAGE, REPORT, REPORT_TEXT, SUSPECTS = "report.html", "report.json", "report.md", "suspects.csv"
PICTURES = "pictures.json"
EVENTS = "events.out.tfevents.raycifar"
PROFILE = "profile"  # a folder
STUDY, COMPARISON, COMPARISON_TABLE = "study.json", "comparison.json", "comparison.csv"  # of a comparison's folder
RAY_FILES = ("checkpoint_manager_snapshot.json", ".validate_storage_marker")  # Ray Train's, left by earlier versions

DOCUMENTS: dict[str, Any] = {
    RUN: schemas.RunFile,
    RESULT: schemas.ResultFile,
    COMPARISON: schemas.ComparisonFile,
    STUDY: dict[str, Any],
    PICTURES: schemas.PicturesFile,
}
# What the columns of tables with a row for each image hold, as `read_parquet` takes it.
PREDICTION_COLUMNS = {"label": "integers", "top5": "lists of integers", "probabilities": "lists of real numbers"}
EXAMPLE_STATS_COLUMNS = {
    **dict.fromkeys(("index", "label", "rival"), "integers"),
    **{"margin": "real numbers", "seen": "integers"},
}
OPTIONAL = {"near_duplicate": "integers"}  # columns that earlier versions lack
RANGES = {
    **dict.fromkeys(("label", "top5", "rival"), (0, CIFAR100.num_classes - 1)),
    **dict.fromkeys(("index", "seen"), (0, math.inf)),
    "near_duplicate": (0, 1),
    "probabilities": (0, 1.001),
}


class RunFolder(Folder):
    """The folder of a run or of a comparison, or one that holds them."""

    @classmethod
    def for_output(cls, location: str, own: Self | None = None, *, option: str = "--out") -> Self:
        """Return the folder that an option or argument names for results, before the work that produces them.

        Args:
            own: the folder of a run or comparison, which may be the same.

        Raises:
            RequestError: it can't be written (of a remote one, that shows only at the end), or holds another run or
                comparison.
        """
        check_location(location, option, to_write=True)
        folder = cls.at(location)
        with folder.marker(option):
            if folder != own:
                folder.check_holds_none(RUN, STUDY, COMPARISON, option=option)
        return folder

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest(self)

    @property
    def comparison(self) -> Self | None:
        """The comparison that this folder lies in, if any."""
        around = self.at(self.storage)
        return around if around.name and around.exists(STUDY) else None  # a bucket has no name

    def runs(self) -> list[Self]:
        """Return the runs inside this folder, sorted by name."""
        return self.folders_with(RUN)

    def check_holds_none(self, *files: str, option: str = "--name") -> None:
        """Raise RequestError if one of these files of another run, or of a comparison, is in the folder."""
        if found := next(filter(self.exists, files), None):
            whose = "run" if found == RUN else "comparison"
            raise RequestError(f"{self.location} is the folder of a {whose}: give another {option}.")

    def read_json(self, file: str, warn: Callable[[str], None] = notice) -> Any:
        """Return the content of a JSON file, checked against `DOCUMENTS`, or None if it doesn't exist.

        Args:
            warn: called with a sentence if the file has changed, or has fields that this version doesn't know.

        Raises:
            DamagedFileError: it can't be read, or doesn't hold what it should.
        """
        kind = DOCUMENTS.get(file, Any)
        with self.reading(file):
            content = self.read(file)
            if content is None:
                return None
            value = schemas.parse(content, kind)
        self.manifest.warn_of_change(file, content, warn)
        self._warn_of_fields(file, schemas.unknown_fields(kind, value), warn)
        return {**schemas.RUN_DEFAULTS, "name": self.name, **value} if file == RUN else value

    def history(self, warn: Callable[[str], None] | None = None) -> list[schemas.EpochRecord]:
        """Return the records of the finished epochs, in order.

        Args:
            warn: called with a sentence if a row is damaged; the rows before it are returned.

        Raises:
            DamagedFileError: a row is damaged, and there is no `warn`.
        """
        with self.reading(METRICS):
            content = self.read(METRICS)
        if content is None:
            return []
        records: list[schemas.EpochRecord] = []
        unknown: set[str] = set()
        try:
            with self.reading(METRICS):
                for record, fields in schemas.parse_history(content):
                    records.append(record)
                    unknown |= fields
        except DamagedFileError as error:
            if warn is None:
                raise
            warn(f"{error} The lines before it are used.")
        else:
            self.manifest.warn_of_change(METRICS, content, warn or notice)
        self._warn_of_fields(METRICS, unknown, warn or notice)
        return records

    def _warn_of_fields(self, file: str, unknown: Iterable[str], warn: Callable[[str], None]) -> None:
        if fields := ", ".join(sorted(unknown)):
            warn(f"{self.location}/{file} has fields that this version doesn't know and ignores: {fields[:200]}.")

    def write_history(self, history: Iterable[schemas.EpochRecord]) -> None:
        self.write(METRICS, "".join(json.dumps(record.to_json()) + "\n" for record in history).encode())

    def read_table(self, file: str) -> pa.Table | None:
        """Return predictions.parquet or example_stats.parquet, or None if it doesn't exist.

        Raises:
            DamagedFileError: it can't be read, has changed, or doesn't hold what it should.
        """
        with self.reading(file):
            content = self.read(file)
            if content is None:
                return self.read_table(OLD_EXAMPLE_STATS) if file == EXAMPLE_STATS else None
            self.manifest.check(file, content)
            return read_image_table(content, PREDICTION_COLUMNS if file == PREDICTIONS else EXAMPLE_STATS_COLUMNS)

    def delete_leftovers(self) -> None:
        """Delete what killed processes have left: files that they were writing, and those of Ray Train."""
        for file in self.file_names():
            if file in RAY_FILES or re.fullmatch(r"\..*\.part", file):
                self.delete(file)


def read_image_table(content: bytes, columns: dict[str, str]) -> pa.Table:
    """Return columns of a Parquet file, see `read_parquet`, and those of `OPTIONAL` that it has.

    Raises:
        ValueError: the file is damaged, or a column holds an impossible value: an unknown class, or no probability.
    """
    optional = {name: kind for name, kind in OPTIONAL.items() if name in read_schema(content).names}
    table = read_parquet(content, {**columns, **optional})
    for name in RANGES.keys() & table.column_names:
        column, (low, high) = table[name].combine_chunks(), RANGES[name]
        values = (column.flatten() if pa.types.is_fixed_size_list(column.type) else column).to_numpy()
        if not low <= values.min() <= values.max() <= high:
            wanted = f"{low} to {high}" if math.isfinite(high) else f"{low} or more"
            raise ValueError(f"the column {name} has values from {values.min()} to {values.max()}, not {wanted}")
        if name == "probabilities" and column.type.list_size != CIFAR100.num_classes:
            raise ValueError(f"the column {name} has no probabilities of {CIFAR100.num_classes} classes")
    return table
