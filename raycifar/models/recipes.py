"""Choosing a recipe: a model's, by name, that of a TOML file or that of a run."""

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any

from pyarrow import fs

from raycifar import models
from raycifar.errors import RequestError, as_sentence, in_a_line
from raycifar.models.recipe import Recipe, changes, field_types
from raycifar.storage.files import file_type, locate, read_file
from raycifar.storage.locations import check_location
from raycifar.storage.run_folder import RUN, RunFolder

PURPOSES = {
    "scratch": "from scratch, 100 epochs or more",
    "short": "from scratch, fewer than 100 epochs",
    "transfer": "from pretrained weights",
    "study": "plain, the same for all models",
}
LONG_EPOCHS = 100  # from which a recipe for long training is a model's default
RENAMED = {"mirror": "tta_flip"}  # fields of earlier versions


@dataclass(frozen=True)
class NamedRecipe:
    """A model's recipe; `own` marks its default."""

    model: str
    name: str
    recipe: Recipe
    purpose: str
    own: bool

    def __str__(self) -> str:
        return f"the {self.model}'s default recipe" if self.own else f"the {self.name} recipe"


def list_recipes(model: str) -> Iterator[NamedRecipe]:
    """Yield a model's recipes, its default first."""
    family = None if model.startswith(models.TIMM) else models.import_family(model)
    purposes = PURPOSES | getattr(family, "PURPOSES", {})
    for k, (name, recipe) in enumerate(models.recipes_of(model).items()):
        yield NamedRecipe(model, name, recipe, purposes[name], own=k == 0)


def to_toml(recipe: Recipe) -> str:
    """Return a recipe as a TOML file, with a comment for each field."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in asdict(recipe).items()]
    width = max(map(len, lines))
    helps = [field.metadata["help"] for field in recipe.__dataclass_fields__.values()]
    return "\n".join(f"{line:{width}}  # {text}" for line, text in zip(lines, helps, strict=True))


# Choosing one ---------------------------------------------------------------------------------------


def model_of(recipe: str | None) -> str:
    """Return the model that a recipe is for: the name of one model's, or a run's folder.

    Raises:
        RequestError: it could be several models'.
    """
    owners = [name for name in models.names() if recipe in models.recipes_of(name)]
    if len(owners) == 1:
        return owners[0]
    with suppress(OSError, ValueError):  # no folder, or none of a run
        run = RunFolder.at(recipe).read_json(RUN) if recipe and not owners else None
        if run and isinstance(run.get("model"), str):
            return run["model"]
    raise RequestError(f"give --model: {', '.join(models.names())}, or timm:NAME.")


def recipe_for(model: str, pretrained: str | None = None, epochs: int | None = None) -> Recipe:
    """Return a model's default recipe; for fewer than 100 epochs from scratch, `short` replaces a long recipe.

    A model without `short` has `study`.

    Args:
        pretrained: the initial weights, if they are given.
        epochs: for how long it is trained, if that is given. The recipe returned may be for longer.
    """
    recipes = models.recipes_of(model)
    base = next(iter(recipes.values()))
    if pretrained is not None:
        base = recipes.get("scratch" if pretrained == "none" else "transfer", base)
        base = change(model, base, {"pretrained": pretrained})
    is_short = isinstance(epochs, Integral) and epochs < LONG_EPOCHS <= base.epochs
    return recipes.get("short", recipes["study"]) if is_short and base.pretrained == "none" else base


def nearest_recipe(model: str, recipe: Recipe) -> NamedRecipe:
    """Return the model's recipe that `recipe` differs least from: of those with its optimizer, if there are any.

    The initial weights and the number of epochs don't count.
    """
    default = recipe_for(model, recipe.pretrained, recipe.epochs)
    candidates = [
        replace(each, recipe=base, own=base == default)
        for each in list_recipes(model)
        for base in [change(model, each.recipe, {"pretrained": recipe.pretrained})]
    ]

    def distance(each: NamedRecipe) -> tuple[bool, int, bool, bool]:
        differing = changes(recipe, change(model, each.recipe, {"epochs": recipe.epochs}))
        return "optimizer" in differing, len(differing), not each.own, each.name != "study"

    return min(candidates, key=distance)


def options_for(model: str, recipe: Recipe) -> dict[str, Any]:
    """Return a few options that give a model this recipe: `choose_recipe` is the inverse."""
    nearest = nearest_recipe(model, recipe)
    options: dict[str, Any] = {} if nearest.own else {"recipe": nearest.name}
    for name in ("pretrained", "epochs"):  # by these, the default is chosen
        value = getattr(recipe, name)
        if value != getattr(resolve(model, **options), name):
            options[name] = value
    return options | changes(recipe, resolve(model, **options))


def shared_options(recipes: Iterable[tuple[str, Recipe]]) -> dict[str, Any] | None:
    """Return options that give each of several models its recipe, or None if there are none."""
    recipes = list(recipes)
    options = {name: value for pair in recipes for name, value in options_for(*pair).items()}
    try:
        same = all(resolve(model, **options) == recipe for model, recipe in recipes)
    except (ValueError, RequestError):  # a model lacks one of the options, or the recipe of that name
        return None
    return options if same else None


def choose_recipe(model: str, recipe: str | None = None, **values: Any) -> Recipe:
    """Return the recipe to train a model with.

    Args:
        recipe: a name, a TOML file or a run's folder; None is the model's default.
        values: fields to change.

    Raises:
        RequestError: there is no such recipe, or a value is not allowed.
    """
    try:
        chosen = resolve(model, recipe, **values)
    except ValueError as error:
        raise RequestError(as_sentence(str(error))) from error
    check_location(chosen.pretrained, "--pretrained")
    return chosen


def resolve(model: str, recipe: str | None = None, **values: Any) -> Recipe:
    """Like `choose_recipe`, but don't check the location of the initial weights; raise ValueError for a value."""
    pretrained, epochs = values.get("pretrained"), values.get("epochs")
    if recipe is None:
        return change(model, recipe_for(model, pretrained, epochs), values)
    return change(model, find_recipe(model, recipe, pretrained, epochs), values)


def find_recipe(model: str, wanted: str, pretrained: str | None, epochs: int | None) -> Recipe:
    """Return the recipe of a name, a TOML file or a run.

    Args:
        pretrained, epochs: if they are given in addition to the recipe.
    """
    if not isinstance(wanted, str | os.PathLike) or not os.fspath(wanted):
        raise RequestError(f"the recipe is {wanted!r}: give a name, a TOML file or a run's folder.")
    wanted, own = os.fspath(wanted), models.recipes_of(model)
    if wanted in own:
        return own[wanted]
    if owners := [name for name in models.names() if wanted in models.recipes_of(name)]:
        raise RequestError(f"--recipe {wanted} is for --model {' or '.join(owners)}, not for {model}.")
    try:
        if file_type(*locate(wanted)) == fs.FileType.File:
            return parse_toml(model, read_file(wanted), pretrained, epochs)
        run = RunFolder.at(wanted).read_json(RUN)
    except (OSError, ValueError) as error:
        raise RequestError(f"--recipe {wanted}: {as_sentence(in_a_line(error))}") from error
    if run is None:
        raise RequestError(
            f"--recipe {wanted} is neither a recipe of {model} ({', '.join(own)}), nor a TOML file, nor a run's folder."
        )
    if "model" not in run or "recipe" not in run:
        raise RequestError(f"--recipe {wanted}: its {RUN} has no model or no recipe.")
    if run["model"] != model:
        raise RequestError(f"--recipe {wanted} is a run of {run['model']}, not of {model}.")
    return recipe_from_json(model, run["recipe"])


def parse_toml(model: str, content: bytes, pretrained: str | None, epochs: int | None) -> Recipe:
    """Return the recipe of a TOML file, or raise ValueError; fields that it lacks are as in the model's default."""
    try:
        values = tomllib.loads(content.decode())
    except ValueError as error:
        raise ValueError(f"it is not a TOML file: {error}") from error
    base = recipe_for(model, pretrained or values.get("pretrained"), epochs or values.get("epochs"))
    return change(model, base, values)


def change(model: str, base: Recipe, values: dict[str, Any]) -> Recipe:
    """Return a model's recipe with some fields changed; fewer epochs still leave one for the whole network.

    The image size of a recipe for ImageNet weights gives way to that of a weights file.

    Raises:
        ValueError: there is no such field, or its value is not allowed; the message names the field.
    """
    known = field_types(type(base))
    if unknown := [name for name in values if name not in known]:
        name = unknown[0]
        if owners := models_with(name):
            raise ValueError(f"{name} is an option of {', '.join(owners)}, not of {model}")
        (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
        raise ValueError(f"a recipe has no field {name!r}; did you mean {nearest!r}?")
    if isinstance(epochs := values.get("epochs"), Integral) and epochs < base.epochs:
        probe = base.head_epochs == base.epochs  # only the head is trained, however long
        values = {"head_epochs": max(0, min(base.head_epochs, int(epochs) - (not probe))), **values}
    if base.pretrained == "imagenet" and values.get("pretrained", "none") not in ("imagenet", "none"):
        values = {"image_size": 0, **values}
    return replace(base, **values)


def recipe_fields() -> dict[str, type[Recipe]]:
    """Return the fields of all models' recipes, each with its class; the models' options come last."""
    kinds = [*map(models.recipe_type, models.names()), Recipe]
    return {name: kind for kind in kinds for name in field_types(kind)}


def models_with(option: str) -> list[str]:
    """Return the models that have an option which others lack."""
    if option in field_types(Recipe):
        return []
    return [name for name in models.names() if option in field_types(models.recipe_type(name))]


def recipe_from_json(model: str, values: dict[str, Any]) -> Recipe:
    """Return the recipe in a `run.json`, whichever version wrote it.

    Raises:
        RequestError: there is no such model, or a value is not allowed.
    """
    renamed = {RENAMED.get(name, name): value for name, value in values.items()}
    kind = models.recipe_type(model)
    try:
        return kind(**{name: renamed[name] for name in field_types(kind) if name in renamed})
    except ValueError as error:
        raise RequestError(f"the recipe of a run of {model}: {error}.") from error
