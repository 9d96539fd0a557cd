"""Command-line options, generated from the fields of requests and recipes, and the layout of their help."""

import re
import textwrap
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import click

from raycifar.command import run_to_the_end
from raycifar.models.recipe import Recipe, field_types
from raycifar.models.recipes import models_with, recipe_fields
from raycifar.workflows.requests import Settings, WorkerCount, WorkerSettings, settings_of

Function = Callable[..., Any]

WIDE = 110  # columns of the help, at most
# Headings in the help of a command with many options; options that aren't named here come last.
SECTIONS = {
    "Model and data": (
        "model", "names", "recipe", "data", "split", "val_size", "limit", "seed", "seeds", "runs", "search", "space",
        "without_near_duplicates", "compile",
    ),
    "Workers": (
        "workers", "count", "device", "cpus_per_worker", "gpus_per_worker", "accelerator", "max_trials", "max_failures",
        "wait", "plan", "interconnect", "price_per_hour",
    ),
    "Run and storage": (
        "name", "storage", "dry_run", "rounds", "against", "startup", "checkpoint_steps", "record", "profile", "report",
        "track", "out",
    ),
}  # fmt: skip
DEFAULT, NOISE = "[default: ", re.compile(r"; \d+<=x<=\d+|  \[\d+<=x<=\d+\]| RANGE$")  # in click's help of an option
TIED = "\N{NO-BREAK SPACE}"
MANY = 8  # options; a command with more has headings


class Command(click.Command):
    """A command that exits as `run_to_the_end` does; its help has an example and groups the options."""

    def __init__(self, *, example: str, params: list[click.Parameter], **options: Any) -> None:
        debug = click.Option(["--debug"], is_flag=True, help="Show tracebacks and Ray's log.")
        settings = {"show_default": True, "max_content_width": WIDE}
        super().__init__(context_settings=settings, params=[*params, debug], **options)
        self.example = example

    def invoke(self, ctx: click.Context) -> None:
        run_to_the_end(partial(super().invoke, ctx), ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [option for option in self.get_params(ctx) if isinstance(option, click.Option)]
        of_recipe = [option for option in options if option.name in recipe_fields()]
        rows = {option.name: option.get_help_record(ctx) for option in options if option not in of_recipe}
        sections = SECTIONS if len(rows) > MANY else {}
        formatter.write(f"\n  Example: {self.example}\n")
        for heading, names in (*sections.items(), ("Other" if sections else "Options", tuple(rows))):
            if found := [row for name in names if (row := rows.pop(name, None))]:
                with formatter.section(heading):
                    shown = [[NOISE.sub("", text).replace(DEFAULT, "[") for text in row] for row in found]
                    formatter.write_dl([(left, right) for left, right in shown])
        if of_recipe:
            with formatter.section("Recipe (`raycifar recipes MODEL` explains the fields and prints their values)"):
                text = "  ".join(map(brief, of_recipe))
                lines = textwrap.wrap(text, formatter.width - 2, break_on_hyphens=False)
                formatter.write("".join(f"  {line}\n" for line in lines).replace(TIED, " "))


def brief(option: click.Option) -> str:
    """Return a field of the recipe and what it takes."""
    flag = option.opts[0]
    return f"--[no-]{flag[2:]}" if option.is_bool_flag else f"{flag}{TIED}{option.metavar}"


def request_options(kind: type[WorkerSettings], *, without: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Add an option for each setting of `kind`, with its default."""

    def add(command: Function) -> Function:
        for setting in reversed(settings_of(kind)):
            if setting.name not in without:
                command = to_option(setting)(command)
        return command

    return add


def folder_argument(command: Function) -> Function:
    """Add the folder that runs are kept in, by default that of `--storage`."""
    storage = Settings.__dataclass_fields__["storage"].metadata
    return click.argument("folder", metavar="[FOLDER|URI]", envvar=storage["env"], default=storage["default"])(command)


recipe_option = click.option(
    "--recipe", metavar="NAME|FILE|RUN", default=None, help="Base recipe; `raycifar recipes` lists them.  [the model's]"
)


def recipe_options(*, without: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Add `--recipe`, and an option for each field of any model's recipe, with the default None."""

    def add(command: Function) -> Function:
        for name, kind in reversed(recipe_fields().items()):
            if name not in without:
                command = field_option(name, kind)(command)
        return recipe_option(command)

    return add


def field_option(name: str, kind: type[Recipe]) -> Callable[[Function], Function]:
    field, flag, value_type = kind.__dataclass_fields__[name], f"--{name.replace('_', '-')}", field_types(kind)[name]
    metavar = {int: "N", float: "X"}.get(value_type, "TEXT")
    if allowed := get_args(value_type):
        value_type, metavar = click.Choice(allowed), "|".join(allowed)
    elif value_type is bool:
        flag, value_type = f"{flag}/--no-{flag[2:]}", None
    owners = "" if kind is Recipe else f" ({', '.join(models_with(name))} only)"
    return click.option(flag, type=value_type, default=None, metavar=metavar, help=field.metadata["help"] + owners)


def to_option(field: Any) -> Callable[[Function], Function]:
    name, kind, default = f"--{field.name.replace('_', '-')}", field.type, field.metadata["default"]
    if kind == WorkerCount:
        kind = str  # parsed by the request
    elif isinstance(kind, types.UnionType):
        kind = get_args(kind)[0]
    if kind is bool and default is not False:
        name = f"{name}/--no-{name[2:]}"
    allowed = get_args(kind)
    return click.option(
        name,
        type=click.Choice(allowed) if allowed else kind,
        is_flag=kind is bool,
        default=default,
        show_default=default not in ("", None),
        help=field.metadata["help"],
        envvar=field.metadata.get("env"),
        metavar=field.metadata.get("metavar"),
    )
