"""What two runs must have in common for one to continue the other's work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .._version import __version__

if TYPE_CHECKING:
    from .inputs import InputFiles
    from .plan import Plan

__all__ = ["ResumeError", "describe", "difference"]


class ResumeError(ValueError):
    """An unfinished output cannot be continued by this merge. Nothing was changed."""


def describe(plan: Plan, inputs: InputFiles, others: Mapping[str, bytes]) -> dict[str, Any]:
    """Everything that the output's bytes depend on, as plain values.

    Args:
        plan: of the merge.
        inputs: its files.
        others: the small files of the output.
    """
    method = plan.method.tensor
    return {
        "pymerge": __version__,
        "method": f"{plan.method.name}: {method.__module__}.{method.__qualname__}",
        "recipe": plan.recipe.to_yaml(),
        "inputs": [[str(file), *identity] for file, identity in inputs.identities.items()],
        "files": [[shard.file_name, shard.size, _digest([shard.head])] for shard in plan.layout.shards],
        "tensors": _digest(repr(_work(tensor)).encode() for tensor in plan.tensors),
        "others": {name: _digest([content]) for name, content in others.items()},
    }


def _work(tensor) -> tuple:
    sources = [(index, info.name, info.dtype, info.shape, info.offset) for index, info in tensor.inputs]
    return tensor.output.name, sources, tensor.has_base, sorted(tensor.parameters.items()), tensor.copied


def _digest(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()


def difference(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What speaks against continuing what `begun` describes, None for nothing."""
    if begun.get("pymerge") != now.get("pymerge"):
        return f"it was begun by pymerge {begun.get('pymerge')}, this is {now.get('pymerge')}"
    if begun.get("recipe") != now.get("recipe"):
        return f"it was begun with another recipe{_first_line_that_differs(str(begun.get('recipe')), str(now.get('recipe')))}"
    before, after = begun.get("inputs", []), now.get("inputs", [])
    if len(before) != len(after):
        return f"it was begun with {len(before)} input files, there are {len(after)} now"
    for (file, *identity), (file_now, *identity_now) in zip(before, after, strict=True):
        if identity != identity_now:
            moved = f" (was {file})" if file != file_now else ""
            names = ("size", "time of change", "inode")
            what = ", ".join(n for n, a, b in zip(names, identity, identity_now, strict=True) if a != b)
            return f"{file_now}{moved} has changed since it was begun ({what})"
    if begun.get("files") != now.get("files"):
        return "the output's files would be other ones (another shard size, say)"
    others = dict(begun.get("others", {}))
    for name, digest in now.get("others", {}).items():
        if others.pop(name, None) != digest:
            return f"{name} would be another"
    if others:
        return f"{next(iter(others))} would be missing"
    return None if dict(begun) == dict(now) else "tensors would be merged in another way"


def _first_line_that_differs(before: str, after: str) -> str:
    for a, b in zip(before.splitlines(), after.splitlines(), strict=False):
        if a != b:
            return f": {a.strip()!r} then, {b.strip()!r} now"
    return ""
