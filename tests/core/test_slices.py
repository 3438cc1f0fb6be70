"""Tensors merged slice by slice: the bytes of the whole, whatever has to be known of it first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymerge import backend, native, reference, slice_ops, streamed_selection
from pymerge.conventions import _CHOICES, Convention
from pymerge.finite import NonFiniteError
from pymerge.merge_methods.registry import get_method
from pymerge.merge_methods.sliced import FusedSlices, SlicedTensor
from pymerge.spec import MergeSpec

from .conftest import DTYPES, HOSTILE, assert_same_bits, models_of, spec_of

MEMORY = 1 << 20
UNIT = slice_ops.ALIGNMENT
CPU = torch.device("cpu")


def merge_in_slices(sliced, tensors, dtype, lengths, check_finite=True):
    """What the engine does: every pass over the slices of every tensor, then the merge of each slice into poisoned memory.

    tensors: name -> (base, models); lengths: of the slices, in turn.
    """

    def read(name, ranges):
        base, models = tensors[name]
        cut = [torch.cat([t[a:b] for a, b in ranges]) for t in models]
        return (None if base is None else torch.cat([base[a:b] for a, b in ranges])), cut

    def slices():
        turn = 0
        for name, (_, models) in tensors.items():
            first = 0
            while True:
                end = min(first + lengths[turn % len(lengths)], models[0].numel())
                turn += 1
                yield name, first, end, *read(name, [(first, end)])
                if end == models[0].numel():
                    break
                first = end

    for number in range(sliced.passes):
        sliced.begin(number, read)
        for name, first, _, base, models in slices():
            sliced.add(number, name, first, base, models)
        sliced.end(number, read)
    outs = {name: torch.full(x.shape, float("nan"), dtype=dtype, device=x.device) for name, (_, (x, *_)) in tensors.items()}
    for name, first, end, base, models in slices():
        sliced.merge(name, first, base, models, outs[name][first:end], check_finite)
    return outs


def check(spec, base, models, dtype, lengths=(UNIT, 3 * UNIT), name="layer.weight", memory=MEMORY, device=CPU):
    f64 = torch.float64 in [t.dtype for t in (base, *models) if t is not None]
    sliced = FusedSlices([SlicedTensor(name, tuple(models[0].shape), f64, {}, device)], {name: spec}, memory)
    there = None if base is None else base.to(device), [x.to(device) for x in models]
    got = merge_in_slices(sliced, {name: there}, dtype, lengths)[name]
    assert_same_bits(got.cpu(), reference.merge(base, models, spec, name=name, dtype=dtype))
    return sliced


def any_case(data, most, longest):
    """A spec with every choice drawn, a base or none, models of it, and the result's dtype."""
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    count = data.draw(st.integers(1, most))
    n = data.draw(st.integers(0, longest))
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=count + 2, max_size=count + 2))
    kinds = data.draw(st.lists(st.sampled_from(sorted(HOSTILE)), min_size=count + 1, max_size=count + 1))
    base, *models = (HOSTILE[k](n).clamp(-6e4, 6e4).to(d) for k, d in zip(kinds, dtypes, strict=False))
    spec = _any_spec(data, count)
    return spec, base if data.draw(st.booleans()) else None, models, dtypes[-1]


def _any_spec(data, count):
    choices = {k: data.draw(st.sampled_from(v)) for k, v in _CHOICES.items()}
    number = st.floats(-4, 4, allow_nan=False).map(lambda x: round(x, 3))
    sparsify = data.draw(st.sampled_from(["none", "magnitude", "band", "bernoulli"]))
    fractions = st.sampled_from([0.0, 1e-3, 0.29, 0.5, 0.9, 1.0])
    return MergeSpec(
        tuple(data.draw(number) for _ in range(count)),
        tuple(data.draw(fractions) for _ in range(count)),
        sparsify,
        data.draw(st.booleans()),
        Convention(**choices),
        data.draw(number),
        data.draw(st.integers(0, 2**64 - 1)),
        tuple(data.draw(fractions) for _ in range(count)) if sparsify == "band" else (),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_choice_together(data):
    case = any_case(data, 4, 20_000)
    lengths = [UNIT * k for k in data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))]
    for isa in native.available_isas():
        native.use_isa(isa)
        check(*case, lengths)
    native.use_isa("")
    with backend("reference"):
        check(*case, lengths)


def test_lengths_around_the_units_of_work(isa):
    torch.manual_seed(1)
    for n in (0, 1, 4095, 4096, 4097, 65536, 65537, 131072 + 77):
        base, *models = (torch.randn(n).bfloat16() for _ in range(4))
        for sparsify in ("magnitude", "bernoulli"):
            spec = spec_of(3, sparsify, True, rescale="norm", zero_vote="majority")
            assert check(spec, base, models, torch.bfloat16, [UNIT, 65536]).passes == (3 if sparsify == "magnitude" and n > 1 else 2)


def test_several_tensors_rank_and_vote_together_in_the_order_of_their_names(isa):
    torch.manual_seed(2)
    sizes = {"m": 70_000, "a": 33, "z": 0, "b": 9000}
    for dtype in (torch.bfloat16, torch.float64):  # one fp64 tensor makes all compute in fp64
        tensors = {
            name: tuple(torch.randint(-9, 9, (n,)).to(dtype if name == "a" else torch.bfloat16) / 8 for _ in range(4))
            for name, n in sizes.items()
        }
        tensors = {name: (base, models) for name, (base, *models) in tensors.items()}
        for tie_break in ("first", "all"):
            spec = spec_of(3, "magnitude", True, tie_break=tie_break, zero_vote="majority", vote_weighted=False, divisor="count")
            described = [SlicedTensor(name, (n,), dtype == torch.float64 and name == "a", {}) for name, n in sizes.items()]
            sliced = FusedSlices(described, dict.fromkeys(sizes, spec), MEMORY)
            got = merge_in_slices(sliced, tensors, torch.float32, [UNIT, 2 * UNIT])
            names = sorted(sizes)
            whole = [torch.cat([(tensors[n][0] if i == 0 else tensors[n][1][i - 1]).to(dtype) for n in names]) for i in range(4)]
            want = reference.merge(whole[0], whole[1:], spec, dtype=torch.float32)
            assert_same_bits(torch.cat([got[n] for n in names]), want)


# --------------------------------------------------------------------------------------------------------------------------------------
# Selection


each_selection = pytest.mark.parametrize("module", [native, streamed_selection], ids=["native", "torch"])


def select_streamed(module, keys, counts, tie_break, limit):
    """(rows, passes) of a selection over fp32 or fp64 keys, given in parts in a shuffled order."""
    n, f64 = keys.numel(), keys.dtype == torch.float64
    models = [keys] * len(counts)
    selection = module.StreamedSelection(n, counts, tie_break, f64, limit)
    for begin, end in selection.sample_ranges():
        assert 0 <= begin < end <= n
        selection.sample(None, [x[begin:end] for x in models])
    firsts = list(range(0, n, 10 * UNIT))
    passes = 0
    while True:
        passes += 1
        for i in torch.randperm(len(firsts)).tolist():
            selection.add(None, [x[firsts[i] : firsts[i] + 10 * UNIT] for x in models], firsts[i])
        if selection.end_pass():
            break
        assert passes < 10
    for i, (begin, end) in enumerate(selection.lookups()):
        selection.look(i, None, [x[begin:end] for x in models], begin)
    return selection.rows(), passes


@pytest.mark.parametrize("kind", HOSTILE)
def test_selection_on_hostile_data_with_little_memory(isa, kind):
    selects_on_hostile_data(native, kind, (4096, 33_333, 200_007))


@pytest.mark.parametrize("kind", HOSTILE)
def test_selection_by_torch_on_hostile_data_with_little_memory(kind, monkeypatch):
    monkeypatch.setattr(streamed_selection, "BINS", 10)
    selects_on_hostile_data(streamed_selection, kind, (4096, 33_333))


def selects_on_hostile_data(module, kind, sizes):
    torch.manual_seed(3)
    for n in sizes:
        for dtype in (torch.float32, torch.float64):
            x = HOSTILE[kind](n).to(dtype)
            counts = sorted({0, 1, n // 5, n // 2, n - 1, n})
            for tie_break in ("first", "all"):
                for limit in (0, 1 << 40):
                    rows, _ = select_streamed(module, x, counts, tie_break, limit)
                    assert rows.tolist() == reference.select(None, [[x]] * len(counts), counts, tie_break).tolist()


@each_selection
def test_selection_needs_one_pass_on_ordinary_data(module):
    torch.manual_seed(4)
    n = 2_000_003 if module is native else 500_003
    base = torch.randn(n).bfloat16().float()
    for x in (torch.randn(n), (base + torch.randn(n) * 1e-2).bfloat16().float() - base):
        rows, passes = select_streamed(module, x, [n // 5, n // 2], "first", 1 << 20)
        assert passes == 1 and rows.tolist() == native.select(None, [[x]] * 2, [n // 5, n // 2]).tolist()
        rows, passes = select_streamed(module, x, [n // 5, n // 2], "all", 0)  # a coarse histogram, for lack of room for candidates
        assert passes == 2 and rows.tolist() == native.select(None, [[x]] * 2, [n // 5, n // 2], "all").tolist()


@each_selection
def test_a_sample_that_misleads_is_found_out(isa, module):
    torch.manual_seed(5)
    x = torch.rand(300_007) * 1e-3
    x[123_456:126_456] += torch.rand(3000) * 100
    for k in (1, 1500, 3000, 3001, 150_000):
        rows, passes = select_streamed(module, x, [k], "first", 1 << 20)
        assert rows.tolist() == reference.select(None, [[x]], [k]).tolist() and passes <= 3


@each_selection
def test_how_far_a_guess_strayed(isa, module):
    """Elements that the guess keeps and the result drops, or the other way round: the exact number after one pass."""
    torch.manual_seed(7)
    for x in (torch.randn(150_000), torch.randint(-40, 40, (150_000,)) / 64):
        counts = [1, 15_000, 75_000, 149_999]
        for limit in (0, 1 << 20):
            selection = module.StreamedSelection(len(x), counts, "all", False, limit)
            for begin, end in selection.sample_ranges():
                selection.sample(None, [x[begin:end]] * len(counts))
            guesses, passes, done = selection.guesses(), 0, False
            while not done:
                selection.add(None, [x] * len(counts), 0)
                done, passes = selection.end_pass(), passes + 1
            keys = reference._keys(x)
            for guess, row, strayed in zip(guesses.tolist(), selection.rows().tolist(), selection.strayed(), strict=True):
                apart = int(((keys >= guess[0]) != (keys >= row[0])).sum())
                assert apart == strayed or (passes > 1 and apart <= strayed)


@pytest.mark.parametrize("favoured", [1.0, -1.0, 0.0])
def test_the_majority_is_counted_with_guesses_and_again_where_they_could_be_wrong(favoured):
    torch.manual_seed(8)
    models = [torch.randn(100_000) + favoured for _ in range(3)]
    spec = spec_of(3, "magnitude", True, tie_break="all", zero_vote="majority", vote_weighted=False, divisor="count")
    counted = []
    original = FusedSlices._again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedSlices, "_again", lambda self, read: counted.append(1) or original(self, read))
        assert check(spec, None, models, torch.float32).passes == 1
    assert len(counted) == (favoured == 0.0)


def test_selection_says_when_elements_are_missing():
    for module in (native, reference, streamed_selection):
        selection = module.StreamedSelection(10_000, [100], "first", False, 1000)
        selection.add(None, [torch.randn(4096)], 0)
        with pytest.raises(ValueError, match="over 10000 elements was (not )?given"):
            selection.end_pass()


# --------------------------------------------------------------------------------------------------------------------------------------
# Methods, and errors


METHODS = {
    "linear": {"weights": (1.0, 0.5), "normalize": True},
    "task_arithmetic": {"weights": (1.0, 0.5), "normalize": False, "int8_mask": False, "scale": 0.5},
    "wise_ft": {"alpha": 0.7},
    "slerp": {"t": 0.3},
    "passthrough": {"scale": (1.0,)},
}
_TRIMMED = {"weights": (1.0, 0.5), "density": (0.3, 0.6), "normalize": None, "rescale": None, "int8_mask": False, "scale": 1.0}
METHODS["ties"] = {**_TRIMMED, "convention": "mergekit"}
METHODS["breadcrumbs"] = {**_TRIMMED, "gamma": (0.1, 0.2), "convention": "mergekit"}
METHODS["dare_ties"] = METHODS["dare_linear"] = {**_TRIMMED, "seed": 7, "convention": "mergekit"}


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("each_backend")
def test_built_in_methods(method, out):
    torch.manual_seed(6)
    registered, parameters = get_method(method), METHODS[method]
    count = min(2, registered.max_models)
    shape = (33, 400)
    for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn):
        base, *models = models_of("normal", 33 * 400, count + 1, torch.float32)
        base, *models = (t.to(dtype) for t in (base, *models))
        if registered.base == "model":
            base = None
        sliced = registered.sliced([SlicedTensor("w", shape, False, parameters)], MEMORY)
        got = merge_in_slices(sliced, {"w": (base, models)}, out, [UNIT])["w"]
        shaped = [t.view(shape) for t in models]
        whole_base = None if base is None else base.view(shape)
        want = registered.tensor(whole_base, shaped, name="w", dtype=out, out=None, check_finite=True, **parameters)
        assert torch.equal(got.view(torch.uint8), want.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("each_backend")
def test_values_that_are_not_finite_are_found_where_they_are(method):
    registered, parameters = get_method(method), METHODS[method]
    count = min(2, registered.max_models)
    models = [torch.ones(4, 3000) + i for i in range(count)]
    models[-1][2, 5] = float("inf")
    base = None if registered.base == "model" else torch.zeros(12_000)
    flat = [t.view(-1) for t in models]
    for check_finite in (True, False):
        sliced = registered.sliced([SlicedTensor("w", (4, 3000), False, parameters)], MEMORY)
        if not check_finite:
            merge_in_slices(sliced, {"w": (base, flat)}, torch.float32, [UNIT], False)
            continue
        where = rf"model {count - 1}: 'w' has 1 or more non-finite value\(s\), the first inf at index \[2, 5\]"
        with pytest.raises(NonFiniteError, match=where):
            merge_in_slices(sliced, {"w": (base, flat)}, torch.float32, [UNIT])


def test_a_slice_is_not_taken_for_the_whole():
    x = [torch.ones(5)] * 2
    for spec, what in [
        (spec_of(2, "magnitude", False), "a selection"),
        (spec_of(2, "bernoulli", False, rescale="norm"), "factors"),
        (spec_of(2, "none", True, zero_vote="majority"), "a balance"),
    ]:
        with pytest.raises(ValueError, match=f"'w' cannot be merged without {what} of the whole"):
            slice_ops.merge(x[0], x, spec, torch.empty(5), name="w", first=0, shape=(5,))
