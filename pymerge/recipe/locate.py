"""From a model as a recipe names it to paths on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

from .hub import hub_snapshot, is_hub_id
from .problems import Path, Problems, did_you_mean
from .reference import Location, ModelReference

__all__ = ["Located", "existing_paths", "locate"]


@dataclass(frozen=True)
class Located:
    """A checkpoint's path, and those of the adapters to add to it."""

    path: FilePath
    adapters: tuple[FilePath, ...] = ()


def locate(
    reference: ModelReference,
    folder: FilePath | None,
    path: Path,
    problems: Problems,
    download: bool = False,
    named: Mapping[str, FilePath] | None = None,
) -> Located | None:
    """The files that `reference` means, None when there are none (which goes to `problems`).

    A relative path is looked up in the recipe's folder first, so that a recipe means the same wherever it is run from, and in the current
    folder second. When both exist and differ the recipe's folder wins, with a warning. What is no path is a hub id, looked up in the
    Hugging Face cache and, with `download`, on the hub. Before all that, `named` knows the results of other recipes in the same file.
    """
    named = named or {}
    try:
        parts = reference.split(lambda text: text in named or bool(existing_paths(text, folder)[0]))
    except ValueError as error:
        problems.add(path, str(error))
        return None
    found = [
        named[part.path] if part.revision is None and part.path in named else _locate_one(part, folder, path, problems, download)
        for part in (parts.model, *parts.adapters)
    ]
    if None in found:
        return None
    return Located(found[0], tuple(found[1:]))


def existing_paths(text: str, folder: FilePath | None) -> tuple[list[FilePath], list[FilePath]]:
    """The candidates for a path that exist, and all of them.

    Raises:
        ValueError: it is no path.
    """
    if "\0" in text or not _is_text(text):
        raise ValueError(f"{text!r} is not a path")
    try:
        given = FilePath(text).expanduser()
        candidates = [given] if given.is_absolute() or folder is None else [folder / given, given]
        return [candidate for candidate in candidates if candidate.exists()], candidates
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{text!r} is not a usable path: {error}") from None


def _locate_one(location: Location, folder: FilePath | None, path: Path, problems: Problems, download: bool) -> FilePath | None:
    text = location.path
    try:
        existing, candidates = existing_paths(text, folder)
    except ValueError as error:
        problems.add(path, str(error))
        return None
    if existing:
        if location.revision is not None:
            problems.add(path, f"{text!r} is on this disk, and only models on the hub have revisions; leave out {location.revision!r}")
            return None
        if len(existing) == 2 and not existing[0].samefile(existing[1]):
            problems.warn(path, f"{text!r} exists in the recipe's folder and in the current one; {existing[0]} is used")
        return existing[0]
    if is_hub_id(text):
        try:
            return hub_snapshot(text, location.revision, download)
        except LookupError as error:
            if not candidates[0].parent.exists():  # otherwise a misspelt path is likelier
                problems.add(path, f"{text!r} {error.args[0]}")
                return None
    problems.add(path, f"{text!r} does not exist{_hint(candidates)}")
    return None


def _is_text(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can spell and no path can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hint(candidates: list[FilePath]) -> str:
    for candidate in candidates:
        if candidate.parent.is_dir():
            near = did_you_mean(candidate.name, [entry.name for entry in candidate.parent.iterdir()])
            if near:
                return near
    return f" (looked at {' and '.join(dict.fromkeys(str(c.absolute()) for c in candidates))})"
