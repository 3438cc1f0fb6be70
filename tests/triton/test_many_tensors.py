"""State dicts in few launches, without waiting, and merges that are prepared once and run many times."""

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

import pymerge
from pymerge import reference, triton_backend
from pymerge.conventions import Convention
from pymerge.spec import MergeSpec
from pymerge.triton_kernels import launch, threshold

from ..core.conftest import assert_same_bits, spec_of
from .conftest import DEVICE, poisoned, there

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

METHODS = {
    "ties": lambda base, models, out: pymerge.ties(base, models, density=0.3, out=out),
    "ties-paper": lambda base, models, out: pymerge.ties(base, models, density=0.3, convention="paper", out=out),
    "dare_linear-norm": lambda base, models, out: pymerge.dare_linear(base, models, convention="mergekit", out=out),
    "linear": lambda base, models, out: pymerge.linear(models, out=out),
    "wise_ft": lambda base, models, out: pymerge.wise_ft(base, models[0], alpha=0.3, out=out),
    "ema_update": lambda base, models, out: pymerge.ema_update(out, models[0], decay=0.9),
}


def states(count, models=2, sizes=(7, 90, 0, 33, 1, 200)):
    """Base and models of `count` tensors, all aligned, so that there is one kind of tensor."""
    generator = torch.Generator().manual_seed(count)
    shapes = [sizes[i % len(sizes)] for i in range(count)]
    base = {f"layer.{i}": torch.randn(n, generator=generator).bfloat16() for i, n in enumerate(shapes)}
    return [base] + [
        {k: (t.float() + 0.1 * torch.randn(len(t), generator=generator)).bfloat16() for k, t in base.items()} for _ in range(models)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_launches_do_not_depend_on_the_number_of_tensors(launches, method):
    counts = []
    for count in (3, 40):
        base, *models = states(count, sizes=(5, 60, 33))
        moved = [{k: there(t) for k, t in m.items()} for m in (base, *models)]
        out = {k: t.clone().float() if method == "ema_update" else torch.full_like(t, float("nan")) for k, t in moved[0].items()}
        assert all(t.data_ptr() % 16 == 0 for m in (*moved, out) for t in m.values())
        launches.clear()
        with pymerge.backend("triton"):
            METHODS[method](moved[0], moved[1:], out)
        counts.append(Counter(launches))
        want = {k: t.clone().float() if method == "ema_update" else torch.full_like(t, float("nan")) for k, t in base.items()}
        with pymerge.backend("reference"):
            METHODS[method](base, models, want)
        for name, t in want.items():
            assert_same_bits(out[name].cpu(), t)
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) <= 24


def test_ranks_and_ties_over_the_whole_model_with_mixed_dtypes(monkeypatch):
    monkeypatch.setattr(threshold, "DIRECT", 200)
    base, *models = states(6)
    for m in (base, *models):
        m["layer.1"] = m["layer.1"].float()
        m["layer.3"] = m["layer.3"].half()
    for wide in (False, True):
        if wide:
            models[1]["layer.5"] = models[1]["layer.5"].double()
        for convention in ("paper", Convention(scope="model", zero_vote="majority")):
            with pymerge.backend("reference"):
                want = pymerge.ties(base, models, density=0.3, convention=convention)
            with pymerge.backend("triton"):
                got = pymerge.ties({k: there(t) for k, t in base.items()}, [{k: there(t) for k, t in m.items()} for m in models],
                                   density=0.3, convention=convention)  # fmt: skip
            for name, t in want.items():
                assert_same_bits(got[name].cpu(), t)


def test_the_bad_tensor_is_named():
    base, *models = ({k: there(t) for k, t in m.items()} for m in states(5))
    models[1]["layer.3"][2] = float("inf")
    with pymerge.backend("triton"):
        for method in ("ties", "linear", "ema_update"):
            with pytest.raises(pymerge.NonFiniteError, match=r"'layer.3' has 1 non-finite value\(s\), the first inf at index \[2\]"):
                METHODS[method](base, models[::-1], {k: t.clone() for k, t in base.items()})


def test_results_in_other_dtypes_and_layouts():
    base, *models = states(4)
    base["layer.2"], models[0]["layer.2"], models[1]["layer.2"] = (torch.randn(6, 4).t() for _ in range(3))
    moved = [{k: there(t) for k, t in m.items()} for m in (base, *models)]
    with pymerge.backend("reference"):
        want = pymerge.linear([base, *models], dtype=torch.float8_e4m3fn)
    with pymerge.backend("triton"):
        got = pymerge.linear(moved, dtype=torch.float8_e4m3fn)
    for name, t in want.items():
        assert torch.equal(got[name].cpu().view(torch.uint8), t.view(torch.uint8))


# ---- prepared merges


def jobs_and_results(spec, seed, dtypes=(torch.bfloat16, torch.float32)):
    torch.manual_seed(seed)
    tensors = []
    for i, n in enumerate((300, 0, 17, 1500)):
        base = torch.randn(n).to(dtypes[i % len(dtypes)])
        models = [(base.float() + torch.randn(n)).to(base.dtype) for _ in spec.weights]
        if i == 2:
            models[0] = models[0].float()  # models of one tensor that differ in dtype are widened on the device
        tensors.append((base, models))
    want = [reference.merge(b, xs, spec, name=f"w{i}", dtype=b.dtype) for i, (b, xs) in enumerate(tensors)]
    return tensors, want


class Watch(TorchDispatchMode):
    """Operators that run on tensors outside of kernels."""

    def __init__(self, launches):
        super().__init__()
        self.launches, self.seen = launches, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.launches.inside:
            self.seen.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "spec",
    [
        spec_of(2, "magnitude", True, rescale="norm", zero_vote="majority"),
        spec_of(2, "bernoulli", False, rescale="norm"),
        MergeSpec((1.0, 0.5), (1.0, 1.0)),
    ],
    ids=["ties", "dare", "sum"],
)
def test_a_prepared_merge_runs_again_without_waiting_or_allocating(monkeypatch, launches, spec):
    monkeypatch.setattr(threshold, "DIRECT", 200)
    monkeypatch.setattr(launch, "BLOCK", 512)
    monkeypatch.setattr(launch, "CHUNK", 4096)
    tensors, want = jobs_and_results(spec, 1)
    jobs = [
        triton_backend.MergeJob(there(b), [there(x) for x in xs], poisoned(len(b), b.dtype), f"w{i}") for i, (b, xs) in enumerate(tensors)
    ]
    merge = triton_backend.prepare_merge(jobs, spec)
    for seed in (1, 2):
        tensors, want = jobs_and_results(spec, seed)
        for job, (base, models) in zip(jobs, tensors):
            job.base.copy_(base)
            for mine, x in zip(job.models, models):
                mine.copy_(x)
            job.out.fill_(float("nan"))
        with Watch(launches) as watch:
            merge.run()
        # Nothing but: counters to zero, models widened.
        assert set(watch.seen) <= {"zero_", "copy_", "slice"}, watch.seen
        for job, expected in zip(jobs, want):
            assert_same_bits(job.out.cpu(), expected)
    assert merge.finite
    jobs[3].models[1][100] = float("nan")
    assert not merge.run()
    jobs[3].models[1][100] = 0.0
    assert merge.run()


def test_merging_without_a_finite_check_does_not_wait(launches):
    base, *models = ({k: there(t) for k, t in m.items()} for m in states(3))
    with pymerge.backend("triton"), Watch(launches) as watch:
        pymerge.ties(base, models, density=0.3, convention="mergekit", check_finite=False)
        pymerge.dare_linear(base, models, convention="mergekit", check_finite=False)
    assert not {"_local_scalar_dense", "item", "nonzero"} & set(watch.seen), Counter(watch.seen)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_prepared_merge_in_a_cuda_graph():
    spec = spec_of(2, "magnitude", True, rescale="norm", zero_vote="majority")
    tensors, want = jobs_and_results(spec, 1)
    jobs = [
        triton_backend.MergeJob(there(b), [there(x) for x in xs], poisoned(len(b), b.dtype), f"w{i}") for i, (b, xs) in enumerate(tensors)
    ]
    merge = triton_backend.prepare_merge(jobs, spec)
    merge.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merge.run()
    tensors, want = jobs_and_results(spec, 2)
    for job, (base, models) in zip(jobs, tensors):
        job.base.copy_(base)
        for mine, x in zip(job.models, models):
            mine.copy_(x)
    graph.replay()
    for job, expected in zip(jobs, want):
        assert_same_bits(job.out.cpu(), expected)
