"""The options by which commands choose a model and its recipe."""

from collections.abc import Callable
from typing import Any

import click

from raycifar import models
from raycifar.errors import RequestError
from raycifar.models.recipe import Recipe, choices, field_types
from raycifar.models.recipes import choose_recipe, models_with

recipe_option = click.option(
    "--recipe", metavar="NAME|FILE|RUN", help="To begin with: see `raycifar recipes`.  [the model's own]"
)


class Model(click.ParamType):
    """The name of an architecture."""

    name = "model"

    def convert(self, value: str, param: Any, ctx: Any) -> str:
        try:
            models.find(value)
        except RequestError as error:
            self.fail(error.message, param, ctx)
        return value


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--recipe`, and an option for each field of any model's recipe; what isn't given is None."""
    for name, kind in reversed(option_fields().items()):
        command = field_option(name, kind)(command)
    return recipe_option(command)


def option_fields() -> dict[str, type[Recipe]]:
    """Return the fields of all recipes, each with the first class that has it: those that models add come last."""
    found: dict[str, type[Recipe]] = {}
    kinds: list[type[Recipe]] = [Recipe, *map(models.recipe_type, models.names())]
    for kind in kinds:
        for name in field_types(kind):
            found.setdefault(name, kind)
    return found


def field_option(name: str, kind: type[Recipe]) -> Callable[..., Any]:
    field, flag, value_type = kind.__dataclass_fields__[name], f"--{name.replace('_', '-')}", field_types(kind)[name]
    if allowed := choices(field, value_type):
        value_type = click.Choice(allowed)
    elif value_type is bool:
        flag, value_type = f"{flag}/--no-{flag[2:]}", None
    owners = "" if kind is Recipe else f" ({', '.join(models_with(name))} only)"
    return click.option(flag, type=value_type, default=None, help=field.metadata["help"] + owners)


def pick_recipe(model: str, options: dict[str, Any]) -> Recipe:
    """Return the recipe that a command's options choose; those that are no fields of a recipe are left alone.

    Raises:
        RequestError: there is no such recipe, or a value makes no sense.
    """
    given = {name: options[name] for name in option_fields() if options.get(name) is not None}
    return choose_recipe(model, options.get("recipe"), **given)
