"""What is fuzzed: each target writes an input that follows from a generator and returns what to do with it, and its size in bytes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import yaml

from pymerge.checkpoint.extras import files_to_copy, read_small
from pymerge.checkpoint.format import CheckpointError
from pymerge.checkpoint.plan import make_plan
from pymerge.checkpoint.provenance import read_provenance
from pymerge.checkpoint.reader import open_checkpoint
from pymerge.checkpoint.resume import ResumeError
from pymerge.checkpoint.store import TensorStore
from pymerge.checkpoint.verify import _source
from pymerge.recipe import RecipeError
from tests.checkpoint.files import raw, save_model, tensors_of

from . import adapters, pickles, resumes
from .adapters import adapter
from .guard import MEMORY, MEMORY_FOR_YAML
from .mutate import RAW, damaged, json_text, structure
from .pickles import pickled
from .resumes import resume

RECIPES = (
    {
        "merge_method": "ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 0.5}}],
        "parameters": {"weight": 1, "density": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 0.5}], "normalize": True},
        "dtype": "float32", "out_dtype": "bfloat16",
    },
    {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 0.5}},
    {
        "merge_method": "slerp", "base_model": "base", "models": [{"model": "a"}],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.3}]},
    },
    {
        "merge_method": "dare_ties", "base_model": "base", "models": [{"model": "a"}],
        "parameters": {"weight": 1, "density": 0.5, "seed": 3},
    },
)  # fmt: skip
METHODS = ("ties", "linear", "slerp", "dare_linear", "dare_ties", "task_arithmetic", "passthrough", "wise_ft")


def prepare(folder: Path) -> None:
    """The valid models that everything starts from; one has every dtype that torch and safetensors share."""
    for i, name in enumerate(("base", "a", "b")):
        save_model(folder / name, tensors_of(i, layers=2), 1 + i % 2)
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int8, torch.uint8, torch.bool)
    varied = {f"t{i}": torch.ones(i, 3).to(kind) for i, kind in enumerate(kinds)}
    save_model(folder / "varied", {**varied, "scalar": torch.tensor(1.0), "empty": torch.empty(0, 7)})
    save_model(folder / "made", tensors_of(0, layers=1))
    (folder / "secret.safetensors").write_bytes((folder / "base/model.safetensors").read_bytes())
    (folder / "work").mkdir()
    for one in (adapters, pickles, resumes):
        one.prepare(folder)
    for target in TARGETS.values():  # what is imported when it is first used is not opened by the inputs
        for number in range(3):
            try:
                target.make(folder, Random(number))[0]()
            except target.documented:
                pass


def parts(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def mutated_file(path: Path, rng: Random) -> bytes:
    if rng.random() < 0.3:
        return damaged(path.read_bytes(), rng)
    header, data = parts(path)
    text = json_text(structure(header, rng), rng)
    if rng.random() < 0.2:
        text = damaged(text, rng)
    length = rng.choice((0, 1, len(text) - 1, len(text) + 1, 10**8, 10**8 + 1, 2**63, 2**64 - 1)) if rng.random() < 0.1 else None
    return raw(text, data, length)


def read_everything(path: Path | TensorStore) -> None:
    with open_checkpoint(path) if isinstance(path, Path) else path as checkpoint:
        for info in checkpoint.tensors.values():
            target = memoryview(bytearray(info.nbytes))
            checkpoint.read_into(info, target)


def header(folder: Path, rng: Random) -> tuple[Callable[[], object], int]:
    """One .safetensors file."""
    path = folder / "work" / "x.safetensors"
    source = rng.choice(sorted(p for name in ("base", "a", "b", "varied") for p in (folder / name).glob("*.safetensors")))
    size = path.write_bytes(mutated_file(source, rng))
    return lambda: read_everything(path), size


def index(folder: Path, rng: Random) -> tuple[Callable[[], object], int]:
    """A folder with shards, whose index, names, links and shards are not what they should be."""
    work = folder / "work" / "sharded"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder / "a", work)
    path = work / "model.safetensors.index.json"
    names = [p.name for p in work.glob("*.safetensors")]
    outside = ("../secret.safetensors", "../../secret.safetensors", str(folder / "secret.safetensors"), "../a/" + names[0], *names)
    if rng.random() < 0.7:
        content = json.loads(path.read_text())
        text = json_text(structure(content, rng, outside), rng)
        path.write_bytes(damaged(text, rng) if rng.random() < 0.2 else text)
    if rng.random() < 0.5:
        shard = work / rng.choice(names)
        shard.unlink()
        kind = rng.randrange(6)
        if kind == 0:
            shard.symlink_to(rng.choice((*outside, "/etc/passwd", "/dev/zero", "/dev/stdin", shard.name, "..", ".")))
        elif kind == 1:
            shard.mkdir()
        elif kind == 2:
            os.mkfifo(shard)
        elif kind == 3:
            shard.write_bytes(b"")
        elif kind == 4:
            shard.write_bytes(mutated_file(folder / "a" / shard.name, rng))
    for name in ("config.json", "tokenizer.json"):
        if rng.random() < 0.2:
            (work / name).unlink()
            if rng.random() < 0.5:
                (work / name).symlink_to(rng.choice(("/etc/passwd", "/dev/zero", "../../secret.safetensors", name)))
            else:
                config = {"model_type": "llama", "torch_dtype": "float32", "text_config": {"dtype": "float32"}}
                (work / name).write_bytes(json_text(structure(config, rng), rng))
    named = work if rng.random() < 0.9 else path

    def use() -> None:
        read_everything(named)
        for other in files_to_copy(work):
            read_small(other)

    return use, sum(p.stat().st_size for p in work.iterdir() if p.is_file() and not p.is_symlink())


def recipe(folder: Path, rng: Random) -> tuple[Callable[[], object], int]:
    """A recipe, as YAML or JSON, planned against real models."""
    more = (*METHODS, "a", "b", "base", "varied", {"model": "varied"}, {"value": 1}, {"filter": "*", "value": 1})
    data = structure(rng.choice(RECIPES), rng, more)
    path = folder / rng.choice(("r.yml", "r.json"))
    if path.suffix == ".json":
        text = json_text(data, rng)
    else:
        text = _yaml(data, rng)
    size = path.write_bytes(damaged(text, rng) if rng.random() < 0.3 else text)
    out = None if rng.random() < 0.5 else folder / "work" / "new"
    return lambda: make_plan(path, out).close(), size


YAML_TRICKS = (
    "!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!!binary x", "&a [*a]", "*nobody", "2024-13-45",
    "0o99", "&a {<<: *a}", "{<<: 3}", "? [a, b]\n: c", "!!set {a, b}", "!!timestamp x", "!!int x", "!!float x", "!!bool x", "!!omap [a]",
    "!!pairs [a]", "1_0:99:99", ".inf", ".nan", "|\n  text", "--- \n---", "%YAML 9.9", "0x", "0b", "!!str", "!<tag:yaml.org,2002:int> ''",
)  # fmt: skip


def _yaml(data, rng: Random) -> bytes:
    text = yaml.dump(data, allow_unicode=True, default_flow_style=rng.choice((None, True, False)), sort_keys=False)
    for mark, value in RAW.items():
        text = text.replace(f"'{mark}'", value[: 3000 if value[0] in "[{" else None])
    lines = text.split("\n")
    if rng.random() < 0.3:
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    if rng.random() < 0.3:
        at = rng.randrange(len(lines))
        lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(YAML_TRICKS)
    if rng.random() < 0.05:  # aliases of aliases
        bomb = [f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
        lines = ["a: &a [x,x,x,x,x,x,x,x,x]", *bomb, *lines]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def provenance(folder: Path, rng: Random) -> tuple[Callable[[], object], int]:
    """pymerge.json, and the recipe in it."""
    path = folder / "made" / "pymerge.json"
    text = _yaml(structure(RECIPES[0], rng), rng).decode("utf-8", "replace")
    content = {
        "pymerge_version": "1", "merge_method": "ties", "recipe": text, "output": {},
        "inputs": [{"model": "a", "role": "model", "files": [{"name": "model.safetensors", "bytes": 100, "sha256": "0" * 64}]}],
    }  # fmt: skip
    text = json_text(structure(content, rng) if rng.random() < 0.7 else content, rng)
    size = path.write_bytes(damaged(text, rng) if rng.random() < 0.2 else text)

    def use() -> None:
        with open_checkpoint(path.parent) as checkpoint:
            _source(read_provenance(checkpoint), folder)

    return use, size


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        make: writes the input of a generator into a folder; what to do with it, and its size in bytes.
        documented: errors that may come of it.
        reads: where files may be opened, below the folder; None for anywhere.
        memory: bytes that Python may take besides some for each of the input's.
        writes: it is meant to write, below the folder.
        resident: the memory of the process is watched too, because much of it is not Python's.
    """

    make: Callable[[Path, Random], tuple[Callable[[], object], int]]
    documented: tuple[type[Exception], ...] = (CheckpointError,)
    reads: str | None = "."
    memory: int = MEMORY
    writes: bool = False
    resident: bool = False


TARGETS = {
    "header": Target(header),
    "index": Target(index, reads="work/sharded"),
    "recipe": Target(recipe, (CheckpointError, RecipeError), reads=None, memory=MEMORY_FOR_YAML),
    "provenance": Target(provenance, (CheckpointError, RecipeError), memory=MEMORY_FOR_YAML),
    "pickle": Target(pickled, resident=True),
    "adapter": Target(adapter, resident=True),
    "resume": Target(resume, (CheckpointError, RecipeError, ResumeError, OSError), writes=True, resident=True),
}
