"""Against mergekit 0.1.5 itself, in fp32: the same bytes, except where it leaves open which of equal magnitudes is kept.

mergekit rounds to the working dtype after every step, pymerge once at the store; so half precision is compared with its documented precise
mode (dtype float32, out_dtype bfloat16), which does the same.
"""

import pytest
import torch

import pymerge

merge_tensors = pytest.importorskip("mergekit.merge_methods").merge_tensors


def models(dtype=torch.float32, n=4099, count=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = (torch.randn(n, generator=g) * 0.02).to(dtype)
    return base, [(base.float() + torch.randn(n, generator=g) * 5e-4).to(dtype) for _ in range(count)]


def theirs(method, base, xs, *, weights, density=None, out_dtype=None, shared=None):
    inputs, offset = ([base, *xs], 1) if base is not None else (xs, 0)
    parameters = {"weight": {i + offset: w for i, w in enumerate(weights)}, **(shared or {})}
    if density is not None:
        parameters["density"] = {i + offset: density for i in range(len(xs))}
    return merge_tensors(
        inputs, method, ids=list(range(len(inputs))), parameters=parameters, base_index=0 if base is not None else None,
        dtype=torch.float32, out_dtype=out_dtype,
    )  # fmt: skip


@pytest.mark.parametrize("density", [0.05, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, 1.7, 0.5), (1.0, -0.5, 0.25)])
@pytest.mark.usefixtures("each_backend")
def test_ties(density, weights):
    base, xs = models()
    want = theirs("ties", base, xs, weights=weights, density=density, shared={"lambda": 0.8})
    got = pymerge.ties(base, xs, weights=weights, density=density, scale=0.8)
    assert torch.equal(got, want)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, -1.7, 0.5)])
@pytest.mark.usefixtures("each_backend")
def test_task_arithmetic(weights):
    base, xs = models()
    assert torch.equal(pymerge.task_arithmetic(base, xs, weights), theirs("task_arithmetic", base, xs, weights=weights))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.usefixtures("each_backend")
def test_linear(normalize):
    """mergekit adds with fused multiply-adds here, so the last bit may differ."""
    _, xs = models()
    want = theirs("linear", None, xs, weights=(0.3, 1.7, 0.5), shared={"normalize": normalize})
    torch.testing.assert_close(pymerge.linear(xs, weights=(0.3, 1.7, 0.5), normalize=normalize), want, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("far", [1e-3, 1.0])
@pytest.mark.usefixtures("each_backend")
def test_slerp(t, far):
    g = torch.Generator().manual_seed(2)
    a = torch.randn(33, 65, generator=g)
    b = a + far * torch.randn(33, 65, generator=g)
    want = merge_tensors([a, b], "slerp", parameters={"t": t}, base_index=0)
    torch.testing.assert_close(pymerge.slerp(a, b, t=t), want, rtol=2e-6, atol=2e-6)


def test_slerp_of_zeros_and_of_opposites():
    a = torch.randn(50, generator=torch.Generator().manual_seed(3))
    for x, y in [(a, a * 0), (a * 0, a), (a * 0, a * 0), (a, -a), (a, a)]:
        want = merge_tensors([x, y], "slerp", parameters={"t": 0.3}, base_index=0)
        torch.testing.assert_close(pymerge.slerp(x, y, t=0.3), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.usefixtures("each_backend")
def test_ties_in_bf16_keeps_the_right_number(density):
    """Percents of bf16 deltas share the threshold's magnitude: elsewhere the bytes agree, and exactly k of each model are kept."""
    base, xs = models(torch.bfloat16)
    n, k = base.numel(), int(density * base.numel())
    deltas = [x.float() - base.float() for x in xs]
    thresholds = [d.abs().sort(descending=True).values[k - 1] for d in deltas]
    tied = torch.stack([d.abs() == t for d, t in zip(deltas, thresholds)]).any(0)
    assert 0.001 * n < tied.sum() < 0.5 * n
    want = theirs("ties", base, xs, weights=(1.0, 1.0, 1.0), density=density, out_dtype=torch.bfloat16)
    got = pymerge.ties(base, xs, density=density)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[~tied], want[~tied])
    for x, d, t in zip(xs, deltas, thresholds):
        change = pymerge.ties(base, [x], density=density, dtype=torch.float32) - base.float()
        kept = change != 0
        assert kept.sum() == k and kept[d.abs() > t].all() and not kept[d.abs() < t].any()
        # Of the equal ones, the first are kept.
        where = torch.nonzero(d.abs() == t).reshape(-1)
        count = int(kept[where].sum())
        assert kept[where[:count]].all()


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_agrees_in_distribution(method):
    """Other random numbers, the same law: with the L1 norm kept, the mean over seeds goes to the sum of the deltas (linear), and ours
    spreads as much around it as theirs."""
    base, xs = models(n=20000, count=2)
    torch.manual_seed(0)
    want = torch.stack([theirs(method, base, xs, weights=(1.0, 1.0), density=0.5) - base for _ in range(20)])
    got = torch.stack([getattr(pymerge, method)(base, xs, density=0.5, seed=s, convention="mergekit") - base for s in range(20)])
    torch.testing.assert_close(got.mean(0).norm(), want.mean(0).norm(), rtol=0.02, atol=0)
    torch.testing.assert_close(got.std(0).norm(), want.std(0).norm(), rtol=0.02, atol=0)


# The methods beyond the fused family. In fp64 the definitions agree to rounding; in fp32 mergekit rounds after each step.
# --------------------------------------------------------------------------------------------------------------------------------------


def far(dtype, count=3, shape=(33, 65), size=0.5):
    """Deltas that are large enough for the constants that mergekit adds to lengths and clamps ratios at."""
    base, *xs = torch.randn(count + 1, *shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return base.to(dtype), [(base + size * (i + 1) * x).to(dtype) for i, x in enumerate(xs)]


def check_method(dtype, method, got, inputs, base, weights=None, **parameters):
    if weights is not None:
        parameters["weight"] = {i + base: w for i, w in enumerate(weights)}
    want = merge_tensors(inputs, method, ids=list(range(len(inputs))), parameters=parameters, base_index=0 if base else None)
    slack = {"rtol": 1e-7, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 3e-6, "atol": 3e-6}
    torch.testing.assert_close(got, want.to(dtype), **slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions(dtype):
    base, xs = far(dtype)
    weights = (0.3, 1.2, 0.7)
    check_method(dtype, "karcher", pymerge.karcher(xs), xs, False)
    check_method(dtype, "karcher", pymerge.karcher(xs, max_iter=1), xs, False, max_iter=1)
    check_method(dtype, "multislerp", pymerge.multislerp(xs, weights=weights), xs, False, weights)
    check_method(dtype, "multislerp", pymerge.multislerp(xs, base=base, weights=weights), [base, *xs], True, weights)
    got = pymerge.multislerp(xs, weights=weights, normalize_weights=False)
    check_method(dtype, "multislerp", got, xs, False, weights, normalize_weights=False)
    check_method(dtype, "model_stock", pymerge.model_stock(base, xs), [base, *xs], True)
    check_method(dtype, "model_stock", pymerge.model_stock(base, xs, filter_wise=True), [base, *xs], True, filter_wise=True)
    for flatten, row_wise in ((True, False), (False, False), (False, True)):
        recipe = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
        arguments = {"weights": weights[:2], "flatten": flatten, "row_wise": row_wise}
        check_method(dtype, "nuslerp", pymerge.nuslerp(xs[:2], **arguments), xs[:2], False, weights[:2], **recipe)
        check_method(dtype, "nuslerp", pymerge.nuslerp(xs[:2], base=base, **arguments), [base, *xs[:2]], True, weights[:2], **recipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_methods_on_deltas(dtype):
    base, xs = far(dtype)
    given = [base, *xs]
    check_method(dtype, "nearswap", pymerge.nearswap(base, xs[0], t=0.3), given[:2], True, t=0.3)
    check_method(dtype, "ram", pymerge.ram(base, xs, epsilon=0.3), given, True, epsilon=0.3)
    # Its factors are fp32, whatever the inputs are.
    check_method(torch.float32, "ramplus_tl", pymerge.ramplus_tl(base, xs, epsilon=0.9).float(), given, True, epsilon=0.9)
    check_method(dtype, "sce", pymerge.sce(base, xs), given, True)
    if dtype == torch.float64:  # in fp32 rounding decides which of two almost equal numbers is selected
        check_method(dtype, "sce", pymerge.sce(base, xs, select_topk=0.3), given, True, select_topk=0.3)
        check_method(dtype, "arcee_fusion", pymerge.arcee_fusion(base, xs[0]), given[:2], True)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("density,gamma", [(0.5, 0.1), (0.9, 0.01), (0.95, 0.2), (1.0, 0.3), (0.0, 0.1), (0.0001, 0.0)])
@pytest.mark.usefixtures("each_backend")
def test_breadcrumbs(method, density, gamma):
    base, xs = models()
    weights = (0.3, 1.7, -0.5)
    inputs = {i + 1: gamma for i in range(3)}
    want = theirs(method, base, xs, weights=weights, density=density, shared={"lambda": 0.8, "gamma": inputs})
    got = getattr(pymerge, method)(base, xs, weights=weights, density=density, gamma=gamma, scale=0.8)
    assert torch.equal(got, want)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_agrees_in_distribution(method):
    base, xs = models(n=20000, count=2)
    base, xs = base.view(100, 200), [x.view(100, 200) for x in xs]
    torch.manual_seed(0)
    want = torch.stack([theirs(method, base, xs, weights=(1.0, 1.0), density=0.4) - base for _ in range(20)])
    got = torch.stack([getattr(pymerge, method)(base, xs, density=0.4, seed=s, convention="mergekit") - base for s in range(20)])
    torch.testing.assert_close(got.mean(0).norm(), want.mean(0).norm(), rtol=0.02, atol=0)
    torch.testing.assert_close(got.std(0).norm(), want.std(0).norm(), rtol=0.02, atol=0)
    kept = [(x != 0).float().mean().item() for x in (got, want)]
    assert abs(kept[0] - kept[1]) < 0.005


def test_where_mergekit_differs():
    """The differences that docs/methods_vs_mergekit.md lists are there, so that the page can be corrected when they are gone."""

    def run(method, inputs, **parameters):
        ids = list(range(len(inputs)))
        if "weight" in parameters:
            parameters["weight"] = {i: parameters["weight"] for i in ids[1:]}
        return merge_tensors(inputs, method, ids=ids, parameters=parameters, base_index=0)

    g = torch.Generator().manual_seed(0)
    base, x = torch.randn(2, 8, 16, generator=g)
    tiny = 1e-6 * x
    changes = [tiny, tiny]
    # model_stock: the same two deltas give their mean, however small they are.
    zero = torch.zeros_like(base)
    torch.testing.assert_close(pymerge.model_stock(zero, changes), tiny)
    assert run("model_stock", [zero, *changes]).norm() < 0.01 * tiny.norm()
    # sce: weights follow the energies.
    a, b = zero.clone(), zero.clone()
    a[0], b[0] = 3e-4, 1e-4
    assert pymerge.sce(zero, [a, b])[0, 0] > 2.7e-4 and abs(run("sce", [zero, a, b])[0, 0] - 2e-4) < 1e-6
    # multislerp: frozen tensors.
    assert torch.equal(pymerge.multislerp([base] * 3, base=base), base)
    with pytest.raises(ValueError, match="zero"):
        run("multislerp", [base] * 4, weight=1.0)
    # della: columns of one element.
    with pytest.raises((RuntimeError, IndexError)):
        run("della", [torch.zeros(4, 1), torch.ones(4, 1)], weight=1.0, density=0.5)
    # arcee_fusion and ramplus_tl: the dtype of the result.
    half = [base.bfloat16(), x.bfloat16()]
    assert run("arcee_fusion", half).dtype == torch.float32 and pymerge.arcee_fusion(*half).dtype == torch.bfloat16
    assert run("ramplus_tl", half).dtype == torch.float32 and pymerge.ramplus_tl(half[0], half[1:]).dtype == torch.bfloat16
    # karcher: tensors shorter than tol.
    small = [1e-7 * base, 1e-7 * x]
    assert merge_tensors(small, "karcher").norm() == 0 and pymerge.karcher(small).norm() > 0
    # nearswap: distances below 1e-6.
    assert run("nearswap", [zero, tiny], t=1e-7).ne(pymerge.nearswap(zero, tiny, t=1e-7)).any()
