"""Draw and explain a run or a comparison: `python -m raycifar.report results/cnn-a`."""

import click

from raycifar.command import command
from raycifar.options import Command
from raycifar.storage.locations import check_location
from raycifar.storage.run_folder import REPORT, REPORT_PAGE, REPORT_TEXT, RunFolder
from raycifar.terminal import Screen
from raycifar.workflows import reporting

FILES = {"html": REPORT_PAGE, "md": REPORT_TEXT, "json": REPORT}


@click.command(cls=Command, example="raycifar report results/first --format md")
@click.argument("folder", metavar="RUN|COMPARISON")
@click.option("--format", "kind", type=click.Choice([*FILES]), default="html")
@click.option("--data", help="Where the images are, for pictures of a run that keeps none.")
@click.option("--out", help="Folder or URI to write to.  [that of the run or the comparison]")
@command
def main(debug: bool, folder: str, kind: str, data: str | None, out: str | None) -> None:
    """Draw and explain a run, finished or not, or a comparison.

    Writes report.html, a page that opens offline, and report.json; for a run also suspects.csv, which ranks its
    training images by how likely their labels are wrong. With --format md or json, writes only that.
    """
    screen, subject = Screen(), RunFolder.at(folder)
    if out is not None:
        check_location(out, "--out", to_write=True)
    where = RunFolder.at(out) if out else subject
    report = reporting.report(subject, screen, data=data, out=where, kind=kind)
    screen.say(report["state"])
    screen.lines(f"Note: {note}" for note in report["notes"])
    for finding in report["findings"]:
        screen.say(f"{finding['kind']} ({finding['confidence']:.2f}): {finding['evidence']} {finding['advice']}")
    for step in report["next"]:
        screen.say(f"Next, {step['reason']}:\n  {step['command']}")
    screen.say(f"Report: {where.folder}/{FILES[kind]}")


if __name__ == "__main__":
    main()
