"""The options that commands share, made of the dataclasses that say what can be asked for."""

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any, get_args

import click

from raycifar.recipes import NAMED, Recipe
from raycifar.workflows.requests import Settings, WorkerCount, settings_of

Command = Callable[..., Any]

WIDE = {"show_default": True, "max_content_width": 110}  # how commands show their help


def request_options(kind: type[Settings], *, without: Sequence[str] = ()) -> Callable[[Command], Command]:
    """Add an option for each setting of `kind`, with its default."""

    def add(command: Command) -> Command:
        for setting in reversed(settings_of(kind)):
            if setting.name not in without:
                command = to_option(setting, setting.metadata["default"])(command)
        return command

    return add


def recipe_options(command: Command) -> Command:
    """Add an option for each field of the recipe; what isn't given is None, so the model's own."""
    for field in reversed(dataclasses.fields(Recipe)):
        command = to_option(field, None)(command)
    return click.option("--recipe", type=click.Choice([*NAMED]), help="To begin with.  [the model's own]")(command)


def to_option(field: Any, default: Any) -> Callable[[Command], Command]:
    name, kind = f"--{field.name.replace('_', '-')}", field.type
    if kind == WorkerCount:
        kind = str  # taken apart with the rest of the request
    elif isinstance(kind, types.UnionType):
        kind = get_args(kind)[0]
    if kind is bool and default is not False:
        name = f"{name}/--no-{name[2:]}"
    choices = get_args(kind)
    return click.option(
        name,
        type=click.Choice(choices) if choices else kind,
        is_flag=kind is bool,
        default=default,
        show_default=default not in ("", None),
        help=field.metadata["help"],
        envvar=field.metadata.get("env"),
        metavar=field.metadata.get("metavar"),
    )
