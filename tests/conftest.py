"""Fixtures for all tests: unwritten memory shows, few threads, and a choice of backends."""

import importlib.util
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

import pymerge

# Triton's interpreter runs the GPU kernels on CPU tensors (tests/triton). It must be chosen before anything imports Triton; set it to 0 to
# run those tests on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Fixtures here choose a backend and poison memory; both are the same for every example. The same examples each time: a failure repeats.
settings.register_profile(
    "pymerge", max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("pymerge")

HAS_NATIVE = importlib.util.find_spec("pymerge._native") is not None


def pytest_configure(config):
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN and huge integers, so that an element which nobody wrote fails a test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "native"])
def each_backend(request):
    if request.param == "native" and not HAS_NATIVE:
        pytest.skip("the C++ extension is not built")
    with pymerge.backend(request.param):
        yield request.param
