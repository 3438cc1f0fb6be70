"""Exact selection on the device against the reference: thresholds, cuts and ties, on data made to break it."""

import pytest
import torch

pytest.importorskip("triton")

from pymerge import reference, triton_backend
from pymerge.triton_kernels import launch, rank, threshold

from ..core.conftest import HOSTILE, unaligned
from .conftest import there

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """The interpreter is slow: small tensors take the way of large ones, in many chunks, runs, slots and pieces."""
    for name, value in {"DIRECT": 200, "PIECE": 512, "TOGETHER": 8, "CHUNKS_PER_SLOT": 2, "MAX_SLOTS": 2, "WALK": 4}.items():
        monkeypatch.setattr(threshold, name, value)
    monkeypatch.setattr(launch, "BLOCK", 512)
    monkeypatch.setattr(launch, "CHUNK", 1024)


def check(bases, models, counts, ties=("first", "all")):
    for tie_break in ties:
        on_device = [there(b) for b in bases] if bases else None
        got = triton_backend.select(on_device, [[there(t) for t in row] for row in models], counts, tie_break)
        assert got.tolist() == reference.select(bases, models, counts, tie_break).tolist()


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_data(kind):
    torch.manual_seed(0)
    for n in (1, 31, 3003):
        base, model = HOSTILE[kind](n).bfloat16(), HOSTILE[kind](n).bfloat16()
        check([base], [[model]] * 3, [n // 5, n // 2, n - 1], ties=("first",))
    check(None, [[model.float()]], [n // 3], ties=("all",))


def test_all_or_nothing():
    x = torch.randn(1500)
    check(None, [[x]] * 4, [0, 1500, 1501, 7])
    check(None, [[x[:0]]], [1])
    check(None, [], [])


def test_every_dtype(dtype):
    torch.manual_seed(1)
    x = torch.cat([torch.randn(1200), torch.randn(300) * 1e-40, torch.zeros(100), -torch.zeros(101)]).to(dtype)
    x = x[torch.randperm(len(x))]
    check([unaligned(x * 0.5, 1)], [[unaligned(x, 3)], [x.flip(0)]], [300, 1650])


def test_mixed_dtypes():
    torch.manual_seed(2)
    x = HOSTILE["huge_range"](1500)
    check([x.half()], [[x.bfloat16()], [x.float()]], [300, 750])
    check([x.half()], [[x.bfloat16()], [x.double()]], [300, 750], ties=("first",))


def test_many_tensors_are_ranked_together():
    torch.manual_seed(3)
    sizes = [3, 0, 1500, 1, 900, 33, 0, 5]
    bases = [torch.randn(n).to(torch.float16 if i % 3 == 1 else torch.bfloat16) for i, n in enumerate(sizes)]
    models = [[(b.float() + torch.randn(len(b)) * 10 ** (i % 3 - 2)).to(b.dtype) for i, b in enumerate(bases)] for _ in range(2)]
    total = sum(sizes)
    check(bases, models, [total // 10, total // 2])


def found_slowly(monkeypatch) -> list[bool]:
    """Of the selections from here on, whether some row needed passes over its data."""
    slow = []
    run = threshold.Selection.run
    monkeypatch.setattr(threshold.Selection, "run", lambda self: (run(self), slow.append(bool(self.any_slow.item()))))
    return slow


def test_a_sample_that_misleads_is_found_out(monkeypatch):
    # Zero wherever the sample looks, and large elsewhere: learnt from the sample of 0, 1, 2, ...
    n = 4007
    x = torch.arange(n, dtype=torch.float32)
    looked_at = []
    run = threshold.Selection.run
    monkeypatch.setattr(threshold.Selection, "run", lambda self: (run(self), looked_at.append(self.sample.clone())))
    check(None, [[x]], [n // 4], ties=("first",))
    seen = looked_at[0].cpu().view(torch.float32).long()
    assert 200 <= len(seen) < n // 10
    monkeypatch.setattr(threshold.Selection, "run", run)
    slow = found_slowly(monkeypatch)
    hidden = 1 + torch.rand(n, generator=torch.Generator().manual_seed(4))
    hidden[seen] = 0.0
    check(None, [[hidden], [x]], [n // 4, n // 4])
    assert slow == [True, True]


def test_random_data_do_not_need_the_slow_way(monkeypatch):
    torch.manual_seed(5)
    slow = found_slowly(monkeypatch)
    base = torch.randn(6000)
    check([base], [[base + torch.randn(6000)]] * 2, [1200, 3000], ties=("first",))
    half = torch.randn(6000).bfloat16()
    check([half], [[(half.float() + 0.1 * torch.randn(6000)).bfloat16()]], [1200], ties=("first",))
    assert slow == [False, False]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("trouble", ["missed", "overflowed"])
def test_slowly_when_the_bracket_is_of_no_use(monkeypatch, wide, trouble):
    torch.manual_seed(6)
    n = 1801
    integer, floating = (torch.int64, torch.float64) if wide else (torch.int32, torch.float32)
    few, many = torch.randint(1000, 1007, (n,), dtype=integer), torch.randint(0, 2**30, (n,), dtype=integer)
    if trouble == "overflowed":
        monkeypatch.setattr(threshold, "_room", lambda n, expected: 3)
    else:
        launch_one = threshold.launch

        def far_off(kernel, programs, device, rows, settled, *args, **constants):
            launch_one(kernel, programs, device, rows, settled, *args, **constants)
            if kernel is rank.bracket_ends_kernel:
                settled.view(programs, -1)[:, :3] = 5

        monkeypatch.setattr(threshold, "launch", far_off)
    slow = found_slowly(monkeypatch)
    check(None, [[few.view(floating)], [many.view(floating)]], [n // 3, n // 2], ties=("first",))
    assert slow == [True]


def test_the_cut_of_a_tie_may_lie_in_any_chunk():
    n = 5000
    check(None, [[torch.ones(n)]] * 4, [5, 1024, 1025, n - 1], ties=("first",))
    two = (torch.arange(n) % 7 < 3).float()  # the k-th is not the bracket's middle when k is near the border
    border = int(two.sum())
    check(None, [[two]] * 4, [border, border + 1, border - 1, n - 2], ties=("first",))
