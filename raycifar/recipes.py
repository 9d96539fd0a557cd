"""The recipes there are, or one in full: `python -m raycifar.recipes vgg16`."""

import click
from rich import box
from rich.table import Table

from raycifar import models
from raycifar.models.recipes import choose_recipe, list_recipes, to_toml
from raycifar.options import command
from raycifar.recipe_options import Model, recipe_option
from raycifar.terminal import Screen


@click.command()
@click.argument("model", type=Model(), required=False)
@recipe_option
@command
def main(debug: bool, model: str | None, recipe: str | None) -> None:
    """List the recipes, or show one of MODEL in full: as a TOML file, which --recipe takes."""
    if model:
        click.echo(to_toml(choose_recipe(model, recipe)))
        return
    if recipe:
        raise click.UsageError(f"--recipe {recipe} needs a model: raycifar recipes MODEL --recipe {recipe}.")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("model", "recipe", "epochs", "for"):
        table.add_column(heading, justify="right" if heading == "epochs" else "left")
    for name in models.names():
        for row in list_recipes(name):
            own = " (its own)" if row.own else ""
            table.add_row(name, f"{row.name}{own}", str(row.recipe.epochs), row.purpose)
    screen = Screen()
    screen.console.print(table)
    screen.say("One in full: raycifar recipes MODEL [--recipe NAME]")


if __name__ == "__main__":
    main()
