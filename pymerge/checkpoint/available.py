"""How much memory this process may still take where a container or a job scheduler limits it: Linux control groups, version 1 and 2.

Documentation of the files: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; of where they are mounted: proc(5),
cgroups(7).
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["memory_left"]

NO_LIMIT = 2**60
"""Version 1 writes "none" as a number near 2**63."""

_FILES = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}
"""Of each version: limits, use, and which lines of memory.stat are page cache. That is given back when it is wanted, so it counts as free:
after a model was read it may fill the group up to its limit."""


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes that the limits of this process's control groups leave: of its own, and of all above it that can be seen.

    Args:
        root: of the file system, for tests.

    Returns:
        None where nothing is limited, or where that cannot be told.
    """
    try:
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):  # not Linux
        return None
    found = []
    for line in mounts:
        mount, _, system = line.partition(" - ")
        fields, (kind, _, options, *_) = mount.split(" "), [*system.split(" "), "", "", ""]
        if len(fields) < 5 or kind not in _FILES or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top = root / _plain(fields[4]).lstrip("/")
        for folder in _from_top(top, _plain(fields[3]), _group(groups, kind)):
            left = _left(folder, kind)
            if left is not None:
                found.append(left)
    return min(found, default=None)


def _plain(text: str) -> str:
    """mountinfo writes blanks in octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _group(groups: list[str], kind: str) -> str:
    """The process's group in the hierarchy that controls memory."""
    for line in groups:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (kind == "cgroup2" and number == "0") or (kind == "cgroup" and "memory" in controllers.split(",")):
            return path
    return "/"


def _from_top(top: Path, mounted: str, group: str) -> list[Path]:
    """The folders of a group and of those above it. `mounted` is the group that is to be seen at `top`: in a container often its own."""
    below = group.removeprefix(mounted.rstrip("/")) if f"{group}/".startswith(f"{mounted.rstrip('/')}/") else ""
    folders = [top]
    for part in below.strip("/").split("/"):
        if part == ".." or not (folders[-1] / part).is_dir():
            break
        if part:
            folders.append(folders[-1] / part)
    return folders


def _left(folder: Path, kind: str) -> int | None:
    limits, use, cache = _FILES[kind]
    known = [limit for limit in (_number(folder / name) for name in limits) if limit is not None and limit < NO_LIMIT]
    if not known:
        return None
    try:
        lines = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        reclaimed = sum(int(line[1]) for line in lines if len(line) == 2 and line[0] in cache)
    except (OSError, ValueError):
        reclaimed = 0
    return max(0, min(known) - max(0, (_number(folder / use) or 0) - reclaimed))


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", and for a file that is not there."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
