"""List the recipes, or print one in full: `python -m raycifar.recipes vgg16`."""

import click

from raycifar import models
from raycifar.models.recipes import choose_recipe, list_recipes, to_toml
from raycifar.options import Command, recipe_option
from raycifar.terminal import Screen
from raycifar.terminal_tables import LESS_OF_RECIPES, fit, recipes_table


@click.command(cls=Command, example="raycifar recipes vgg16 > vgg16.toml")
@click.argument("model", required=False)
@recipe_option
def main(debug: bool, model: str | None, recipe: str | None) -> None:
    """List the recipes, or print one of MODEL's as a TOML file for --recipe."""
    screen = Screen()
    if model:
        models.find_family(model)
        screen.lines(to_toml(choose_recipe(model, recipe)).splitlines())
        return
    if recipe:
        raise click.UsageError(f"--recipe {recipe} needs a model: raycifar recipes MODEL --recipe {recipe}.")
    table = recipes_table(row for name in models.names() for row in list_recipes(name))
    screen.console.print(fit(table, screen.console, LESS_OF_RECIPES))
    screen.say("One in full: raycifar recipes MODEL [--recipe NAME]")


if __name__ == "__main__":
    main()
