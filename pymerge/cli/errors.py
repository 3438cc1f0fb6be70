"""Errors as people read them: what is wrong, where, what to do; no traceback for anything but a defect of pymerge."""

from __future__ import annotations

import sys

__all__ = ["FAILED", "REFUSED", "explain"]

FAILED, REFUSED = 1, 2


def explain(error: Exception) -> tuple[str | None, int]:
    """The message and exit status for an error; no message for one that is a defect."""
    known = _known()
    if isinstance(error, known.get("RecipeError", ())):
        problems = error.problems
        heading = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}, nothing was read or written:"
        return "\n".join([heading, *(f"  {problem}" for problem in problems)]), REFUSED
    for name, code in (("ResumeError", REFUSED), ("CheckpointError", FAILED), ("NonFiniteError", FAILED), ("MergeError", FAILED)):
        if isinstance(error, known.get(name, ())):
            hint = "; --no-check-finite merges it anyway" if name == "NonFiniteError" else ""
            message = str(error).replace("; pass check_finite=False to merge them anyway", "")
            return f"error: {message}{hint}", code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {where}{error.strerror or error}", FAILED
    if isinstance(error, MemoryError):
        return "error: there is not enough memory", FAILED
    return None, FAILED


def _known() -> dict[str, type]:
    """Our error types, of modules that are loaded: one that is not cannot have raised."""
    found = {}
    for module, name in (
        ("pymerge.recipe.problems", "RecipeError"),
        ("pymerge.checkpoint.resume", "ResumeError"),
        ("pymerge.checkpoint.format", "CheckpointError"),
        ("pymerge.finite", "NonFiniteError"),
        ("pymerge.checkpoint.merge", "MergeError"),
    ):
        if module in sys.modules:
            found[name] = getattr(sys.modules[module], name)
    return found
