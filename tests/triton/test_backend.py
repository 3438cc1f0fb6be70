"""The choice of the Triton backend, and the public functions on top of it."""

import pytest
import torch

pytest.importorskip("triton")

import pymerge
from pymerge import ops, triton_backend
from pymerge.triton_kernels.compat import parse_version

from ..core.conftest import assert_same_bits
from .conftest import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def state(seed):
    torch.manual_seed(seed)
    return {"w": torch.randn(40, 31).bfloat16(), "b": torch.randn(31).to(DEVICE, torch.float32), "n": torch.tensor(3)}


@pytest.mark.parametrize(
    "method",
    [
        lambda base, models: pymerge.ties(base, models, density=0.3),
        lambda base, models: pymerge.ties(base, models, density=0.3, convention="paper"),
        lambda base, models: pymerge.dare_ties(base, models, density=0.5, seed=5),
        lambda base, models: pymerge.dare_linear(base, models, density=0.5, convention="mergekit"),
        lambda base, models: pymerge.task_arithmetic(base, models, [0.4, 0.6]),
        lambda base, models: pymerge.linear([base, *models]),
        lambda base, models: pymerge.wise_ft(base, models[0], alpha=0.3),
        lambda base, models: pymerge.slerp(base, models[0], t=0.3),
    ],
    ids=["ties", "ties-paper", "dare_ties", "dare_linear-mergekit", "task_arithmetic", "linear", "wise_ft", "slerp"],
)
def test_methods_give_the_reference_s_bytes(method):
    base, *models = [state(i) for i in range(3)]
    with pymerge.backend("reference"):
        want = method(base, models)
    move = [{k: v.to(DEVICE) for k, v in m.items()} for m in (base, *models)]
    with pymerge.backend("triton"):
        got = method(move[0], move[1:])
    for name in ("w", "b"):
        assert_same_bits(got[name].cpu().reshape(-1), want[name].reshape(-1))


def test_nan_is_named():
    base, model = torch.zeros(50, device=DEVICE), torch.zeros(50, device=DEVICE)
    model[7] = float("nan")
    with pymerge.backend("triton"):
        with pytest.raises(pymerge.NonFiniteError, match=r"first nan at index \[7\]"):
            pymerge.ties(base, [model], density=0.5)
        pymerge.ties(base, [model], density=0.5, check_finite=False)


def test_the_environment_chooses_it(monkeypatch):
    monkeypatch.setenv("PYMERGE_BACKEND", "triton")
    assert ops._backend_for(DEVICE) is triton_backend


def test_the_default_follows_the_device(monkeypatch):
    monkeypatch.delenv("PYMERGE_BACKEND", raising=False)
    for interpreted, on_gpu in ((False, triton_backend), (True, ops.reference)):
        monkeypatch.setattr(triton_backend, "INTERPRETED", interpreted)
        assert ops._backend_for(torch.device("cuda")) is on_gpu
        assert ops._backend_for(torch.device("cpu")) is not triton_backend
        assert ops._backend_for(torch.device("meta")) is ops.reference


def test_other_devices_are_an_error(monkeypatch):
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    with pymerge.backend("triton"), pytest.raises(ValueError, match="takes GPU tensors, or CPU tensors under TRITON_INTERPRET=1"):
        ops.dots(torch.zeros(3), torch.zeros(3))
    monkeypatch.setattr(triton_backend, "INTERPRETED", True)
    with pymerge.backend("triton"), pytest.raises(ValueError, match="takes CPU tensors under TRITON_INTERPRET=1; these are on cuda"):
        ops._backend_for(torch.device("cuda"))


def test_a_missing_triton_is_an_error_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(ops, "_import_triton", lambda: (None, "No module named 'triton'"))
    assert ops._backend_for(torch.device("cuda")) is ops.reference
    with pymerge.backend("triton"), pytest.raises(ValueError, match="backend 'triton' cannot be used: No module named 'triton'"):
        ops.dots(torch.zeros(3), torch.zeros(3))


def test_versions_are_compared_as_numbers():
    assert parse_version("3.10.0") > parse_version("3.9.1") > parse_version("3.4")
    assert parse_version("3.6.0+git5389ed79") == (3, 6)
    assert parse_version("unknown") == (0, 0)
