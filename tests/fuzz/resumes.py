"""What an interrupted merge left, damaged or edited: going on gives the right bytes or says why not, and never anything else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from pymerge.checkpoint import memory
from pymerge.checkpoint.merge import merge
from tests.checkpoint.files import tree
from tests.checkpoint.test_resume import interrupted

from .guard import Violation
from .mutate import NASTY, damaged, json_text, structure

RECIPE = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}}
SHARD = 4000
STATES = (1, 4, 7)
"""After how many of 9 tensors a merge was interrupted; each twice, with files that bear other marks."""


def prepare(folder: Path) -> None:
    """What merges leave that are interrupted at different places, and what they would have given."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "BATCH", 1)
            for at in STATES:
                for copy in "ab":
                    interrupted(RECIPE, "state", at, shard_size=SHARD)
                    os.rename("state.partial", f"left-{at}{copy}")
        merge(RECIPE, "whole", shard_size=SHARD)
    finally:
        os.chdir(here)


def resume(folder: Path, rng: Random) -> tuple[Callable[[], object], int]:
    """OUT.partial with another journal, or other files, than it was left with."""
    out = folder / "work" / "resumed"
    left = folder / "work" / "resumed.partial"
    for path in (out, left):
        shutil.rmtree(path, ignore_errors=True)
    at = rng.choice(STATES)
    shutil.copytree(folder / f"left-{at}a", left)
    other = folder / rng.choice([f"left-{state}{copy}" for state in STATES for copy in "ab"])
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.7:
            _edit_journal(left / "journal.jsonl", other / "journal.jsonl", rng)
        else:
            _change_files(left / "output", other / "output", rng)
    before = {name: tree(folder / name) for name in ("a", "b")}

    def use() -> None:
        try:
            merge(RECIPE, "work/resumed", shard_size=SHARD, resume=True, memory="70MB")
        finally:
            if {name: tree(folder / name) for name in before} != before:
                raise Violation("an input was changed")
            if out.exists() and tree(out) != tree(folder / "whole"):
                raise Violation("the output is not what the merge gives")

    return use, sum(path.stat().st_size for path in left.rglob("*") if path.is_file())


def _edit_journal(path: Path, other: Path, rng: Random) -> None:
    data = path.read_bytes() if path.is_file() else b""
    lines = data.split(b"\n")[:-1]
    i = rng.randrange(len(lines)) if lines else 0
    kind = rng.randrange(9)
    if kind == 0 or not lines:
        data = damaged(data, rng)
    elif kind == 1:
        data = data[: rng.randrange(len(data) + 1)]
    elif kind == 2:
        data = other.read_bytes()
    elif kind == 3:
        rng.shuffle(lines)
    elif kind == 4:
        del lines[i]
    elif kind == 5:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice([*lines, *other.read_bytes().split(b"\n")[:-1]]))
    else:
        lines[i] = _edited(lines[i], rng, whole=kind == 6)
    if kind >= 3 and lines:
        data = b"\n".join(lines) + b"\n" * rng.choice((1, 1, 1, 0, 2))
    path.write_bytes(data)


def _edited(line: bytes, rng: Random, whole: bool) -> bytes:
    """A record as a person would change it: more tensors that are done, other inputs, another version."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return line
    done = record.get("done")
    if isinstance(done, dict) and done and not whole:
        names = [f"model.layers.{i}.{part}.weight" for i in range(2) for part in ("mlp.up_proj", "self_attn.q_proj", "input_layernorm")]
        done[rng.choice(list(done))] += rng.sample([*names, "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"], 3)
        return json.dumps(record, separators=(",", ":")).encode()
    more = ({"done": {}}, {"lost": []}, {"commit": [1, 2]}, {"begun": {}}, *NASTY[:20])
    return json_text(structure(record, rng, more), rng).replace(b"\n", b" ")


def _change_files(folder: Path, other: Path, rng: Random) -> None:
    files = sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
    if not files:
        return
    path = rng.choice(files)
    kind = rng.randrange(8)
    if path.is_symlink() or not path.is_file():
        return
    if kind == 0:
        path.unlink()
    elif kind == 1:
        os.truncate(path, rng.randrange(path.stat().st_size * 2))
    elif kind == 2 and (other / path.name).exists():
        shutil.copy(other / path.name, path)  # of a merge that was interrupted elsewhere
    elif kind == 3:
        second = rng.choice(files)
        if second.is_file():
            path.rename(folder / "swap")
            if second != path:
                second.rename(path)
            (folder / "swap").rename(second)
    elif kind == 4:
        (folder / rng.choice(("evil.txt", "pymerge.json", "README.md", "model.safetensors.index.json", ".x"))).write_text("not ours")
    elif kind == 5:
        path.unlink()
        rng.choice((lambda: path.symlink_to(folder.parent.parent.parent / "a/config.json"), path.mkdir, lambda: os.mkfifo(path)))()
    elif kind == 6:
        with open(path, "r+b") as file:
            file.write(rng.choice((bytes(64), rng.randbytes(24), bytes(8) + rng.randbytes(16))))
    else:
        folder.rename(folder.parent / "elsewhere")
        folder.symlink_to("elsewhere")
