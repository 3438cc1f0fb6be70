"""What to leave out before mixing: duplicates, samples of poor quality, and whatever is in an evaluation set.

Every function returns :class:`Curated`: places, and a reason for each sample left out. Nothing is copied or changed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Curated", "decontaminate", "dedup_exact", "filter_quality", "minhash_dedup"]

Text = Callable[[Any], str]


@dataclass
class Curated:
    """What was kept of a data set.

    Attributes:
        kept: places of the samples that stay, ascending.
        dropped: place of each sample left out -> why.
    """

    kept: list[int] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)

    def of(self, samples: Sequence) -> Sequence:
        """The samples that stay, as a map-style dataset over `samples`."""
        from torch.utils.data import Subset

        return Subset(samples, self.kept)

    def _note(self, place: int, reason: str | None) -> None:
        if reason is None:
            self.kept.append(place)
        else:
            self.dropped[place] = reason


def _text_of(sample: Any) -> str:
    if isinstance(sample, str):
        return sample
    raise TypeError(f"a sample is a {type(sample).__name__}; pass text=, a function that gives a sample's text")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def dedup_exact(samples: Iterable, *, against: Iterable = (), text: Text = _text_of) -> Curated:
    """Leave out samples whose text occurred before, here or in `against`; case, punctuation and spacing do not count."""
    seen: dict[tuple, str] = {}
    for place, sample in enumerate(against):
        seen.setdefault(tuple(_words(text(sample))), f"the same as {place} of the data compared against")
    result = Curated()
    for place, sample in enumerate(samples):
        words = tuple(_words(text(sample)))
        result._note(place, seen.get(words))
        seen.setdefault(words, f"the same as {place}")
    return result


def minhash_dedup(
    samples: Iterable,
    *,
    against: Iterable = (),
    threshold: float = 0.8,
    num_perm: int = 128,
    ngram: int = 5,
    seed: int = 1,
    text: Text = _text_of,
) -> Curated:
    """Leave out near duplicates: samples whose word n-grams have a Jaccard similarity of at least `threshold` with an earlier sample that
    stayed, here or in `against`.

    Candidates come from datasketch's MinHash LSH (Broder 1997), which finds a pair with a probability that rises steeply around the
    threshold; each is then checked by its exact similarity. So nothing below the threshold is left out, and pairs little above it can be
    missed. Needs datasketch (``pip install "pymerge-kernels[replay]"``).

    Args:
        samples: the data.
        against: other data whose near duplicates are left out too.
        threshold: in (0, 1].
        num_perm: hash functions of a signature; more find pairs more surely.
        ngram: words of a shingle; shorter texts are one shingle.
        seed: of the hash functions.
        text: gives a sample's text.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it is a Jaccard similarity, above 0 and at most 1")
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=min(threshold, 0.999), num_perm=num_perm)
    stored: dict[str, frozenset] = {}

    def nearest(sample: Any, name: str) -> str | None:
        shingles = _shingles(_words(text(sample)), ngram)
        signature = MinHash(num_perm=num_perm, seed=seed)
        signature.update_batch([s.encode() for s in sorted(shingles)])
        best = max(((_jaccard(shingles, stored[other]), other) for other in index.query(signature)), default=(0.0, ""))
        if best[0] >= threshold:
            return f"similarity {best[0]:.3f} with {best[1]}"
        stored[name] = shingles
        index.insert(name, signature)
        return None

    for place, sample in enumerate(against):
        nearest(sample, f"{place} of the data compared against")
    result = Curated()
    for place, sample in enumerate(samples):
        result._note(place, nearest(sample, str(place)))
    return result


def decontaminate(samples: Iterable, evaluation: Iterable, *, ngram: int = 13, text: Text = _text_of) -> Curated:
    """Leave out samples that share a run of `ngram` words with a sample of an evaluation set (Brown et al. 2020, appendix C: 13).

    Evaluation samples with fewer words count when they occur as a whole; those of fewer than 4 words would hit everything and are not
    looked for.
    """
    if ngram < 1:
        raise ValueError(f"ngram is {ngram}; at least one word is compared")
    runs: dict[int, dict[tuple, int]] = {}
    for place, sample in enumerate(evaluation):
        words = _words(text(sample))
        length = min(ngram, len(words))
        if length >= min(4, ngram):
            for begin in range(len(words) - length + 1):
                runs.setdefault(length, {}).setdefault(tuple(words[begin : begin + length]), place)
    result = Curated()
    for place, sample in enumerate(samples):
        words = _words(text(sample))
        result._note(place, _first_hit(words, runs))
    return result


def _first_hit(words: list[str], runs: dict[int, dict[tuple, int]]) -> str | None:
    for length, known in runs.items():
        for begin in range(len(words) - length + 1):
            found = known.get(tuple(words[begin : begin + length]))
            if found is not None:
                return f"shares {' '.join(words[begin : begin + length])!r} with {found} of the evaluation data"
    return None


def filter_quality(
    samples: Iterable,
    *,
    keep: Callable[[Any], bool] | None = None,
    quality: Callable[[Any], float] | None = None,
    min_quality: float | None = None,
) -> Curated:
    """Leave out what `keep` refuses, and what `quality` puts below `min_quality` (NaN is below everything)."""
    if (quality is None) != (min_quality is None):
        raise ValueError("quality and min_quality go together")
    if keep is None and quality is None:
        raise ValueError("give keep, or quality with min_quality")
    result = Curated()
    for place, sample in enumerate(samples):
        reason = "refused by the filter" if keep is not None and not keep(sample) else None
        if reason is None and quality is not None:
            score = quality(sample)
            reason = None if score >= min_quality else f"quality {score:.4g} is below {min_quality}"
        result._note(place, reason)
    return result


def _shingles(words: list[str], n: int) -> frozenset[str]:
    return frozenset(" ".join(words[i : i + n]) for i in range(max(len(words) - n + 1, 1)))


def _jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b)
