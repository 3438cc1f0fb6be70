"""Whether the output can be written where it is to go."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..recipe.problems import Problems
from .sizes import format_bytes
from .sources import Sources
from .writer import check_target, leftovers

__all__ = ["check_out"]


def check_out(out: Path, force: bool, nbytes: int, sources: Sources, problems: Problems) -> None:
    """Add to `problems` what speaks against writing `nbytes` to `out`."""
    out = out.absolute()
    for checkpoint in sources.checkpoints:
        clash = _clash(out.resolve(), checkpoint.path.resolve(), {file.resolve() for file in checkpoint.files})
        if clash:
            problems.add_elsewhere(str(out), clash)
            return
    problem = check_target(out, force)
    if problem:
        problems.add_elsewhere(str(out), problem)
        return
    ancestor = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(ancestor).free
    if nbytes > free:
        problems.add_elsewhere(str(out), f"needs {format_bytes(nbytes)}, but its disk has {format_bytes(free)} free")
    for path in leftovers(out):
        problems.warnings.append(f"{path} is left over from a merge that was killed; delete it")


def _clash(out: Path, source: Path, files: set[Path]) -> str | None:
    if out == source or out in files:
        return f"is an input of the merge ({source}); choose another name"
    if source.is_dir() and source in out.parents:
        return f"is inside an input of the merge ({source}); choose a place outside it"
    if out in source.parents or any(out in file.parents for file in files):
        return f"contains an input of the merge ({source}); choose another name" if out.exists() else None
    return None
