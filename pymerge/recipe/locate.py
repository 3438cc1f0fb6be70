"""From a model as a recipe names it to a path on disk."""

from __future__ import annotations

import re
from pathlib import Path as FilePath

from .problems import Path, Problems, did_you_mean

__all__ = ["locate"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(text: str, folder: FilePath | None, path: Path, problems: Problems) -> FilePath | None:
    """The checkpoint that `text` means, None when there is none (which goes to `problems`).

    A relative path is looked up in the recipe's folder first, so that a recipe means the same wherever it is run from, and in the current
    folder second. When both exist and differ the recipe's folder wins, with a warning. A path that exists is taken as it is, whatever
    characters it has; only otherwise are '+' and '@' understood as mergekit's LoRA and revision marks.
    """
    if "\0" in text or not _is_text(text):
        problems.add(path, f"{text!r} is not a path")
        return None
    try:
        given = FilePath(text).expanduser()
        candidates = [given] if given.is_absolute() or folder is None else [folder / given, given]
        existing = [candidate for candidate in candidates if candidate.exists()]
    except (OSError, RuntimeError) as error:
        problems.add(path, f"{text!r} is not a usable path: {error}")
        return None
    if len(existing) == 2 and not existing[0].samefile(existing[1]):
        problems.warn(path, f"{text!r} exists in the recipe's folder and in the current one; {existing[0]} is used")
    if existing:
        return existing[0]
    problems.add(path, f"{text!r} does not exist{_hint(text, candidates)}")
    return None


def _is_text(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can spell and no path can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hint(text: str, candidates: list[FilePath]) -> str:
    if "+" in text:
        return f"; LoRA references (model+adapter) are not supported yet: merge the adapter into {text.split('+')[0]!r} first"
    name = text.split("@")[0]
    if _HUB_ID.fullmatch(name) and not candidates[0].parent.exists():
        return f"; models are not downloaded: fetch it (`hf download {name} --local-dir FOLDER`) and give that folder"
    for candidate in candidates:
        if candidate.parent.is_dir():
            near = did_you_mean(candidate.name, [entry.name for entry in candidate.parent.iterdir()])
            if near:
                return near
    return f" (looked at {' and '.join(dict.fromkeys(str(c.absolute()) for c in candidates))})"
