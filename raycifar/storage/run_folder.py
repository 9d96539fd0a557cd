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

`records` and `image_tables` have the types and ranges of what the files hold.
"""

import json
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Self

import pyarrow as pa

from raycifar.errors import DamagedFileError, RequestError, notice
from raycifar.storage.folder import Folder
from raycifar.storage.image_tables import EXAMPLE_STATS_COLUMNS, PREDICTION_COLUMNS, read_image_table
from raycifar.storage.locations import check_location
from raycifar.storage.manifest import Manifest
from raycifar.storage.records import (
    RUN_DEFAULTS,
    ComparisonFile,
    EpochRecord,
    PicturesFile,
    ResultFile,
    RunFile,
    parse,
    parse_history,
    unknown_fields,
)

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
    RUN: RunFile,
    RESULT: ResultFile,
    COMPARISON: ComparisonFile,
    STUDY: dict[str, Any],
    PICTURES: PicturesFile,
}


class RunFolder(Folder):
    """The folder of a run or of a comparison, or one that holds them."""

    @classmethod
    def for_output(cls, location: str, own: Self | None = None, *, option: str = "--out") -> Self:
        """Return the folder that an option or argument names for results, before the work that has them.

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
            value = parse(content, kind)
        self.manifest.warn_of_change(file, content, warn)
        self._warn_of_fields(file, unknown_fields(kind, value), warn)
        return {**RUN_DEFAULTS, "name": self.name, **value} if file == RUN else value

    def history(self, warn: Callable[[str], None] | None = None) -> list[EpochRecord]:
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
        records: list[EpochRecord] = []
        unknown: set[str] = set()
        try:
            with self.reading(METRICS):
                for record, fields in parse_history(content):
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
            warn(f"{self.location}/{file} has fields that this version doesn't know and passes over: {fields[:200]}.")

    def write_history(self, history: Iterable[EpochRecord]) -> None:
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
