"""Writing the report of a run or a comparison, also while it runs."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from raycifar.data.dataset import Source
from raycifar.data.sources import load
from raycifar.errors import DamagedFileError, RequestError, in_a_line, notice
from raycifar.models import slug
from raycifar.redaction import redact
from raycifar.storage.run_folder import (
    COMPARISON,
    EXAMPLE_STATS,
    METRICS,
    PICTURES,
    PREDICTIONS,
    PROFILE,
    REPORT,
    REPORT_PAGE,
    REPORT_TEXT,
    RESULT,
    RUN,
    STUDY,
    SUSPECTS,
    RunFolder,
)
from raycifar.terminal import Screen
from raycifar.words import count
from raycifar.workflows.duplicates import known_training_copies
from raycifar.workflows.inventory import claim_of
from raycifar.workflows.training_run import read_run

if TYPE_CHECKING:
    from raycifar.analysis.run_files import RunFiles

FRACTION = 0.01  # of a run's time that its reports may take
FIRST_GUESS = 3.0  # seconds for a report, before the first is timed

log = logging.getLogger(__name__)


def report(
    folder: RunFolder, screen: Screen, *, data: str | None = None, out: RunFolder | None = None, kind: str = "html"
) -> dict[str, Any]:
    """Write the report of a run or a comparison, and return the content of `report.json`.

    It opens nothing outside the folder but `data`.

    Args:
        data: where the page's images are, if the folder doesn't keep them.
        out: the folder to write to, by default `folder`. kind: html, md or json.

    Raises:
        RequestError: the folder holds neither a run nor a comparison, or `data` holds other images.
    """
    if folder.exists(COMPARISON) or folder.exists(STUDY):
        return write_comparison(folder, out, kind)
    if not folder.exists(RUN):
        holds = f"holds no {RUN} and no {STUDY}" if folder.exists("") else "does not exist"
        raise RequestError(f"{folder.location} {holds}: give the folder of a run, or of a comparison.")
    source = None
    if data and kind == "html":
        with screen.waiting("Reading the images"):
            source = load(data)
        if not is_source_of(source, read_run(folder)):
            raise RequestError(f"--data {data} holds other images than {folder.location} was trained on.")
    return write_run(folder, source, out, kind, host=training_host(folder))


def training_host(run: RunFolder) -> str | None:
    """Return the host on which a run is being trained, or None."""
    with suppress(DamagedFileError):
        claim = claim_of(run, run.comparison)
        return claim.host if claim else None
    return None


def overlay(folders: Sequence[RunFolder], out: RunFolder, kind: str = "html") -> dict[str, Any]:
    """Write a report of any runs side by side to `out`, and return the content of `report.json`.

    Raises:
        RequestError: a folder holds no run.
    """
    from raycifar.analysis.comparison_report import comparison_page, report_overlay

    for folder in folders:
        if not folder.exists(RUN):
            raise RequestError(f"{folder.location} holds no {RUN}: several folders must each be a run's.")
    files = [read_files(folder) for folder in folders]
    content = report_overlay(files)
    write_report(content, lambda: comparison_page(content, files, None, {}, overlay=True), out, kind)
    return content


# Images ---------------------------------------------------------------------------------------------


def load_images(run: dict[str, Any] | None, data: str | None, *, test_alone: bool = False) -> Source:
    """Return the data set that `data` names, else that of a run, else the default.

    Args:
        run: the content of `run.json`, or None without a run. test_alone: take a test set without training images, too.

    Raises:
        RequestError: the images can't be read.
    """
    default, failed = os.environ.get("RAYCIFAR_DATA"), None
    if data or run is None:
        return load(data or default or "cifar100", test_alone=test_alone)
    for location in dict.fromkeys(filter(None, (run["data"]["source"], default))):
        try:
            source = load(location)
        except RequestError as error:
            failed = failed or error
            continue
        if is_source_of(source, run):
            return source
    moved = f"the images of this run are no longer at {run['data']['source']}: give --data."
    raise RequestError(f"{moved} {failed}" if failed else moved) from failed


def is_source_of(source: Source, run: dict[str, Any] | None) -> bool:
    return run is not None and source.fingerprint == run["data"].get("fingerprint")


# Reports --------------------------------------------------------------------------------------------


def read_files(folder: RunFolder, host: str | None = None) -> "RunFiles":
    """Return the files of a run that its report is based on; what is damaged or missing is noted and left out.

    Args:
        host: on which the run is being trained.

    Raises:
        DamagedFileError: `run.json` is damaged; without it nothing can be said.
    """
    from raycifar.analysis.history import RunHistory
    from raycifar.analysis.run_files import RunFiles

    notes: list[str] = []
    run = read_run(folder, notes.append)
    if run is None:
        raise DamagedFileError(f"{folder.location} holds no {RUN}.")
    records = read_or_note(lambda: folder.history(notes.append), notes) or []
    result, pictures = (
        read_or_note(partial(folder.read_json, file, notes.append), notes) for file in (RESULT, PICTURES)
    )
    predictions, example_stats = (
        read_or_note(partial(folder.read_table, file), notes) for file in (PREDICTIONS, EXAMPLE_STATS)
    )
    lost = folder.manifest.lost(METRICS, RESULT, PREDICTIONS, EXAMPLE_STATS)
    notes += [f"{folder.location}/{file} is missing." for file in lost]
    if result and result["status"] == "finished" and len(records) < result.get("epochs", 0):
        notes.append(f"Only {len(records)} of {count(result['epochs'], 'epoch')} recorded.")
    history = RunHistory(run, records, result)
    copies = known_training_copies(run["data"])
    storage, host = redact(folder.storage), None if result else host
    return RunFiles(folder.name, history, predictions, example_stats, pictures, storage, notes, copies, host)


def read_or_note(read: Callable[[], Any], notes: list[str]) -> Any:
    """Return what `read` returns; None, with a note, if a file is damaged."""
    try:
        return read()
    except DamagedFileError as error:
        notes.append(f"{error} It is left out.")
        return None


def write_run(
    folder: RunFolder,
    source: Source | None = None,
    out: RunFolder | None = None,
    kind: str = "html",
    *,
    host: str | None = None,
) -> dict[str, Any]:
    """Write the report of a run, and return the content of `report.json`.

    Args:
        source: the data set; the images that the page shows are then kept in the run's folder.
        out: the folder to write to, by default the run's. host: on which the run is being trained.
    """
    from raycifar.analysis.gallery import choose_pictures
    from raycifar.analysis.reports import report_run, run_page

    files = read_files(folder, host)
    if source is not None:
        files.pictures = choose_pictures(files, source)
        if out is None or out == folder:
            write_pictures(folder, files.pictures)
    out, content = out or folder, report_run(files)
    write_report(content, lambda: run_page(files, content), out, kind)
    if kind == "html" and files.suspects:
        out.write(SUSPECTS, files.suspects.to_csv().encode())
    return content


def keep_pictures(folder: RunFolder, source: Source) -> None:
    """Keep the images that a later report shows."""
    from raycifar.analysis.gallery import choose_pictures

    write_pictures(folder, choose_pictures(read_files(folder), source))


def write_pictures(folder: RunFolder, pictures: Any) -> None:
    folder.write_json(PICTURES, pictures)
    folder.manifest.renew(PICTURES)


def write_comparison(folder: RunFolder, out: RunFolder | None = None, kind: str = "html") -> dict[str, Any]:
    """Write the report of a comparison, finished or not, and return the content of `report.json`."""
    from raycifar.analysis.comparison_report import comparison_page

    content, files, comparison = read_comparison(folder)

    def page() -> str:
        runs = folder.runs() if out in (None, folder) else []  # a page elsewhere can't link to their pages
        links = {run.name: f"{run.name}/{REPORT_PAGE}" for run in runs if run.exists(REPORT_PAGE)}
        return comparison_page(content, files, comparison, links)

    write_report(content, page, out or folder, kind)
    return content


def read_comparison(folder: RunFolder) -> tuple[dict[str, Any], list["RunFiles"], dict[str, Any] | None]:
    """Return a comparison's report, the files of its runs, and its result; what is damaged is noted and left out."""
    from raycifar.analysis.comparison_report import report_comparison

    notes: list[str] = []
    comparison = read_or_note(lambda: folder.read_json(COMPARISON, notes.append), notes)
    notes += [f"{folder.location}/{file} is missing." for file in folder.manifest.lost(COMPARISON)]
    files = []
    for run in find_runs(folder, comparison, notes.append):
        try:
            files.append(read_files(run))
        except DamagedFileError as error:
            notes.append(f"{error} The run is left out.")
    return report_comparison(folder.name, files, comparison, folder.storage, notes), files, comparison


def write_report(content: dict[str, Any], page: Callable[[], str], out: RunFolder, kind: str) -> None:
    """Write a report as one kind; html stands for its page and report.json."""
    from raycifar.analysis.markdown import to_markdown

    if kind == "html":
        out.write(REPORT_PAGE, page().encode())
    if kind == "md":
        out.write(REPORT_TEXT, to_markdown(content).encode())
    else:
        out.write_json(REPORT, content)


def find_runs(
    folder: RunFolder, comparison: dict[str, Any] | None, warn: Callable[[str], None] = notice
) -> list[RunFolder]:
    """Return a comparison's runs; until it has a result, those in its folder that are not search trials.

    Args:
        warn: called with a sentence if runs aren't in the comparison's folder; no other is looked into.
    """
    inside = {run.name: run for run in folder.runs()}
    if not comparison:
        given = [slug(model) for model in folder.read_json(STUDY) or {}]  # in the order of --models
        finals = [run for run in inside.values() if not is_search_trial(run)]

        def place(run: RunFolder) -> int:
            return next((k for k, name in enumerate(given) if run.name.startswith(f"{name}-s")), len(given))

        return sorted(finals, key=place)
    names = [name for model in comparison["models"].values() for name in model["runs"]]
    if absent := [name for name in names if name not in inside]:
        warn(f"{folder.location} doesn't hold these of its runs, which are left out: {', '.join(absent)}.")
    return [inside[name] for name in names if name in inside]


def is_search_trial(run: RunFolder) -> bool:
    """Return whether a run was a trial of a search; earlier versions mark it only by its name."""
    try:
        about = run.read_json(RUN)
    except DamagedFileError:
        return False
    return (about or {}).get("search", "-search-" in run.name)


# While it runs --------------------------------------------------------------------------------------


class Refresher:
    """Writes the report of running work so rarely that it takes at most 1% of the time."""

    def __init__(self, write: Callable[[], Any]) -> None:
        self.write, self.took, self.last = write, FIRST_GUESS, time.monotonic()

    def __call__(self) -> None:
        started = time.monotonic()
        if started - self.last < self.took / FRACTION:
            return
        with forgiving():
            self.write()
        self.last = time.monotonic()
        self.took = self.last - started


@contextmanager
def forgiving(say: Callable[[str], None] = lambda sentence: None) -> Iterator[None]:
    """Log and show what goes wrong with a report, in a sentence: the run goes on without it."""
    try:
        yield
    except Exception as error:
        log.debug("The report failed.", exc_info=True)
        say(f"The report failed: {type(error).__name__}: {in_a_line(error)}.")


def show_report(write: Callable[[], dict[str, Any]], screen: Screen) -> None:
    """Write a report, and say what it shows."""
    report = None
    with screen.waiting("Drawing the report"), forgiving(screen.say):
        report = write()
    if report:
        headline = f"What the curves show: {report['headline']}. " if report["headline"] else ""
        screen.say(f"{headline}See {REPORT_PAGE}")


def show_profile(folder: RunFolder, screen: Screen) -> None:
    """Say what takes longest in a step."""
    if (table := folder.read(f"{PROFILE}/worker0.txt")) is None:
        from raycifar.engine.profile import NEEDED

        screen.say(f"Nothing is traced: --profile needs {NEEDED} steps in one go.")
        return
    screen.say(f"What takes longest in a step of worker 0; traces are in {PROFILE}/, for TensorBoard or Perfetto:")
    screen.lines(table.decode().splitlines())
