"""What is wrong with a set of models, in words: every problem of one kind in one message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["keys_that_differ", "raise_all"]

SHOWN = 20  # problems in one message: enough to see the pattern, short enough to read
NAMED = 3  # names quoted per model when keys differ
COMPARED = 2000  # names searched for the nearest one; a file of another architecture has many that resemble nothing


def raise_all(error: type[Exception], heading: str, problems: Sequence[str]) -> None:
    """Raise `error` if there are problems: a single one as it stands, several under `heading` ("{count} tensors differ in shape")."""
    if not problems:
        return
    if len(problems) == 1:
        raise error(problems[0])
    lines = list(problems[:SHOWN])
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    raise error(heading.format(count=len(problems)) + ":\n  " + "\n  ".join(lines))


def _quoted(names: Sequence[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(repr, names[:NAMED])) + rest


def keys_that_differ(label: str, keys: Iterable[str], base_label: str, base_keys: Iterable[str]) -> str | None:
    """What one model lacks and has too many, compared with the base; None when the names agree."""
    given, wanted = list(keys), list(base_keys)
    given_set, wanted_set = set(given), set(wanted)
    missing = [k for k in wanted if k not in given_set]
    extra = [k for k in given if k not in wanted_set]
    if not missing and not extra:
        return None
    parts = []
    if missing:
        near = difflib.get_close_matches(missing[0], extra[:COMPARED], n=1)
        hint = f" (it has {near[0]!r}, which resembles {missing[0]!r})" if near else ""
        parts.append(f"lacks {_quoted(missing)}{hint}")
    if extra:
        parts.append(f"has {_quoted(extra)}, which {base_label} has not")
    return f"{label} " + " and ".join(parts)
