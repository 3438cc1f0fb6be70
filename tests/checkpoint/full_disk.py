"""Run in a mount namespace of its own by test_full_disk.py: merges onto filesystems of a few megabytes. Prints what happened as JSON.

unshare -rm python -m tests.checkpoint.full_disk FOLDER
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

from tests.cli.test_commands import run

from .files import tree


def small(size: str, how: str = "") -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", "small"], check=True)


def pymerge(*args: str) -> dict:
    """A command, what it said, and what there is afterwards."""
    done = run(*args, cwd=Path.cwd())
    there = {str(path.relative_to("small")) for path in Path("small").rglob("*")}
    return {"status": done.returncode, "out": done.stdout, "err": done.stderr, "there": sorted(there)}


def while_the_disk_looks_empty(*args: str) -> dict:
    """Others may fill a disk while we write to it, after it was looked at."""
    actual = shutil.disk_usage
    looks = iter([mock.Mock(free=10**12)])  # once: what is said afterwards is true
    with mock.patch("pymerge.checkpoint.target.shutil.disk_usage", lambda path: next(looks, None) or actual(path)):
        return pymerge(*args)


def same(folder: str, expected: str) -> bool:
    return tree(Path(folder)) == tree(Path(expected))


def main() -> None:
    os.chdir(sys.argv[1])
    os.mkdir("small")
    inputs = tree(Path("inputs"))
    results = {}
    for kind in ("model", "adapter"):
        command = ("merge", f"{kind}.yml", "small/out")
        small("3m")
        results[kind] = {
            "before": pymerge(*command),
            "during": while_the_disk_looks_empty(*command),
            "inputs": tree(Path("inputs")) == inputs,
            "still": pymerge(*command, "--resume"),
        }
        small("20m", "remount,")
        results[kind]["after"] = pymerge(*command, "--resume")
        pymerge("merge", f"{kind}.yml", f"fresh-{kind}")
        results[kind]["same"] = same("small/out", f"fresh-{kind}")
        subprocess.run(["umount", "small"], check=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
