"""Merging CPU tensors on a device: the same bytes as without, in whatever order the device's streams run what they were given."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pymerge
from pymerge import staging, staging_batches

from .fake_streams import Device, Event, Stream

METHODS = {
    "linear": lambda base, models, **more: pymerge.linear(models, weights=[0.3, 0.5, 1.1], **more),
    "task_arithmetic": lambda base, models, **more: pymerge.task_arithmetic(base, models, [0.5, -0.25, 1.0], **more),
    "wise_ft": lambda base, models, **more: pymerge.wise_ft(base, models[0], alpha=0.3, **more),
    "ties": lambda base, models, **more: pymerge.ties(base, models, density=0.4, **more),
    "ties of the paper": lambda base, models, **more: pymerge.ties(base, models, density=0.4, convention="paper", **more),
    "dare_linear": lambda base, models, **more: pymerge.dare_linear(base, models, seed=7, **more),
    "dare_ties by norm": lambda base, models, **more: pymerge.dare_ties(base, models, seed=7, convention="mergekit", **more),
    "breadcrumbs": lambda base, models, **more: pymerge.breadcrumbs(base, models, density=0.5, gamma=0.2, **more),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def state_dict(seed: int) -> dict[str, torch.Tensor]:
    """Ragged tensors of every dtype; with slices of 64 elements some are cut, some share a batch."""
    g = torch.Generator().manual_seed(seed)

    def values(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=g).to(dtype)

    tied = values(5, 3)
    return {
        "large": values(37, 11, dtype=torch.bfloat16),
        "transposed": values(19, 9).t(),
        "scalar": values(dtype=torch.float64),
        "tied": tied,
        "empty": values(0, 4),
        "steps": torch.tensor([3, 4]),
        "also tied": tied,
        "half": values(64, dtype=torch.float16),
        "mixed": values(70, dtype=torch.float64 if seed % 2 else torch.bfloat16),
        "long": values(130, dtype=torch.float64),
        "byte": values(100).to(torch.float8_e4m3fn),
    }


BASE, MODELS = state_dict(0), [state_dict(i) for i in (1, 2, 3)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Many batches and many windows of small tensors; device inputs become NaN as soon as they have been merged."""
    monkeypatch.setattr(staging_batches, "SLICE", 64)
    monkeypatch.setattr(staging, "BLOCK", 96)
    for name in ("launch_merges", "launch_lerps"):
        plain = getattr(staging.many_ops, name)

        def launch(jobs, *args, plain=plain):
            finite = plain(jobs, *args)
            for job in jobs:
                for t in [*job.models, *([] if job.base is None else [job.base])]:
                    t.view(torch.uint8).fill_(255)
            return finite

        monkeypatch.setattr(staging.many_ops, name, launch)


def assert_same(result, expected):
    assert list(result) == list(expected)
    for name, want in expected.items():
        have = result[name]
        assert have.dtype == want.dtype and have.shape == want.shape and have.device == want.device, name
        assert torch.equal(have.contiguous().view(-1).view(torch.uint8), want.contiguous().view(-1).view(torch.uint8)), name


@each_method
def test_dicts_are_merged_to_the_same_bytes(method, each_backend):
    assert_same(method(BASE, MODELS, device="cpu"), method(BASE, MODELS))


@each_method
@given(seed=st.none() | st.integers(0, 2**32))
def test_no_order_that_the_streams_allow_changes_a_byte(method, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "make_streams", lambda device: tuple(Device(seed).streams))
        assert_same(method(BASE, MODELS, device="cpu"), method(BASE, MODELS))


@each_method
@pytest.mark.parametrize("slots", [1, 2])
def test_late_streams_with_memory_for_one_or_two_batches(method, slots, monkeypatch):
    sizes = []
    plain = staging._Pipeline._slots

    def counted(self):
        largest = max(batch.input_bytes for batch in self._batches) + max(batch.result_bytes for batch in self._batches)
        monkeypatch.setattr(staging, "free_bytes", lambda device: slots * largest)
        made = plain(self)
        sizes.append((len(made), len(self._batches)))
        return made

    monkeypatch.setattr(staging, "make_streams", lambda device: tuple(Device(None).streams))
    monkeypatch.setattr(staging._Pipeline, "_slots", counted)
    assert_same(method(BASE, MODELS, device="cpu"), method(BASE, MODELS))
    assert sizes and all(made == min(slots, batches) for made, batches in sizes)


@pytest.mark.parametrize("forgotten", ["wait_event", "synchronize"])
def test_the_streams_of_these_tests_notice_a_forgotten_wait(forgotten, monkeypatch):
    device = Device(None)
    monkeypatch.setattr(staging, "make_streams", lambda _: tuple(device.streams))
    if forgotten == "wait_event":
        monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    else:
        monkeypatch.setattr(Event, "synchronize", lambda self: None)
    result = METHODS["linear"](BASE, MODELS, device="cpu", check_finite=False)
    assert not torch.equal(result["large"], METHODS["linear"](BASE, MODELS)["large"])


@each_method
def test_results_go_into_out(method):
    expected = method(BASE, MODELS, dtype=torch.float32)
    out = {name: torch.full_like(t, 77) for name, t in expected.items()}
    out["large"] = torch.full((11, 37), 77.0).t()
    assert method(BASE, MODELS, out=out, device="cpu") is out
    assert_same(out, expected)


@each_method
def test_bare_tensors_modules_and_nothing(method):
    base, models = BASE["large"], [m["large"] for m in MODELS]
    assert torch.equal(method(base, models, device="cpu"), method(base, models))
    modules = [torch.nn.Linear(9, 20) for _ in range(4)]
    assert_same(method(modules[0], modules[1:], device="cpu"), method(modules[0], modules[1:]))
    assert method({}, [{}, {}, {}], device="cpu") == {}


@each_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_the_same_error(method, bad):
    broken = {name: t.clone() for name, t in MODELS[0].items()}
    broken["large"][20, 5] = bad
    broken["long"][3] = bad
    models = [broken, *MODELS[1:]]
    with pytest.raises(pymerge.NonFiniteError) as plain:
        method(BASE, models)
    with pytest.raises(pymerge.NonFiniteError) as staged:
        method(BASE, models, device="cpu")
    assert str(staged.value) == str(plain.value) and "'large'" in str(staged.value)
    assert_same(method(BASE, models, check_finite=False, device="cpu"), method(BASE, models, check_finite=False))


def test_a_delta_that_overflows_is_no_error():
    base, models = {"w": torch.full((100,), 3e38)}, [{"w": torch.full((100,), -3e38)}]
    assert_same(pymerge.task_arithmetic(base, models, device="cpu"), pymerge.task_arithmetic(base, models))


def test_the_triton_kernels_take_batches(monkeypatch):
    pytest.importorskip("triton")
    base, models = BASE, MODELS[:2]
    with pymerge.backend("triton"):
        staged = pymerge.ties(base, models, density=0.4, device="cpu")
        soup = pymerge.linear(models, device="cpu")
        with pytest.raises(pymerge.NonFiniteError, match="model 1: 'half' has 1"):
            pymerge.linear(
                [models[0], models[1] | {"half": torch.full((64,), 1.0).index_fill(0, torch.tensor(5), torch.nan)}], device="cpu"
            )
    assert_same(staged, pymerge.ties(base, models, density=0.4))
    assert_same(soup, pymerge.linear(models))


def test_a_tensor_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(staging, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"^'long': inputs and result take 5760 bytes on cpu, where 1000 bytes are free; leave device out"):
        pymerge.ties(BASE, MODELS, device="cpu")
    with pytest.raises(ValueError, match=r"^a batch of 9 tensors from 'large' on: inputs and result take"):
        pymerge.ties(BASE, MODELS, device="cpu", convention="paper")


def test_an_error_while_merging_leaves_nothing_under_way(monkeypatch):
    device = Device(None)
    monkeypatch.setattr(staging, "make_streams", lambda _: tuple(device.streams))

    def launch(jobs, spec):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(staging.many_ops, "launch_merges", launch)
    with pytest.raises(ValueError, match="'large': .* the rest does not hold the side buffers"):
        pymerge.ties({"large": BASE["large"]}, [{"large": m["large"]} for m in MODELS], device="cpu")


def test_devices_that_cannot_be_used(monkeypatch):
    with pytest.raises(ValueError, match="choose a GPU"):
        pymerge.linear(MODELS, device="meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda', and torch sees no GPU here"):
        pymerge.linear(MODELS, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_method
def test_on_a_gpu(method, monkeypatch):
    small = method(BASE, MODELS, device="cuda")
    assert_same(small, method(BASE, MODELS))
    monkeypatch.undo()
    g = torch.Generator().manual_seed(1)
    base, *models = [{f"w{i}": torch.randn(3_000_001, generator=g).bfloat16() for i in range(9)} for _ in range(4)]
    assert_same(method(base, models, device="cuda"), method(base, models))
    with pytest.raises(ValueError, match="is on cuda:0"):
        method({"w": torch.ones(3, device="cuda")}, [{"w": torch.ones(3, device="cuda")}] * 3, device="cuda")
