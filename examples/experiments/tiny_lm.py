"""A byte-level transformer and the text it learns from: what every Python brings along, its standard library.

Prose is the lines of the docstrings, code is everything else. Nothing is downloaded. The text differs a little between Python versions.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

CONTEXT, IGNORE = 64, -100
MODULES = (
    "argparse ast bdb cmd codecs configparser contextlib csv datetime difflib dis doctest enum fractions ftplib functools glob gzip heapq "
    "imaplib inspect ipaddress locale mailbox nntplib ntpath optparse pathlib pdb pickle pickletools platform plistlib poplib posixpath "
    "pprint profile pstats pydoc random sched selectors shelve shutil smtplib socket ssl statistics string subprocess tarfile tempfile "
    "textwrap threading timeit trace traceback turtle typing unittest/case unittest/mock uuid warnings weakref webbrowser zipfile"
)


def read_stdlib(limit: int | None = None) -> tuple[list[bytes], list[bytes]]:
    """(lines of prose, pieces of code): prose of 10 to CONTEXT + 1 bytes, code all CONTEXT + 1 bytes long."""
    prose: list[bytes] = []
    code: list[bytes] = []
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES.split()[:limit]:
        if not (root / f"{name}.py").exists():  # some of these are no longer in newer Pythons
            continue
        source = (root / f"{name}.py").read_text()
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                prose += [line.strip().encode()[: CONTEXT + 1] for line in text.splitlines() if len(line.strip()) >= 10]
                inside = node.body[0]
                lines[inside.lineno - 1 : inside.end_lineno] = [""] * (inside.end_lineno - inside.lineno + 1)
        rest = "\n".join(line for line in lines if line.strip() and not line.strip().startswith("#")).encode()
        code += [rest[i : i + CONTEXT + 1] for i in range(0, len(rest) - CONTEXT - 1, CONTEXT + 1)]
    return prose, code


class TinyLM(nn.Module):
    """Two layers of a pre-norm transformer over bytes; token ids [batch, length <= CONTEXT] to logits [batch, length, 256]."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width), "up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.tokens(ids) + self.places.weight[:length]
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm1"](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["out"](mixed.transpose(1, 2).reshape(batch, length, -1))
            x = x + block["down"](nn.functional.gelu(block["up"](block["norm2"](x))))
        return self.head(self.norm(x))


def pack(samples: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """(ids, labels) of samples of unequal length: padding has label IGNORE."""
    length = max(map(len, samples)) - 1
    ids, labels = torch.zeros(len(samples), length, dtype=torch.long), torch.full((len(samples), length), IGNORE)
    for i, sample in enumerate(samples):
        row = torch.tensor(list(sample))
        ids[i, : len(row) - 1], labels[i, : len(row) - 1] = row[:-1], row[1:]
    return ids, labels


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over tokens, in nats."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def fit(model: TinyLM, batches: Iterable[Sequence[bytes]], lr: float, penalty=None) -> TinyLM:
    """Adam; `penalty(logits, ids, labels=...)` is added to the loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for batch in batches:
        ids, labels = pack(batch)
        optimizer.zero_grad()
        logits = model(ids)
        loss = cross_entropy(logits, labels)
        (loss if penalty is None else loss + penalty(logits, ids, labels=labels)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def nats(model: TinyLM, samples: Sequence[bytes]) -> float:
    """Loss per byte on held-out samples."""
    ids, labels = pack(samples)
    return cross_entropy(model(ids), labels).item()
