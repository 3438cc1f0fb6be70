"""nuslerp, multislerp, karcher and model_stock against their definitions, and where directions are missing or cancel."""

import math

import numpy as np
import pytest
import torch

import pymerge
from tests.oracles import directions as oracle


@pytest.fixture(autouse=True)
def _(each_backend):
    pass


def vectors(count, near=None, shape=(600,), seed=0):
    """Independent ones, or ones that differ from the first by `near`."""
    rng = np.random.default_rng(seed)
    first, *rest = (rng.normal(size=shape) for _ in range(count))
    return [first, *(first + near * x for x in rest)] if near else [first, *rest]


def tensors(arrays, dtype=torch.float64):
    return [torch.from_numpy(x).to(dtype) for x in arrays]


NEAR = [None, 1e-1, 1e-4]


@pytest.mark.parametrize("near", NEAR)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (3.0, -1.0)])
def test_nuslerp(near, weights):
    a, b = vectors(2, near)
    want = oracle.nuslerp(a, b, weights[1] / sum(weights))
    got = pymerge.nuslerp(tensors([a, b]), weights=weights)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-12)
    got = pymerge.nuslerp(tensors([a, b], torch.float32), weights=weights)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-6)


def test_nuslerp_of_deltas_and_of_rows_and_columns():
    base, a, b = vectors(3, shape=(20, 31))
    t_base, t_a, t_b = tensors([base, a, b])

    def check(got, want):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-12)

    flat = [(x - base).reshape(-1) for x in (a, b)]
    check(pymerge.nuslerp([t_a, t_b], base=t_base), base + oracle.nuslerp(*flat, 0.5).reshape(base.shape))
    check(pymerge.nuslerp([t_a, t_b], flatten=False), oracle.by_rows(oracle.nuslerp, a, b, t=0.5))
    check(pymerge.nuslerp([t_a, t_b], base=t_base, flatten=False), base + oracle.by_rows(oracle.nuslerp, a - base, b - base, t=0.5))
    check(pymerge.nuslerp([t_a, t_b], flatten=False, row_wise=True), oracle.by_rows(oracle.nuslerp, a.T, b.T, t=0.5).T)
    three = [x.reshape(4, 5, 31) for x in (t_a, t_b)]
    check(pymerge.nuslerp(three, flatten=False).reshape(20, 31), oracle.by_rows(oracle.nuslerp, a, b, t=0.5))


def test_nuslerp_by_hand():
    a, b = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
    got = pymerge.nuslerp([a, b], flatten=False)
    torch.testing.assert_close(got, torch.tensor([[math.sqrt(2), math.sqrt(2)], [0.0, 0.0]]))  # opposite: the straight line
    zero = torch.zeros(2, 2)
    torch.testing.assert_close(pymerge.nuslerp([a, zero]), a * math.sqrt(0.5))  # zero is at a right angle
    assert torch.equal(pymerge.nuslerp([a, a], base=a), a)


@pytest.mark.parametrize("near", NEAR)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_multislerp(near, count):
    xs = vectors(count, near)
    weights = [0.7, 0.2, 1.1, 0.4, 2.0][:count]
    share = np.array(weights) / sum(weights)
    got = pymerge.multislerp(tensors(xs), weights=weights)
    np.testing.assert_allclose(got.numpy(), oracle.multislerp(xs, share), rtol=1e-9, atol=1e-9)
    got = pymerge.multislerp(tensors(xs), weights=weights, normalize_weights=False)
    np.testing.assert_allclose(got.numpy(), oracle.multislerp(xs, weights), rtol=1e-9, atol=1e-9)
    base = np.ones_like(xs[0])
    got = pymerge.multislerp(tensors(xs), base=torch.ones(600, dtype=torch.float64), weights=weights)
    np.testing.assert_allclose(got.numpy(), base + oracle.multislerp([x - base for x in xs], share), rtol=1e-9, atol=1e-9)


def test_multislerp_of_frozen_tensors_and_of_opposites():
    base = torch.randn(30)
    assert torch.equal(pymerge.multislerp([base] * 3, base=base), base)
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    assert pymerge.multislerp([a, -a, b, -b], weights=[1.0, 1.0, 2.0, 2.0]).tolist() == [0.0, 0.0]
    assert pymerge.multislerp([a, -3 * a]).tolist() == [-1.0, 0.0]  # the weighted mean
    # One model that did not change gives no direction and no length.
    torch.testing.assert_close(pymerge.multislerp([a, b, a * 0], weights=[1.0, 1.0, 2.0]), torch.tensor([1.0, 1.0]) / math.sqrt(2))
    one = torch.randn(30)
    torch.testing.assert_close(pymerge.multislerp([one]), one)


@pytest.mark.parametrize("near", NEAR)
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_karcher(near, count):
    xs = vectors(count, near)
    got = pymerge.karcher(tensors(xs), max_iter=200, tol=1e-12).numpy()
    np.testing.assert_allclose(got, oracle.karcher(xs), rtol=1e-8, atol=1e-8)
    m = oracle.unit(got)
    logs = sum(oracle.log_map(m, oracle.unit(x)) for x in xs)
    assert np.linalg.norm(logs) < 1e-7  # what makes it the mean
    np.testing.assert_allclose(pymerge.karcher(tensors(xs)).numpy(), got, rtol=1e-4, atol=1e-4)


def test_karcher_of_two_is_the_middle_of_the_arc():
    a, b = vectors(2)
    want = oracle.nuslerp(oracle.unit(a), oracle.unit(b), 0.5) * (np.linalg.norm(a) + np.linalg.norm(b)) / 2
    np.testing.assert_allclose(pymerge.karcher(tensors([a, b])).numpy(), want, rtol=1e-10, atol=1e-12)


def test_karcher_of_zeros_opposites_and_tiny_tensors():
    a = torch.tensor([0.0, 2.0])
    assert pymerge.karcher([a * 0, a * 0]).tolist() == [0.0, 0.0]
    torch.testing.assert_close(pymerge.karcher([a, a * 0]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(pymerge.karcher([a, -a]), a)
    assert pymerge.karcher([a, -a], tol=0).isfinite().all()
    b = torch.tensor([2.0, 0.0])
    small = pymerge.karcher([a * 1e-9, b * 1e-9])  # mergekit: zero
    torch.testing.assert_close(small, pymerge.karcher([a, b]) * 1e-9, rtol=1e-6, atol=0)


@pytest.mark.parametrize("near", NEAR)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock(near, count):
    base = np.random.default_rng(7).normal(size=600)
    xs = [base + 1e-3 * x for x in vectors(count, near)]
    got = pymerge.model_stock(*(lambda b, *m: (b, m))(*tensors([base, *xs])))
    np.testing.assert_allclose(got.numpy(), oracle.model_stock(base, xs), rtol=1e-9, atol=1e-12)
    rows = [x.reshape(20, 30) for x in (base, *xs)]
    got = pymerge.model_stock(*(lambda b, *m: (b, m))(*tensors(rows)), filter_wise=True)
    want = np.stack([oracle.model_stock(b, np.stack(r)) for b, *r in zip(*rows)])
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-12)


def test_model_stock_by_hand():
    base = torch.zeros(2)
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
    torch.testing.assert_close(pymerge.model_stock(base, [a, b]), torch.tensor([0.8, 0.4]) * 0.75)  # c = 0.6: t = 1.2 / 1.6
    torch.testing.assert_close(pymerge.model_stock(base, [a * 1e-6, b * 1e-6]), torch.tensor([0.8e-6, 0.4e-6]) * 0.75, rtol=1e-6, atol=0)
    assert pymerge.model_stock(base, [a, torch.tensor([0.0, 1.0])]).tolist() == [0.0, 0.0]
    torch.testing.assert_close(pymerge.model_stock(base, [a, a]), a)
    assert torch.equal(pymerge.model_stock(a, [a, a, b]), a)
    assert pymerge.model_stock(base, [a, -a]).tolist() == [0.0, 0.0]


def test_errors():
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"3 models given; nuslerp takes exactly two \(multislerp and karcher take more\)"):
        pymerge.nuslerp([x] * 3)
    with pytest.raises(ValueError, match="one model given; model_stock compares models, so it takes at least two"):
        pymerge.model_stock(x, [x])
    with pytest.raises(ValueError, match="max_iter is -1 and tol 1e-05; both must be at least 0"):
        pymerge.karcher([x], max_iter=-1)
    with pytest.raises(ValueError, match="eps is -1.0; it must be at least 0"):
        pymerge.multislerp([x], eps=-1)
    for method in (pymerge.nuslerp, pymerge.multislerp):
        with pytest.raises(ValueError, match="sum to zero"):
            method([x, x], weights=[1.0, -1.0])
    pymerge.multislerp([x, x], weights=[1.0, -1.0], normalize_weights=False)
