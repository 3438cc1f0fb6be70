"""Greedy soup: add a model to the average when the held-out score does not drop (Wortsman et al. 2022, arXiv:2203.05482, recipe 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..finite import raise_if_not_finite
from ..reference import compute_dtype, round_to
from ..tree import Facts, Paired, Source, check_alike, common_dtype

__all__ = ["GreedySoup", "greedy_soup"]


@dataclass(frozen=True)
class GreedySoup:
    """What :func:`greedy_soup` found.

    Attributes:
        soup: the average of the chosen candidates, of their kind (for modules a state dict).
        chosen: indices of the candidates in it, in the order they were added.
        score: the soup's score.
        scores: each candidate's own score.
    """

    soup: Any
    chosen: tuple[int, ...]
    score: float
    scores: tuple[float, ...]


def greedy_soup(
    candidates: Sequence[Any | Callable[[], Any]],
    evaluate: Callable[[Any], float],
    *,
    scores: Sequence[float] | None = None,
    higher_is_better: bool = True,
    strict: bool = False,
    dtype: torch.dtype | None = None,
    check_finite: bool = True,
) -> GreedySoup:
    """Try candidates from the best to the worst; keep one when the average with it scores at least as well as without.

    Besides candidates that are given as models, at most three models are in memory: a running sum in fp32, one candidate and one trial
    soup. Callables that load a model keep the candidates out of it; each is called at most twice, and once when `scores` is given.

    Args:
        candidates: models (tensors, mappings name -> tensor or nn.Modules, of one kind) or callables without arguments that return one.
        evaluate: gets a model (for modules a state dict), which it must not change, and returns a held-out score.
        scores: the candidates' own scores where they are known; otherwise each candidate is evaluated.
        higher_is_better: False for losses.
        strict: accept only what scores better (the authors' code); by default also what scores the same (the paper).
        dtype: of the soup; by default the candidates' own.
        check_finite: refuse NaN and Inf in a candidate.

    Equal scores are tried in the order of the list. A NaN score is the worst of all: such a candidate is tried last and never comes first,
    and a soup with a NaN score is not accepted.

    Returns:
        A :class:`GreedySoup`. Its soup is ``sum / n`` of the chosen candidates in the order chosen: the same bytes as
        ``model_soup([candidates[i] for i in chosen])``.

    Raises:
        ValueError: no candidates; not one score per candidate; every score is NaN; names, shapes or devices of candidates differ, found
            before the first trial when candidates are evaluated here.
        TypeError: models of different kinds; tensors that cannot be merged.
        NonFiniteError: a NaN or Inf in a candidate that is tried.
    """
    candidates = list(candidates)
    if not candidates:
        raise ValueError("no candidates given; pass a list of at least one")
    own = _own_scores(candidates, evaluate) if scores is None else [float(s) for s in scores]
    if len(own) != len(candidates):
        raise ValueError(f"{len(own)} scores for {len(candidates)} candidates")
    rank = [-math.inf if math.isnan(s) else (s if higher_is_better else -s) for s in own]
    if all(math.isnan(s) for s in own):
        raise ValueError("every candidate's score is NaN; there is none to start from")
    order = sorted(range(len(own)), key=lambda i: (math.isnan(own[i]), -rank[i]))

    soup = _RunningMean(_load(candidates[order[0]]), order[0], dtype, check_finite)
    chosen, best = [order[0]], own[order[0]]
    for i in order[1:]:
        candidate = _load(candidates[i])
        pairs = soup.paired_with(candidate, i)
        score = float(evaluate(soup.mean(pairs)))
        better = score > best if higher_is_better else score < best
        if better or (score == best and not strict):
            soup.add(pairs)
            chosen.append(i)
            best = score
        del candidate, pairs
    return GreedySoup(soup.mean(), tuple(chosen), best, tuple(own))


def _load(candidate: Any) -> Any:
    # A module is callable too, but it is the model itself.
    return candidate() if callable(candidate) and not isinstance(candidate, (nn.Module, Tensor)) else candidate


def _own_scores(candidates: Sequence[Any], evaluate: Callable[[Any], float]) -> list[float]:
    scores: list[float] = []
    first: tuple[str, dict[str, Facts]] | None = None
    for i, candidate in enumerate(candidates):
        model = _load(candidate)
        source = Source(model, f"candidate {i}")
        facts, _ = source.survey()
        first = first or (source.kind, facts)
        if source.kind != first[0]:
            raise TypeError(f"candidate {i} is a {source.kind}, candidate 0 is a {first[0]}")
        check_alike(["candidate 0", source.label], [first[1], facts])
        scores.append(float(evaluate(model.state_dict() if isinstance(model, nn.Module) else model)))
        del model, source
    return scores


class _RunningMean:
    """A sum of models in fp32 (fp64 tensors in fp64), and the mean that goes with it."""

    def __init__(self, model: Any, index: int, dtype: torch.dtype | None, check_finite: bool) -> None:
        pairs = Paired(None, [model], labels=[f"candidate {index}"])
        self._check_finite = check_finite
        self._require_finite(pairs, index)
        self._dtype = dtype
        self._dtypes = dict(pairs.dtypes)
        self._count = 1
        self._label = f"candidate {index}"
        # x + 0, as every sum of the package starts from +0: only a -0 is changed by it.
        self._sum = pairs.result(lambda name, base, models, dtype, out: models[0].to(compute_dtype(models)) + 0.0)

    def paired_with(self, model: Any, index: int) -> Paired:
        given = model.state_dict() if isinstance(model, nn.Module) else model
        pairs = Paired(self._sum, [given], labels=[self._label, f"candidate {index}"])
        self._require_finite(pairs, index)
        return pairs

    def _require_finite(self, pairs: Paired, index: int) -> None:
        for name in pairs.merged if self._check_finite else ():
            raise_if_not_finite([(f"candidate {index}", pairs.tensors(name)[1][0])], name)

    def mean(self, pairs: Paired | None = None) -> Any:
        """The mean, with the candidate of `pairs` in it if given."""
        count = self._count + (pairs is not None)
        dtypes = self._dtypes_with(pairs)

        def merge_one(name: str, total: Tensor | None, models: list[Tensor], dtype: torch.dtype, out: Tensor | None) -> Tensor:
            total = models[0] if total is None else _plus(total, models[0])
            # A number from the host would make a GPU multiply by its rounded reciprocal.
            return round_to(total / torch.full((), count, dtype=total.dtype, device=total.device), self._dtype or dtypes[name])

        return (pairs or Paired(None, [self._sum])).result(merge_one)

    def add(self, pairs: Paired) -> None:
        """Take in the candidate of `pairs`."""
        self._dtypes = self._dtypes_with(pairs)
        self._sum = pairs.result(lambda name, total, models, dtype, out: _plus(total, models[0]))
        self._count += 1

    def _dtypes_with(self, pairs: Paired | None) -> dict[str, torch.dtype]:
        if pairs is None:
            return self._dtypes
        return {name: common_dtype([have, pairs.facts[1][name].dtype]) for name, have in self._dtypes.items()}


def _plus(total: Tensor, model: Tensor) -> Tensor:
    wide = torch.promote_types(total.dtype, compute_dtype([model]))
    return total.to(wide) + model.to(wide)
