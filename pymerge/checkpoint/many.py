"""The merges of a recipe file, one or several, planned together or one after another."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..recipe.documents import Document, order_documents
from ..recipe.problems import Problem, RecipeError
from ..recipe.schema import Recipe
from ..recipe.source import Source, read_sources
from .format import CheckpointError
from .plan import Plan, make_plan
from .planned import PlannedStore
from .reader import open_checkpoint
from .target import is_file_target, lack_of_room

__all__ = ["PlannedMerge", "plan_all", "plan_merges"]


@dataclass(frozen=True)
class PlannedMerge:
    """One merge of a recipe file.

    Attributes:
        name: of its result; None for the only recipe of a file.
        place: where it goes; None where that was not said.
        plan: what it does.
        there: it need not be done: its complete result lies at `place`.
        ready: everything that it uses is there.
    """

    name: str | None
    place: Path | None
    plan: Plan
    there: bool = False
    ready: bool = True


@contextmanager
def plan_all(
    recipe: str | os.PathLike | Mapping | Recipe, out: str | os.PathLike | None = None, *, force: bool = False, **options
) -> Iterator[list[PlannedMerge]]:
    """Plan every merge of a recipe file, in the order in which they are to be carried out, without any of their results.

    Args:
        recipe: see :func:`make_plan`, as for `options`.
        out: where results are to go, see :func:`plan_merges`; None to leave that open.
        force: replace what exists.

    Yields:
        the merges. Plans that use results of others cannot be carried out; they are closed at the end of the block.

    Raises:
        RecipeError: with everything that is wrong with any of them, but for those that use one with which something is wrong.
    """
    out = None if out is None else Path(out)
    sources = [recipe] if isinstance(recipe, Recipe) else read_sources(recipe)
    if len(sources) == 1:
        with make_plan(sources[0], out, force=force, **options) as plan:
            yield [PlannedMerge(None, out, plan)]
        return
    merges: list[PlannedMerge] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pymerge-plan-")))
        planned: dict[Path, PlannedStore] = {}
        redone: set[str] = set()
        wrong: dict[str, list[Problem]] = {}
        documents = _documents(sources, out)
        for document in documents:
            if not wrong.keys().isdisjoint(document.uses):
                wrong[document.name] = []  # what would be found might only follow from what is wrong there
                continue
            try:
                merge = _plan_one(document, out, force, redone, {**options, "planned": planned})
            except RecipeError as error:
                wrong[document.name] = list(error.problems)
                continue
            stack.callback(merge.plan.close)
            merges.append(merge)
            if not merge.there:
                redone.add(document.name)
                own = folder / str(len(planned))
                own.mkdir()
                place = merge.place or Path(document.name)
                planned[place] = PlannedStore(merge.plan, place, own)
        problems = [problem for found in wrong.values() for problem in found]
        if not problems and out is not None:
            lack = lack_of_room(out.absolute(), {m.place: m.plan.nbytes_on_disk for m in merges if not m.there})
            problems += [] if lack is None else [Problem(str(out), None, "", lack)]
        if problems:
            raise RecipeError(problems)
        yield merges


def plan_merges(
    recipe: str | os.PathLike | Mapping | Recipe, out: str | os.PathLike, *, force: bool = False, **options
) -> Iterator[tuple[Path, Plan | None]]:
    """The merges that a recipe file asks for, in the order in which they are to be carried out.

    A file with one recipe gives one merge, into `out`. Of a file with several, each is merged into the folder of its name in `out`, after
    those that it uses; one that is there complete, from the same recipe, is not merged again unless `force` is set or something that it
    uses was merged again. All of them are planned before the first merge.

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
    with plan_all(recipe, out, force=force, **options):
        pass
    redone: set[str] = set()
    for document in _documents(sources, out):
        merge = _plan_one(document, out, force, redone, options)
        if merge.there:
            merge.plan.close()
            yield merge.place, None
        else:
            yield merge.place, merge.plan
            redone.add(document.name)


def _documents(sources: Sequence[Source], out: Path | None) -> list[Document]:
    documents = order_documents(sources)
    if out is not None and is_file_target(out):
        message = f"holds {len(documents)} recipes, whose results need a folder, and not the file {out}"
        raise RecipeError([Problem(documents[0].source.label, None, "", message)])
    return documents


def _plan_one(document: Document, out: Path | None, force: bool, redone: set[str], options: Mapping) -> PlannedMerge:
    """Plan one of several merges; `redone` are the names of those before it that are not there already."""
    place = None if out is None else out / document.name
    named = {name: (out or Path()) / name for name in document.uses}
    if place is not None and not force and not redone & set(document.uses) and place.exists():
        plan = make_plan(document.source, named=named, **options)
        if _is_result_of(place, plan.recipe):
            return PlannedMerge(document.name, place, plan, there=True)
        plan.close()
    plan = make_plan(document.source, place, force=force, named=named, **options)
    return PlannedMerge(document.name, place, plan, ready=not set(named.values()) & set(options.get("planned", ())))


def _is_result_of(place: Path, recipe: Recipe) -> bool:
    """Whether a complete result of this recipe lies at `place`: nothing incomplete ever has a result's name."""
    try:
        with open_checkpoint(place) as checkpoint:
            return all(header.metadata.get("pymerge_recipe") == recipe.to_yaml() for header in checkpoint.headers)
    except CheckpointError:
        return False
