"""slerp against its formula in fp64, and its special cases."""

import numpy as np
import pytest
import torch

import pymerge
from tests.oracles.averages import slerp


@pytest.fixture(autouse=True)
def _(each_backend):
    pass


def pair(n=5000, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=n).astype(np.float32), rng.normal(size=n).astype(np.float32)


@pytest.mark.parametrize("t", [-0.2, 0.0, 0.3, 0.5, 1.0, 1.2])
def test_formula(t):
    a, b = pair()
    got = pymerge.slerp(torch.from_numpy(a), torch.from_numpy(b), t=t)
    np.testing.assert_allclose(got.numpy(), slerp(a, b, t), rtol=1e-6, atol=1e-6)
    got64 = pymerge.slerp(torch.from_numpy(a).double(), torch.from_numpy(b).double(), t=t)
    np.testing.assert_allclose(got64.numpy(), slerp(a, b, t), rtol=1e-12, atol=1e-12)


def test_length_is_kept_on_the_way():
    a, b = (torch.from_numpy(x) for x in pair())
    a, b = a / a.norm(), b / b.norm()
    for t in (0.1, 0.5, 0.8):
        assert pymerge.slerp(a, b, t=t).norm().item() == pytest.approx(1.0, rel=1e-6)


def test_each_tensor_has_its_own_angle():
    a, b = pair()
    got = pymerge.slerp(
        {k: torch.from_numpy(a[s]) for k, s in (("x", slice(0, 10)), ("y", slice(10, 30)))},
        {k: torch.from_numpy(b[s]) for k, s in (("x", slice(0, 10)), ("y", slice(10, 30)))},
        t=0.4,
    )
    np.testing.assert_allclose(got["y"].numpy(), slerp(a[10:30], b[10:30], 0.4), rtol=1e-6, atol=1e-6)


def test_almost_collinear_vectors_are_interpolated_linearly():
    a, _ = pair()
    for b in (a * 3, -a, np.zeros_like(a)):
        got = pymerge.slerp(torch.from_numpy(a), torch.from_numpy(b), t=0.25)
        if b.any():
            np.testing.assert_allclose(got.numpy(), 0.75 * a + 0.25 * b, rtol=1e-6, atol=1e-6)
        else:  # a right angle, as in mergekit: the zero vector's cosine is 0
            np.testing.assert_allclose(got.numpy(), np.sin(0.75 * np.pi / 2) * a, rtol=1e-6, atol=1e-6)


def test_t_is_needed():
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 't'"):
        pymerge.slerp(torch.ones(1), torch.ones(1))
