"""What holds for all shapes, dtypes, weights, densities and numbers of models."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pymerge

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SHAPES = st.sampled_from([(), (0,), (1,), (17,), (3, 5), (2, 3, 7), (129,), (1030,)])
DENSITIES = st.one_of(st.sampled_from([0.0, 0.2, 1.0]), st.floats(0, 1))
WEIGHTS = st.floats(-2, 2, width=32)
PRESETS = st.sampled_from(["default", "paper", "peft", "mergelm", "fusion_bench", "sd_mecha"])
SPARSE_METHODS = st.sampled_from(["ties", "dare_linear", "dare_ties"])


@st.composite
def tensors(draw, count, shape=None, dtype=None):
    """`count` tensors of one shape and dtype: normal, or coarse so that magnitudes and votes tie."""
    shape = draw(SHAPES) if shape is None else shape
    dtype = draw(DTYPES) if dtype is None else dtype
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    coarse = draw(st.booleans())
    values = [torch.randn(shape, generator=generator) for _ in range(count)]
    return [((v * 2).round() / 2 if coarse else v).to(dtype) for v in values]


@st.composite
def models(draw, least=1, most=4):
    return draw(tensors(draw(st.integers(least, most))))


@pytest.fixture(autouse=True)
def _(each_backend):
    pass


@given(st.data(), st.integers(1, 4), DENSITIES, SPARSE_METHODS)
def test_models_that_equal_the_base_give_the_base(data, count, density, method):
    (base,) = data.draw(tensors(1))
    weights = data.draw(st.lists(WEIGHTS, min_size=count, max_size=count))
    assert torch.equal(getattr(pymerge, method)(base, [base] * count, weights=weights, density=density), base)


@given(models(2))
def test_density_zero_gives_the_base(given_models):
    base, *rest = given_models
    for method in (pymerge.ties, pymerge.dare_linear, pymerge.dare_ties):
        assert torch.equal(method(base, rest, density=0.0), base)


@given(st.data(), PRESETS)
def test_ties_of_one_model_at_density_one_returns_it(data, preset):
    """Up to rounding of the delta; exactly where the base is zero."""
    base, model = data.draw(tensors(2))
    got = pymerge.ties(base, [model], density=1.0, convention=preset)
    slack = 2 * torch.finfo(model.dtype).eps
    torch.testing.assert_close(got, model, rtol=slack, atol=slack * 4)
    assert torch.equal(pymerge.ties(torch.zeros_like(model), [model], density=1.0, convention=preset), model)


@given(st.data(), DENSITIES, st.floats(-3, 3))
def test_exactly_k_elements_change(data, density, scale):
    """With exactly-k selection, never more elements than the density allows, however magnitudes tie."""
    base, model = data.draw(tensors(2))
    changed = int((pymerge.ties(base, [model], density=density, scale=scale, dtype=torch.float64) != base.double()).sum())
    assert changed <= (0 if density <= 0 else max(1, int(density * base.numel())))


@given(models(3), st.randoms(use_true_random=False), DENSITIES)
def test_order_of_models_matters_only_to_rounding(given_models, random, density):
    """Of coarse values every sum is exact, so the order does not matter at all; DARE's masks go with the place and are left out."""
    base, *rest = [(m.double() * 8).round() / 8 for m in given_models]
    weights = [2.0 ** random.randint(-2, 2) for _ in rest]
    order = random.sample(range(len(rest)), len(rest))
    for method in (
        lambda w, xs: pymerge.ties(base, xs, weights=w, density=density),
        lambda w, xs: pymerge.linear(xs, weights=w),
        lambda w, xs: pymerge.task_arithmetic(base, xs, w),
    ):
        assert torch.equal(method(weights, rest), method([weights[i] for i in order], [rest[i] for i in order]))


@given(models(2), st.floats(-2, 2, width=32))
def test_negated_deltas_negate_the_merge(given_models, scale):
    """But for the tied votes, which go to the positive side; "drop" has none."""
    models = given_models[1:]
    base = torch.zeros_like(models[0])
    drop = pymerge.Convention(zero_vote="drop")
    for method in (lambda xs: pymerge.ties(base, xs, density=0.5, scale=scale, convention=drop), pymerge.linear):
        assert torch.equal(method([-m for m in models]), -method(models))


@given(models(2), DENSITIES)
def test_ties_lies_between_the_smallest_and_largest_delta(given_models, density):
    """The mean of agreeing deltas is one of their convex combinations."""
    base, *rest = [m.double() for m in given_models]
    got = pymerge.ties(base, rest, density=density) - base
    deltas = torch.stack([m - base for m in rest] + [torch.zeros_like(base)])
    assert (got <= deltas.amax(0) + 1e-12).all() and (got >= deltas.amin(0) - 1e-12).all()


@given(models(1, 4), st.floats(0.125, 4, width=32))
def test_scaling_all_weights_does_not_change_a_mean(given_models, factor):
    once = pymerge.linear(given_models, weights=[1.0] * len(given_models), dtype=torch.float64)
    twice = pymerge.linear(given_models, weights=[factor] * len(given_models), dtype=torch.float64)
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=1e-6)


@given(st.data(), st.floats(0, 1))
def test_interpolations_meet_their_ends(data, t):
    a, b = data.draw(tensors(2))
    for method in (lambda x: pymerge.wise_ft(a, b, alpha=x), lambda x: pymerge.slerp(a, b, t=x)):
        slack = 2 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(method(0.0), a, rtol=slack, atol=slack)
        torch.testing.assert_close(method(1.0), b, rtol=slack, atol=slack)
    between = pymerge.wise_ft(a, b, alpha=t)
    assert ((between >= torch.minimum(a, b)) & (between <= torch.maximum(a, b))).all()


@given(st.data(), DENSITIES, SPARSE_METHODS, st.integers(0, 2**64 - 1))
def test_a_state_dict_is_its_tensors_and_dtypes_only_round(data, density, method, seed):
    """Merged alone (scope "tensor") and in any company, a tensor is the same; in fp32 and in bf16 it differs by one rounding."""
    base, model = data.draw(tensors(2, dtype=torch.bfloat16))
    extra = {"seed": seed} if method != "ties" else {}
    merge = getattr(pymerge, method)
    alone = merge({"w": base}, [{"w": model}], density=density, **extra)["w"]
    company = merge({"a": model, "w": base}, [{"a": base, "w": model}], density=density, **extra)["w"]
    wide = merge({"w": base}, [{"w": model}], density=density, dtype=torch.float32, **extra)["w"]
    assert torch.equal(alone, company) and torch.equal(alone, wide.to(torch.bfloat16))


@given(st.data(), PRESETS, DENSITIES, st.floats(-2, 2))
def test_backends_agree_to_the_bit(data, preset, density, scale):
    base, *rest = data.draw(tensors(4))
    weights = data.draw(st.lists(WEIGHTS, min_size=3, max_size=3))
    got = pymerge.ties(base, rest, weights=weights, density=density, scale=scale, convention=preset)
    with pymerge.backend("reference"):
        want = pymerge.ties(base, rest, weights=weights, density=density, scale=scale, convention=preset)
    assert torch.equal(got, want)


@given(
    st.data(),
    st.lists(st.sampled_from([(0,), (), (1,), (7,), (3, 5), (40,)]), min_size=1, max_size=5),
    DENSITIES,
    st.sampled_from(["first", "all"]),
    st.sampled_from(["positive", "majority", "drop"]),
    st.sampled_from(["floor1", "floor", "paper", "complement"]),
)
def test_scope_model_is_one_long_tensor(data, shapes, density, tie_break, zero_vote, k):
    """Thresholds, cuts among equal magnitudes and majorities cross the borders of tensors without a seam."""
    names = [f"w{i}" for i in range(len(shapes))]
    dicts = [dict(zip(names, data.draw(st.tuples(*(tensors(1, s, torch.float32) for s in shapes))))) for _ in range(3)]
    base, *rest = [{n: t for n, (t,) in d.items()} for d in dicts]
    model = pymerge.Convention(tie_break=tie_break, zero_vote=zero_vote, k=k, scope="model")
    got = pymerge.ties(base, rest, density=density, weights=[1.0, 0.5], convention=model)
    flat = [torch.cat([d[n].reshape(-1) for n in names]) for d in (base, *rest)]
    want = pymerge.ties(flat[0], flat[1:], density=density, weights=[1.0, 0.5], convention=model.replace(scope="tensor"))
    assert torch.equal(torch.cat([got[n].reshape(-1) for n in names]), want)
