"""Every preset against an independent NumPy version written from its program's formula."""

import numpy as np
import pytest
import torch

import pymerge
from pymerge.conventions import Convention, kept_count
from tests.oracles import fusion_bench, mergekit, mergelm, peft, philox, sd_mecha, ties_paper

TIES = {
    "default": mergekit,
    "mergekit": mergekit,
    "paper": ties_paper,
    "peft": peft,
    "mergelm": mergelm,
    "fusion_bench": fusion_bench,
    "sd_mecha": sd_mecha,
}
DATA = {
    "normal": lambda rng, n: rng.normal(size=n),
    "many ties": lambda rng, n: rng.integers(-3, 4, size=n) / 4,
    "two values": lambda rng, n: rng.choice([-0.5, 0.5], size=n),
    "all zero": lambda rng, n: np.zeros(n),
    "subnormal": lambda rng, n: rng.integers(-9, 10, size=n) * 1e-45,
}


def vectors(kind, n, count, seed=0, cancel=False):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=n).astype(np.float32) if kind == "normal" else np.zeros(n, np.float32)
    models = [(base + DATA[kind](rng, n).astype(np.float32)).astype(np.float32) for _ in range(count)]
    if cancel:
        models[-1] = (2 * base - models[0]).astype(np.float32)
    return base, models


def close(got, want, base):
    """Equal up to the last bits: the order of additions may differ, the elements that are kept may not."""
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * max(1e-30, float(np.abs(base).max(initial=0))))


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("preset", TIES)
@pytest.mark.usefixtures("each_backend")
def test_ties_presets(preset, kind):
    cases = [(101, 3, 0.2, False), (100, 2, 0.29, True), (64, 1, 0.5, False), (7, 4, 1 / 7, False), (50, 3, 1.0, True), (20, 2, 0.0, False)]
    for n, count, density, cancel in cases:
        base, models = vectors(kind, n, count, seed=n, cancel=cancel)
        weights = [1.0, 0.5, -0.75, 2.0][:count]
        want = TIES[preset].ties(base, models, weights, density, 0.7)
        got = pymerge.ties(
            torch.from_numpy(base), [torch.from_numpy(m) for m in models], weights=weights, density=density, scale=0.7, convention=preset
        )
        close(got.numpy(), want, base)


@pytest.mark.parametrize("preset", ["paper", "mergelm", "fusion_bench"])
@pytest.mark.usefixtures("each_backend")
def test_scope_model_ranks_and_votes_over_all_tensors(preset):
    """A state dict merged at once equals the oracle on the concatenation in the order of the names, whatever the dict's order."""
    shapes = {"b": (3, 5), "a": (7,), "d": (), "c": (0, 4), "e": (11, 2)}
    names = sorted(shapes)
    for kind in ("normal", "many ties"):
        sizes = [int(np.prod(shapes[k])) for k in names]
        base, models = vectors(kind, sum(sizes), 3, seed=5, cancel=True)
        want = TIES[preset].ties(base, models, [1.0, 1.0, 1.0], 0.3, 1.0)

        def cut(v, sizes=sizes):
            parts = dict(zip(names, np.split(v, np.cumsum(sizes)[:-1])))
            return {k: torch.from_numpy(parts[k].reshape(shapes[k])) for k in shapes}

        got = pymerge.ties(cut(base), [cut(m) for m in models], density=0.3, convention=preset)
        assert list(got) == list(shapes)
        assert {k: tuple(v.shape) for k, v in got.items()} == shapes
        close(np.concatenate([got[k].reshape(-1).numpy() for k in names]), want, base)


@pytest.mark.usefixtures("each_backend")
def test_scope_model_computes_all_in_fp64_when_one_tensor_is():
    base, models = vectors("normal", 60, 2, seed=3)
    base, models = base.astype(np.float64), [m.astype(np.float64) for m in models]
    want = ties_paper.ties(base, models, [1.0, 1.0], 0.4, 1.0)

    def cut(v):
        return {"half": torch.from_numpy(v[:30].astype(np.float32)), "rest": torch.from_numpy(v[30:].copy())}

    got = pymerge.ties(cut(base), [cut(m) for m in models], density=0.4, convention="paper")
    assert [t.dtype for t in got.values()] == [torch.float32, torch.float64]
    np.testing.assert_allclose(got["half"].numpy(), want[:30].astype(np.float32), rtol=1e-6)
    np.testing.assert_allclose(got["rest"].numpy(), want[30:], rtol=1e-14)


@pytest.mark.parametrize("preset", ["default", "mergekit", "paper", "peft", "mergelm", "fusion_bench"])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.usefixtures("each_backend")
def test_dare_presets(method, preset):
    if method not in {m for m in ("dare_linear", "dare_ties") if _defines(preset, m)}:
        with pytest.raises(ValueError, match=f"convention '{preset}' does not define '{method}'"):
            getattr(pymerge, method)(torch.zeros(3), [torch.zeros(3)], convention=preset)
        return
    base, models = vectors("normal", 1030, 3, seed=8)
    weights, density, seed, name = [0.5, 1.0, -0.25], 0.3, 2**63 + 12345, "layers.0.w"
    factor = {
        "mergekit": lambda delta, kept: np.abs(delta.astype(np.float64)).sum() / np.abs(kept.astype(np.float64)).sum(),
    }.get(preset, lambda delta, kept: 1 / density)
    mask = lambda i, delta: philox.keep_mask(delta.size, density, seed, name, i)  # noqa: E731
    if preset == "peft" and method == "dare_ties":
        taus = [np.where(mask(i, m - base), m - base, 0) * np.float32(1 / density) for i, m in enumerate(models)]
        want = peft.combine(base, taus, weights, 1.5)
    else:
        want = mergekit.merge(base, models, weights, 1.5, mask, elect=method == "dare_ties", normalize=False, rescale=factor)
    got = getattr(pymerge, method)(
        {name: torch.from_numpy(base)},
        [{name: torch.from_numpy(m)} for m in models],
        weights=weights, density=density, scale=1.5, seed=seed, convention=preset,
    )  # fmt: skip
    close(got[name].numpy(), want, base)


def _defines(preset, method):
    return not (method == "dare_ties" and preset in ("paper", "mergelm", "fusion_bench"))


def test_philox_known_answers():
    """The three vectors that the authors' Random123 distribution publishes for philox4x32-10."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, want in [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, (2**32 - 1, 2**32 - 1), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, (0xA4093822, 0x299F31D0), [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]:
        got = philox.philox4x32(np.array(counter, np.uint32)[:, None], key)
        assert [int(v) for v in got[:, 0]] == want


def test_kept_count():
    assert kept_count(0.29, 100, "floor1") == 28  # 0.29 * 100 is 28.999999999999996, and every peer truncates
    assert [kept_count(0.0, 10, rule) for rule in ("floor1", "floor", "paper")] == [0, 0, 1]
    assert kept_count(0.001, 10, "floor1") == 1
    assert kept_count(0.2, 10, "paper") == 3
    assert kept_count(0.2, 10, "complement") == 3
    assert all(kept_count(1.0, 10, rule) == 10 for rule in ("floor1", "floor", "paper", "complement"))
    assert all(kept_count(0.5, 0, rule) == 0 for rule in ("floor1", "floor", "paper", "complement"))


def test_errors_name_the_choices():
    with pytest.raises(ValueError, match="convention 'papers' does not exist; choose one of 'default', 'mergekit', 'paper'"):
        Convention.resolve("papers", "ties")
    with pytest.raises(ValueError, match="Convention.vote is 'sum'; choose one of 'mass', 'count'"):
        Convention(vote="sum")
    with pytest.raises(TypeError, match="convention is a int"):
        Convention.resolve(3, "ties")


def test_no_choice_is_ignored():
    """On data with ties of every kind, each field changes the result, and each in its own way."""
    generator = torch.Generator().manual_seed(1)
    base = torch.zeros(200)
    models = [torch.randint(-3, 3, (200,), generator=generator) / 4 for _ in range(3)]  # more negative than positive
    changes = [
        {}, {"tie_break": "all"}, {"vote": "count"}, {"vote_weighted": False}, {"zero_vote": "majority"}, {"zero_vote": "drop"},
        {"divisor": "count"}, {"divisor": "none"}, {"rescale": "density"}, {"rescale": "norm"}, {"k": "paper"},
    ]  # fmt: skip
    results = [pymerge.ties(base, models, weights=[1.0, 1.5, 0.5], density=0.5, convention=Convention(**c)) for c in changes]
    for i, one in enumerate(results):
        for j, other in enumerate(results[:i]):
            assert not torch.equal(one, other), (changes[i], changes[j])
