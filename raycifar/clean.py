"""Remove checkpoints of finished runs: `python -m raycifar.clean results`."""

import click

from raycifar.errors import RequestError
from raycifar.options import Command, folder_argument
from raycifar.terminal import Screen
from raycifar.words import count
from raycifar.workflows.inventory import Removable, removable, remove


@click.command(cls=Command, example="raycifar clean results --yes")
@folder_argument
@click.option("--yes", is_flag=True, help="Don't ask.")
def main(debug: bool, folder: str, yes: bool) -> None:
    """Remove the checkpoints of finished runs, after listing them and asking. Nothing else is removed.

    Runs that are under way, interrupted or failed keep their checkpoints and can be continued. Trials that a search
    has stopped count as finished. Without its checkpoints, a finished run can still be reported, compared, evaluated
    and exported.
    """
    screen, found = Screen(), list(removable(folder))
    if not found:
        screen.say(f"No finished run in {folder} has checkpoints.")
        return
    for what in found:
        screen.say(f"{what.run.location}: {checkpoints([what])}")
    try:
        if not yes and input(f"Remove {total(found)}? [y/N] ").strip().lower() not in ("y", "yes"):
            screen.say("Nothing was removed.")
            return
    except EOFError as error:
        screen.say()  # ends the line of the question
        raise RequestError("nobody can answer here, so nothing was removed: give --yes to remove them.") from error
    removed = [what for what in found if remove(what, screen.say)]
    screen.say(f"Removed {total(removed)}." if removed else "Nothing was removed.")


def total(found: list[Removable]) -> str:
    return f"{checkpoints(found)}, of {count(len(found), 'finished run')}"


def checkpoints(found: list[Removable]) -> str:
    """Return how many there are, and their size."""
    number, megabytes = sum(len(what.names) for what in found), sum(what.num_bytes for what in found) / 1e6
    return f"{count(number, 'checkpoint')}, {megabytes:,.1f} MB"


if __name__ == "__main__":
    main()
