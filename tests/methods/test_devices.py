"""What every method does with tensors on a GPU, on a machine without one: it stays there, and divides as on the CPU."""

import pytest
import torch

from pymerge.merge_methods import della, sce
from pymerge.merge_methods.registry import get_method
from tests.checkpoint.test_device import METHODS
from tests.pretend_gpu import OnGpu, PretendGpu

from .test_registry import recipe

G = torch.Generator().manual_seed(0)
BASE, *MODELS = torch.randn(4, 50, 33, generator=G)
VARIANTS = {
    **{name: (name, given) for name, given in METHODS.items()},
    "model_stock by rows": ("model_stock", {"filter_wise": True}),
    "nuslerp by rows": ("nuslerp", {"weight": 1, "nuslerp_flatten": False}),
    "nuslerp by columns": ("nuslerp", {"weight": 1, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "sce of all": ("sce", {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_methods_stay_on_the_device(variant):
    name, given = VARIANTS[variant]
    method = get_method(name)
    count = 2 if name == "nuslerp" else min(3, method.max_models)
    base = None if method.base == "model" else BASE
    want = recipe(name, base, MODELS[:count], **given)
    with PretendGpu():
        got = recipe(name, None if base is None else OnGpu(base), [OnGpu(x) for x in MODELS[:count]], **given)
    assert isinstance(got, OnGpu) and torch.equal(got.values_, want)


def test_divisions_are_not_by_reciprocals():
    deltas = list(MODELS)
    variance, chances = sce._variance(deltas), della._chances(BASE[:, :8], 0.5, 0.1)
    with PretendGpu():
        assert not torch.equal((OnGpu(BASE) / 3).values_, BASE / 3), "a GPU's division by a number of the host"
        assert torch.equal(sce._variance([OnGpu(d) for d in deltas]).values_, variance)
        assert torch.equal(della._chances(OnGpu(BASE[:, :8]), 0.5, 0.1).values_, chances)


def test_tensors_on_two_devices_are_noticed():
    with PretendGpu(), pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
        OnGpu(BASE) + BASE
