"""Whole-tensor sums, interpolation and the random numbers."""

import numpy as np
import pytest
import torch

from pymerge import native, reference

from .conftest import DTYPES, HOSTILE, assert_same_bits, unaligned


def test_dots_follow_the_one_order(isa, dtype):
    torch.manual_seed(0)
    for n in (0, 1, 63, 64, 65, 4095, 4096, 4097, 100_001):
        a, b = torch.randn(n).to(dtype), HOSTILE["huge_range"](n).clamp(-1e4, 1e4).to(dtype)
        assert native.dots(a, b).tolist() == reference.dots(a, b).tolist()
        assert native.dots(unaligned(a, 1), b).tolist() == reference.dots(a, b).tolist()


def test_the_one_order_written_out():
    rng = np.random.default_rng(1)
    x = rng.normal(size=10_000) * 10.0 ** rng.integers(-8, 8, size=10_000)
    total = 0.0
    for block in np.split(np.concatenate([x, np.zeros(-len(x) % 4096)]), -(-len(x) // 4096)):
        lanes = np.zeros(64)
        for row in block.reshape(64, 64):
            lanes += row
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        total += lanes[0]
    assert reference.tree_sum(torch.from_numpy(x)) == total


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.3, 0.5, 0.999, 1.0])
def test_lerp(isa, alpha):
    torch.manual_seed(2)
    for n in (0, 1, 17, 1000, 70_001):
        for da in DTYPES:
            for db in (torch.float32, torch.bfloat16, torch.float64):
                a, b = torch.randn(n).to(da), unaligned(torch.randn(n).to(db), 1)
                for out_dtype in (da, torch.bfloat16):
                    out = torch.full((n,), float("nan"), dtype=out_dtype)
                    native.lerp(a, b, alpha, out)
                    assert_same_bits(out, reference.lerp(a, b, alpha, out_dtype))
                inplace = a.clone()
                native.lerp(inplace, b, alpha, inplace)
                assert_same_bits(inplace, reference.lerp(a, b, alpha, da))


@pytest.mark.parametrize("alpha", [0.25, 0.75])
def test_lerp_of_what_is_not_finite_spoils_no_other_element(isa, dtype, alpha):
    torch.manual_seed(8)
    for n in (40, 2100):
        a, b = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
        a[3], a[n // 2], b[n - 1], b[n // 3] = float("nan"), float("inf"), float("-inf"), float("nan")
        want = reference.lerp(a, b, alpha, dtype)
        in_place = a.clone()
        for out in (torch.full_like(a, 7.0), in_place):
            assert not native.lerp(in_place if out is in_place else a, b, alpha, out)
            assert torch.equal(out.isnan(), want.isnan())
            assert_same_bits(out.nan_to_num(nan=1.0), want.nan_to_num(nan=1.0))


def test_lerp_is_exact_at_both_ends_and_at_equality(isa):
    a, b = torch.randn(1000) * 1e6, torch.randn(1000)
    for alpha, want in ((0.0, a), (1.0, b)):
        out = torch.empty(1000)
        native.lerp(a, b, alpha, out)
        assert_same_bits(out, want)
    native.lerp(a, a.clone(), 0.37, out)
    assert_same_bits(out, a)


@pytest.mark.parametrize(
    ("counter", "seed", "want"),
    [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, seed, want):
    """The known answers that the authors' Random123 publishes for philox4x32 with 10 rounds."""
    words = reference.philox_words([torch.tensor([c]) for c in counter], seed)
    assert [int(w) for w in words] == want


def test_kept_fraction_is_the_density():
    from pymerge.spec import MergeSpec

    n = 1 << 20
    ones = torch.ones(n)
    for density in (0.1, 0.5, 0.9):
        out = torch.empty(n)
        native.merge(None, [ones], MergeSpec((1.0,), (density,), "bernoulli", seed=5), out, name="w")
        assert abs(float((out != 0).double().mean()) - density) < 5 * (density * (1 - density) / n) ** 0.5
