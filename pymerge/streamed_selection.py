"""Exact selection by magnitude among elements that pass by in parts, in torch operations on the parts' own device, with bounded memory.

For GPUs, on which a tensor may not fit as a whole. Their memory is some fifty times as fast as the bus that brings the parts, so operations
that each read a part once or twice keep up with it.

A sample gives each model a bracket that almost surely holds its k-th key, and a guess inside. A pass counts the keys above the bracket and
those equal to the guess, and collects the others inside. The counts prove where the k-th key is. If it is elsewhere, the next pass looks
there; if more was inside than there is room for, the next pass counts a histogram of the bracket, and the one after it looks into one bin.
Numbers of ties are kept per CHUNK elements, so that only one chunk has to be looked at again for the last tie that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .reference import KEEP_NONE, _deltas

__all__ = ["StreamedSelection"]

CHUNK = 1 << 14
SMALL = 1 << 12  # elements that need no sample
RUN, RUNS = 256, 4096  # sampled elements come in runs, each of which is a read of a file
DEVIATIONS = 10.0  # half a bracket: neighbours are alike, and a miss costs a pass
LEAST_ROOM = 1 << 12  # keys
BINS = 20  # bits of a histogram's bin number


@dataclass
class _Search:
    """One model whose k-th key is not known yet; `lo`, `mid`, `hi` are the bracket and the guess of the current pass."""

    model: int
    k: int
    lo: int
    mid: int
    hi: int
    sample: list[Tensor] = field(default_factory=list)
    histogram: Tensor | None = None  # of the bracket's keys in steps of 2**shift, instead of collecting them
    shift: int = 0

    def begin(self, device: torch.device) -> None:
        self.above = torch.zeros((), dtype=torch.int64, device=device)
        self.inside = 0
        self.ties: list[tuple[int, int, Tensor]] = []  # per part: its first element and size, and ties with the guess per chunk
        self.found: list[tuple[int, int, Tensor, Tensor]] = []  # likewise collected keys, and how many per chunk

    def add(self, key: Tensor, first: int, room: int) -> None:
        """Count and collect the keys of the elements from `first` on."""
        self.above += (key > self.hi).sum()
        equal = key == self.mid
        self.ties.append((first, len(key), _per_chunk(equal)))
        chosen = (key >= self.lo) & (key <= self.hi) & ~equal
        keys = key[chosen]
        self.inside += len(keys)
        if self.histogram is not None:
            self.histogram += _bins(keys, self.lo, self.shift, len(self.histogram))
        elif self.inside <= room:
            self.found.append((first, len(key), keys, _per_chunk(chosen)))
        else:
            self.found.clear()

    def narrow(self, lo: int, hi: int) -> None:
        """The next pass looks in [lo, hi], which has the k-th key."""
        device = self.above.device
        self.lo, self.mid, self.hi = lo, lo, hi
        self.histogram = None
        if lo < hi:
            self.use_histogram(device)

    def use_histogram(self, device: torch.device) -> None:
        self.shift = max((self.hi - self.lo).bit_length() - BINS, 0)
        self.histogram = torch.zeros(((self.hi - self.lo) >> self.shift) + 1, dtype=torch.int64, device=device)


class StreamedSelection:
    """See :class:`pymerge.reference.StreamedSelection`; `limit` is kept, and memory is on the device of what is added.

    Nothing depends on the sample but how many passes there are.
    """

    def __init__(self, n: int, counts: Sequence[int], tie_break: str, f64: bool, limit: int) -> None:
        self._n, self._tie_all = n, tie_break == "all"
        self._dtype = torch.float64 if f64 else torch.float32
        self._top = 2 ** (63 if f64 else 31) - 1
        self._room = max(limit, LEAST_ROOM)
        self._rows = [KEEP_NONE if k <= 0 or n == 0 else (0, n - 1) for k in counts]
        self._searches = [_Search(m, k, 0, 0, self._top) for m, k in enumerate(counts) if 0 < k < n]
        self._strayed = [0] * len(counts)
        self._lookups: list[tuple[int, int, int, int]] = []  # model, begin, end, rank of the tie
        self._seen = 0
        self._begun = False

    @property
    def searched(self) -> int:
        return len(self._searches)

    def sample_ranges(self) -> list[tuple[int, int]]:
        if not self._searches or self._n <= SMALL:
            return []
        runs = min(max(self._n // 64 // RUN, 16), RUNS)
        stride, run = self._n // runs, min(RUN, self._n // runs)
        # Multiples of the golden ratio: anywhere in its stride, and never in step with the rows of a matrix.
        firsts = [r * stride + (r * 0x9E3779B1 % 2**32 * (stride - run + 1) >> 32) for r in range(runs)]
        return [(first, first + run) for first in firsts]

    def sample(self, base: Tensor | None, models: Sequence[Tensor]) -> None:
        for search in self._searches:
            search.sample.append(self._keys(base, models[search.model]))

    def guesses(self) -> Tensor:
        self._begin(None)
        rows = list(self._rows)
        for search in self._searches:
            rows[search.model] = (search.mid, self._n - 1)
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)

    def add(self, base: Tensor | None, models: Sequence[Tensor], first: int) -> None:
        self._begin(models[0].device)
        self._seen += len(models[0])
        for search in self._searches:
            search.add(self._keys(base, models[search.model]), first, self._room)

    def end_pass(self) -> bool:
        if not self._searches:
            return True
        if self._seen != self._n:
            raise ValueError(f"a selection over {self._n} elements was given {self._seen} of them")
        self._searches = [search for search in self._searches if not self._finish(search)]
        self._seen, self._begun = 0, False
        return not self._searches

    def lookups(self) -> list[tuple[int, int]]:
        return [(begin, end) for _, begin, end, _ in self._lookups]

    def look(self, lookup: int, base: Tensor | None, models: Sequence[Tensor], first: int) -> None:
        model, begin, end, rank = self._lookups[lookup]
        key = self._rows[model][0]
        equal = torch.nonzero(self._keys(base, models[model])[begin - first : end - first] == key).view(-1)
        self._rows[model] = (key, begin + int(equal[rank - 1]))

    def rows(self) -> Tensor:
        return torch.tensor(self._rows, dtype=torch.int64).reshape(-1, 2)

    def strayed(self) -> list[int]:
        return self._strayed

    def _keys(self, base: Tensor | None, model: Tensor) -> Tensor:
        (delta,) = _deltas(base, [model], self._dtype)
        return delta.view(torch.int64 if self._dtype == torch.float64 else torch.int32) & self._top

    def _begin(self, device: torch.device | None) -> None:
        """A pass, before its first part; guesses are made of the samples before that, when there are any."""
        for search in self._searches:
            if search.sample:
                self._guess(search)
        if device is not None and not self._begun:
            self._begun = True
            for search in self._searches:
                search.begin(device)

    def _guess(self, search: _Search) -> None:
        falling = torch.cat(search.sample).sort(descending=True).values
        search.sample.clear()
        size, p = len(falling), search.k / self._n
        rank, spread = p * size, DEVIATIONS * math.sqrt(size * p * (1 - p)) + 2
        lowest, highest = int(rank + spread), int(rank - spread)
        search.mid = int(falling[min(int(rank), size - 1)])
        search.lo = int(falling[lowest]) if lowest < size - 1 else 0
        search.hi = int(falling[highest]) if highest > 0 else self._top
        inside = torch.count_nonzero((falling >= search.lo) & (falling <= search.hi) & (falling != search.mid))
        # Twice as many as expected fit: a sample errs, and its error costs a pass.
        if 2 * int(inside) / size * self._n > self._room:
            search.use_histogram(falling.device)

    def _finish(self, search: _Search) -> bool:
        """Find the key and, unless ties are all kept, the chunk of the last one; false when that takes another pass."""
        above = int(search.above)
        equal = sum(int(ties.sum()) for _, _, ties in search.ties)
        if search.k <= above:
            return self._look_in(search, search.hi + 1, self._top)
        if search.k > above + equal + search.inside:
            return self._look_in(search, 0, search.lo - 1)
        if search.histogram is not None:
            counts = search.histogram
            counts[(search.mid - search.lo) >> search.shift] += equal
            found, rank = _from_above(counts, search.k - above)
            key = search.lo + (found << search.shift)
            if search.shift or not (self._tie_all or key == search.mid):  # ties are counted for the guess alone, so the key has to be that
                return self._look_in(search, key, min(search.hi, key + (1 << search.shift) - 1))
            low, high = sorted((key - search.lo, search.mid - search.lo))
            between, ties = int(counts[low:high].sum()), search.ties
        elif search.inside > self._room:
            return self._look_in(search, search.lo, search.hi)
        else:
            key, rank = self._among_collected(search, above, equal)
            low, high = sorted((key, search.mid))
            between = sum(int(torch.count_nonzero((keys >= low) & (keys < high))) for _, _, keys, _ in search.found)
            between += equal if key > search.mid else 0
            ties = search.ties if key == search.mid else [_ties(part, key) for part in search.found]
        self._strayed[search.model] = max(self._strayed[search.model], between)
        self._rows[search.model] = (key, self._n - 1)
        if not self._tie_all:
            self._lookups.append((search.model, *_chunk_of(ties, rank)))
        return True

    def _look_in(self, search: _Search, lo: int, hi: int) -> bool:
        """Another pass; the first one's guess is then far from the result, for all that is known."""
        self._strayed[search.model] = self._n
        search.narrow(lo, hi)
        return False

    def _among_collected(self, search: _Search, above: int, equal: int) -> tuple[int, int]:
        """The k-th key and its rank among those equal to it, by histograms: of all in the bracket, then of one bin of that, and so on."""
        lo, hi, rank = search.lo, search.hi, search.k - above
        while lo < hi:
            shift = max((hi - lo).bit_length() - BINS, 0)
            bins = ((hi - lo) >> shift) + 1
            counts = torch.zeros(bins, dtype=torch.int64, device=search.above.device)
            for _, _, keys, _ in search.found:
                counts += _bins(keys[(keys >= lo) & (keys <= hi)], lo, shift, bins)
            if lo <= search.mid <= hi:
                counts[(search.mid - lo) >> shift] += equal
            found, rank = _from_above(counts, rank)
            lo += found << shift
            hi = min(hi, lo + (1 << shift) - 1)
        return lo, rank


def _bins(keys: Tensor, lo: int, shift: int, bins: int) -> Tensor:
    return torch.bincount((keys.long() - lo) >> shift, minlength=bins)


def _from_above(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that has the rank-th largest, and its rank there."""
    falling = counts.cpu().flip(0).cumsum(0)
    at = int(torch.searchsorted(falling, rank))
    return len(falling) - 1 - at, rank - (int(falling[at - 1]) if at else 0)


def _per_chunk(mask: Tensor) -> Tensor:
    """How many are set, per CHUNK elements."""
    chunks = -(-len(mask) // CHUNK)
    padded = torch.zeros(chunks * CHUNK, dtype=torch.bool, device=mask.device)
    padded[: len(mask)] = mask
    return padded.view(chunks, CHUNK).sum(1)


def _ties(part: tuple[int, int, Tensor, Tensor], key: int) -> tuple[int, int, Tensor]:
    """Collected keys that equal `key`, per chunk of their part."""
    first, size, keys, collected = part
    chunks = torch.repeat_interleave(torch.arange(len(collected), device=keys.device), collected)
    return first, size, torch.bincount(chunks[keys == key], minlength=len(collected))


def _chunk_of(ties: Sequence[tuple[int, int, Tensor]], rank: int) -> tuple[int, int, int]:
    """First and last element of the chunk with the rank-th tie in flat order, and the tie's rank there."""
    for first, size, counts in sorted(ties, key=lambda part: part[0]):
        total = int(counts.sum())
        if rank <= total:
            sums = counts.cpu().cumsum(0)
            at = int(torch.searchsorted(sums, rank))
            begin = first + at * CHUNK
            return begin, min(begin + CHUNK, first + size), rank - (int(sums[at - 1]) if at else 0)
        rank -= total
    raise RuntimeError("the elements changed while they were counted")
