"""Errors as people and programs read them: what is wrong, where, what to do; no traceback for anything but a defect of pymerge."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

__all__ = ["FAILED", "INTERRUPTED", "REFUSED", "Explanation", "exits_with", "explain", "notes_of"]

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class Explanation:
    """What became of a command that did not succeed.

    Attributes:
        kind: for programs: "usage", "recipe", "resume", "checkpoint", "not_finite", "device", "merge", "system", "memory", "interrupted".
        message: for people.
        status: to exit with.
        problems: of a recipe: each with source, line, place and message.
        notes: what was kept, how to go on.
    """

    kind: str
    message: str
    status: int
    problems: list[dict] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict:
        """The content of the JSON document "error/1"."""
        result = {"kind": self.kind, "message": self.message, "exit_status": self.status}
        optional = {"problems": self.problems, "notes": list(self.notes)}
        return {**result, **{key: value for key, value in optional.items() if value}}


@contextmanager
def exits_with(status: int, kinds: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
    """Errors of some kinds that leave this block end the program with `status`."""
    try:
        yield
    except kinds as error:
        error.exit_status = status
        raise


def notes_of(error: BaseException | None) -> tuple[str, ...]:
    """What was added to an error on its way (``add_note``, which Python 3.10 does not have): what was kept, how to go on."""
    return tuple(getattr(error, "__notes__", ()))


def explain(error: Exception) -> Explanation | None:
    """An error's explanation; None for one that is a defect of pymerge."""
    explanation = _explain(error)
    return explanation and replace(explanation, notes=notes_of(error))


def _explain(error: Exception) -> Explanation | None:
    status = getattr(error, "exit_status", FAILED)
    known = _known()
    if isinstance(error, known.get("RecipeError", ())):
        return _recipe(error)
    for name, kind in _KINDS.items():
        if isinstance(error, known.get(name, ())):
            message = str(error).replace("; pass check_finite=False to merge them anyway", "; --no-check-finite merges it anyway")
            return Explanation(kind, message, REFUSED if kind == "resume" else status)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        advice = _ADVICE.get(error.errno or 0, "")
        advice = "" if advice and advice in str(error.strerror) else advice
        return Explanation("system", f"{where}{error.strerror or error}{advice}", status)
    if isinstance(error, MemoryError):
        return Explanation("memory", "there is not enough memory; `pymerge plan` shows how much a merge takes", status)
    return None


_KINDS = {
    "ResumeError": "resume",
    "CheckpointError": "checkpoint",
    "NonFiniteError": "not_finite",
    "DeviceError": "device",
    "MergeError": "merge",
}

_ADVICE = {
    errno.ENOSPC: "; make room, or write to another disk",
    errno.EDQUOT: "; your quota on that disk is used up: make room, or write to another one",
    errno.EFBIG: "; that file system does not take files of this size: write smaller ones (of models: --shard-size), or to another disk",
    errno.EACCES: "; check the permissions, or write to another folder",
    errno.EPERM: "; check the permissions, or write to another folder",
    errno.EROFS: "; write to another folder",
    errno.EIO: "; the disk or the network behind it failed: check it before you try again",
    errno.EMFILE: "; too many files are open: raise the limit (ulimit -n)",
    errno.ENOENT: "; check the path",
}


def _recipe(error) -> Explanation:
    problems = error.problems
    heading = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}, nothing was read or written:"
    message = "\n".join([heading, *(f"  {problem}" for problem in problems)])
    listed = [{"source": p.source, "line": p.line, "place": p.place, "message": p.message} for p in problems]
    return Explanation("recipe", message, REFUSED, listed)


def _known() -> dict[str, type]:
    """Our error types, of modules that are loaded: one that is not cannot have raised."""
    found = {}
    for module, name in (
        ("pymerge.recipe.problems", "RecipeError"),
        ("pymerge.checkpoint.resume", "ResumeError"),
        ("pymerge.checkpoint.format", "CheckpointError"),
        ("pymerge.finite", "NonFiniteError"),
        ("pymerge.checkpoint.failures", "DeviceError"),
        ("pymerge.checkpoint.failures", "MergeError"),
    ):
        if module in sys.modules:
            found[name] = getattr(sys.modules[module], name)
    return found
