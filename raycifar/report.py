"""Draw and explain a run or a comparison: `python -m raycifar.report results/cnn-a`."""

import time
from collections.abc import Callable
from typing import Any

import click

from raycifar.data.sources import load
from raycifar.data.tables import Source
from raycifar.errors import RequestError
from raycifar.options import command
from raycifar.storage.run_folder import (
    COMPARISON,
    EXAMPLE_STATS,
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
from raycifar.terminal import Screen

SHARE = 0.01  # of a run's time that drawing it may take while it runs
GUESS_SECONDS = 3.0  # that drawing takes, before it has been measured


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.argument("folder", metavar="RUN|COMPARISON")
@click.option("--format", "kind", type=click.Choice(["html", "md", "json"]), default="html")
@click.option("--data", envvar="RAYCIFAR_DATA", help="Where the images are, for pictures.  [where the run found them]")
@click.option("--out", help="Folder or URI to write to.  [that of the run or the comparison]")
@command
def main(debug: bool, folder: str, kind: str, data: str | None, out: str | None) -> None:
    """Draw and explain a run, finished or not, or a comparison.

    Writes report.html, one page that opens without a network, and report.json; of a run also suspects.csv, its
    training images in the order in which their labels are to be doubted. With --format md or json: that alone.
    """
    screen, run = Screen(), RunFolder.at(folder)
    where = RunFolder.at(out) if out else run
    if run.read_json(COMPARISON) is not None or run.read_json(STUDY) is not None:
        report = write_comparison(run, where, kind)
    elif (about := run.read_json(RUN)) is not None:
        source = None
        if kind == "html":
            with screen.waiting("Reading the images"):
                source = find_images(about, data)
        report = write_run(run, source, where, kind)
    else:
        raise RequestError(f"{folder} holds no {RUN} and no {STUDY}: give the folder of a run, or of a comparison.")
    screen.say(report["state"])
    for finding in report["findings"]:
        screen.say(f"{finding['kind']} ({finding['confidence']:.2f}): {finding['evidence']} {finding['advice']}")
    for step in report["next"]:
        screen.say(f"Next, {step['reason']}:\n  {step['command']}")
    screen.say(f"Report: {where.folder}/{ {'html': REPORT_PAGE, 'md': REPORT_TEXT, 'json': REPORT}[kind] }")


def find_images(about: dict[str, Any], data: str | None) -> Source | None:
    """Return the images that a run was trained on, or None where they aren't at hand."""
    for place in dict.fromkeys(filter(None, (about["data"]["source"], data))):
        try:
            source = load(place)
        except RequestError:
            continue
        if source.fingerprint() == about["data"]["fingerprint"]:
            return source
    return None


def read_files(run: RunFolder) -> Any:
    """Return what a run's folder holds, as `analysis.reports` reads it."""
    from raycifar.analysis.history import RunHistory
    from raycifar.analysis.reports import RunFiles

    history = RunHistory(run.read_json(RUN), run.history(), run.read_json(RESULT))
    return RunFiles(run.name, history, run.read(PREDICTIONS), run.read(EXAMPLE_STATS))


def write_run(
    run: RunFolder, source: Source | None, where: RunFolder | None = None, kind: str = "html"
) -> dict[str, Any]:
    """Write the report of a run, and return what `report.json` holds.

    Args:
        source: the images, for pictures. where: the folder to write to, by default the run's own.
    """
    from raycifar.analysis.reports import report_run, run_page, to_markdown
    from raycifar.analysis.suspects import rank_suspects

    where = where or run
    files = read_files(run)
    report = report_run(files)
    if kind == "md":
        where.write(REPORT_TEXT, to_markdown(report).encode())
        return report
    if kind == "html":
        where.write(REPORT_PAGE, run_page(files, report, source).encode())
        if files.example_stats and (found := rank_suspects(files.example_stats)):
            where.write(SUSPECTS, found.to_csv().encode())
    where.write_json(REPORT, report)
    return report


def write_comparison(folder: RunFolder, where: RunFolder | None = None, kind: str = "html") -> dict[str, Any]:
    """Write the report of a comparison, finished or not, and return what `report.json` holds."""
    from raycifar.analysis.reports import comparison_page, report_comparison, to_markdown

    where = where or folder
    comparison = folder.read_json(COMPARISON)
    runs = [run for run in find_runs(folder, comparison) if run.read_json(RUN) is not None]
    files = [read_files(run) for run in runs]
    report = report_comparison(folder.name, files, comparison)
    if kind == "md":
        where.write(REPORT_TEXT, to_markdown(report).encode())
        return report
    if kind == "html":
        links = {run.name: f"{run.name}/{REPORT_PAGE}" for run in folder.runs() if run.read(REPORT_PAGE) is not None}
        where.write(REPORT_PAGE, comparison_page(report, files, comparison, links).encode())
    where.write_json(REPORT, report)
    return report


def find_runs(folder: RunFolder, comparison: dict[str, Any] | None) -> list[RunFolder]:
    """Return the runs that a comparison names, or while it has no result, those in its folder but for a search's."""
    inside = {run.name: run for run in folder.runs()}
    if not comparison:
        return [run for name, run in inside.items() if "-search-" not in name]
    named = [pair for m in comparison["models"].values() for pair in zip(m["runs"], m["folders"], strict=True)]
    return [inside.get(name) or RunFolder.at(place) for name, place in named]


# While it runs ---------------------------------------------------------------------------------------


class Refresher:
    """Draws the report of what is under way, at most so often that it takes a hundredth of the time."""

    def __init__(self, write: Callable[[], Any]) -> None:
        self.write, self.took, self.last = write, GUESS_SECONDS, time.monotonic()

    def __call__(self) -> None:
        begun = time.monotonic()
        if begun - self.last < self.took / SHARE:
            return
        explain(self.write)
        self.last = time.monotonic()
        self.took = self.last - begun


def explain(write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the report that `write` makes; a report that fails never fails the run that it is about."""
    try:
        return write()
    except Exception as error:
        return {"headline": f"the report could not be made ({type(error).__name__}: {error})"}


if __name__ == "__main__":
    main()
