"""The Triton kernels of the divergences: values in Triton's interpreter, registers and spills by compiling for a GPU that is not there."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pymerge
from pymerge import reference_kl
from tests.kl.conftest import DTYPES, KINDS, logits

os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when it is imported, and for each kernel when that is
pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def load():
    try:
        return importlib.import_module("pymerge.triton_kernels.kl")
    except ModuleNotFoundError:  # a checkout that is not installed
        return importlib.import_module("triton_kernels.kl")


kl = load()
pytestmark = [
    pytest.mark.skipif(
        type(kl.forward_kernel).__name__ != "InterpretedFunction", reason="the kernels were imported without the interpreter"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy warns where a kernel computes with infinities
]


def check(student, teacher, kind, weight=None, beta=0.3, temperature=0.8):
    grad = torch.linspace(-1, 2, student.shape[0])
    wide = student.double(), teacher.double()
    want, want_stats = reference_kl.forward(*wide, kind, beta, temperature, weight)
    got, stats = kl.forward(student, teacher, kind, beta, temperature, weight)
    torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=2e-6, equal_nan=True)
    for of_teacher in (False, True):
        choices = (kind, beta, temperature, weight, of_teacher)
        want = reference_kl.backward(*wide, want_stats, grad.double(), *choices)
        got = kl.backward(student, teacher, stats, grad, *choices)
        assert got.dtype == (teacher if of_teacher else student).dtype
        rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8 + 1e-5, torch.float16: 2**-11 + 1e-5}[got.dtype]
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=3e-6, equal_nan=True)
        if weight is not None:
            assert got[weight == 0].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 17, 4097, 9000])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, vocab, dtype):
    check(*logits(2, vocab, seed=vocab, dtype=dtype), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_with_nan(kind):
    student, teacher = logits(4, 5000, dtype=torch.bfloat16)
    student[1], teacher[3, 4500] = math.nan, math.inf
    check(student, teacher, kind, torch.tensor([1.0, 0.0, 0.25, 0.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_vocabulary(kind):
    student, teacher = logits(3, 9000)
    for x in (student, teacher):
        x[:, :4500] = x[:, -3:] = -math.inf  # a whole block of them first
    check(student, teacher, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_different_supports_and_nan(kind):
    student, teacher = logits(6, 5000)
    student[0, 4999] = student[1, 0] = teacher[2, 4500] = -math.inf
    student[3, 4600] = teacher[4, 3] = math.nan
    check(student, teacher, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_order_raise_the_maximum_in_every_block(kind):
    rising = torch.linspace(-100, 100, 10_000)[None]
    for x in (rising, -rising):
        check(x, x / 2 + torch.sin(torch.arange(10_000.0)), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_small_divergences_keep_their_digits(kind):
    student, _ = logits(2, 5000, dtype=torch.bfloat16)
    teacher = (student.float() * 1.004).bfloat16()
    want, _ = reference_kl.forward(student.double(), teacher.double(), kind)
    torch.testing.assert_close(kl.forward(student, teacher, kind)[0].double(), want, rtol=2e-2, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_over_the_logits(kind):
    student, teacher = logits(2, 4200, dtype=torch.bfloat16)
    _, stats = kl.forward(student, teacher, kind)
    want = kl.backward(student, teacher, stats, torch.ones(2), kind)
    assert kl.backward(student, teacher, stats, torch.ones(2), kind, out=student) is student
    assert torch.equal(student, want)


def test_operator_reaches_the_kernels(monkeypatch):
    pytest.importorskip("pymerge.triton_kernels", reason="needs an installed pymerge: a checkout has the package elsewhere")
    monkeypatch.setenv("PYMERGE_BACKEND", "triton")
    student, teacher = (x.requires_grad_() for x in logits(2, 3, 300, dtype=torch.bfloat16))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    for kind in KINDS:
        loss = torch.ops.pymerge.kl_divergence(student, teacher, kind, 0.3, 2.0, mask)
        grads = torch.autograd.grad(loss.sum(), (student, teacher))
        with pymerge.backend("reference"):
            want = torch.ops.pymerge.kl_divergence(student, teacher, kind, 0.3, 2.0, mask)
        torch.testing.assert_close(loss, want, rtol=5e-6, atol=2e-6)
        for got, expected in zip(grads, torch.autograd.grad(want.sum(), (student, teacher))):
            torch.testing.assert_close(got, expected)
        over = student.detach().clone()
        _, stats = torch.ops.pymerge.kl_divergence_forward(student, teacher, kind, 0.3, 2.0, mask)
        torch.ops.pymerge.kl_divergence_backward_(over, teacher, stats, torch.ones(2, 3), kind, 0.3, 2.0, mask)
        assert torch.equal(over, grads[0])


# Compiled in another process: here the kernels are interpreted ones.
COMPILE = """
import json, os, subprocess, sys, tempfile
sys.path.insert(0, sys.argv[1])
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_kernels import kl

TOOL = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
POINTERS = {"a", "b", "own", "other", "out"}
FP32 = {"weight", "loss", "stats", "grad"}

def usage(kernel, dtype, constants, capability):
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS | FP32 | {"vocab"}:
            signature[name] = "i32" if name == "vocab" else "*fp32" if name in FP32 else "*" + dtype
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": kl.NUM_WARPS, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    words = next(line for line in dump.splitlines() if "REG:" in line).split()
    return {**{w.split(":")[0]: int(w.split(":")[1]) for w in words if ":" in w}, "wide": ".v4." in compiled.asm["ptx"]}

results = {}
for dtype in ("bf16", "fp32"):
    for capability in (90, 100):
        for name, kind in kl._KIND.items():
            constants = {"KIND": kind, "WEIGHTED": True, "BLOCK": kl.forward_block(name)}
            results[f"forward {kind} {dtype} sm_{capability}"] = usage(kl.forward_kernel, dtype, constants, capability)
        for shape in ("difference", "centred", "mixture"):
            constants = {"SHAPE": shape, "OF_TEACHER": False, "WEIGHTED": True, "BLOCK": kl.BLOCK}
            results[f"{shape} {dtype} sm_{capability}"] = usage(kl.backward_kernel, dtype, constants, capability)
print(json.dumps(results))
"""


def test_compiled_kernels_spill_nothing_and_load_whole_vectors(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", COMPILE, str(ROOT)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    for name, usage in json.loads(run.stdout).items():
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0, (name, usage)
        assert usage["REG"] <= 128, (name, usage)  # two programs of 256 threads per multiprocessor at the least
        assert usage["wide"], name
