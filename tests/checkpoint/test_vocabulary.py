"""Re-ordered tensors, read in arbitrary pieces, against rows put together one by one."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pymerge.checkpoint import vocabulary
from pymerge.checkpoint.reader import open_checkpoint
from pymerge.checkpoint.vocabulary import MEAN, PADDING, ZERO, ReorderedTensor, Rows, VocabularyStore

WIDTH = 6
ROWS = (40, 57, 33)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Three checkpoints with an embedding of each dtype, a bias, and something else."""
    folder = tmp_path_factory.mktemp("rows")
    opened = []
    for i, rows in enumerate(ROWS):
        g = torch.Generator().manual_seed(i)
        tensors = {f"{dtype}".removeprefix("torch."): torch.randn(rows, 2, 3, generator=g).to(dtype) for dtype in DTYPES}
        tensors["bias"] = torch.randn(rows, generator=g)
        tensors["other"] = torch.randn(5, 5, generator=g)
        save_file(tensors, folder / f"{i}.safetensors")
        opened.append((open_checkpoint(folder / f"{i}.safetensors"), tensors))
    return opened


def expected(sources: list[torch.Tensor], rows: Rows) -> torch.Tensor:
    """One row after the other, in plain torch."""
    return torch.stack([_row(sources, rows, i) for i in range(len(rows.source))])


def _row(sources: list[torch.Tensor], rows: Rows, i: int) -> torch.Tensor:
    source, row = int(rows.source[i]), int(rows.row[i])
    wide = torch.float64 if sources[0].dtype == torch.float64 else torch.float32
    if source >= 0:
        return sources[source][row]
    if source == ZERO:
        return torch.zeros_like(sources[0][0])
    if source == MEAN:
        total = torch.zeros_like(sources[0][0], dtype=wide)
        present = [(s, int(r)) for s, r in zip(sources, rows.members[:, row]) if r >= 0]
        for tensor, r in present:
            total += tensor[r].to(wide)
        return (total / len(present)).to(sources[0].dtype)
    real = [_row(sources, rows, j).double() for j in range(len(rows.source)) if rows.source[j] != PADDING]
    return (torch.stack(real).sum(0) / len(real) if real else torch.zeros_like(sources[0][0]).double()).to(sources[0].dtype)


@st.composite
def some_rows(draw) -> Rows:
    """Stretches of rows in order, single rows, zeros, means and padding."""
    source, row = [], []
    means = draw(st.integers(1, 4))
    members = [[draw(st.integers(-1, count - 1)) for _ in range(means)] for count in ROWS]
    for k in range(means):
        if all(line[k] < 0 for line in members):
            members[0][k] = 0
    for _ in range(draw(st.integers(1, 8))):
        what = draw(st.integers(PADDING, len(ROWS) - 1))
        count = draw(st.integers(1, 12))
        if what >= 0:
            first = draw(st.integers(0, ROWS[what] - 1))
            stretch = list(range(first, min(first + count, ROWS[what])))
            row += draw(st.permutations(stretch)) if draw(st.booleans()) else stretch
            source += [what] * len(stretch)
        else:
            row += [draw(st.integers(0, means - 1)) if what == MEAN else 0] * count
            source += [what] * count
    return Rows(torch.tensor(source), torch.tensor(row), torch.tensor(members))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), rows=some_rows())
def test_any_bytes_of_any_rows(stores, data, rows):
    name = data.draw(st.sampled_from(["float32", "bfloat16", "float16", "float64", "bias"]))
    with pytest.MonkeyPatch.context() as patch:
        # Small limits, so that small tensors take every path.
        patch.setattr(vocabulary, "BLOCK", data.draw(st.sampled_from([1, 64, 4 << 20])))
        patch.setattr(vocabulary, "GAP", data.draw(st.sampled_from([0, 48, 32 << 10])))
        patch.setattr(vocabulary, "DIRECT", data.draw(st.sampled_from([0, 100, 1 << 20])))
        patch.setattr(vocabulary, "SUMMED", data.draw(st.sampled_from([1, 16384])))
        tensor = ReorderedTensor(name, [(store, store.tensors[name]) for store, _ in stores], 0, rows)
        store = VocabularyStore(stores[0][0], {name: tensor})
        info = store.tensors[name]
        want = expected([tensors[name] for _, tensors in stores], rows).contiguous()
        assert info.shape == want.shape and info.nbytes == want.nbytes
        raw = want.view(-1).view(torch.uint8).numpy().tobytes()
        start = data.draw(st.integers(0, info.nbytes))
        count = data.draw(st.integers(0, info.nbytes - start))
        got = bytearray(b"\xff" * count)
        store.read_into(info, memoryview(got), start)
        # The mean of all rows is a sum in another order than the oracle's: fp64 rows may differ in their last bit.
        if name != "float64" or not (rows.source == PADDING).any():
            assert got == raw[start : start + count]
        else:
            whole = bytearray(info.nbytes)
            store.read_into(info, memoryview(whole))
            assert got == whole[start : start + count]
            torch.testing.assert_close(torch.frombuffer(whole, dtype=torch.float64).view(want.shape), want, rtol=1e-15, atol=1e-15)


def test_mixed_dtypes_are_promoted(stores):
    """bf16 rows among fp16 ones are fp32, as in torch; rows that are not used have no say."""
    half, brain, double = stores[0][0], stores[1][0], stores[2][0]
    sources = [(half, half.tensors["float16"]), (brain, brain.tensors["bfloat16"]), (double, double.tensors["float64"])]
    source, row = torch.tensor([0, 1, MEAN, 0]), torch.tensor([3, 4, 0, 5])
    rows = Rows(source, row, torch.tensor([[7], [8], [-1]]))
    tensor = ReorderedTensor("float16", sources, 0, rows)
    assert tensor.info.dtype == "F32" and tensor.used == [half, brain]
    got = torch.empty(4, 2, 3)
    tensor.read_into(memoryview(got.numpy()).cast("B"), 0)
    a, b = stores[0][1]["float16"].float(), stores[1][1]["bfloat16"].float()
    assert torch.equal(got, torch.stack([a[3], b[4], (a[7] + b[8]) / 2, a[5]]))


def test_other_tensors_pass_through(stores):
    store, tensors = stores[0]
    rows = Rows(torch.zeros(3, dtype=torch.int64), torch.tensor([2, 1, 0]), torch.zeros(3, 0, dtype=torch.int64))
    view = VocabularyStore(store, {"float32": ReorderedTensor("float32", [(store, store.tensors["float32"])], 0, rows)})
    assert list(view.tensors) == list(store.tensors) and view.files == store.files
    assert view.nbytes == store.nbytes - (40 - 3) * WIDTH * 4
    got = torch.empty(25)
    view.read_into(view.tensors["other"], memoryview(got.numpy()).cast("B"))
    assert torch.equal(got.view(5, 5), tensors["other"])
    with pytest.raises(ValueError, match="72 bytes; 72 from byte 4"):
        view.read_into(view.tensors["float32"], memoryview(bytearray(72)), 4)


def test_files_of_all_used_stores(stores):
    (a, _), (b, _), (c, _) = stores
    rows = Rows(torch.tensor([0, MEAN]), torch.tensor([0, 0]), torch.tensor([[0], [-1], [4]]))
    view = VocabularyStore(a, {"bias": ReorderedTensor("bias", [(s, s.tensors["bias"]) for s in (a, b, c)], 0, rows)})
    assert view.files == (*a.files, *c.files)


class Counting:
    """A store that notes its reads."""

    def __init__(self, store):
        self._store, self.reads = store, []
        self.path, self.folder, self.files, self.tensors, self.nbytes = store.path, store.folder, store.files, store.tensors, store.nbytes

    def read_into(self, info, target, start=0):
        self.reads.append((start, len(target)))
        self._store.read_into(info, target, start)


def test_rows_that_lie_together_are_one_read(tmp_path):
    """A vocabulary to which tokens were added is read like any other tensor; scattered rows of one neighbourhood too."""
    save_file({"embed": torch.arange(4000.0 * 64).view(4000, 64)}, tmp_path / "m.safetensors")
    store = Counting(open_checkpoint(tmp_path / "m.safetensors"))
    info = store.tensors["embed"]
    none = torch.zeros(1, 0, dtype=torch.int64)

    def read(row: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        tensor = ReorderedTensor("embed", [(store, info)], 0, Rows(source, row, none))
        store.reads.clear()
        got = torch.empty(len(row), 64)
        tensor.read_into(memoryview(got.numpy()).cast("B"), 0)
        return got

    appended = torch.where(torch.arange(4010) < 4000, 0, ZERO)
    got = read(torch.arange(4010), appended)
    assert store.reads == [(0, 4000 * 256)] and torch.equal(got[3999], torch.arange(3999.0 * 64, 4000 * 64)) and not got[4000:].any()
    shuffled = torch.randperm(4000, generator=torch.Generator().manual_seed(0))[:500]
    got = read(shuffled, torch.zeros(500, dtype=torch.int64))
    assert len(store.reads) == 1 and torch.equal(got[:, 0], shuffled * 64.0)


def test_padding_is_the_same_for_all_threads(stores):
    """Many threads ask for padding at once; it is computed once, and the same by any number of torch's threads."""
    store, _ = stores[1]
    n = 57
    rows = Rows(
        torch.cat([torch.zeros(n, dtype=torch.int64), torch.full((7,), PADDING)]), torch.arange(n + 7), torch.zeros(1, 0, dtype=int)
    )
    results = []

    def read(tensor: ReorderedTensor) -> None:
        memory = bytearray(tensor.info.nbytes)
        tensor.read_into(memoryview(memory), 0)
        results.append(bytes(memory))

    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tensor = ReorderedTensor("bfloat16", [(store, store.tensors["bfloat16"])], 0, rows)
            workers = [threading.Thread(target=read, args=(tensor,)) for _ in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
    finally:
        torch.set_num_threads(before)
    assert len(results) == 8 and len(set(results)) == 1
