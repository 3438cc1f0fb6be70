"""Compiles the Triton kernels for GPUs that are not there and reads what came out: `make aot` (needs Triton, no GPU and no driver).

    python benchmarks/aot.py [--kernel NAME ...] [--target sm_90] [--json FILE]

For every kernel, dtype and main variant: no spilled registers, 128-bit loads and stores where the data are aligned, no fused multiply-add
and no approximate division in the merge's arithmetic, and on sm_90 no more instructions per element than the table below allows. Prints a
line per case; exits with 1 when one is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # which would leave nothing to compile

import triton
import triton.language as tl
from machine_code import instructions, shortest_loop, span
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pymerge.triton_kernels import combine, kl, lerp, rank, reduce, rows, select, threshold
from pymerge.triton_kernels.compat import LAUNCH_OPTIONS, THREADS
from pymerge.triton_kernels.launch import BLOCK, CHUNK, block_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LOADS, BOTH = ("load",), ("load", "store")
DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}

# Instructions per element on sm_90, measured plus a tenth. Of three models together what is between the first wide load and the last wide
# store; of the kernels that only read, the loop over one model's elements (for `radix` collected keys, for `kl` logits of both models); for
# `publish` a model's words. At full bandwidth of an H200 (4.3 TB/s) some 7.8 instructions fit per byte moved: 62 per element of three bf16
# models with a base, 125 of fp32.
BUDGET = {
    ("merge", "bf16"): 26,
    ("merge", "fp32"): 19,
    ("soup", "bf16"): 40,
    ("soup", "fp32"): 33,
    ("ties", "bf16"): 98,
    ("ties", "fp32"): 93,
    ("ties_counted", "bf16"): 104,
    ("ties_counted", "fp32"): 99,
    ("dare_linear", "bf16"): 94,
    ("dare_linear", "fp32"): 84,
    ("dare_ties", "bf16"): 112,
    ("dare_ties", "fp32"): 105,
    ("lerp", "bf16"): 10,
    ("lerp", "fp32"): 6,
    ("sample", "bf16"): 71,
    ("sample", "fp32"): 68,
    ("bracket", "bf16"): 48,
    ("bracket", "fp32"): 47,
    ("digits", "bf16"): 21,
    ("digits", "fp32"): 20,
    ("tally", "bf16"): 15,
    ("tally", "fp32"): 13,
    ("radix_sample", "fp32"): 21,
    ("radix", "fp32"): 23,
    ("publish", "fp32"): 18,
    ("abs_sums_magnitude", "bf16"): 35,
    ("abs_sums_bernoulli", "bf16"): 71,
    ("dots", "bf16"): 21,
    ("dots", "fp32"): 20,
    ("kl_forward", "bf16"): 52,
    ("kl_forward", "fp32"): 46,
    ("kl_gradient_difference", "bf16"): 27,
    ("kl_gradient_difference", "fp32"): 25,
}


@dataclass(frozen=True)
class Case:
    """One compilation: `constants` are the kernel's constexpr arguments, `pointers` the types of its pointers by position."""

    name: str
    dtype: str
    kernel: object
    constants: dict
    pointers: dict = field(default_factory=lambda: {0: "*i64"})
    wide: tuple[str, ...] = ()  # which of loads and stores must be 128 bits wide
    loop: str = ""  # the load whose loop is counted; without one straight code is
    per: int = 0  # elements of a program's loop, or of straight code that is counted whole
    scalars: dict = field(default_factory=dict)  # types of other arguments by name
    multiples: tuple[str, ...] = ()  # integers that are multiples of 16
    threads: int = THREADS
    exact: bool = True  # whether its floating-point arithmetic must be one operation at a time

    def signature(self) -> dict[str, str]:
        types = {}
        for i, name in enumerate(self.kernel.arg_names):
            types[name] = self.scalars.get(name, self.pointers.get(i, "i64" if name == "n" else "i32"))
            if name in self.constants:
                types[name] = "constexpr"
        return types


def cases() -> Iterator[Case]:
    for label, dtype in DTYPES.items():
        compute = tl.float64 if label == "fp64" else tl.float32
        integer = "*i64" if label == "fp64" else "*i32"
        shape = {"CHUNK": CHUNK, "BLOCK": block_of(compute)}
        base = {"HAS_BASE": True, "BASE": dtype, "MODEL": dtype, "COMPUTE": compute}
        fused = {**base, **shape, "MODELS": 3, "UNROLL": 3, "OUT": dtype, "RESCALED": False, "VOTE_WEIGHTED": True, "ZERO_VOTE": "positive"}
        fused |= {"BALANCE_ONLY": False, "ALIGNED": True, "SPARSIFY": "none", "VOTE": "none", "DIVISOR": "none"}
        for name, changes in {
            "merge": {},
            "merge_unaligned": {"ALIGNED": False},
            "merge_16_models": {"MODELS": 16, "UNROLL": 4},
            "soup": {"HAS_BASE": False, "DIVISOR": "weights"},
            "ties": {"SPARSIFY": "magnitude", "VOTE": "mass", "DIVISOR": "weights"},
            "ties_counted": {"SPARSIFY": "magnitude", "VOTE": "count", "DIVISOR": "count", "VOTE_WEIGHTED": False, "ZERO_VOTE": "majority"},
            "ties_drop": {"SPARSIFY": "magnitude", "VOTE": "count", "DIVISOR": "none", "ZERO_VOTE": "drop"},
            "breadcrumbs_ties": {"SPARSIFY": "band", "VOTE": "mass"},
            "dare_linear": {"SPARSIFY": "bernoulli", "RESCALED": True},
            "dare_ties": {"SPARSIFY": "bernoulli", "RESCALED": True, "VOTE": "mass"},
            "vote_balance": {"SPARSIFY": "magnitude", "VOTE": "mass", "BALANCE_ONLY": True},
        }.items():
            constants = {**fused, **changes}
            wide = () if not constants["ALIGNED"] else LOADS if constants["BALANCE_ONLY"] else BOTH
            yield Case(name, label, combine.combine_kernel, constants, wide=wide)
        pair = {"A": dtype, "B": dtype, "OUT": dtype, "COMPUTE": compute, "NEAR_A": True, **shape}
        yield Case("lerp", label, lerp.lerp_kernel, {**pair, "ALIGNED": True}, wide=BOTH)
        yield Case("lerp_unaligned", label, lerp.lerp_kernel, {**pair, "ALIGNED": False})
        together = {"TOGETHER": reduce.TOGETHER}
        short = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "fp64": "*fp64"}[label]
        load = {"fp32": "LDG.E R", "fp64": "LDG.E.64"}.get(label, "LDG.E.U16")
        lanes = reduce.LANES.value
        pointers = {0: short, 1: short, 2: "*fp64"}
        yield Case("dots", label, reduce.dots_kernel, together, pointers, loop=load, per=reduce.TOGETHER * lanes)
        chunked = {**base, **shape, "ALIGNED": True, "MODELS": 3}
        sums = {"loop": load, "per": CHUNK // reduce.SUM_BLOCK.value * lanes}
        for sparsify in ("magnitude", "band", "bernoulli"):
            constants = {**base, "SPARSIFY": sparsify, "MODELS": 3, "CHUNK": CHUNK, "TOGETHER": CHUNK // reduce.SUM_BLOCK.value}
            yield Case(f"abs_sums_{sparsify}", label, reduce.abs_sums_kernel, constants, {0: "*i64", 2: "*fp64"}, **sums)
        pair = {"DTYPE": dtype, "COMPUTE": compute, "ALIGNED": True, **shape}
        yield Case("finite", label, lerp.finite_kernel, pair)
        sample = {**base, "MODELS": 3, "RUN": threshold.RUN, "TOGETHER": threshold.TOGETHER}
        pointers = {0: "*i64", 1: "*i64", 3: integer}
        yield Case("sample", label, select.sample_kernel, sample, pointers, per=threshold.RUN * threshold.TOGETHER)
        reading = {"wide": LOADS, "loop": "LDG.E.128", "per": shape["BLOCK"]}
        pointers = {0: "*i64", 3: "*i64", 4: "*i64", 5: "*i64", 6: "*i32", 7: "*i32", 8: integer, 9: "*i32"}
        yield Case("bracket", label, select.bracket_kernel, chunked, pointers, **reading)
        bits = 63 if label == "fp64" else 31
        pointers = {0: "*i64", 3: "*i64", 4: "*i64", 5: "*i64", 6: "*i32"}
        yield Case("digits", label, select.digits_kernel, {**chunked, "BITS": bits}, pointers, **reading)
        yield Case("tally", label, select.tally_kernel, chunked, {0: "*i64", 3: "*i64", 4: "*i64", 5: "*i32"}, **reading)
        pointers = {0: "*i64", 5: "*i64", 6: "*i64", 7: "*i32", 8: "*i32"}
        yield Case("cut", label, select.cut_kernel, {**chunked, "WALK": threshold.WALK}, pointers)
    for label, bits, integer in (("fp32", 31, "*i32"), ("fp64", 63, "*i64")):
        compute = DTYPES[label]
        constants = {"COMPUTE": compute, "MODELS": 3, "TOGETHER": CHUNK // reduce.SUM_BLOCK.value, "UNROLL": reduce.UNROLL}
        yield Case("factor", label, reduce.factor_kernel, constants, {0: "*i64", 1: "*i64", 2: "*fp64"})
        for name, statistics, filled, counted in (("radix_sample", 3, False, "*i32"), ("radix", 1, True, "*i64")):
            constants = {"BITS": bits, "STATISTICS": statistics, "FILLED": filled, "BLOCK": BLOCK}
            pointers = {0: "*i64", 1: "*i32", 2: "*i64", 3: integer, 4: "*i64", 5: counted}
            load = "LDG.E R" if bits == 31 else "LDG.E.64"
            yield Case(name, label, rank.radix_kernel, constants, pointers, loop=load, per=BLOCK)
        pointers = {0: "*i64", 1: "*i64", 2: "*i64", 3: "*i32"}
        yield Case("bracket_ends", label, rank.bracket_ends_kernel, {"BITS": bits, "SAMPLES": True}, pointers)
        yield Case("settle", label, rank.settle_kernel, {"BITS": bits}, pointers)
        pointers |= {4: "*i64", 5: "*i64"}
        yield Case("where_to_look", label, rank.where_to_look_kernel, {"BITS": bits, "BLOCK": threshold.MAX_SLOTS}, pointers)
        pointers = {0: "*i64", 1: "*i32", 2: integer, 3: "*i32", 4: "*i64", 5: "*i32"}
        yield Case("tally_found", label, rank.tally_found_kernel, {"MODELS": 3, "BLOCK": BLOCK}, pointers)
    publish = {"MODELS": 3, "PADDED": 4, "TO": rows.KEY_WORD.value}
    yield Case("publish", "fp32", rank.publish_kernel, publish, {0: "*i64", 1: "*i64", 2: "*i64"}, per=3 * THREADS)


def kl_cases() -> Iterator[Case]:
    """The divergences' kernels, whose arithmetic has tolerances instead of one result."""
    logits = {"scalars": {"inverse_temperature": "fp32", "w_a": "fp32", "w_b": "fp32", "w_own": "fp32", "w_other": "fp32"}}
    logits |= {"multiples": ("vocab",), "threads": 32 * kl.NUM_WARPS, "exact": False, "per": kl.BLOCK}
    for label in ("bf16", "fp16", "fp32"):
        pointer = f"*{label}"
        for kind, number in kl._KIND.items():
            block = kl.forward_block(kind)
            constants = {"KIND": number, "WEIGHTED": True, "BLOCK": block}
            pointers = {0: pointer, 1: pointer, 2: "*fp32", 3: "*fp32", 4: "*fp32"}
            yield Case(
                f"kl_{kind}", label, kl.forward_kernel, constants, pointers, wide=LOADS, loop="LDG.E.128", **{**logits, "per": block}
            )
        for shape in ("difference", "centred", "mixture"):
            constants = {"SHAPE": shape, "OF_TEACHER": False, "WEIGHTED": True, "BLOCK": kl.BLOCK}
            pointers = {0: pointer, 1: pointer, 2: "*fp32", 3: "*fp32", 4: "*fp32", 5: pointer}
            yield Case(f"kl_gradient_{shape}", label, kl.backward_kernel, constants, pointers, wide=BOTH, **logits)


def inspect_cuda(case: Case, compiled) -> tuple[list[str], float]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    code, ptx, faults = instructions(sass), compiled.asm["ptx"], []
    if not code or "REG:" not in resources:
        return ["cannot be disassembled"], 0.0
    if "STACK:0" not in resources or any(x.startswith(("LDL", "STL")) for x in code):
        faults.append("spills registers")
    if case.exact:
        faults += [f"uses {x}" for x in ("fma.rn.f32", "fma.rn.f64", "div.full", "div.approx", ".ftz") if x in ptx]
    if case.wide:
        for kind in case.wide:
            name = {"load": "LDG.E.128", "store": "STG.E.128"}[kind]
            if not any(x.startswith(name) for x in code):
                faults.append(f"has no {name}")
    return faults, per_element(case, sass)


def per_element(case: Case, sass: str) -> float:
    """Instructions per element of the way that full blocks take, 0 where that is not to be seen."""
    if case.loop:
        return shortest_loop(sass, case.loop) * case.threads / case.per
    if case.wide:
        return span(sass) * case.threads / case.constants["BLOCK"]
    return len(instructions(sass)) * case.threads / case.per if case.per else 0.0


def inspect_hip(case: Case, compiled) -> tuple[list[str], float]:
    code, faults = compiled.asm["amdgcn"], []
    # Scalar registers spill into lanes of vector registers, which costs no memory traffic.
    spills = [int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", code)]
    if not spills or any(spills):
        faults.append("spills registers")
    for kind in case.wide:
        if not re.search(rf"(global|buffer)_{kind}_dwordx4", code):
            faults.append(f"has no 128-bit {kind}")
    return faults, 0.0


def check(case: Case, target: str) -> tuple[list[str], float]:
    """What is wrong with a case on a target, and its instructions per element (0 where that is not counted)."""
    names = case.kernel.arg_names
    divisible = {(i,): [["tt.divisibility", 16]] for i in [*case.pointers, *map(names.index, case.multiples)]}
    source = ASTSource(case.kernel, signature=case.signature(), constexprs=case.constants, attrs=divisible)
    options = {**LAUNCH_OPTIONS, "num_warps": case.threads // TARGETS[target].warp_size}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if TARGETS[target].backend == "hip":
        return inspect_hip(case, compiled)
    faults, cost = inspect_cuda(case, compiled)
    budget = BUDGET.get((case.name, case.dtype))
    if target == "sm_90" and budget is not None and not 0 < cost <= budget:
        faults.append(f"takes {cost:.0f} instructions per element, the budget is {budget}")
    return faults, cost


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels without a GPU and check the machine code.")
    parser.add_argument("--kernel", nargs="+", help="only cases of these names")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.add_argument("--target", choices=TARGETS, help="only this architecture")
    parser.add_argument("--json", type=Path, help="write what was found here")
    args = parser.parse_args()
    found = []
    for case in chain(cases(), kl_cases()):
        if (args.kernel and case.name not in args.kernel) or (args.dtype and case.dtype != args.dtype):
            continue
        for target in [args.target] if args.target else TARGETS:
            try:
                faults, cost = check(case, target)
            except Exception as error:  # one kernel that does not compile must not hide what is wrong with the others
                faults, cost = [f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[-200:]}"], 0.0
            note = "; ".join(faults) or (f"{cost:.1f} instructions per element" if cost else "ok")
            print(f"{target:7} {case.name:20} {case.dtype:5} {note}", flush=True)
            found.append({"target": target, "kernel": case.name, "dtype": case.dtype, "instructions": round(cost, 2), "faults": faults})
    broken = sum(bool(row["faults"]) for row in found)
    print(f"{len(found)} compiled, {broken} broken")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if broken or not found else 0


if __name__ == "__main__":
    sys.exit(main())
