"""Which cases there are. Not every combination: one full comparison, and around it one line per thing that speed depends on."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from .logits import LogitsCase
from .measure import Case, Effort
from .methods import DENSITY, METHODS

__all__ = ["Group", "Plan", "full", "quick"]

M = 2**20
ALL = ("naive", "torch", "mergekit", "peft", "averaged")


@dataclass(frozen=True)
class Group:
    """Cases that share their tensors, and so a process.

    Attributes:
        name: in the report and for `--only`.
        cases: of methods on tensors, of the largest number of models among them; or of divergences.
        effort: that is spent on each.
    """

    name: str
    cases: tuple[Case | LogitsCase, ...]
    effort: Effort = field(default_factory=Effort)


@dataclass(frozen=True)
class Plan:
    """Groups in their order, and the bytes at which the bandwidth is measured first."""

    groups: tuple[Group, ...]
    bandwidth_bytes: tuple[int, ...]
    bandwidth_seconds: float


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_counts() -> list[int]:
    """1, 2, 4, ... and all of them."""
    return sorted({2**i for i in range(10) if 2**i <= cores()} | {cores()})


def _case(method: str, layout="one", elements=16 * M, dtype="bf16", models=3, density=None, threads=None, rivals=()) -> Case:
    kept = DENSITY.get(method, 1.0) if density is None else density
    return Case(method, layout, elements, dtype, models, kept, threads or cores(), tuple(rivals))


def full() -> Plan:
    """About half an hour on two cores; 16 GB of memory for the billion elements."""
    main = Group("main", tuple(_case(m, elements=64 * M, rivals=ALL) for m in METHODS))
    some = ("linear", "task_arithmetic", "ties", "dare_ties")
    # A billion elements with everything in them are 10 GB, and rivals need ten times that.
    sizes = tuple(Group(f"size {n}", tuple(_case(m, elements=e, rivals=("naive",)) for m in some)) for n, e in
                  (("1M", M), ("16M", 16 * M), ("256M", 256 * M), ("1G", 1024 * M)))  # fmt: skip
    dtypes = tuple(
        Group(f"dtype {dtype}", tuple(_case(m, dtype=dtype, rivals=("naive",)) for m in ("linear", "ties", "dare_ties", "ema")))
        for dtype in ("fp16", "fp32", "fp64", "mixed")
    )
    models = Group("models", tuple(_case(m, models=count) for m in ("linear", "ties", "dare_ties") for count in (2, 3, 4, 8)))
    density = Group(
        "density",
        tuple(_case("ties", density=d) for d in (0.05, 0.2, 0.5, 0.9)) + tuple(_case("dare_linear", density=d) for d in (0.1, 0.5, 0.9)),
    )
    threads = Group(
        "threads", tuple(_case(m, threads=t) for m in ("linear", "ties", "dare_linear", "dare_ties", "slerp") for t in thread_counts())
    )
    several = ("linear", "ties", "dare_ties", "ema")
    layouts = (
        Group("llama", tuple(_case(m, "llama", 110 * M, rivals=("naive",)) for m in several[:3])),
        Group("thousand", tuple(_case(m, "thousand", 64 * M, rivals=("naive", "averaged")) for m in several)),
        Group("lora", tuple(_case(m, "lora", 40 * M, rivals=("naive", "torch", "mergekit", "peft", "averaged")) for m in several)),
    )
    divergences = (
        Group("kl 32k", tuple(LogitsCase(kind, 1024, 32_000, cores()) for kind in ("forward", "reverse", "jsd"))
              + tuple(LogitsCase("forward", 1024, 32_000, t, rivals=False) for t in thread_counts()[:-1])),
        Group("kl 128k", tuple(LogitsCase(kind, 256, 131_072, cores()) for kind in ("forward", "jsd"))),
    )  # fmt: skip
    groups = (main, *divergences, *layouts, *sizes, *dtypes, models, density, threads)
    return Plan(groups, (8 * M, 128 * M, 512 * M, 2048 * M), 0.5)


def quick() -> Plan:
    """About three minutes on two cores: what `full` shows, at smaller sizes and with the rivals that need not be compiled first."""
    effort = Effort(9, 0.3, 0.5)

    def group(name: str, *cases: Case | LogitsCase) -> Group:
        return Group(name, cases, effort)

    main = group("main", *(_case(m, elements=8 * M, rivals=("naive", "torch") if m == "ties" else ("naive",)) for m in METHODS))
    groups = (
        main,
        group("kl 32k", *(replace(LogitsCase(kind, 64, 32_000, cores()), rivals=kind == "forward") for kind in ("forward", "jsd"))),
        group("lora", *(_case(m, "lora", 10 * M, rivals=("naive", "averaged")) for m in ("linear", "ties", "ema"))),
        group("thousand", *(_case(m, "thousand", 16 * M) for m in ("linear", "ties"))),
        group("size 1M", *(_case(m, elements=M) for m in ("linear", "ties", "dare_ties"))),
        group("size 64M", *(_case(m, elements=64 * M) for m in ("linear", "ties", "dare_ties"))),
        group("dtype fp32", *(_case(m, elements=8 * M, dtype="fp32") for m in ("linear", "ties"))),
        group("models", *(_case(m, elements=8 * M, models=count) for m in ("linear", "ties") for count in (2, 8))),
        group("threads", *(_case(m, threads=t) for m in ("linear", "ties", "dare_ties") for t in thread_counts())),
    )
    return Plan(groups, (8 * M, 128 * M), 0.2)
