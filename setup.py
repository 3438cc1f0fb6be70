"""Builds the C++ core. Needs a C++17 compiler and pybind11, never torch.

One library runs on every CPU of its architecture: each file in csrc/targets is compiled for one instruction set and csrc/dispatch.cpp picks
among them at run time. PYMERGE_SANITIZE=1 adds AddressSanitizer and UndefinedBehaviorSanitizer (see `make sanitize`).
"""

import os
import platform
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

MACHINE = platform.machine().lower()
X86 = MACHINE in ("x86_64", "amd64")

# Flags beyond the architecture's baseline, by file. No -mfma: the arithmetic has no fused multiply-add (docs/arithmetic.md).
AVX2 = ["-mavx2", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt"]
TARGET_FLAGS = {
    "avx2.cpp": AVX2,
    "avx512.cpp": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}
COMMON = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra"]
# GCC 12 finds its own AVX-512 headers' deliberately undefined registers.
COMMON += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


class BuildPerTarget(build_ext):
    """build_ext with extra flags for the files that are compiled for one instruction set."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def with_target_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *TARGET_FLAGS.get(Path(src).name, [])], pp_opts)

        self.compiler._compile = with_target_flags
        super().build_extensions()


def sources() -> list[str]:
    targets = ["scalar", "avx2", "avx512"] if X86 else ["scalar", "neon"] if MACHINE in ("arm64", "aarch64") else ["scalar"]
    return sorted(glob("csrc/*.cpp")) + [f"csrc/targets/{name}.cpp" for name in targets]


ParallelCompile("PYMERGE_BUILD_JOBS").install()
flags = COMMON + (SANITIZE if os.environ.get("PYMERGE_SANITIZE") == "1" else [])
setup(
    packages=[*find_packages(include=["pymerge", "pymerge.*"]), "pymerge.triton_kernels"],
    package_dir={"pymerge.triton_kernels": "triton_kernels"},
    ext_modules=[
        Pybind11Extension(
            "pymerge._native",
            sources(),
            include_dirs=["csrc"],
            depends=glob("csrc/**/*.h", recursive=True),
            extra_compile_args=flags,
            extra_link_args=[f for f in flags if f.startswith("-fsanitize")] + ([] if platform.system() == "Darwin" else ["-pthread"]),
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildPerTarget},
)
