"""What the installed Triton can do. Nothing else in the package asks for versions or for the interpreter."""

from __future__ import annotations

import re

import torch
import triton
import triton.language as tl

__all__ = ["INTERPRET", "INTERPRETED", "LAUNCH_OPTIONS", "THREADS", "parse_version"]

# Until 3.5 div_rn becomes div.rn.ftz, which loses subnormals. Tested: 3.6.0 and 3.9.0 in the interpreter and ahead of time, 3.7.1 and 3.8.0
# (TIES, DARE-TIES) ahead of time.
MINIMUM = (3, 6)


def parse_version(text: str) -> tuple[int, int]:
    """(major, minor) of a version such as ``"3.10.0+git1234"``: numbers, so that 3.10 comes after 3.9."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


if parse_version(triton.__version__) < MINIMUM:
    raise ImportError(f"pymerge's GPU kernels need Triton {MINIMUM[0]}.{MINIMUM[1]} or later; this is {triton.__version__}")

# triton.jit reads the same setting once, when it decorates a function.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
INTERPRET = tl.constexpr(INTERPRETED)

# Of a program: with launch.BLOCK elements, each has 16 bytes of a half type.
THREADS = 128

# One IEEE operation at a time: without this Triton up to 3.9 fuses a product and a sum.
LAUNCH_OPTIONS = {"enable_fp_fusion": False, "num_warps": THREADS // (64 if torch.version.hip else 32)}
