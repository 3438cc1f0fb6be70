"""Adapter folders, made invalid or hostile: settings, factors, links."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from pymerge.checkpoint.lora import AdaptedCheckpoint, open_adapter
from pymerge.checkpoint.lora.job import open_job
from pymerge.checkpoint.reader import open_checkpoint
from pymerge.finite import NonFiniteError
from tests.checkpoint.adapters import save_adapter

from .mutate import damaged, json_text, structure

MODULES = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.1.mlp.up_proj": (32, 16)}
PATTERNS = (
    "(a+)+$", "(" * 200, "[", "q_proj", ".*", "(.*)*", "(?P<x>a)(?P<x>b)", "x{1000000}", "\\", "(?i)Q_PROJ", "^model\\.layers\\.(\\d+)",
    "a" * 400, "(?<=a+)b",
)  # fmt: skip
MORE = (*PATTERNS, *({pattern: 3} for pattern in PATTERNS), "LORA", "ADALORA", "all", "lora_only", "pissa", ["lm_head"], 10**9, 1e300)


def prepare(folder: Path) -> None:
    """Two valid adapters of the model "a", one with trained tensors besides."""
    for seed, name in enumerate(("lora", "more")):
        g = torch.Generator().manual_seed(seed)
        pairs = {m: (torch.randn(2, i, generator=g), torch.randn(o, 2, generator=g)) for m, (o, i) in MODULES.items()}
        others = {"lm_head.weight": torch.ones(40, 16)} if name == "more" else None
        settings = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"^model.layers.0": 4}, "use_rslora": True, "bias": "none"}
        save_adapter(folder / name, pairs, others, target_modules=["q_proj", "up_proj"], modules_to_save=None, **settings)


def adapter(folder: Path, rng: Random) -> tuple[Callable[[], object], int]:
    """A folder whose files or links are not what they should be: opened, added to a base, merged with another."""
    from .targets import mutated_file, read_everything

    work = folder / "work" / "adapter"
    shutil.rmtree(work, ignore_errors=True)
    source = folder / rng.choice(("lora", "more"))
    shutil.copytree(source, work)
    config, weights = work / "adapter_config.json", work / "adapter_model.safetensors"
    if rng.random() < 0.6:
        text = json_text(structure(json.loads(config.read_text()), rng, MORE), rng)
        config.write_bytes(damaged(text, rng) if rng.random() < 0.2 else text)
    if rng.random() < 0.6:
        weights.write_bytes(mutated_file(source / weights.name, rng))
    if rng.random() < 0.15:
        broken = rng.choice((config, weights))
        broken.unlink()
        if rng.random() < 0.8:
            outside = (
                "../../lora/" + broken.name,
                "../../secret.safetensors",
                str(folder / "secret.safetensors"),
                "/etc/passwd",
                "/dev/zero",
                ".",
            )
            broken.symlink_to(rng.choice((*outside, broken.name)))
        elif rng.random() < 0.5:
            broken.mkdir()
        else:
            os.mkfifo(broken)
    method = rng.choice(("cat", "svd", "ties", "linear"))

    def use() -> None:
        with open_adapter(work) as opened:
            read_everything(opened.store)
            for change in opened.modules.values():
                opened.factors(change)
        try:
            with open_job([work, folder / "lora"], method=method) as job:
                for name in job.names:
                    job.saved(name, job.merge(name), "F32")
                job.config()
        except (NonFiniteError, ValueError):  # as pymerge.merge_adapters documents; of a CheckpointError the rest of this will tell
            pass
        with AdaptedCheckpoint(open_checkpoint(folder / "a"), open_adapter(work)) as store:
            read_everything(store)

    return use, sum(p.stat().st_size for p in work.iterdir() if p.is_file() and not p.is_symlink())
