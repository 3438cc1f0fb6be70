"""The tensors of a case: one large one, or the state dicts of something that people merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.speed.weights import Weights

__all__ = ["DTYPES", "LAYOUTS", "MIXED", "Inputs", "make_inputs"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}

MIXED = (torch.bfloat16, torch.float16, torch.float32)
"""The models' dtypes of the case "mixed", in turn, over a base and an output of bf16."""

Shapes = dict[str, tuple[int, ...]]


def llama(elements: int) -> Shapes:
    """The tensors of a Llama with 7 billion parameters, each dimension divided alike: 32 layers, fewer than `elements` in all."""
    divisor = next(d for d in (2, 4, 8, 16, 32, 64, 128) if _llama_size(d) <= max(elements, _llama_size(128)))
    return _llama_shapes(divisor)


def _llama_shapes(divisor: int) -> Shapes:
    hidden, inner, vocabulary = 4096 // divisor, 11008 // divisor, 32000 // divisor
    shapes: Shapes = {"embed_tokens": (vocabulary, hidden), "norm": (hidden,), "lm_head": (vocabulary, hidden)}
    for i in range(32):
        shapes |= {f"{i}.self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{i}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{i}.mlp.down_proj": (hidden, inner), f"{i}.input_norm": (hidden,), f"{i}.post_norm": (hidden,)}
    return shapes


def _llama_size(divisor: int) -> int:
    return sum(torch.Size(shape).numel() for shape in _llama_shapes(divisor).values())


def thousand(elements: int) -> Shapes:
    """A thousand tensors of one size."""
    return {f"{i}.weight": (elements // 1000,) for i in range(1000)}


def lora(elements: int) -> Shapes:
    """Two factors for each of the seven matrices in 32 layers of a Llama with 7 billion parameters; rank 16 makes 40 million."""
    rank = max(1, min(16, elements * 16 // 39_976_960))
    shapes: Shapes = {}
    for i in range(32):
        for name, (out, inner) in {
            "q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
            "gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008),
        }.items():  # fmt: skip
            shapes |= {f"{i}.{name}_proj.lora_A": (rank, inner), f"{i}.{name}_proj.lora_B": (out, rank)}
    return shapes


LAYOUTS = {"llama": llama, "thousand": thousand, "lora": lora}


@dataclass
class Inputs:
    """What a method merges: tensors for the layout "one", else state dicts. A LoRA's base is zeros, as what it adapts does not move."""

    base: Tensor | Mapping[str, Tensor]
    models: list
    out: Tensor | Mapping[str, Tensor]
    layout: str
    dtype: str

    @property
    def elements(self) -> int:
        return sum(x.numel() for x in tensors(self.out))

    def first(self, models: int) -> Inputs:
        """With fewer models."""
        return Inputs(self.base, self.models[:models], self.out, self.layout, self.dtype)


def tensors(model: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
    return [model] if isinstance(model, Tensor) else list(model.values())


def make_inputs(layout: str, elements: int, dtype: str, models: int) -> Inputs:
    """The same ones for the same arguments. `dtype` "mixed" is :data:`MIXED`."""
    shapes = None if layout == "one" else LAYOUTS[layout](elements)
    n = elements if shapes is None else sum(torch.Size(shape).numel() for shape in shapes.values())
    mixed = [MIXED[i % len(MIXED)] for i in range(models)] if dtype == "mixed" else None
    flat = Weights.random(n, DTYPES.get(dtype, torch.bfloat16), models, mixed)
    if shapes is None:
        return Inputs(flat.base, list(flat.models), flat.out, layout, dtype)
    if layout == "lora":
        flat.base.zero_()
    dicts = [_cut(flat.base, shapes)]
    flat.base = None  # a cut tensor is copied, so the whole one can go
    for i in range(models):
        dicts.append(_cut(flat.models[i], shapes))
        flat.models[i] = None
    return Inputs(dicts[0], dicts[1:], {name: torch.zeros_like(x) for name, x in dicts[0].items()}, layout, dtype)


def _cut(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Tensors with memory of their own, as a program has that loaded them."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    return {name: x.view(shape).clone() for (name, shape), x in zip(shapes.items(), flat.split(sizes))}
