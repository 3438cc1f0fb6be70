"""The YAML description of a merge, in mergekit's format: reading it, checking it, and what its parameters mean for each tensor."""

from .problems import Problem, Problems, RecipeError
from .schema import ModelEntry, Recipe, load_recipe, parse_recipe
from .source import Source, read_source

__all__ = ["ModelEntry", "Problem", "Problems", "Recipe", "RecipeError", "Source", "load_recipe", "parse_recipe", "read_source"]
