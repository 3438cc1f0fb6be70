"""The YAML description of a merge, in mergekit's format: reading it, checking it, and what its parameters mean for each tensor."""

from .entries import ModelEntry, ModuleEntry, SliceEntry
from .problems import Problem, Problems, RecipeError
from .reference import Location, ModelReference
from .schema import Recipe, load_recipe, parse_recipe
from .source import Source, read_source, read_sources
from .tokenizer import TokenizerSpec, TokenSpec

__all__ = [
    "Location", "ModelEntry", "ModelReference", "ModuleEntry", "Problem", "Problems", "Recipe", "RecipeError", "SliceEntry", "Source",
    "TokenSpec", "TokenizerSpec", "load_recipe", "parse_recipe", "read_source", "read_sources",
]  # fmt: skip
