"""Which sets of models are taken, what comes out, and what the errors say."""

import gc
from collections import OrderedDict

import pytest
import torch
from torch import nn

import pymerge

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def soup(models, **more):
    return pymerge.linear(models, **more)


class Lazy:
    """Only keys() and [name]; a new tensor at every access."""

    def __init__(self, tensors):
        self._tensors, self.loads = tensors, []

    def keys(self):
        return self._tensors.keys()

    def __getitem__(self, name):
        self.loads.append(name)
        return self._tensors[name].clone()


# ---------------------------------------------------------------------------------------------------------------------------------------
# What is taken


def test_three_kinds_give_the_same_numbers():
    base, a = nn.Linear(4, 3), nn.Linear(4, 3)
    as_dicts = pymerge.ties(base.state_dict(), [a.state_dict()], density=0.5)
    as_modules = pymerge.ties(base, [a], density=0.5)
    as_lazy = pymerge.ties(Lazy(base.state_dict()), [Lazy(a.state_dict())], density=0.5)
    as_tensor = pymerge.ties(base.weight, [a.weight], density=0.5)
    assert type(as_modules) is dict and list(as_modules) == ["weight", "bias"]
    assert torch.equal(as_tensor, as_dicts["weight"])
    for other in (as_modules, as_lazy):
        assert all(torch.equal(other[k], as_dicts[k]) for k in as_dicts)
    base.load_state_dict(as_modules)


def test_lazy_mappings_are_read_one_name_at_a_time():
    tensors = {k: torch.randn(5) for k in "abc"}
    lazy = Lazy(tensors)
    soup([lazy, Lazy(tensors)])
    assert lazy.loads == [*"abc", *"abc"]  # once to check, once to merge


def test_inputs_are_not_changed_and_results_have_no_history():
    base, a = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    before = base.detach().clone(), a.detach().clone()
    out = pymerge.ties(base, [a * 2], density=0.5)
    assert not out.requires_grad and out.grad_fn is None
    assert torch.equal(base, before[0]) and torch.equal(a, before[1])


def test_strides_do_not_matter():
    base, a = torch.randn(6, 8), torch.randn(6, 8)
    want = pymerge.dare_ties(base, [a], seed=4)
    columns = base.T.contiguous().T
    spread = torch.randn(6, 16)[:, ::2].copy_(a)
    assert not columns.is_contiguous() and not spread.is_contiguous()
    got = pymerge.dare_ties(columns, [spread], seed=4)
    assert torch.equal(got, want) and got.is_contiguous()
    assert torch.equal(pymerge.wise_ft(columns, spread), pymerge.wise_ft(base, a))
    assert torch.equal(pymerge.slerp(columns, spread, t=0.3), pymerge.slerp(base, a, t=0.3))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4, 5)])
def test_shapes(shape):
    base, a, b = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    for out in (
        pymerge.ties(base, [a, b]),
        pymerge.dare_linear(base, [a, b]),
        pymerge.task_arithmetic(base, [a, b]),
        soup([a, b]),
        pymerge.wise_ft(a, b),
        pymerge.slerp(a, b, t=0.5),
    ):
        assert out.shape == shape and not out.isnan().any()


def test_empty_mappings():
    assert soup([{}, {}]) == {} and pymerge.ties({}, [{}], convention="paper") == {}


# ---------------------------------------------------------------------------------------------------------------------------------------
# Dtypes


@pytest.mark.parametrize(
    ("dtypes", "want"),
    [
        ((BF16, BF16), BF16),
        ((BF16, F16), F32),
        ((BF16, F32), F32),
        ((F16, F64), F64),
        ((torch.float8_e4m3fn, torch.float8_e4m3fn), torch.float8_e4m3fn),
        ((torch.float8_e4m3fn, torch.float8_e5m2), F32),
        ((torch.float8_e4m3fn, BF16), F32),
    ],
)
def test_result_dtype(dtypes, want):
    models = [torch.ones(4).to(d) for d in dtypes]
    for out in (soup(models), pymerge.ties(models[0], models[1:]), pymerge.wise_ft(*models), pymerge.slerp(*models, t=0.5)):
        assert out.dtype == want and out.float().tolist() == [1.0] * 4
    assert soup(models, dtype=F16).dtype == F16


def test_dtype_must_be_floating():
    with pytest.raises(TypeError, match="dtype is torch.int64; choose one of float32, bfloat16, float16, float64, float8"):
        soup([torch.ones(2)], dtype=torch.int64)


def test_arithmetic_is_fp32_and_rounds_once():
    """256 + 1 + 1 is lost in bf16 steps and kept in fp32."""
    models = [torch.tensor([v], dtype=BF16) for v in (256.0, 1.0, 1.0)]
    assert soup(models, normalize=False).item() == 258.0


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(("dtype", "step"), [(torch.float8_e4m3fn, 1 / 8), (torch.float8_e5m2, 1 / 4), (BF16, 2**-7), (F16, 2**-10)])
def test_fp64_rounds_once_too(dtype, step):
    """Just above the middle of two values: by way of fp32 it would become the middle and then go down to the even one."""
    x = torch.tensor([1 + step / 2 + 2.0**-40], dtype=F64)
    for out in (soup([x], dtype=dtype), pymerge.wise_ft(x, x, dtype=dtype), soup([x], out=torch.zeros(1).to(dtype))):
        assert out.double().item() == 1 + step


def test_integers_are_copied():
    a = {"w": torch.randn(2), "steps": torch.tensor(7), "mask": torch.tensor([True, False])}
    out = soup([a, {**a, "w": torch.randn(2)}], dtype=BF16)
    assert out["steps"].dtype == torch.int64 and out["steps"] == 7 and out["mask"].tolist() == [True, False]
    assert out["steps"] is not a["steps"] and out["w"].dtype == BF16


def test_unequal_integers_are_all_named():
    a = {"w": torch.ones(2), "n": torch.tensor(1), "m": torch.tensor(1)}
    b = {**a, "n": torch.tensor(2), "m": torch.tensor(2)}
    with pytest.raises(ValueError) as error:
        soup([a, b])
    assert str(error.value) == (
        "2 tensors that are not floating differ:\n"
        "  model 1: 'n' (int64) differs from model 0's; only equal integers can be kept\n"
        "  model 1: 'm' (int64) differs from model 0's; only equal integers can be kept"
    )


# ---------------------------------------------------------------------------------------------------------------------------------------
# Ties


def tied(values=None):
    w = torch.randn(4, 3) if values is None else values
    return OrderedDict([("embed", w), ("body", torch.randn(3)), ("head", w)])


def test_tied_tensors_stay_tied():
    for out in (
        soup([tied(), tied()]),
        pymerge.ties(tied(), [tied()], convention="paper"),
        pymerge.dare_linear(tied(), [tied()]),
        pymerge.wise_ft(tied(), tied()),
    ):
        assert out["embed"] is out["head"] and list(out) == ["embed", "body", "head"]


def test_tied_parameters_of_a_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    assert (out := soup([Net(), Net()]))["embed.weight"] is out["head.weight"]


def test_tied_in_some_models_only_is_merged_twice():
    base, untied = tied(), {"embed": torch.zeros(4, 3), "body": torch.zeros(3), "head": torch.ones(4, 3)}
    out = soup([base, untied])
    assert out["embed"] is not out["head"]
    assert torch.equal(out["embed"], base["embed"] / 2) and torch.equal(out["head"], (base["embed"] + 1) / 2)


def test_a_tied_tensor_counts_once_in_a_ranking_of_the_model():
    w, d = torch.zeros(4), torch.tensor([4.0, 3.0, 2.0, 1.0])
    once = pymerge.ties({"a": w, "b": w + 0}, [{"a": d, "b": d * 0.1}], density=0.25, convention="paper")
    v = torch.zeros(4)
    both = pymerge.ties({"a": v, "b": w, "c": v}, [{"a": (t := d.clone()), "b": d * 0.1, "c": t}], density=0.25, convention="paper")
    assert torch.equal(both["a"], once["a"]) and torch.equal(both["b"], once["b"]) and both["c"] is both["a"]


def test_freed_memory_of_a_lazy_mapping_is_no_tie():
    """Equal tensors asked for one after the other often land at the same address."""
    tensors = {f"w{i}": torch.full((1000,), float(i)) for i in range(20)}
    out = soup([Lazy(tensors), Lazy(tensors)])
    gc.collect()
    assert [int(out[k][0]) for k in tensors] == list(range(20))


def test_overlapping_views_are_no_tie():
    w = torch.arange(6.0)
    out = soup([{"a": w[:4], "b": w[2:]}] * 2)
    assert out["a"].tolist() == [0, 1, 2, 3] and out["b"].tolist() == [2, 3, 4, 5]


# ---------------------------------------------------------------------------------------------------------------------------------------
# out=


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [F32, BF16, F64, torch.float8_e4m3fn])
@pytest.mark.parametrize("strided", [False, True])
def test_out(dtype, strided):
    base, a = torch.randn(6, 4), torch.randn(6, 4)
    for method in (
        lambda **k: pymerge.ties(base, [a], **k),
        lambda **k: pymerge.dare_ties(base, [a], **k),
        lambda **k: pymerge.task_arithmetic(base, [a], **k),
        lambda **k: pymerge.linear([base, a], **k),
        lambda **k: pymerge.model_soup([base, a], **k),
        lambda **k: pymerge.wise_ft(base, a, alpha=0.3, **k),
        lambda **k: pymerge.slerp(base, a, t=0.3, **k),
    ):
        out = (torch.empty(6, 8)[:, ::2] if strided else torch.empty(6, 4)).to(dtype)
        assert method(out=out) is out
        assert torch.equal(out.double(), method(dtype=dtype).double())


def test_out_of_a_mapping():
    a, b = tied(), tied()
    want = soup([a, b])
    out = {k: torch.empty_like(v) for k, v in a.items()}
    assert soup([a, b], out=out) is out
    assert all(torch.equal(out[k], want[k]) for k in want)
    out = tied()
    soup([a, b], out=out)
    assert out["embed"] is out["head"] and torch.equal(out["head"], want["head"])
    net = nn.Linear(3, 2)
    soup([nn.Linear(3, 2), nn.Linear(3, 2)], out=net.state_dict())


def test_out_must_fit():
    a = {"w": torch.ones(3), "v": torch.ones(2)}
    with pytest.raises(ValueError, match=r"out: 'w' is \(4,\), model 0 is \(3,\)"):
        soup([a], out={"w": torch.ones(4), "v": torch.ones(2)})
    with pytest.raises(ValueError, match="out lacks 'v'"):
        soup([a], out={"w": torch.ones(3)})
    with pytest.raises(TypeError, match="out is a tensor, the models are mappings"):
        soup([a], out=torch.ones(3))
    with pytest.raises(ValueError, match="out: 'w' is float32, but dtype=bfloat16 was asked for"):
        soup([{"w": torch.ones(3)}], out={"w": torch.ones(3)}, dtype=BF16)


def test_out_must_not_share_memory():
    whole = torch.zeros(10)
    with pytest.raises(ValueError, match="out shares memory with model 0"):
        soup([whole[:4]], out=whole[3:7])
    soup([whole[:4]], out=whole[4:8])
    with pytest.raises(ValueError, match="out shares memory with base"):
        pymerge.ties(whole, [torch.ones(10)], out=whole)
    with pytest.raises(ValueError, match="out: 'a' and 'b' share memory and are not tied in every model"):
        soup([{"a": torch.ones(4), "b": torch.zeros(4)}], out={"a": whole[:4], "b": whole[2:6]})
    with pytest.raises(ValueError, match="out is an expanded tensor"):
        soup([torch.ones(4)], out=torch.zeros(1).expand(4))
    with pytest.raises(ValueError) as error:
        soup([a := {"x": torch.ones(2), "y": torch.ones(3)}], out=a)
    assert str(error.value).splitlines()[0] == "2 tensors share memory:"


# ---------------------------------------------------------------------------------------------------------------------------------------
# Errors


def test_shapes_that_differ_are_all_named():
    base = {"lm_head.weight": torch.zeros(6, 4), "embed": torch.zeros(6, 4), "norm": torch.zeros(4)}
    bad = {**base, "lm_head.weight": torch.zeros(8, 4)}
    with pytest.raises(ValueError) as error:
        pymerge.ties(base, [base, base, bad])
    assert str(error.value) == "model 2: 'lm_head.weight' is (8, 4), base is (6, 4)"
    with pytest.raises(ValueError) as error:
        pymerge.ties(base, [bad, {**bad, "embed": torch.zeros(8, 4)}])
    assert str(error.value) == (
        "3 tensors differ in shape:\n"
        "  model 0: 'lm_head.weight' is (8, 4), base is (6, 4)\n"
        "  model 1: 'lm_head.weight' is (8, 4), base is (6, 4)\n"
        "  model 1: 'embed' is (8, 4), base is (6, 4)"
    )
    with pytest.raises(ValueError, match=r"model 1 is \(3, 1\), base is \(3,\)"):
        pymerge.ties(torch.zeros(3), [torch.zeros(3), torch.zeros(3, 1)])


def test_many_problems_are_cut_short():
    base = {f"w{i}": torch.zeros(1) for i in range(30)}
    with pytest.raises(ValueError) as error:
        pymerge.ties(base, [{k: torch.zeros(2) for k in base}])
    lines = str(error.value).splitlines()
    assert lines[0] == "30 tensors differ in shape:" and lines[-1] == "  and 10 more" and len(lines) == 22


def test_keys_that_differ():
    base = {"fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        pymerge.ties(base, [base, {"fc.wieght": torch.zeros(1), "fc.bias": torch.zeros(1)}])
    assert str(error.value) == (
        "model 1 lacks 'fc.weight' (it has 'fc.wieght', which resembles 'fc.weight') and has 'fc.wieght', which base has not"
    )
    with pytest.raises(ValueError) as error:
        pymerge.ties(base, [{"fc.weight": torch.zeros(1)}, {}])
    assert str(error.value) == ("2 models do not have the same tensors:\n  model 0 lacks 'fc.bias'\n  model 1 lacks 'fc.weight', 'fc.bias'")
    with pytest.raises(ValueError, match="model 1 lacks 'w0', 'w1', 'w2' and 7 more"):
        soup([{f"w{i}": torch.zeros(1) for i in range(10)}, {}])


def test_kinds_must_not_mix():
    t = torch.zeros(2)
    with pytest.raises(TypeError, match="model 0 is a mapping, base is a tensor"):
        pymerge.ties(t, [{"w": t}])
    with pytest.raises(TypeError, match="model 0 is a module, base is a mapping"):
        pymerge.ties({"w": t}, [nn.Linear(1, 1)])
    with pytest.raises(TypeError, match="model 0 is a float; a model is a tensor, a mapping name -> tensor or an nn.Module"):
        pymerge.ties(t, [1.0])
    with pytest.raises(TypeError, match="model 0: 'w' is a list, not a tensor"):
        soup([{"w": [1.0]}])
    with pytest.raises(TypeError, match="model 0 has the key 3; names of tensors are strings"):
        soup([{3: t}])


@pytest.mark.parametrize("models", [torch.zeros(2, 2), {"w": torch.zeros(2)}, nn.Linear(1, 1)])
def test_one_model_is_no_list(models):
    with pytest.raises(TypeError, match=f"models is one {type(models).__name__}; pass a list of models"):
        soup(models)


def test_no_models():
    for call in (lambda: soup([]), lambda: pymerge.ties(torch.zeros(1), []), lambda: pymerge.task_arithmetic({}, [])):
        with pytest.raises(ValueError, match="no models given; pass a list of at least one"):
            call()
    with pytest.raises(TypeError, match="base is None; ties merges what models changed in a base, so it needs one"):
        pymerge.ties(None, [torch.zeros(1)])


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_dense_values():
    t = torch.ones(2, 2)
    for bad, words in [
        (t.to_sparse(), "is sparse (sparse_coo); call .to_dense() first"),
        (t.to("meta"), "is a meta tensor: it has no values; load the weights first"),
        (torch.complex(t, t).conj().imag, "is a lazily negated view, whose memory holds the opposite values; call .resolve_neg() first"),
        (torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is quantised; dequantise it first"),
    ]:
        with pytest.raises(TypeError) as error:
            pymerge.ties({"w": t}, [{"w": bad}])
        assert str(error.value) == f"model 0: 'w' {words}"


def test_kinds_of_dtype_must_agree():
    with pytest.raises(TypeError, match="model 1: 'n' is float32, model 0 is int64"):
        soup([{"n": torch.tensor(1)}, {"n": torch.tensor(1.0)}])
    with pytest.raises(TypeError, match="model 1: 'n' is int32, model 0 is int64"):
        soup([{"n": torch.tensor(1)}, {"n": torch.tensor(1, dtype=torch.int32)}])


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [F32, BF16, F64, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(dtype, value):
    good = {"w": torch.ones(2, 3).to(dtype)}
    bad = {"w": torch.ones(2, 3).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value)).to(dtype)}
    calls = {
        "model 1": [
            lambda **k: soup([good, bad], **k),
            lambda **k: pymerge.ties(good, [good, bad], **k),
            lambda **k: pymerge.ties(good, [good, bad], convention="paper", **k),
            lambda **k: pymerge.dare_ties(good, [good, bad], density=1.0, **k),
        ],
        "base": [lambda **k: pymerge.task_arithmetic(bad, [good], **k), lambda **k: pymerge.wise_ft(bad, good, **k)],
        "finetuned": [lambda **k: pymerge.wise_ft(good, bad, **k)],
        "b": [lambda **k: pymerge.slerp(good, bad, t=0.5, **k)],
    }
    for label, methods in calls.items():
        for method in methods:
            with pytest.raises(pymerge.NonFiniteError) as error:
                method()
            assert str(error.value) == (
                f"{label}: 'w' has 1 non-finite value(s), the first {value} at index [1, 2]; pass check_finite=False to merge them anyway"
            )
            assert method(check_finite=False, dtype=F32)["w"].shape == (2, 3)


@pytest.mark.usefixtures("each_backend")
def test_unchecked_values_pass_through():
    base, bad = torch.zeros(3), torch.tensor([1.0, float("nan"), float("inf")])
    for out in (
        soup([base, bad], check_finite=False),
        pymerge.task_arithmetic(base, [bad], check_finite=False),
        pymerge.wise_ft(base, bad, check_finite=False),
        pymerge.slerp(base, bad, t=0.5, check_finite=False),
        pymerge.dare_linear(base, [bad], density=1.0, check_finite=False),
    ):
        assert out.isnan().tolist()[:2] == [False, True] and not out[2].isfinite()
    # A NaN has no sign, so it agrees with nobody in an election.
    assert pymerge.ties(base, [bad], density=1.0, check_finite=False).tolist() == [1.0, 0.0, float("inf")]


def test_overflow_of_finite_inputs_is_no_error():
    big = torch.full((3,), 3e38)
    assert pymerge.task_arithmetic(-big, [big]).isinf().all()
    assert soup([big, big], normalize=False).isinf().all()
    assert pymerge.wise_ft(big, big).tolist() == big.tolist()
    half = torch.full((3,), 6e4, dtype=F16)
    assert torch.equal(pymerge.slerp(half, half, t=0.5), half)


def test_numbers_per_model():
    t = torch.zeros(2)
    with pytest.raises(ValueError, match="weights has 3 numbers for 2 models"):
        pymerge.ties(t, [t, t], weights=[1, 2, 3])
    with pytest.raises(ValueError, match="density of model 1 is 1.5; density is the fraction kept, between 0 and 1"):
        pymerge.ties(t, [t, t], density=[0.5, 1.5])
    with pytest.raises(ValueError, match="weight of model 0 is nan; weights must be finite"):
        soup([t], weights=float("nan"))
    with pytest.raises(TypeError, match="weights is 'abc'; pass a number or a sequence with one number per model"):
        soup([t], weights="abc")
    with pytest.raises(ValueError, match="scale is inf"):
        pymerge.ties(t, [t], scale=float("inf"))
    with pytest.raises(TypeError, match=r"scale is \[1.0, 2.0\]; pass one number"):
        pymerge.ties(t, [t], scale=[1.0, 2.0])
    with pytest.raises(TypeError, match="seed is 1.5; pass an integer"):
        pymerge.dare_ties(t, [t], seed=1.5)
    with pytest.raises(ValueError, match="seed is -1"):
        pymerge.dare_linear(t, [t], seed=-1)
    with pytest.raises(ValueError, match="65 models given; a merge takes 1 to 64"):
        soup([t] * 65)
    assert torch.equal(soup([t + 1, t + 3], weights=torch.tensor([1.0, 3.0])), t + 2.5)
    assert soup(m for m in (t, t + 2)).tolist() == [1.0, 1.0]
