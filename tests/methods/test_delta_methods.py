"""magmax, nearswap, arcee_fusion, ram, ramplus_tl and sce against their definitions and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pymerge
from pymerge.merge_methods import flat
from tests.oracles import deltas as oracle


@pytest.fixture(autouse=True)
def _(each_backend):
    pass


@st.composite
def cases(draw, most=4, shape=None):
    """fp64 base and models: normal, or on a coarse grid so that values and magnitudes tie."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Matrices are for arcee_fusion, where rounding decides between equal importances.
    coarse = shape is None and draw(st.booleans())
    shape = draw(st.integers(0, 400)) if shape is None else draw(shape)
    count = draw(st.integers(1, most))
    return [(rng.integers(-4, 5, shape) / 4 if coarse else rng.normal(size=shape)) for _ in range(count + 1)]


def check(method, arrays, want, **arguments):
    base, *models = (torch.from_numpy(x) for x in arrays)
    got = method(base, models[0] if method in (pymerge.nearswap, pymerge.arcee_fusion) else models, **arguments)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-9)


@given(cases(), st.sampled_from([1.0, 0.5, -2.0]))
def test_magmax(arrays, scale):
    check(pymerge.magmax, arrays, oracle.magmax(arrays[0], arrays[1:], scale), scale=scale)


@given(cases(most=1), st.sampled_from([0.0, 0.25, 0.3, 10.0]))
def test_nearswap(arrays, t):
    check(pymerge.nearswap, arrays, oracle.nearswap(*arrays, t), t=t)


@given(cases(most=1, shape=st.tuples(st.integers(1, 12), st.integers(1, 30))))
def test_arcee_fusion(arrays):
    check(pymerge.arcee_fusion, arrays, oracle.arcee_fusion(*arrays))


@given(cases(), st.sampled_from([0.0, 0.25, 0.3]))
def test_ram(arrays, epsilon):
    check(pymerge.ram, arrays, oracle.ram(arrays[0], arrays[1:], epsilon), epsilon=epsilon)
    check(pymerge.ramplus_tl, arrays, oracle.ramplus_tl(arrays[0], arrays[1:], epsilon), epsilon=epsilon)
    check(pymerge.ramplus_tl, arrays, oracle.ramplus_tl(arrays[0], arrays[1:], epsilon, 0.5, 2.0), epsilon=epsilon, r=0.5, alpha=2.0)


@given(cases(), st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]))
def test_sce(arrays, topk):
    check(pymerge.sce, arrays, oracle.sce(arrays[0], arrays[1:], topk), select_topk=topk)


def test_magmax_by_hand():
    base = torch.tensor([1.0, 1.0, 1.0])
    assert pymerge.magmax(base, [base + 2, torch.tensor([0.0, -4.0, -1.0])]).tolist() == [3.0, -4.0, 3.0]  # a tie: the first model's
    assert pymerge.magmax(base, [base + 2, base - 3], scale=0.5).tolist() == [-0.5] * 3


def test_nearswap_by_hand():
    base, model = torch.tensor([0.0, 0.0, 0.0, 5.0]), torch.tensor([0.1, 1.0, -4.0, 5.0])
    assert pymerge.nearswap(base, model, t=0.5).tolist() == [model[0], 0.5, -0.5, 5.0]
    assert torch.equal(pymerge.nearswap(base, model, t=0.0), base) and torch.equal(pymerge.nearswap(base, model, t=9.0), model)
    # Smaller than mergekit's clamp at 1e-6: the ratio is still the one of the formula.
    assert pymerge.nearswap(torch.zeros(1), torch.tensor([1e-7]), t=2e-7).item() == torch.tensor(1e-7).item()


def test_arcee_fusion_takes_what_changed_most():
    base = torch.zeros(4, 100)
    model = base.clone()
    model[0, :10] = 1.0
    model[1:] += torch.randn(3, 100, generator=torch.Generator().manual_seed(0)) * 1e-4
    out = pymerge.arcee_fusion(base, model)
    assert torch.equal(out[0], model[0])
    assert 0 < (out[1:] == model[1:]).sum() < 150 and torch.equal(pymerge.arcee_fusion(base, model), out)


def test_arcee_fusion_is_exact_and_repeatable_above_a_million_elements():
    g = torch.Generator().manual_seed(1)
    base = torch.randn(1100, 1000, generator=g)
    model = base + torch.randn(1100, 1000, generator=g) * torch.rand(1100, 1, generator=g)
    out = pymerge.arcee_fusion(base, model)
    want = oracle.arcee_fusion(base.double().numpy(), model.double().numpy())
    assert (out.double().numpy() != want).sum() <= 2  # an importance at the threshold may round to either side
    assert torch.equal(pymerge.arcee_fusion(base, model), out)


def test_ram_by_hand():
    base = torch.zeros(4)
    a, b = torch.tensor([1.0, 0.0, 2.0, 1e-6]), torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert pymerge.ram(base, [a, b]).tolist() == [2.0, 4.0, 2.0, 0.0]
    # One unique and one shared element each: factor 1 + 0.1 * min(1, 0.2).
    torch.testing.assert_close(pymerge.ramplus_tl(base, [a, b]), torch.tensor([2.0, 4.08, 2.04, 0.0]))


def test_sce_by_hand():
    base = torch.zeros(3)
    a, b = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 2.0])
    assert pymerge.sce(base, [a, b]).tolist() == [1.5, 0.0, 2.0]  # energies 5 and 5; the third element's vote is positive
    assert pymerge.sce(base, [a, b], select_topk=0.5).tolist() == [0.0, 0.0, 2.0]  # variances 0.25, 0 and 2.25
    # Deltas of the size that fine-tunes have: mergekit would weigh them equally.
    torch.testing.assert_close(pymerge.sce(base, [a * 3e-4, torch.tensor([2e-4, 0.0, 0.0])])[0], torch.tensor((6e-4 * 45 + 2e-4 * 4) / 49))


def test_sce_selects_the_first_of_equal_variances_in_every_piece(monkeypatch):
    """Half of 1000 equal variances: the first 500, whichever piece they are in."""
    monkeypatch.setattr(flat, "PIECE", 64)
    base = torch.zeros(1000)
    out = pymerge.sce(base, [base + 1, base + 3], select_topk=0.5)
    torch.testing.assert_close(out, torch.where(torch.arange(1000) < 500, 2.8, 0.0))  # energies 1 and 9


def test_errors():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="t is -1.0; it is a distance between weights, at least 0"):
        pymerge.nearswap(x, x, t=-1)
    with pytest.raises(ValueError, match="epsilon is -1.0; it is a magnitude, at least 0"):
        pymerge.ram(x, [x], epsilon=-1)
    with pytest.raises(ValueError, match="alpha is -1.0; it is a ratio, at least 0"):
        pymerge.ramplus_tl(x, [x], alpha=-1)
    with pytest.raises(ValueError, match="select_topk is 1.5; it is the fraction that is selected, between 0 and 1"):
        pymerge.sce(x, [x], select_topk=1.5)
    for method in (pymerge.magmax, pymerge.ram, pymerge.sce, pymerge.model_stock):
        with pytest.raises(TypeError, match=f"base is None; {method.__name__} merges what models changed in a base"):
            method(None, [x, x])
