"""Several recipes in one file that use each other's results by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .problems import Problems, RecipeError
from .schema import Recipe, parse_recipe
from .source import Source

__all__ = ["UNNAMED", "Document", "order_documents"]

UNNAMED = "merged"
"""Name of the result of the one recipe in a file of several that may go without."""


@dataclass(frozen=True)
class Document:
    """One recipe of a file.

    Attributes:
        name: of its result.
        recipe: what it says.
        source: its text with lines.
        uses: names of others whose results it merges.
    """

    name: str
    recipe: Recipe
    source: Source
    uses: tuple[str, ...]


def order_documents(sources: Sequence[Source]) -> list[Document]:
    """The recipes of a file that holds several, each after those that it uses, otherwise in their order.

    Raises:
        RecipeError: with everything that is wrong with any of them.
    """
    found = []
    wrong: list = []
    for source in sources:
        problems = Problems(source.label, source.lines)
        parsed = parse_recipe(source, problems)
        name = parsed.name or UNNAMED
        if any(name == other.name for other, _ in found):
            hint = " (it has no name)" if parsed.name is None else ""
            problems.add(("name",), f"two recipes of the file are called {name!r}{hint}; give this one another name")
        found.append((Document(name, parsed, source, ()), problems))
        wrong += problems.found()
    if wrong:
        raise RecipeError(wrong)
    names = {document.name for document, _ in found}
    documents = {}
    for document, _ in found:
        uses = dict.fromkeys(name for _, reference in document.recipe.references() if (name := reference.stem(names)) is not None)
        documents[document.name] = Document(document.name, document.recipe, document.source, tuple(uses))
    return _ordered(documents)


def _ordered(documents: dict[str, Document]) -> list[Document]:
    result: dict[str, Document] = {}
    while len(result) < len(documents):
        ready = [d for d in documents.values() if d.name not in result and all(name in result for name in d.uses)]
        if not ready:
            raise _cycle({d.name: d for d in documents.values() if d.name not in result})
        result[ready[0].name] = ready[0]
    return list(result.values())


def _cycle(left: dict[str, Document]) -> RecipeError:
    walk = [next(iter(left))]
    while walk[-1] not in walk[:-1]:
        walk.append(next(name for name in left[walk[-1]].uses if name in left))
    loop = walk[walk.index(walk[-1]) :]
    first = left[loop[0]].source
    problems = Problems(first.label, first.lines)
    problems.add(("name",), "uses itself: " + ", ".join(f"{a!r} uses {b!r}" for a, b in zip(loop, loop[1:], strict=False)))
    return RecipeError(problems.found())
