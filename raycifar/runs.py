"""List the runs of a folder or URI: `python -m raycifar.runs results`."""

import json
from dataclasses import asdict

import click

from raycifar.options import Command, folder_argument
from raycifar.redaction import redact
from raycifar.storage.run_folder import RunFolder
from raycifar.terminal import Screen
from raycifar.terminal_tables import LESS_OF_RUNS, fit, runs_table
from raycifar.workflows.inventory import find_runs


@click.command(cls=Command, example="raycifar runs s3://bucket/runs --json")
@folder_argument
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def main(debug: bool, folder: str, as_json: bool) -> None:
    """List the runs and comparisons in a folder, or the trials in a comparison's folder, the newest first.

    A run listed as stopped was interrupted; the same command with its name continues it. One listed as stopped by
    search is over.
    """
    screen, found = Screen(), find_runs(folder)
    if as_json:
        click.echo(redact(json.dumps([asdict(entry) for entry in found], indent=2)))
    elif found:
        screen.console.print(fit(runs_table(found), screen.console, LESS_OF_RUNS))
        screen.lines(f"{entry.name}: {entry.reason}" for entry in found if entry.reason)
    else:
        screen.say(f"There are no runs in {RunFolder.at(folder).location}.")


if __name__ == "__main__":
    main()
