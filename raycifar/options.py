"""Command-line options, made from the fields of requests and recipes."""

import types
from collections.abc import Callable, Sequence
from typing import Any, get_args

import click

from raycifar.models.recipe import Recipe, choices, field_types
from raycifar.models.recipes import models_with, recipe_fields
from raycifar.workflows.requests import WorkerCount, WorkerSettings, settings_of

Command = Callable[..., Any]

WIDE = {"show_default": True, "max_content_width": 110}  # layout of the help


def request_options(kind: type[WorkerSettings], *, without: Sequence[str] = ()) -> Callable[[Command], Command]:
    """Add an option for each setting of `kind`, with its default."""

    def add(command: Command) -> Command:
        for setting in reversed(settings_of(kind)):
            if setting.name not in without:
                command = to_option(setting, setting.metadata["default"])(command)
        return command

    return add


recipe_option = click.option(
    "--recipe", metavar="NAME|FILE|RUN", default=None, help="Base recipe: see `raycifar recipes`.  [the model's]"
)


def recipe_options(command: Command) -> Command:
    """Add `--recipe`, and an option for each field of any model's recipe, with the default None."""
    for name, kind in reversed(recipe_fields().items()):
        command = field_option(name, kind)(command)
    return recipe_option(command)


def field_option(name: str, kind: type[Recipe]) -> Callable[[Command], Command]:
    field, flag, value_type = kind.__dataclass_fields__[name], f"--{name.replace('_', '-')}", field_types(kind)[name]
    if allowed := choices(field, value_type):
        value_type = click.Choice(allowed)
    elif value_type is bool:
        flag, value_type = f"{flag}/--no-{flag[2:]}", None
    owners = "" if kind is Recipe else f" ({', '.join(models_with(name))} only)"
    return click.option(flag, type=value_type, default=None, help=field.metadata["help"] + owners)


def to_option(field: Any, default: Any) -> Callable[[Command], Command]:
    name, kind = f"--{field.name.replace('_', '-')}", field.type
    if kind == WorkerCount:
        kind = str  # parsed by the request
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
