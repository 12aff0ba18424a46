"""From a user's words to a checked recipe, on top of that of the model's task; imports no torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hamcli.checkpoint.source import find_model, infer_task, is_bare
from hamcli.defaults import recipe_of
from hamcli.errors import RecipeError
from hamcli.recipe import ReadRecipe, Recipe, read_recipe, recipe_layer, values_layer
from hamcli.recipe.text import KeyPath, Parsed


def complete(layers: Sequence[Any], *, has_recipe: bool) -> ReadRecipe:
    """The checked recipe; without one of the user's, that of the model's task lies below."""
    layers = [_with_levels(layer) for layer in layers]
    if not has_recipe:
        said = [layer.data for layer in layers]
        model = _last(said, "model", "id")
        task = _last(said, "model", "task") or "auto"
        config = _last(said, "model", "config")
        if task == "auto" and isinstance(model, str) and not is_bare(model, config):
            source = find_model(model, config=config, hashed=False)
            task = infer_task(source.config)
        name = recipe_of(task, _last(said, "sparsity", "target"))
        if name is not None:
            layers.insert(0, recipe_layer(name))
            layers.insert(1, values_layer({"model.task": task}, "task"))
    said = [layer.data for layer in layers]
    pattern = _last(said, "sparsity", "pattern")
    # a recipe that says both is held to both; a pattern of the command line overrides its target
    is_asked = _last(said[1:], "sparsity", "target") is not None
    is_one_word = _where(said, "sparsity", "target") == _where(said, "sparsity", "pattern")
    if isinstance(pattern, str) and not is_asked and not is_one_word and ":" in pattern:
        kept, _, group = pattern.partition(":")
        if kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group):
            fixed = values_layer({"sparsity.target": 1 - int(kept) / int(group)}, "pattern")
            layers.append(fixed)
    return read_recipe(layers)


def _with_levels(layer: Parsed) -> Parsed:
    """A layer whose `sparsity.target` is a list says the levels of ast instead."""
    section = layer.data.get("sparsity")
    target = section.get("target") if isinstance(section, Mapping) else None
    if not isinstance(section, Mapping) or not isinstance(target, list | tuple) or not target:
        return layer
    levels = sorted(set(target))
    said: dict[str, Any] = {"target": levels[-1]}
    if len(levels) > 1:
        said |= {"levels": levels, "method": section.get("method", "ast")}
    place = layer.places.get(("sparsity", "target"), "")
    places: dict[KeyPath, str] = {("sparsity", key): place for key in said}
    return Parsed({**layer.data, "sparsity": {**section, **said}}, {**places, **layer.places})


def _last(layers: Sequence[Mapping[str, Any]], section: str, key: str) -> Any:
    found = None
    for layer in layers:
        inner = layer.get(section)
        if isinstance(inner, Mapping) and inner.get(key) is not None:
            found = inner[key]
    return found


def placed(error: RecipeError, read: ReadRecipe) -> RecipeError:
    """The fault at the line of the recipe that said its key, and those told with it."""
    return RecipeError(
        error.code,
        error.what,
        read.place(*error.where.split(".")),
        error.why,
        error.right,
        error.hints,
        [placed(other, read) for other in error.others],
    )


def input_paths(recipe: Recipe) -> list[Path]:
    """The files and folders that a run reads, of which none may be written."""
    named = (recipe.model.id, recipe.model.config, recipe.data.source, recipe.data.evaluation)
    paths = [Path(name).expanduser() for name in named if name is not None]
    return [path for path in paths if path.exists()]


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as reports show it: paths by their last name."""
    shown = recipe.as_dict()
    for section, key in (
        ("model", "id"),
        ("model", "config"),
        ("data", "source"),
        ("data", "evaluation"),
    ):
        value = shown[section][key]
        if value is not None and os.path.isabs(value):
            shown[section][key] = Path(value).name
    return shown


def _where(layers: Sequence[Mapping[str, Any]], section: str, key: str) -> int:
    """Index of the last layer that says a key; -1 for none."""
    return max(
        (index for index, layer in enumerate(layers) if _last([layer], section, key) is not None),
        default=-1,
    )
