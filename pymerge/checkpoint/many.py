"""The merges of a recipe file, one or several, planned one after another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..recipe.documents import order_documents
from ..recipe.problems import Problem, RecipeError
from ..recipe.schema import Recipe
from ..recipe.source import read_sources
from .format import CheckpointError
from .plan import Plan, make_plan
from .reader import open_checkpoint
from .target import is_file_target

__all__ = ["plan_merges"]


def plan_merges(
    recipe: str | os.PathLike | Mapping | Recipe, out: str | os.PathLike, *, force: bool = False, **options
) -> Iterator[tuple[Path, Plan | None]]:
    """The merges that a recipe file asks for, in the order in which they are to be carried out.

    A file with one recipe gives one merge, into `out`. Of a file with several, each is merged into the folder of its name in `out`, after
    those that it uses; one that is there complete, from the same recipe, is not merged again unless `force` is set or something that it
    uses was merged again. Before the first merge everything is planned that uses no other.

    Args:
        recipe: see :func:`make_plan`, as for `options`.
        out: a folder; for one recipe also a .safetensors file.
        force: replace what exists.

    Yields:
        where the result goes, and the plan, to be carried out (and closed) before the next is asked for; None for one that is complete.

    Raises:
        RecipeError: with everything that is wrong.
    """
    out = Path(out)
    sources = [recipe] if isinstance(recipe, Recipe) else read_sources(recipe)
    if len(sources) == 1:
        yield out, make_plan(sources[0], out, force=force, **options)
        return
    documents = order_documents(sources)
    if is_file_target(out):
        message = f"holds {len(documents)} recipes, whose results need a folder, and not the file {out}"
        raise RecipeError([Problem(documents[0].source.label, None, "", message)])
    places = {document.name: out / document.name for document in documents}
    for document in documents:
        if not document.uses:
            make_plan(document.source, **options).close()
    redone: set[str] = set()
    for document in documents:
        place = places[document.name]
        found = {name: places[name] for name in document.uses}
        if not force and not redone & set(document.uses) and place.exists():
            with make_plan(document.source, named=found, **options) as plan:
                if _is_result_of(place, plan.recipe):
                    yield place, None
                    continue
        yield place, make_plan(document.source, place, force=force, named=found, **options)
        redone.add(document.name)


def _is_result_of(place: Path, recipe: Recipe) -> bool:
    """Whether a complete result of this recipe lies at `place`: nothing incomplete ever has a result's name."""
    try:
        with open_checkpoint(place) as checkpoint:
            return all(header.metadata.get("pymerge_recipe") == recipe.to_yaml() for header in checkpoint.headers)
    except CheckpointError:
        return False
