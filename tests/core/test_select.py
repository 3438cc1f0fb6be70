"""Exact selection: thresholds, cuts and ties, on data made to break it."""

import pytest
import torch

from pymerge import native, reference
from pymerge.conventions import Convention
from pymerge.spec import MergeSpec

from .conftest import HOSTILE

# Below and above the size from which a sample says where to begin (8192), not multiples of anything.
LENGTHS = (1, 2, 31, 64, 4097, 8193, 33_333, 100_003)


def check(bases, models, counts):
    """Also in two pieces, whose ranks are taken together: a tensor that fits in a cache is selected from in another way."""
    for tie_break in ("first", "all"):
        want = reference.select(bases, models, counts, tie_break).tolist()
        assert native.select(bases, models, counts, tie_break).tolist() == want
        if len(models[0]) == 1:
            at = models[0][0].numel() // 3
            pieces = [[model[0][:at], model[0][at:]] for model in models]
            assert native.select(bases and [bases[0][:at], bases[0][at:]], pieces, counts, tie_break).tolist() == want


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_data(isa, kind):
    torch.manual_seed(0)
    for n in LENGTHS:
        base, model = HOSTILE[kind](n).bfloat16(), HOSTILE[kind](n).bfloat16()
        counts = sorted({0, 1, 2, n // 5, n // 2, n - 1, n, n + 1})
        check([base], [[model]] * len(counts), counts)
        check(None, [[model.float()]] * len(counts), counts)


@pytest.mark.parametrize("kind", ["normal", "few_values", "huge_range"])
def test_fp64_and_mixed_dtypes(isa, kind):
    torch.manual_seed(1)
    for n in LENGTHS:
        x = HOSTILE[kind](n)
        check([x * 0.5], [[x], [x.flip(0)]], [n // 5, n // 2])
        check([x.half()], [[x.bfloat16()], [x.float()]], [n // 5, n // 2])


def test_many_tensors_are_ranked_together(isa):
    torch.manual_seed(2)
    sizes = [3, 0, 70_000, 1, 4096, 33, 65536, 0, 5]
    bases = [torch.randn(n).bfloat16() for n in sizes]
    models = [[(b.float() + torch.randn(len(b)) * 10 ** (i % 3 - 2)).bfloat16() for i, b in enumerate(bases)] for _ in range(2)]
    total = sum(sizes)
    for k in (1, total // 10, total // 2, total - 1):
        check(bases, models, [k, total - k])


def test_a_sample_that_misleads_is_found_out(isa):
    # 1 % of the elements, in one place, hold all the large values: a bracket from a sample is wide or wrong, the result is not.
    torch.manual_seed(3)
    n = 300_007
    for start in (0, 123_456, n - n // 100):
        x = torch.rand(n) * 1e-3
        x[start : start + n // 100] += torch.rand(n // 100) * 100
        for k in (1, n // 200, n // 100, n // 100 + 1, n // 2):
            check(None, [[x]], [k])


def test_digit_by_digit_when_everything_lies_in_the_bracket(isa):
    # Neighbouring keys in huge numbers: far more would be collected than the side buffers take.
    n = 1_500_000
    keys = torch.randint(1000, 1007, (n,), dtype=torch.int32)
    check(None, [[keys.view(torch.float32)]], [n // 3])
    wide = torch.randint(1000, 1007, (n,), dtype=torch.int64)
    check(None, [[wide.view(torch.float64)]], [n // 3])


def test_property_on_random_keys(isa):
    generator = torch.Generator().manual_seed(4)
    for n in (70_000, 262_144):
        x = torch.randint(0, 2**31 - 2**24, (n,), dtype=torch.int32, generator=generator).view(torch.float32)
        for k in torch.randint(1, n, (5,), generator=generator).tolist():
            key, cut = native.select(None, [[x]], [k], "first")[0].tolist()
            keys = x.view(torch.int32).long() & 0x7FFFFFFF
            kept = (keys > key) | ((keys == key) & (torch.arange(n) <= cut))
            assert int(kept.sum()) == k
            assert int(keys[kept].min()) >= int(keys[~kept].max())


@pytest.mark.slow
def test_beyond_32_bit_indices():  # 9 GB: for one instruction set, not for each
    n = 2**31 + 1000
    x = torch.zeros(n, dtype=torch.bfloat16)
    x[-3:] = torch.tensor([5.0, 3.0, 3.0])
    x[7] = 3.0
    assert native.select(None, [[x]], [2], "first")[0].tolist() == [0x40400000, 7]
    assert native.select(None, [[x]], [3], "first")[0].tolist() == [0x40400000, n - 2]
    out = torch.full((n,), float("nan"), dtype=torch.bfloat16)
    spec = MergeSpec((2.0,), (3 / n,), "magnitude", convention=Convention(divisor="none"))
    assert native.merge(None, [x], spec, out)
    assert torch.nonzero(out[: 2**20]).reshape(-1).tolist() == [7]
    assert out[-3:].tolist() == [10.0, 6.0, 0.0]
    assert not bool(out[2**20 : -3].isnan().any())
