"""Draw and explain a run, a comparison, or several runs: `python -m raycifar.report results/cnn-a`."""

import click

from raycifar.errors import RequestError
from raycifar.options import Command
from raycifar.storage.run_folder import REPORT, REPORT_PAGE, REPORT_TEXT, RunFolder
from raycifar.terminal import Screen
from raycifar.workflows import reporting

FILES = {"html": REPORT_PAGE, "md": REPORT_TEXT, "json": REPORT}


@click.command(cls=Command, example="raycifar report results/first --format md")
@click.argument("folders", metavar="RUN…|COMPARISON", nargs=-1, required=True)
@click.option("--format", "kind", type=click.Choice([*FILES]), default="html", help="Format of the report.")
@click.option("--data", help="Data set to take pictures from, if the run kept none.")
@click.option("--out", help="Folder or URI to write to.  [the folder of the run or comparison; overlay for several]")
def main(debug: bool, folders: tuple[str, ...], kind: str, data: str | None, out: str | None) -> None:
    """Draw and explain a run, finished or not, or a comparison; draw several runs on one page, without a verdict.

    Writes report.html, a page that opens offline, and report.json; for a run also suspects.csv, which ranks its
    training images by how likely their labels are wrong. With --format md or json, writes only that.
    """
    screen, subjects = Screen(), [RunFolder.at(folder) for folder in folders]
    if len(subjects) > 1:
        if data:
            raise RequestError("--data is for one run: give one folder, or leave --data out.")
        where = RunFolder.for_output(out or "overlay")
        report = reporting.overlay(subjects, where, kind)
    else:
        where = RunFolder.for_output(out, subjects[0]) if out else subjects[0]
        report = reporting.report(subjects[0], screen, data=data, out=where, kind=kind)
    screen.say(report["state"])
    screen.lines(f"Note: {note}" for note in report["notes"])
    screen.lines(report.get("sentences", []))
    for finding in report["findings"]:
        screen.say(f"{finding['kind']} ({finding['confidence']:.2f}): {finding['evidence']} {finding['advice']}")
    for step in report["next"]:
        screen.lines([f"Next, {step['reason']}:", f"  {step['command']}"])
    screen.say(f"Report: {where.location}/{FILES[kind]}")


if __name__ == "__main__":
    main()
