"""Recipes: one flat YAML file, and options over it, that say everything about a run. Nothing here loads a model."""

from __future__ import annotations

from prefopt.recipe.bundled import bundled_recipes, find_recipe, recipe_text
from prefopt.recipe.recipe import Recipe, load_recipe
from prefopt.recipe.sections import DataSection, DatasetEntry, LossSpec, ModelSection, ReferenceSection

__all__ = [
    "DataSection",
    "DatasetEntry",
    "LossSpec",
    "ModelSection",
    "Recipe",
    "ReferenceSection",
    "bundled_recipes",
    "find_recipe",
    "load_recipe",
    "recipe_text",
]
