"""The report of a run or a comparison, finished or not: read, drawn and written, also while it is under way."""

import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raycifar.data.sources import load
from raycifar.data.tables import Source
from raycifar.errors import RequestError
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

FRACTION = 0.01  # of a run's time that drawing it may take while it runs
FIRST_GUESS = 3.0  # seconds that drawing takes, before it has been measured

log = logging.getLogger(__name__)


def report(
    folder: RunFolder, screen: "Screen", *, data: str | None = None, out: RunFolder | None = None, kind: str = "html"
) -> dict[str, Any]:
    """Write the report of a run or a comparison, and return what `report.json` holds.

    Args:
        data: where the images may be, for pictures. out: the folder to write to, by default its own.
        kind: html, md or json.

    Raises:
        RequestError: the folder holds neither.
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
    """Return the images that `data` names, else those that a run was trained on, else the default's.

    Args:
        run: what `run.json` holds, or None where there is no run.

    Raises:
        RequestError: they can't be had.
    """
    if data or run is None:
        return load(data or os.environ.get("RAYCIFAR_DATA") or "cifar100")
    if source := find_images(run):
        return source
    raise RequestError(f"the images of this run are no longer at {run['data']['source']}: give --data.")


def find_images(run: dict[str, Any], data: str | None = None) -> Source | None:
    """Return the images that a run was trained on, or None where they aren't at hand."""
    for place in dict.fromkeys(filter(None, (run["data"]["source"], data, os.environ.get("RAYCIFAR_DATA")))):
        try:
            source = load(place)
        except RequestError:
            continue
        if source.fingerprint() == run["data"]["fingerprint"]:
            return source
    return None


# Reports --------------------------------------------------------------------------------------------


def read_files(folder: RunFolder) -> "RunFiles":
    """Return what a run's folder holds, as `analysis.reports` reads it."""
    from raycifar.analysis.history import RunHistory
    from raycifar.analysis.reports import RunFiles

    history = RunHistory(folder.read_json(RUN), folder.history(), folder.read_json(RESULT))
    example_stats = folder.read(EXAMPLE_STATS) or folder.read(OLD_EXAMPLE_STATS)
    return RunFiles(folder.name, history, folder.read(PREDICTIONS), example_stats, folder.storage)


def read_report(folder: RunFolder) -> dict[str, Any]:
    """Return what `report.json` holds of a run, as its files are now."""
    from raycifar.analysis.reports import report_run

    return finite(report_run(read_files(folder)))


def read_comparison_report(folder: RunFolder) -> dict[str, Any]:
    """Return what `report.json` holds of a comparison, as its files are now."""
    from raycifar.analysis.reports import report_comparison

    comparison = folder.read_json(COMPARISON)
    files = [read_files(run) for run in find_runs(folder, comparison)]
    return finite(report_comparison(folder.name, files, comparison))


def write_run(
    folder: RunFolder, source: Source | None, out: RunFolder | None = None, kind: str = "html"
) -> dict[str, Any]:
    """Write the report of a run, and return what `report.json` holds.

    Args:
        source: the images, for pictures. out: the folder to write to, by default the run's own.
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
    """Write the report of a comparison, finished or not, and return what `report.json` holds."""
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
    """Return the runs that a comparison names, or while it has no result, those in its folder but for a search's."""
    inside = {run.name: run for run in folder.runs()}
    if not comparison:
        return [run for run in inside.values() if not is_search(run)]
    named = [pair for m in comparison["models"].values() for pair in zip(m["runs"], m["folders"], strict=True)]
    runs = [inside.get(name) or RunFolder.at(place) for name, place in named]
    return [run for run in runs if run.read_json(RUN) is not None]


def is_search(folder: RunFolder) -> bool:
    """Return whether a run is a trial of a search; the first versions told it by the name alone."""
    return folder.read_json(RUN).get("search", "-search-" in folder.name)


# While it runs --------------------------------------------------------------------------------------


class Refresher:
    """Draws the report of what is under way, at most so often that it takes a hundredth of the time."""

    def __init__(self, write: Callable[[], Any]) -> None:
        self.write, self.took, self.last = write, FIRST_GUESS, time.monotonic()

    def __call__(self) -> None:
        begun = time.monotonic()
        if begun - self.last < self.took / FRACTION:
            return
        explain(self.write)
        self.last = time.monotonic()
        self.took = self.last - begun


def explain(write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the report that `write` makes; one that fails doesn't fail the run that it is about, and is logged."""
    try:
        return write()
    except Exception as error:
        log.debug("The report could not be made.", exc_info=True)
        return {"headline": f"the report could not be made ({type(error).__name__}: {error})"}
