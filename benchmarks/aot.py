"""Compiles the Triton kernels for GPUs that are not there and reads what came out: `make aot` (needs Triton, no GPU and no driver).

    python benchmarks/aot.py [--kernel NAME] [--target sm_90]

For every kernel, dtype and main variant: no spilled registers, 128-bit loads and stores where the data are aligned, no fused multiply-add
and no approximate division in the merge's arithmetic, and on sm_90 no more instructions per element than the table below allows. Prints a
line per case; exits with 1 when one is broken.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # which would leave nothing to compile

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pymerge.triton_kernels import combine, lerp, rank, reduce, rows, select, threshold
from pymerge.triton_kernels.compat import LAUNCH_OPTIONS, THREADS
from pymerge.triton_kernels.launch import BLOCK, CHUNK, block_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}

# Instructions per element on sm_90 of three models, between the first wide load and the last wide store: measured plus a tenth. At full
# bandwidth of an H200 (4.3 TB/s) some 7.8 instructions fit per byte moved: 62 per element of three bf16 models with a base, 125 of fp32.
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
}


@dataclass(frozen=True)
class Case:
    """One compilation: `constants` are the kernel's constexpr arguments, `pointers` the types of its pointers by position."""

    name: str
    dtype: str
    kernel: object
    constants: dict
    pointers: dict = field(default_factory=lambda: {0: "*i64"})
    wide: bool = False  # whether it must load and store 128 bits
    exact: bool = True  # whether its floating-point arithmetic must be one operation at a time

    def signature(self) -> dict[str, str]:
        types = {}
        for i, name in enumerate(self.kernel.arg_names):
            types[name] = "constexpr" if name in self.constants else self.pointers.get(i, "i64" if name == "n" else "i32")
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
            yield Case(name, label, combine.combine_kernel, constants, wide=constants["ALIGNED"] and not constants["BALANCE_ONLY"])
        pair = {"A": dtype, "B": dtype, "OUT": dtype, "COMPUTE": compute, "NEAR_A": True, **shape}
        yield Case("lerp", label, lerp.lerp_kernel, {**pair, "ALIGNED": True}, wide=True)
        yield Case("lerp_unaligned", label, lerp.lerp_kernel, {**pair, "ALIGNED": False})
        together = {"TOGETHER": reduce.TOGETHER}
        short = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "fp64": "*fp64"}[label]
        yield Case("dots", label, reduce.dots_kernel, together, {0: short, 1: short, 2: "*fp64"})
        chunked = {**base, **shape, "ALIGNED": True, "MODELS": 3}
        for sparsify in ("magnitude", "band", "bernoulli"):
            constants = {**base, "SPARSIFY": sparsify, "MODELS": 3, "CHUNK": CHUNK, "TOGETHER": CHUNK // reduce.SUM_BLOCK.value}
            yield Case(f"abs_sums_{sparsify}", label, reduce.abs_sums_kernel, constants, {0: "*i64", 2: "*fp64"})
        pair = {"DTYPE": dtype, "COMPUTE": compute, "ALIGNED": True, **shape}
        yield Case("finite", label, lerp.finite_kernel, pair)
        sample = {**base, "MODELS": 3, "RUN": threshold.RUN, "TOGETHER": threshold.TOGETHER}
        yield Case("sample", label, select.sample_kernel, sample, {0: "*i64", 1: "*i64", 3: integer})
        pointers = {0: "*i64", 3: "*i64", 4: "*i64", 5: "*i64", 6: "*i32", 7: "*i32", 8: integer, 9: "*i32"}
        yield Case("bracket", label, select.bracket_kernel, chunked, pointers)
        bits = 63 if label == "fp64" else 31
        pointers = {0: "*i64", 3: "*i64", 4: "*i64", 5: "*i64", 6: "*i32"}
        yield Case("digits", label, select.digits_kernel, {**chunked, "BITS": bits}, pointers)
        yield Case("tally", label, select.tally_kernel, chunked, {0: "*i64", 3: "*i64", 4: "*i64", 5: "*i32"})
        pointers = {0: "*i64", 5: "*i64", 6: "*i64", 7: "*i32", 8: "*i32"}
        yield Case("cut", label, select.cut_kernel, {**chunked, "WALK": threshold.WALK}, pointers)
    for label, bits, integer in (("fp32", 31, "*i32"), ("fp64", 63, "*i64")):
        compute = DTYPES[label]
        constants = {"COMPUTE": compute, "MODELS": 3, "TOGETHER": CHUNK // reduce.SUM_BLOCK.value, "UNROLL": reduce.UNROLL}
        yield Case("factor", label, reduce.factor_kernel, constants, {0: "*i64", 1: "*i64", 2: "*fp64"})
        for name, statistics, filled, counted in (("radix_sample", 3, False, "*i32"), ("radix", 1, True, "*i64")):
            constants = {"BITS": bits, "STATISTICS": statistics, "FILLED": filled, "BLOCK": BLOCK}
            pointers = {0: "*i64", 1: "*i32", 2: "*i64", 3: integer, 4: "*i64", 5: counted}
            yield Case(name, label, rank.radix_kernel, constants, pointers)
        pointers = {0: "*i64", 1: "*i64", 2: "*i64", 3: "*i32"}
        yield Case("bracket_ends", label, rank.bracket_ends_kernel, {"BITS": bits, "SAMPLES": True}, pointers)
        yield Case("settle", label, rank.settle_kernel, {"BITS": bits}, pointers)
        pointers |= {4: "*i64", 5: "*i64"}
        yield Case("where_to_look", label, rank.where_to_look_kernel, {"BITS": bits, "BLOCK": threshold.MAX_SLOTS}, pointers)
        pointers = {0: "*i64", 1: "*i32", 2: integer, 3: "*i32", 4: "*i64", 5: "*i32"}
        yield Case("tally_found", label, rank.tally_found_kernel, {"MODELS": 3, "BLOCK": BLOCK}, pointers)
    yield Case(
        "publish", "fp32", rank.publish_kernel, {"MODELS": 3, "PADDED": 4, "TO": rows.KEY_WORD.value}, {0: "*i64", 1: "*i64", 2: "*i64"}
    )


def instructions(sass: str) -> list[str]:
    """The instructions of a disassembly, without predicates: "LDG.E.128 R4, ..."."""
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", sass, re.M)
    return [i for i in found if not i.startswith("NOP")]


def per_element(code: list[str], block: int) -> float:
    """Instructions of the unmasked path per element: those from the first wide load to the last wide store."""
    loads = [i for i, x in enumerate(code) if x.startswith("LDG.E.128")]
    stores = [i for i, x in enumerate(code) if x.startswith("STG.E.128")]
    return (stores[-1] - loads[0] + 1) * THREADS / block if loads and stores else 0.0


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
        for kind in ("LDG", "STG"):
            if not any(x.startswith(f"{kind}.E.128") for x in code):
                faults.append(f"has no {kind}.E.128")
    return faults, per_element(code, case.constants.get("BLOCK", 1))


def inspect_hip(case: Case, compiled) -> tuple[list[str], float]:
    code, faults = compiled.asm["amdgcn"], []
    # Scalar registers spill into lanes of vector registers, which costs no memory traffic.
    spills = [int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", code)]
    if not spills or any(spills):
        faults.append("spills registers")
    if case.wide and not (re.search(r"(global|buffer)_load_dwordx4", code) and re.search(r"(global|buffer)_store_dwordx4", code)):
        faults.append("has no 128-bit load or store")
    return faults, 0.0


def check(case: Case, target: str) -> tuple[list[str], float]:
    """What is wrong with a case on a target, and its instructions per element (0 where that is not counted)."""
    divisible = {(i,): [["tt.divisibility", 16]] for i in case.pointers}
    source = ASTSource(case.kernel, signature=case.signature(), constexprs=case.constants, attrs=divisible)
    options = {**LAUNCH_OPTIONS, "num_warps": THREADS // TARGETS[target].warp_size}
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
    parser.add_argument("--kernel", help="only cases of this name")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.add_argument("--target", choices=TARGETS, help="only this architecture")
    args = parser.parse_args()
    broken = done = 0
    for case in cases():
        if (args.kernel and case.name != args.kernel) or (args.dtype and case.dtype != args.dtype):
            continue
        for target in [args.target] if args.target else TARGETS:
            faults, cost = check(case, target)
            note = "; ".join(faults) or (f"{cost:.1f} instructions per element" if cost else "ok")
            print(f"{target:7} {case.name:20} {case.dtype:5} {note}", flush=True)
            broken += bool(faults)
            done += 1
    print(f"{done} compiled, {broken} broken")
    return 1 if broken or not done else 0


if __name__ == "__main__":
    sys.exit(main())
