"""Models that the core reads by itself: the results and the errors of those read in Python; and what is not plain is left to Python."""

from array import array
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pymerge
from pymerge.plain import Plain
from tests.test_many_tensors import METHODS, SCOPE_MODEL, same, tensor_of

API = "__dlpack_c_exchange_api__"
pytestmark = pytest.mark.skipif(not hasattr(torch.Tensor, API), reason="torch before 2.10 does not let itself be read")
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
CALLS = {
    **METHODS,
    **{
        f"ties, {name}": lambda base, models, c=c, **more: pymerge.ties(base, models, density=0.4, convention=c, **more)
        for name, c in SCOPE_MODEL.items()
    },
}


def models_of(count=3, dtypes=(BF16,), shapes=((3, 5), (), (0, 2), (4097,), (1, 7, 1))):
    generator = torch.Generator().manual_seed(1)
    return [
        {f"t{9 - i}": tensor_of(shape, dtypes[(i + m) % len(dtypes)], generator, coarse=i % 2 == 0) for i, shape in enumerate(shapes)}
        for m in range(count)
    ]


def in_python(call, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(torch.Tensor, API)
        assert Plain.of(None, models_of()) is None
        return call()


def equal(got, want):
    return list(got) == list(want) and all(same(got[k], want[k]) for k in want)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Results


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("dtypes", [(BF16,), (F32,), (F64,), (F32, BF16), (F64, BF16, F32)])
def test_results_are_those_of_python(method, dtypes, monkeypatch):
    base, *models = models_of(dtypes=dtypes)
    for more in ({}, {"dtype": F32}, {"dtype": torch.float8_e4m3fn}):
        assert Plain.of(base, models) is not None
        assert equal(CALLS[method](base, models, **more), in_python(lambda: CALLS[method](base, models, **more), monkeypatch))  # noqa: B023


@pytest.mark.parametrize("method", CALLS)
def test_results_in_given_places_are_those_of_python(method, monkeypatch):
    base, *models = models_of()
    for dtype in (BF16, F32):
        place, other = [{k: torch.empty_like(t, dtype=dtype) for k, t in base.items()} for _ in range(2)]
        assert CALLS[method](base, models, out=place) is place
        in_python(lambda: CALLS[method](base, models, out=other), monkeypatch)  # noqa: B023
        assert equal(place, other)


def test_results_lie_in_storages_of_their_own():
    base, *models = models_of()
    got = pymerge.ties(base, models)
    for t in got.values():
        assert t.untyped_storage().nbytes() == t.nbytes and t.untyped_storage().resizable()


def test_parameters_modules_and_bare_tensors_are_plain():
    a, b = nn.Linear(3, 4), nn.Linear(3, 4)
    parameters = [dict(m.named_parameters()) for m in (a, b)]
    assert Plain.of(*parameters[:1], parameters[1:]) and Plain.of(a.state_dict(), [b.state_dict()])
    got = pymerge.wise_ft(*parameters)
    assert equal(got, pymerge.wise_ft(a, b)) and not any(t.requires_grad for t in got.values())
    assert type(pymerge.wise_ft(a.weight, b.weight)) is torch.Tensor and torch.equal(pymerge.wise_ft(a.weight, b.weight), got["weight"])


def test_models_may_have_other_orders():
    base, model = models_of(2)
    want = pymerge.task_arithmetic(base, [model])
    assert equal(pymerge.task_arithmetic(base, [dict(reversed(model.items()))]), want)


@pytest.mark.parametrize("dtypes", [(F32,), (F32, BF16)])
def test_averages_are_those_of_python(dtypes, monkeypatch):
    ema, model = models_of(2, dtypes)
    other = {k: t.clone() for k, t in ema.items()}
    pymerge.ema_update(ema, model, decay=0.7)
    in_python(lambda: pymerge.ema_update(other, model, decay=0.7), monkeypatch)
    assert equal(ema, other)


def test_the_average_of_a_module_is_that_of_python(monkeypatch):
    module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    followers = [pymerge.EMA(module, 0.9) for _ in range(2)]
    for t in module.parameters():
        t.data.add_(1.5)
    followers[0].update(module)
    in_python(lambda: followers[1].update(module), monkeypatch)
    a, b = (f.state_dict()["tensors"] for f in followers)
    assert equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------------------------
# What is not plain


class Subclass(torch.Tensor):
    pass


def emptied(t):
    t.untyped_storage().resize_(0)
    return t


ODD = {
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "fp8": lambda t: t.to(torch.float8_e4m3fn),
    "integers": lambda t: t.int(),
    "booleans": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "negated": lambda t: torch._neg_view(t),
    "a subclass": lambda t: t.as_subclass(Subclass),
    "another shape": lambda t: t[:1].clone(),
    "more dimensions": lambda t: t[None],
    "None": lambda t: None,
    "a number": lambda t: 3.0,
    "a list": lambda t: t.tolist(),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("where", [0, 1])
def test_one_odd_tensor_is_left_to_python(odd, where, monkeypatch):
    def outcome(call):
        base, model = pair = models_of(2, (F32,))
        pair[where]["t9"] = ODD[odd](pair[where]["t9"])
        assert Plain.of(base, [model]) is None
        try:
            result = call(base, model)
        except Exception as error:
            return type(error), str(error)
        return {k: repr(t) for k, t in (result or base).items()}

    calls = (lambda base, model: pymerge.ties(base, [model]), pymerge.wise_ft, lambda *both: pymerge.ema_update(*both, decay=0.5))
    for call in calls:
        assert outcome(call) == in_python(lambda: outcome(call), monkeypatch)  # noqa: B023


def test_a_tensor_without_memory_is_not_plain():
    base, model = models_of(2)
    assert Plain.of(base, [{**model, "t9": emptied(model["t9"])}]) is None


def test_other_names_tied_tensors_and_other_mappings_are_left_to_python():
    base, model = models_of(2)
    assert Plain.of(base, [{**model, "more": torch.ones(1)}]) is None and Plain.of({}, [{}]) is None
    assert Plain.of({**base, "again": base["t9"]}, [{**model, "again": model["t9"]}]) is None
    assert Plain.of({**base, "again": base["t9"].clone()}, [{**model, "again": model["t9"]}]) is not None  # not tied in every model

    class Other(dict):
        pass

    assert Plain.of(Other(base), [model]) is None and Plain.of(OrderedDict(base), [model]) is not None
    tied = pymerge.wise_ft({**base, "again": base["t9"]}, {**model, "again": model["t9"]})
    assert tied["again"] is tied["t9"]


def test_nothing_is_plain_while_somebody_watches():
    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    models = models_of()
    for watching in (Dispatch(), Function(), pymerge.backend("reference")):
        with watching:
            assert Plain.of(None, models) is None
    inside = []
    torch.func.vmap(lambda x: (inside.append(Plain.of(None, [{"t": x}])), x)[1])(torch.ones(3, 2))
    assert inside == [None] and Plain.of(None, models) is not None


# ---------------------------------------------------------------------------------------------------------------------------------------
# Errors


def test_tensors_that_share_memory_are_refused_as_in_python():
    base, model = models_of(2, (F32,))
    slab = torch.zeros(30)
    overlapping = {**{k: t.clone() for k, t in base.items()}, "t9": slab[:15].view(3, 5), "t5": slab[8:15].view(1, 7, 1)}
    for out in (base, model, overlapping, {**overlapping, "t5": model["t5"]}):
        with pytest.raises(ValueError, match="share.* memory"):
            pymerge.ties(base, [model], out=out)
    with pytest.raises(ValueError, match="shares memory with model"):
        pymerge.ema_update(base, base, decay=0.5)
    with pytest.raises(ValueError, match="share memory"):
        pymerge.ema_update(overlapping, model, decay=0.5)
    assert not slab.any()
    touching = {**overlapping, "t5": slab[15:22].view(1, 7, 1)}
    assert pymerge.ties(base, [model], out=touching) is touching and slab[:22].any()


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (lambda base: torch.ones(3), TypeError),
        (lambda base: 3, TypeError),
        (lambda base: {}, ValueError),
        (lambda base: {**base, "more": torch.ones(2)}, ValueError),
        (lambda base: {**base, "t9": torch.ones(15)}, ValueError),
        (lambda base: {**base, "t9": None}, TypeError),
    ],
)
def test_a_wrong_place_is_refused(out, error):
    base, model = models_of(2, (F32,))
    place = out({k: t.clone() for k, t in base.items()})
    with pytest.raises(error, match="out"):
        pymerge.ties(base, [model], out=place)
    with pytest.raises(ValueError, match="another dtype than the one asked for|but dtype="):
        pymerge.ties(base, [model], out={k: t.clone() for k, t in base.items()}, dtype=BF16)


def test_the_first_tensor_that_is_not_finite_is_named_and_no_average_changes():
    base, model = models_of(2, (F32,))
    before = {k: t.clone() for k, t in base.items()}
    model["t9"][1, 2] = model["t6"][4] = float("nan")
    with pytest.raises(pymerge.NonFiniteError, match=r"model 0: 't9' has 1 .*index \[1, 2\]"):
        pymerge.task_arithmetic(base, [model])
    with pytest.raises(pymerge.NonFiniteError, match=r"model 0: 't6' has 1 .*index \[4\]"):  # ranks are in the order of names
        pymerge.ties(base, [model], convention="paper")
    with pytest.raises(pymerge.NonFiniteError, match=r"finetuned: 't9'"):
        pymerge.wise_ft(base, model)
    with pytest.raises(pymerge.NonFiniteError, match=r"model: 't6'"):
        pymerge.ema_update(base, model, decay=0.5)
    assert equal(base, before)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The core's own functions


def reader():
    return core().reader(getattr(torch.Tensor, API), [torch.Tensor], torch.Tensor.is_neg)


def core():
    from pymerge.native import _core

    return _core


def test_reading_refuses_what_does_not_fit():
    cells, one = array("q", bytes(8 * 2 * 8)), [torch.ones(3), torch.ones(4)]
    assert reader().read(cells, 1, [4, 6], [one, one]) is True
    assert list(cells[::8]) == [3, 4] and list(cells[4::8]) == [t.data_ptr() for t in one] == list(cells[6::8])
    assert reader().read(cells, 1, [4, 6], [one, [t.double() for t in one]]) is False
    for at, lists in [([4], [one[:1]]), ([4], [[*one, *one]]), ([4], [[]]), ([4, 6], [one]), ([3], [one]), ([0], [one]), ([8], [one])]:
        with pytest.raises(ValueError, match="a list per column|no column of a tensor"):
            reader().read(cells, 1, at, lists)
    for table in (array("q", bytes(8 * 9)), array("b", bytes(128))):
        with pytest.raises(ValueError, match="64-bit"):
            reader().read(table, 1, [4], [one])
    with pytest.raises(BufferError):
        reader().read(bytes(128), 1, [4], [one])
    for wrong in (None, (None, None), 3):
        with pytest.raises(TypeError):
            reader().read(cells, 1, [4], [wrong])
    assert reader().read(cells, 1, [4], [[None, torch.ones(2)]]) is None
    with pytest.raises(TypeError):
        core().reader(None, [torch.Tensor], torch.Tensor.is_neg)


def test_a_method_that_fails_makes_nothing_plain():
    def fails(t):
        raise RuntimeError("not known")

    cells = array("q", bytes(8 * 8))
    assert core().reader(getattr(torch.Tensor, API), [torch.Tensor], fails).read(cells, 1, [4], [[torch.ones(3)]]) is None


def test_counts_are_one_per_model_and_tensor():
    from pymerge.native import _options
    from pymerge.spec import MergeSpec

    options = _options(MergeSpec((1.0,), (0.5,), "magnitude"), 0, "", None, None)
    cells, t, out = array("q", bytes(8 * 8)), torch.ones(3), torch.empty(3)
    reader().read(cells, 1, [2, 6], [[out], [t]])
    for counts in ([], [1, 2]):
        with pytest.raises(ValueError, match="counts"):
            core().merge_many(cells, 1, array("q", counts), options, 1)
    assert core().merge_many(cells, 1, array("q", [2]), options, 1) == [] and out.tolist() == [1, 1, 0]
