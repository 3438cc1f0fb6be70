"""Whether the output can be written where it is to go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .partial import OutputInUseError, partial_of, peek
from .sizes import format_bytes

if TYPE_CHECKING:
    from ..recipe.problems import Problems
    from .sources import Sources

__all__ = ["check_out", "check_target", "clash", "is_file_target", "lack_of_room"]


def is_file_target(out: Path) -> bool:
    """Whether `out` names one .safetensors file rather than a folder."""
    return out.suffix == ".safetensors"


def check_out(out: Path, force: bool, nbytes: int, sources: Sources, problems: Problems, resume: bool = False) -> None:
    """Add to `problems` what speaks against writing `nbytes` to `out`."""
    out = out.absolute()
    for checkpoint in sources.checkpoints:
        problem = clash(out.resolve(), checkpoint.path.resolve(), {file.resolve() for file in checkpoint.files})
        if problem:
            problems.add_elsewhere(str(out), problem)
            return
    unfinished = partial_of(out)
    try:
        state = peek(out)
    except OutputInUseError as error:
        problems.add_elsewhere(str(out), str(error).removeprefix(f"{out}: "))
        return
    if state == "committed" and resume:
        return
    problem = check_target(out, force)
    if problem:
        problems.add_elsewhere(str(out), problem)
        return
    if state == "begun" and not resume and not force:
        problems.add_elsewhere(str(unfinished), UNFINISHED)
        return
    lack = lack_of_room(out, {out: nbytes})
    if lack:
        problems.add_elsewhere(str(out), lack)


def lack_of_room(out: Path, sizes: Mapping[Path, int]) -> str | None:
    """What to say when the disk of `out` has no room for outputs of these sizes; None when it has, as far as can be told now."""
    ancestor = next(parent for parent in (out, *out.parents) if parent.exists())
    needed, free = sum(sizes.values()), shutil.disk_usage(ancestor).free
    # What unfinished outputs take already counts as free: it is continued or thrown away.
    free += sum(_allocated(partial_of(place)) for place in sizes)
    if needed <= free:
        return None
    return f"needs {format_bytes(needed)}, but its disk has {format_bytes(free)} free; make room, or write to another disk"


UNFINISHED = "holds an unfinished merge; continue it with --resume (resume=True) or throw it away with --force (force=True)"


def _allocated(folder: Path) -> int:
    """Bytes on the disk that the files below a folder take; files may have holes."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def check_target(out: Path, force: bool) -> str | None:
    """What speaks against writing to `out`, None when nothing does."""
    if not out.name:
        return "is not a name for a new checkpoint"
    ancestor = next(parent for parent in out.parents if parent.exists() or parent.is_symlink())
    if not ancestor.is_dir():
        return f"cannot be made: {ancestor} is not a folder"
    if not os.access(ancestor, os.W_OK | os.X_OK):
        return f"cannot be made: {ancestor} is not writable"
    if out.is_symlink():
        return "is a symbolic link; name the place that it points to"
    if not out.exists():
        return None
    if is_file_target(out):
        if not out.is_file():
            return "exists and is not a file"
        return None if force else "exists already; choose another name or replace it with --force"
    if not out.is_dir():
        return "exists and is not a folder"
    entries = list(os.scandir(out))
    if not entries:
        return None
    if not force:
        return "exists already and is not empty; choose another name or replace it with --force"
    # --force deletes a whole folder, so make sure that it is a checkpoint and not somebody's home.
    if any(entry.is_dir(follow_symlinks=False) for entry in entries) or not any(e.name.endswith(".safetensors") for e in entries):
        return "is not replaced: it holds folders, or no .safetensors file, so it does not look like a checkpoint; delete it yourself"
    return None


def clash(out: Path, source: Path, files: set[Path]) -> str | None:
    """What speaks against writing to `out` by reading from `source` and its `files`, None when nothing does. All paths are resolved."""
    if out == source or out in files:
        return f"is an input of the merge ({source}); choose another name"
    if source.is_dir() and source in out.parents:
        return f"is inside an input of the merge ({source}); choose a place outside it"
    if out in source.parents or any(out in file.parents for file in files):
        return f"contains an input of the merge ({source}); choose another name" if out.exists() else None
    return None
