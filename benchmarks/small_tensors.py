"""Many small tensors against one tensor of the same total size, timed in turn; `python benchmarks/small_tensors.py`.

A ratio of 1 means that a tensor costs nothing beyond its elements.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pymerge

COUNT = 1000


def lora_shapes() -> list[tuple[int, ...]]:
    return [(16, 4096) if i % 2 else (4096, 16) for i in range(COUNT)]


def tiny_shapes() -> list[tuple[int, ...]]:
    sizes = torch.randint(1, 10_001, (COUNT,), generator=torch.Generator().manual_seed(0))
    return [(int(n),) for n in sizes]


CASES = {"lora": lora_shapes, "tiny": tiny_shapes}


def models_of(shapes: list[tuple[int, ...]], models: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """A base and what it became, three times: deltas of a hundredth, as after a fine-tuning."""
    generator = torch.Generator().manual_seed(1)
    base = {f"layers.{i}.weight": torch.randn(s, generator=generator) for i, s in enumerate(shapes)}
    changed = [{k: t + 0.01 * torch.randn(t.shape, generator=generator) for k, t in base.items()} for _ in range(models)]
    return [{k: t.to(dtype) for k, t in model.items()} for model in (base, *changed)]


def joined(model: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"weight": torch.cat([t.reshape(-1) for t in model.values()])}


class Weights(nn.Module):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = nn.ParameterList([nn.Parameter(t.clone()) for t in tensors.values()])


def calls(base: dict[str, Tensor], models: list[dict[str, Tensor]]) -> dict[str, Callable[[], object]]:
    average = {k: t.float() for k, t in base.items()}
    module = Weights(models[0])
    follower = pymerge.EMA(module, 0.99)
    return {
        "linear": lambda: pymerge.linear(models),
        "task_arithmetic": lambda: pymerge.task_arithmetic(base, models),
        "wise_ft": lambda: pymerge.wise_ft(base, models[0]),
        "ema_update": lambda: pymerge.ema_update(average, models[0], decay=0.99),
        "EMA.update": lambda: follower.update(module),
        "dare_linear": lambda: pymerge.dare_linear(base, models),
        "dare_ties": lambda: pymerge.dare_ties(base, models),
        "ties": lambda: pymerge.ties(base, models),
        "ties of the model": lambda: pymerge.ties(base, models, convention=pymerge.Convention(scope="model")),
        "ties, paper": lambda: pymerge.ties(base, models, convention="paper"),
    }


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"{'case':6} {'method':18} {'threads':>7} {'many, ms':>9} {'one, ms':>9} {'ratio':>6} {'us per tensor more':>19}")
    for case in args.cases:
        base, *models = models_of(CASES[case](), args.models, getattr(torch, args.dtype))
        many, one = calls(base, models), calls(joined(base), [joined(m) for m in models])
        for method in args.methods or many:
            for threads in args.threads:
                torch.set_num_threads(threads)
                pairs = [(seconds(many[method]), seconds(one[method])) for _ in range(args.rounds + 1)][1:]
                a, b = (statistics.median(column) for column in zip(*pairs))
                ratio = statistics.median(x / y for x, y in pairs)
                more = (a - b) / COUNT * 1e6
                print(f"{case:6} {method:18} {threads:7} {a * 1e3:9.2f} {b * 1e3:9.2f} {ratio:6.2f} {more:19.1f}", flush=True)


if __name__ == "__main__":
    main()
