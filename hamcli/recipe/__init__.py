"""Recipes: strict, frozen, plain data with line numbers. Imports no torch."""

from hamcli.recipe.reading import (
    WORDS,
    ReadRecipe,
    read_recipe,
    recipe_layer,
    shipped_names,
    shipped_summary,
    shipped_text,
    values_layer,
    words_layer,
)
from hamcli.recipe.schema import Recipe, json_schema
from hamcli.recipe.writing import effective_text

__all__ = [
    "WORDS",
    "ReadRecipe",
    "Recipe",
    "effective_text",
    "json_schema",
    "read_recipe",
    "recipe_layer",
    "shipped_names",
    "shipped_summary",
    "shipped_text",
    "values_layer",
    "words_layer",
]
