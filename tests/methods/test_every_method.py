"""What every method outside the older fused ones holds to: shapes, dtypes, kinds of model, memory, threads, errors, recipes."""

import pytest
import torch

import pymerge
from pymerge.merge_methods import flat
from pymerge.merge_methods.registry import get_method

from .test_registry import defaults, recipe

G = torch.Generator().manual_seed(0)


def on_deltas(method, **arguments):
    return lambda base, models, **rest: getattr(pymerge, method)(base, models, **arguments, **rest)


def of_two(method, **arguments):
    return lambda base, models, **rest: getattr(pymerge, method)(base, models[0], **arguments, **rest)


def from_base(method, count=None, **arguments):
    return lambda base, models, **rest: getattr(pymerge, method)(models[:count], base=base, **arguments, **rest)


# All take (base, three models); those of the first table give the base where no model changed anything.
ON_DELTAS = {
    "arcee_fusion": of_two("arcee_fusion"),
    "breadcrumbs": on_deltas("breadcrumbs", density=0.5, gamma=0.1),
    "breadcrumbs_ties": on_deltas("breadcrumbs_ties", density=0.5, gamma=0.1),
    "della": on_deltas("della"),
    "della_norm": on_deltas("della", convention="mergekit"),
    "della_linear": on_deltas("della_linear"),
    "magmax": on_deltas("magmax"),
    "model_stock": on_deltas("model_stock"),
    "model_stock_rows": on_deltas("model_stock", filter_wise=True),
    "multislerp": from_base("multislerp"),
    "nearswap": of_two("nearswap", t=0.5),
    "nuslerp": from_base("nuslerp", 2),
    "nuslerp_rows": from_base("nuslerp", 2, flatten=False),
    "nuslerp_columns": from_base("nuslerp", 2, flatten=False, row_wise=True),
    "ram": on_deltas("ram"),
    "ramplus_tl": on_deltas("ramplus_tl"),
    "sce": on_deltas("sce"),
    "sce_some": on_deltas("sce", select_topk=0.4),
}
METHODS = {**ON_DELTAS, "karcher": lambda base, models, **rest: pymerge.karcher([base, *models], **rest)}

every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
SHAPES = [(), (0,), (1,), (17,), (9, 1), (1, 9), (5, 13), (2, 3, 4), (3, 0, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def models(shape, dtype=torch.float32, seed=0):
    base, *rest = torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return base.to(dtype), [(base + x).to(dtype) for x in rest]


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(method, shape, each_backend):
    base, given = models(shape)
    before = [t.clone() for t in (base, *given)]
    out = method(base, given)
    assert out.shape == base.shape and out.dtype == base.dtype and out.isfinite().all() and out.is_contiguous()
    assert all(torch.equal(t, b) for t, b in zip((base, *given), before))
    assert not any(out.data_ptr() == t.data_ptr() for t in (base, *given) if t.numel())


@pytest.mark.parametrize("method", ON_DELTAS.values(), ids=ON_DELTAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frozen_tensors_stay(method, shape):
    base, _ = models(shape)
    assert torch.equal(method(base, [base.clone()] * 3), base)


@every
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_half_precision_is_rounded_once(method, dtype):
    base, given = models((6, 50), dtype)
    wide = method(base.float(), [x.float() for x in given])
    assert torch.equal(method(base, given), wide.to(dtype))
    assert torch.equal(method(base, given, dtype=torch.float32), wide)


@every
def test_mixed_dtypes_and_fp8(method):
    base, given = models((6, 50), torch.float8_e4m3fn)
    mixed = [given[0].double(), given[1].bfloat16(), given[2].float()]
    out = method(base.float(), mixed)
    # nuslerp takes two of the models, others one: whichever it is, one of them is fp64.
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), method(base.float(), [x.float() for x in mixed]), rtol=1e-5, atol=1e-5)
    narrow = method(base, given)
    assert narrow.dtype == base.dtype
    assert torch.equal(narrow.float(), method(base.float(), [x.float() for x in given]).to(base.dtype).float())


@every
def test_kinds_of_models_and_out(method):
    base, given = models((4, 6))
    want = method({"weight": base}, [{"weight": x} for x in given])["weight"]  # the name decides della's draws

    def module(weight):
        linear = torch.nn.Linear(6, 4, bias=False)
        linear.weight.data = weight.clone()
        return linear

    got = method(module(base), [module(x) for x in given])
    assert list(got) == ["weight"] and torch.equal(got["weight"], want) and not got["weight"].requires_grad
    counted = [{"weight": t, "steps": torch.tensor(3)} for t in (base, *given)]
    got = method(counted[0], counted[1:])
    assert torch.equal(got["weight"], want) and got["steps"] == 3
    for out in (torch.full((4, 6), float("nan")), torch.full((6, 4), float("nan")).t(), torch.full((4, 6), float("nan")).half()):
        target = {"weight": out}
        assert method({"weight": base}, [{"weight": x} for x in given], out=target) is target
        assert torch.equal(target["weight"], want.to(out.dtype))


@every
def test_strides_pieces_and_threads_do_not_show(method, monkeypatch):
    base, given = models((31, 40))
    want = method(base, given)
    assert torch.equal(method(base.t().contiguous().t(), [x.t().contiguous().t() for x in given]), want)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(method(base, given), want)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(flat, "PIECE", 120)
    torch.testing.assert_close(method(base, given), want, rtol=1e-6, atol=1e-6)  # sums of a tensor are taken piece by piece


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(method, bad):
    base, given = models((4, 6))
    given[0][1, 2] = bad
    with pytest.raises(pymerge.NonFiniteError, match="model [01]: 'w' has 1 non-finite"):
        method({"w": base}, [{"w": x} for x in given])
    assert method(base, given, check_finite=False).shape == base.shape


@every
def test_backends_agree(method):
    base, given = models((31, 40), torch.bfloat16)
    with pymerge.backend("reference"):
        want = method(base, given)
    with pymerge.backend("native"):
        assert torch.equal(method(base, given), want)


WEIGHTS = (1.0, 0.5, -0.25)
BASE, GIVEN = models((12, 25), seed=1)


@pytest.mark.parametrize(
    "method,base,given,in_recipe,arguments",
    [
        ("arcee_fusion", BASE, GIVEN[:1], {}, None),
        ("breadcrumbs", BASE, GIVEN, {"weight": WEIGHTS, "density": (0.5, 0.4, 0.3), "gamma": (0.1, 0.2, 0.3), "lambda": 0.5},
         {"weights": WEIGHTS, "density": (0.5, 0.4, 0.3), "gamma": (0.1, 0.2, 0.3), "scale": 0.5}),
        ("breadcrumbs_ties", BASE, GIVEN, {"weight": WEIGHTS, "density": 0.5, "normalize": True},
         {"weights": WEIGHTS, "density": 0.5, "convention": pymerge.Convention(k="floor")}),
        ("della", BASE, GIVEN, {"weight": WEIGHTS, "density": 0.4, "epsilon": 0.1, "seed": 5},
         {"weights": WEIGHTS, "density": 0.4, "epsilon": 0.1, "seed": 5, "convention": "mergekit"}),
        ("della_linear", BASE, GIVEN, {"weight": WEIGHTS, "density": 0.4, "convention": "default"}, {"weights": WEIGHTS, "density": 0.4}),
        ("karcher", None, GIVEN, {"max_iter": 3, "tol": 1e-3}, {"max_iter": 3, "tol": 1e-3}),
        ("magmax", BASE, GIVEN, {"lambda": 0.5}, {"scale": 0.5}),
        ("model_stock", BASE, GIVEN, {"filter_wise": True}, {"filter_wise": True}),
        ("multislerp", None, GIVEN, {"weight": WEIGHTS, "normalize_weights": False, "eps": 0.1},
         {"weights": WEIGHTS, "normalize_weights": False, "eps": 0.1}),
        ("multislerp", BASE, GIVEN, {"weight": WEIGHTS}, {"weights": WEIGHTS, "base": BASE}),
        ("nearswap", BASE, GIVEN[:1], {"t": 0.3}, {"t": 0.3}),
        ("nuslerp", BASE, GIVEN[:2], {"weight": (1.0, 0.5), "nuslerp_flatten": False, "nuslerp_row_wise": True},
         {"weights": (1.0, 0.5), "flatten": False, "row_wise": True, "base": BASE}),
        ("ram", BASE, GIVEN, {"epsilon": 0.5}, {"epsilon": 0.5}),
        ("ramplus_tl", BASE, GIVEN, {"epsilon": 0.5, "r": 0.3, "alpha": 0.6}, {"epsilon": 0.5, "r": 0.3, "alpha": 0.6}),
        ("sce", BASE, GIVEN, {"select_topk": 0.3, "int8_mask": True}, {"select_topk": 0.3}),
    ],
)  # fmt: skip
def test_recipes_agree_with_the_functions(method, base, given, in_recipe, arguments):
    def named(x):
        return {"w": x} if isinstance(x, torch.Tensor) else [{"w": t} for t in x]

    arguments = dict(arguments or {})
    if "base" in arguments:
        arguments["base"] = named(arguments["base"])
    first = [] if get_method(method).base != "required" else [named(base)]
    last = named(given[0]) if method in ("arcee_fusion", "nearswap") else named(given)
    want = getattr(pymerge, method)(*first, last, **arguments)["w"]
    assert torch.equal(recipe(method, base, given, **in_recipe), want)


def test_parameters_have_mergekits_names_and_defaults():
    required = pymerge.REQUIRED
    family = {
        "weight": required,
        "density": 1.0,
        "normalize": None,
        "rescale": None,
        "int8_mask": False,
        "lambda": 1.0,
        "convention": "mergekit",
    }
    assert defaults("breadcrumbs") == defaults("breadcrumbs_ties") == {**family, "gamma": 0.01}
    assert defaults("della") == defaults("della_linear") == {**family, "epsilon": 0.15, "seed": 0}
    assert defaults("nuslerp") == {"weight": required, "nuslerp_flatten": True, "nuslerp_row_wise": False}
    assert defaults("multislerp") == {"weight": required, "normalize_weights": True, "eps": 1e-8}
    assert defaults("karcher") == {"max_iter": 10, "tol": 1e-5} and defaults("model_stock") == {"filter_wise": False}
    assert defaults("nearswap") == {"t": required} and defaults("arcee_fusion") == {} and defaults("magmax") == {"lambda": 1.0}
    assert defaults("ram") == {"epsilon": 1e-5} and defaults("ramplus_tl") == {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}
    assert defaults("sce") == {"select_topk": 1.0, "int8_mask": False}


def test_model_counts():
    limits = {m: (get_method(m).base, get_method(m).min_models, get_method(m).max_models) for m in pymerge.methods()}
    assert limits["nuslerp"] == ("optional", 2, 2) and limits["multislerp"] == ("optional", 1, 64) and limits["karcher"] == ("model", 1, 64)
    assert limits["model_stock"] == ("required", 2, 64)
    assert limits["nearswap"] == limits["arcee_fusion"] == ("required", 1, 1)
