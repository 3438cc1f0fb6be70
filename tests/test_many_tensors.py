"""Many tensors in one call: the bytes of one call for each, whatever their sizes, dtypes, strides and number of threads."""

import os
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import pymerge
from pymerge import many_ops
from pymerge.conventions import Convention

F32, BF16, F16, F64, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn

pytest.importorskip("pymerge.native")
FEW = settings(max_examples=12)

METHODS = {
    "linear": lambda base, models, **more: pymerge.linear(models, weights=[0.3, 0.9], **more),
    "task_arithmetic": lambda base, models, **more: pymerge.task_arithmetic(base, models, [0.5, -0.4], **more),
    "wise_ft": lambda base, models, **more: pymerge.wise_ft(base, models[0], alpha=0.7, **more),
    "ties": lambda base, models, **more: pymerge.ties(base, models, density=[0.3, 0.6], **more),
    "ties, all ties and the majority": lambda base, models, **more: pymerge.ties(
        base, models, convention=Convention(tie_break="all", zero_vote="majority", rescale="norm"), **more
    ),
    "dare_linear": lambda base, models, **more: pymerge.dare_linear(base, models, seed=3, convention="mergekit", **more),
    "dare_ties": lambda base, models, **more: pymerge.dare_ties(base, models, seed=2**63 + 1, **more),
    "breadcrumbs": lambda base, models, **more: pymerge.breadcrumbs(base, models, gamma=0.1, density=0.5, **more),
}
SCOPE_MODEL = {
    "paper": "paper",
    "norm": Convention(scope="model", rescale="norm"),
    "majority": Convention(scope="model", zero_vote="majority", tie_break="all"),
}


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def tensor_of(shape, dtype, generator, strided=False, coarse=False):
    x = torch.randn(shape, generator=generator)
    if coarse:  # many equal magnitudes
        x = (x * 2).round() / 2
    x = x.to(dtype)
    if strided and x.dim() and x.numel():
        x = torch.stack([x, x], -1)[..., 0]
        assert not x.is_contiguous() or x.numel() == 1
    return x


@st.composite
def state_dicts(draw, count):
    """A base and models of the same names and shapes; of any dtypes, or all of one."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shapes = draw(
        st.lists(
            st.one_of(
                st.sampled_from([(), (0,), (3, 0, 2), (1,), (4097,), (70_001,)]),
                st.tuples(st.integers(1, 40)),
                st.tuples(st.integers(1, 70), st.integers(1, 70)),
            ),
            min_size=2,
            max_size=9,
        )
    )
    shared = draw(st.sampled_from([None, BF16, F32, F16]))
    dtype = st.sampled_from([F32, BF16, F16, F64, FP8]) if shared is None else st.just(shared)
    flags = st.sampled_from([False, False, True])
    return [
        {f"t{i}": tensor_of(shape, draw(dtype), generator, draw(flags), draw(flags)) for i, shape in enumerate(shapes)}
        for _ in range(count)
    ]


def same(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    return torch.equal(got.contiguous().reshape(-1).view(integer), want.contiguous().reshape(-1).view(integer))


def one_by_one(call, base, models):
    return {name: call({name: base[name]}, [{name: m[name]} for m in models])[name] for name in base}


@pytest.mark.parametrize("method", METHODS)
@FEW
@given(dicts=state_dicts(3))
def test_together_as_one_by_one(method, dicts):
    base, *models = dicts
    want = one_by_one(METHODS[method], base, models)
    got = METHODS[method](base, models)
    assert list(got) == list(base) and all(same(got[k], want[k]) for k in base)
    addresses = [t.untyped_storage().data_ptr() for t in got.values() if t.numel()]
    assert len(set(addresses)) == len(addresses)  # each can be freed, saved or resized alone


@pytest.mark.parametrize("convention", SCOPE_MODEL)
@FEW
@given(dicts=state_dicts(3), density=st.sampled_from([0.05, 0.3, 1.0]))
def test_ranks_over_the_model_as_the_reference_has_them(convention, dicts, density):
    base, *models = dicts
    got = pymerge.ties(base, models, density=density, convention=SCOPE_MODEL[convention])
    with pymerge.backend("reference"):
        want = pymerge.ties(base, models, density=density, convention=SCOPE_MODEL[convention])
    assert all(same(got[k], want[k]) for k in base)


@pytest.mark.parametrize("method", METHODS)
def test_large_tensors_among_small_ones_and_any_number_of_threads(method):
    generator = torch.Generator().manual_seed(1)
    sizes = [400_000, 5, 70_000, 0, 3000, 65_536, 4096, 4097, 262_145, 16_385]
    base, *models = [{f"t{n}": tensor_of((n,), BF16, generator) for n in sizes} for _ in range(3)]
    want = one_by_one(METHODS[method], base, models)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        got = METHODS[method](base, models)
        assert all(same(got[k], want[k]) for k in base)


@FEW
@given(dicts=state_dicts(4), method=st.sampled_from(list(METHODS)))
def test_results_are_written_into_out(dicts, method):
    base, *models, place = dicts
    want = {k: one_by_one(lambda b, m: METHODS[method](b, m, dtype=place[k].dtype), {k: base[k]}, models)[k] for k in base}  # noqa: B023
    got = METHODS[method](base, models[:2], out=place)
    assert got is place and all(same(place[k], want[k]) for k in base)


@pytest.mark.parametrize("method", [*METHODS, "ties, paper"])
def test_groups_have_no_effect(method, monkeypatch):
    call = METHODS.get(method, lambda base, models: pymerge.ties(base, models, convention="paper"))
    generator = torch.Generator().manual_seed(2)
    base, *models = [{f"t{i}": tensor_of((i * 7,), F32, generator) for i in range(40)} for _ in range(3)]
    want = call(base, models)
    for size in (0, 1, 5000):
        monkeypatch.setattr(many_ops, "GROUP_BYTES", size)
        got = call(base, models)
        assert all(same(got[k], want[k]) for k in base)


def test_lazy_mappings_need_not_fit_in_memory(monkeypatch):
    monkeypatch.setattr(many_ops, "GROUP_BYTES", 10 * 2 * 400)
    alive, most = [0], [0]

    class Counted:
        def __init__(self, tensors):
            self.tensors = tensors

        def keys(self):
            return self.tensors.keys()

        def __getitem__(self, name):
            t = self.tensors[name].clone()
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref.finalize(t, lambda: alive.__setitem__(0, alive[0] - 1))
            return t

    tensors = {f"t{i:02}": torch.randn(100) for i in range(50)}
    pymerge.linear([Counted(tensors), Counted(tensors)])
    assert most[0] <= 2 * 10 + 4


# ---------------------------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("method", [*METHODS, "ties, paper"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(method, bad):
    call = METHODS.get(method, lambda base, models, **more: pymerge.ties(base, models, convention="paper", **more))
    generator = torch.Generator().manual_seed(3)
    base, *models = [{f"layers.{i}.weight": tensor_of((5, 9), BF16, generator) for i in range(30)} for _ in range(3)]
    models[0]["layers.17.weight"][3, 2] = bad
    models[0]["layers.23.weight"][0, 0] = bad
    who = "finetuned" if method == "wise_ft" else "model 0"
    with pytest.raises(pymerge.NonFiniteError, match=rf"{who}: 'layers\.17\.weight' has 1 non-finite value.*at index \[3, 2\]"):
        call(base, models)
    call(base, models, check_finite=False)


def test_a_delta_that_overflows_is_no_error():
    huge = {f"t{i}": torch.full((20,), 3e38) for i in range(5)}
    got = pymerge.task_arithmetic(huge, [{k: -t for k, t in huge.items()}])
    assert all(t.isinf().all() for t in got.values())


def test_shapes_and_devices_are_checked_by_the_operators_too():
    a, b = [torch.ones(3), torch.ones(4)], [torch.ones(3), torch.ones(5)]
    with pytest.raises(ValueError, match=r"shapes differ: \(4,\) and \(5,\)"):
        torch.ops.pymerge.lerp_many_(a, b, 0.5)
    assert all((t == 1).all() for t in a)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Moving averages, in place


@FEW
@given(dicts=state_dicts(2), decay=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_averages_together_as_one_by_one(dicts, decay):
    ema, model = dicts
    want = {k: t.clone() for k, t in ema.items()}
    for k in want:
        pymerge.ema_update({k: want[k]}, {k: model[k]}, decay=decay)
    pymerge.ema_update(ema, model, decay=decay)
    assert all(same(ema[k], want[k]) for k in want)


def test_averages_in_place_of_strided_tensors_and_in_modules():
    module, other = torch.nn.Linear(7, 5), torch.nn.Linear(7, 5)
    want = {k: pymerge.wise_ft(module.state_dict()[k], t, alpha=0.25) for k, t in other.state_dict().items()}
    pymerge.ema_update(module, other, decay=0.75)
    assert all(torch.equal(t, want[k]) for k, t in module.state_dict().items())


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64, FP8])
def test_nothing_changes_when_one_parameter_is_not_finite(dtype):
    generator = torch.Generator().manual_seed(4)
    for size in (1, 40, 70_000):
        ema, model = ({f"t{i}": tensor_of((size + i,), dtype, generator) for i in range(4)} for _ in range(2))
        before = {k: t.clone() for k, t in ema.items()}
        for place in (0, size // 2, size - 1):
            spoiled = {k: t.clone() for k, t in model.items()}
            spoiled["t2"][place] = float("nan")
            with pytest.raises(pymerge.NonFiniteError, match=rf"model: 't2' has 1 non-finite value.*at index \[{place}\]"):
                pymerge.ema_update(ema, spoiled, decay=0.5)
            assert all(same(ema[k], before[k]) for k in ema)
        pymerge.ema_update(ema, model, decay=0.5)


# ---------------------------------------------------------------------------------------------------------------------------------------
# As a guest in a process


def small_models(count=200):
    generator = torch.Generator().manual_seed(5)
    return [{f"t{i}": tensor_of((1 + 37 * i,), BF16, generator) for i in range(count)} for _ in range(3)]


def test_from_several_python_threads_at_once():
    base, *models = small_models()
    want = pymerge.ties(base, models)
    wrong = []

    def work():
        for _ in range(4):
            got = pymerge.ties(base, models)
            wrong.extend(k for k in base if not same(got[k], want[k]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
        assert not t.is_alive()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_forked_child():
    base, *models = small_models()
    want = pymerge.ties(base, models)
    child = os.fork()
    if child == 0:
        got = pymerge.ties(base, models)
        os._exit(0 if all(same(got[k], want[k]) for k in base) else 3)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_who_watches_torch_s_operators_sees_one_for_all():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    base, *models = small_models(20)
    want = pymerge.ties(base, models), pymerge.wise_ft(base, models[0])
    seen = []
    with Watch():
        got = pymerge.ties(base, models), pymerge.wise_ft(base, models[0])
    assert seen.count("pymerge.merge_many_out.default") == seen.count("pymerge.lerp_many_out.default") == 1
    assert all(same(a[k], b[k]) for a, b in zip(got, want) for k in base)
