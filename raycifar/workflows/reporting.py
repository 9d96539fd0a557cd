"""Writing the report of a run or a comparison, also while it runs."""

import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raycifar.data.sources import load
from raycifar.data.tables import Source
from raycifar.errors import RequestError
from raycifar.redaction import shown
from raycifar.storage.records import finite
from raycifar.storage.run_folder import (
    COMPARISON,
    EXAMPLE_STATS,
    OLD_EXAMPLE_STATS,
    PREDICTIONS,
    REPORT,
    REPORT_PAGE,
    REPORT_TEXT,
    RESULT,
    RUN,
    STUDY,
    SUSPECTS,
    RunFolder,
)

if TYPE_CHECKING:
    from raycifar.analysis.reports import RunFiles
    from raycifar.terminal import Screen

FRACTION = 0.01  # of a run's time that its reports may take
FIRST_GUESS = 3.0  # seconds for a report, before the first is timed

log = logging.getLogger(__name__)


def report(
    folder: RunFolder, screen: "Screen", *, data: str | None = None, out: RunFolder | None = None, kind: str = "html"
) -> dict[str, Any]:
    """Write the report of a run or a comparison, and return the content of `report.json`.

    Args:
        data: where the page's images may be found. out: the folder to write to, by default `folder`.
        kind: html, md or json.

    Raises:
        RequestError: the folder holds neither a run nor a comparison.
    """
    if folder.read_json(COMPARISON) is not None or folder.read_json(STUDY) is not None:
        return write_comparison(folder, out, kind)
    run = folder.read_json(RUN)
    if run is None:
        raise RequestError(
            f"{folder.folder} holds no {RUN} and no {STUDY}: give the folder of a run, or of a comparison."
        )
    source = None
    if kind == "html":
        with screen.waiting("Reading the images"):
            source = find_images(run, data)
    return write_run(folder, source, out, kind)


# Images ---------------------------------------------------------------------------------------------


def load_images(run: dict[str, Any] | None, data: str | None) -> Source:
    """Return the data set that `data` names, else that of a run, else the default.

    Args:
        run: the content of `run.json`, or None without a run.

    Raises:
        RequestError: the images can't be read.
    """
    if data or run is None:
        return load(data or os.environ.get("RAYCIFAR_DATA") or "cifar100")
    if source := find_images(run):
        return source
    raise RequestError(f"the images of this run are no longer at {run['data']['source']}: give --data.")


def find_images(run: dict[str, Any], data: str | None = None) -> Source | None:
    """Return a run's images, or None if they can't be found."""
    for location in dict.fromkeys(filter(None, (run["data"]["source"], data, os.environ.get("RAYCIFAR_DATA")))):
        try:
            source = load(location)
        except RequestError:
            continue
        if source.fingerprint() == run["data"]["fingerprint"]:
            return source
    return None


# Reports --------------------------------------------------------------------------------------------


def read_files(folder: RunFolder) -> "RunFiles":
    """Return the files of a run that its report is based on."""
    from raycifar.analysis.history import RunHistory
    from raycifar.analysis.reports import RunFiles

    history = RunHistory(folder.read_json(RUN), folder.history(), folder.read_json(RESULT))
    example_stats = folder.read(EXAMPLE_STATS) or folder.read(OLD_EXAMPLE_STATS)
    return RunFiles(folder.name, history, folder.read(PREDICTIONS), example_stats, shown(folder.storage))


def read_report(folder: RunFolder) -> dict[str, Any]:
    """Return a run's current report."""
    from raycifar.analysis.reports import report_run

    return finite(report_run(read_files(folder)))


def read_comparison_report(folder: RunFolder) -> dict[str, Any]:
    """Return a comparison's current report."""
    from raycifar.analysis.reports import report_comparison

    comparison = folder.read_json(COMPARISON)
    files = [read_files(run) for run in find_runs(folder, comparison)]
    return finite(report_comparison(folder.name, files, comparison))


def write_run(
    folder: RunFolder, source: Source | None, out: RunFolder | None = None, kind: str = "html"
) -> dict[str, Any]:
    """Write the report of a run, and return the content of `report.json`.

    Args:
        source: the data set whose images the page shows. out: the folder to write to, by default the run's.
    """
    from raycifar.analysis.reports import report_run, run_page
    from raycifar.analysis.suspects import rank_suspects

    out, files = out or folder, read_files(folder)
    content = report_run(files, source)
    if kind == "html":
        out.write(REPORT_PAGE, run_page(files, content, source).encode())
        if files.example_stats and (found := rank_suspects(files.example_stats)):
            out.write(SUSPECTS, found.to_csv().encode())
    write_content(content, out, kind)
    return content


def write_comparison(folder: RunFolder, out: RunFolder | None = None, kind: str = "html") -> dict[str, Any]:
    """Write the report of a comparison, finished or not, and return the content of `report.json`."""
    from raycifar.analysis.reports import comparison_page, report_comparison

    out, comparison = out or folder, folder.read_json(COMPARISON)
    files = [read_files(run) for run in find_runs(folder, comparison)]
    content = report_comparison(folder.name, files, comparison)
    if kind == "html":
        links = {run.name: f"{run.name}/{REPORT_PAGE}" for run in folder.runs() if run.read(REPORT_PAGE) is not None}
        out.write(REPORT_PAGE, comparison_page(content, files, comparison, links).encode())
    write_content(content, out, kind)
    return content


def write_content(content: dict[str, Any], out: RunFolder, kind: str) -> None:
    from raycifar.analysis.reports import to_markdown

    if kind == "md":
        out.write(REPORT_TEXT, to_markdown(content).encode())
    else:
        out.write_json(REPORT, content)


def find_runs(folder: RunFolder, comparison: dict[str, Any] | None) -> list[RunFolder]:
    """Return a comparison's runs; until it has a result, those in its folder that are not search trials."""
    inside = {run.name: run for run in folder.runs()}
    if not comparison:
        # Earlier versions mark a search trial only by its name.
        return [run for run in inside.values() if not run.read_json(RUN).get("search", "-search-" in run.name)]
    named = [pair for m in comparison["models"].values() for pair in zip(m["runs"], m["folders"], strict=True)]
    runs = [inside.get(name) or RunFolder.at(folder) for name, folder in named]
    return [run for run in runs if run.read_json(RUN) is not None]


# While it runs --------------------------------------------------------------------------------------


class Refresher:
    """Writes the report of running work, so often that it takes at most 1 % of the time."""

    def __init__(self, write: Callable[[], Any]) -> None:
        self.write, self.took, self.last = write, FIRST_GUESS, time.monotonic()

    def __call__(self) -> None:
        started = time.monotonic()
        if started - self.last < self.took / FRACTION:
            return
        explain(self.write)
        self.last = time.monotonic()
        self.took = self.last - started


def explain(write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the report that `write` returns; a failure is logged, and doesn't fail the run."""
    try:
        return write()
    except Exception as error:
        log.debug("The report failed.", exc_info=True)
        return {"headline": f"the report failed ({type(error).__name__}: {error})"}
