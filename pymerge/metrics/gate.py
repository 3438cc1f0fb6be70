"""A gate for releases: has the new model kept what the old one could do?

"No significant drop" is no answer: with few items nothing is ever significant. So the question is turned around. A probe passes when a
drop of `margin` or more can be excluded (non-inferiority), fails when a drop is certain, and is inconclusive otherwise, with the smallest
drop that its items could have shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .comparison import Comparison, compare_items, compare_means, holm

__all__ = ["FAIL", "INCONCLUSIVE", "PASS", "GateReport", "ProbeResult", "RegressionGate"]

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
EXIT = {PASS: 0, FAIL: 1, INCONCLUSIVE: 3}


@dataclass(frozen=True)
class ProbeResult:
    """One probe's outcome. Differences are new - old with more being better.

    Attributes:
        name: of the probe.
        outcome: ``"pass"``, ``"fail"`` or ``"inconclusive"``.
        old, new: mean scores as measured.
        difference, low, high: and its two-sided interval at ``1 - 2 alpha``, not corrected for the number of probes.
        margin: what must be excluded, noise floor included.
        method: ``"paired"`` or ``"unpaired"``.
        items: how many; 0 where that is not known.
        p_not_inferior, p_drop: corrected one-sided p values: small means not worse by the margin; worse.
        detectable_drop: the smallest true drop that a test of this probe alone finds with 80 % power.
        items_needed: after which an unchanged model passes with 80 % power, None where the present number is not known.
        dropped: a drop is certain.
        critical: inconclusive counts as failed.
    """

    name: str
    outcome: str
    old: float
    new: float
    difference: float
    low: float
    high: float
    margin: float
    method: str
    items: int
    p_not_inferior: float
    p_drop: float
    detectable_drop: float
    items_needed: int | None
    dropped: bool
    critical: bool

    def sentence(self) -> str:
        """The outcome in words."""
        text = f"{self.name}: {self.old:.4g} -> {self.new:.4g} ({self.difference:+.4g}, {self.low:+.4g} to {self.high:+.4g}, {self.method})"
        if self.outcome == PASS:
            return f"{text}: a drop of {self.margin:.3g} can be excluded"
        if self.dropped:
            return f"{text}: it dropped"
        needed = f"; about {self.items_needed} items would do, now {self.items}" if self.items_needed and self.items else ""
        critical = "; the probe is critical" if self.critical else ""
        return (
            f"{text}: neither a drop of {self.margin:.3g} nor its absence is certain; drops below {self.detectable_drop:.2g} cannot be "
            f"seen{needed}{critical}"
        )


@dataclass(frozen=True)
class GateReport:
    """The outcome over all probes: failed if any failed, else inconclusive if any is."""

    probes: tuple[ProbeResult, ...]
    alpha: float
    correction: str

    @property
    def outcome(self) -> str:
        """``"pass"``, ``"fail"`` or ``"inconclusive"``."""
        found = {probe.outcome for probe in self.probes}
        return FAIL if FAIL in found else INCONCLUSIVE if INCONCLUSIVE in found else PASS

    @property
    def exit_code(self) -> int:
        """For continuous integration: 0 passed, 1 failed, 3 inconclusive."""
        return EXIT[self.outcome]

    @property
    def suspicious(self) -> tuple[ProbeResult, ...]:
        """Probes that improved for certain and by more than the margin: often a broken answer parser, not progress."""
        return tuple(p for p in self.probes if p.low > p.margin)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "outcome": self.outcome,
            "alpha": self.alpha,
            "correction": self.correction,
            "probes": [{k: (None if isinstance(v, float) and math.isnan(v) else v) for k, v in asdict(p).items()} for p in self.probes],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def to_markdown(self) -> str:
        """A table and a sentence on each probe that did not pass."""
        rows = ["| probe | old | new | difference | interval | margin | outcome |", "|---|--:|--:|--:|---|--:|---|"]
        for p in self.probes:
            interval = f"{p.low:+.4g} to {p.high:+.4g}"
            rows.append(f"| {p.name} | {p.old:.4g} | {p.new:.4g} | {p.difference:+.4g} | {interval} | {p.margin:.3g} | {p.outcome} |")
        notes = [f"* {p.sentence()}" for p in self.probes if p.outcome != PASS]
        notes += [f"* {p.name} rose by {p.difference:.3g}: check how answers are read before believing it" for p in self.suspicious]
        return "\n".join([f"**{self.outcome}**", "", *rows, "", *notes]).rstrip() + "\n"


class RegressionGate:
    """Compares old and new scores of several probes.

    A probe passes when the one-sided test of "worse by the margin or more" rejects at `alpha`; it fails when the test of "not worse by more
    than `min_effect`" does. Both families of tests are corrected for the number of probes.

    Args:
        margin: the drop that would matter, in the score's unit; a number, or by probe with ``"*"`` for the others.
        alpha: one-sided error.
        correction: ``"holm"`` or ``"none"``.
        min_effect: drops up to this never fail a probe, however certain.
        noise_floor: how far two runs of one and the same model differ (it is added to the margin); a number or by probe.
        critical: probes that must not be inconclusive.
        higher_is_better: for all probes or by probe.

    Raises:
        ValueError: a setting is out of range. A margin of 0 cannot be met by a model that did not change, so it must be positive.
    """

    def __init__(
        self,
        margin: float | Mapping[str, float] = 0.02,
        *,
        alpha: float = 0.05,
        correction: str = "holm",
        min_effect: float = 0.0,
        noise_floor: float | Mapping[str, float] = 0.0,
        critical: Collection[str] = (),
        higher_is_better: bool | Mapping[str, bool] = True,
    ) -> None:
        margins = list(margin.values()) if isinstance(margin, Mapping) else [margin]
        if not all(m > 0 for m in margins):
            raise ValueError(
                f"margin is {margin}; it must be positive: that nothing at all was lost cannot be shown by any number of items"
            )
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha is {alpha}; it must be between 0 and 0.5")
        if correction not in ("holm", "none"):
            raise ValueError(f"correction is {correction!r}; choose 'holm' or 'none'")
        floors = list(noise_floor.values()) if isinstance(noise_floor, Mapping) else [noise_floor]
        if min_effect < 0 or not all(f >= 0 for f in floors):
            raise ValueError(f"min_effect is {min_effect} and noise_floor {noise_floor}; neither can be negative")
        self.margin, self.alpha, self.correction, self.min_effect = margin, alpha, correction, min_effect
        self.noise_floor, self.critical, self.higher_is_better = noise_floor, frozenset(critical), higher_is_better

    def compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> GateReport:
        """Judge probes by name.

        Args:
            old, new: per probe, scores by item (``[items]`` or ``[runs, items]``, in one order: paired), or a pair (mean, standard error),
                or a triple with the number of items (unpaired).

        Raises:
            ValueError: other probes in `new` than in `old`, or scores that cannot be compared; the message names the probe.
        """
        if set(old) != set(new):
            raise ValueError(f"probes differ: only old has {sorted(set(old) - set(new))}, only new has {sorted(set(new) - set(old))}")
        unknown = sorted(self.critical - set(old))
        if not old or unknown:
            raise ValueError(f"critical probes that were not measured: {unknown}" if unknown else "there are no probes")
        measured = {name: self._measure(name, old[name], new[name]) for name in old}
        margins = {name: self._setting(self.margin, name, None) + self._setting(self.noise_floor, name, 0.0) for name in old}
        adjust = holm if self.correction == "holm" else list
        keeps = adjust([measured[n][2].p_not_inferior(margins[n]) for n in measured])
        drops = adjust([measured[n][2].p_inferior(self.min_effect) for n in measured])
        results = []
        for (name, (before, after, found)), keep, drop in zip(measured.items(), keeps, drops):
            critical = name in self.critical
            # Certain to be worse, but by less than the margin, is a pass: that is what a margin means.
            dropped = drop < self.alpha
            outcome = PASS if keep < self.alpha else FAIL if dropped or critical else INCONCLUSIVE
            low, high = found.interval(1 - 2 * self.alpha)
            results.append(
                ProbeResult(
                    name, outcome, before, after, found.difference, low, high, margins[name], found.method, found.items, keep, drop,
                    found.detectable_drop(self.alpha), found.items_needed(margins[name], self.alpha), dropped, critical,
                )
            )  # fmt: skip
        return GateReport(tuple(results), self.alpha, self.correction)

    def _measure(self, name: str, old: Any, new: Any) -> tuple[float, float, Comparison]:
        sign = 1.0 if self._setting(self.higher_is_better, name, True) else -1.0
        try:
            if isinstance(old, tuple) != isinstance(new, tuple):
                raise ValueError("old and new are not of one kind: give items for both, or (mean, standard error) for both")
            if isinstance(old, tuple):
                (before, before_error, *n), (after, after_error, *m) = old, new
                items = min(n[0], m[0]) if n and m else 0
                return before, after, compare_means(sign * before, before_error, sign * after, after_error, items)
            found = compare_items(old, new)
            if sign < 0:
                swapped = found.binary[::-1] if found.binary else None
                found = Comparison(-found.difference, found.stderr, found.degrees, found.method, found.items, swapped)
            return _mean(old), _mean(new), found
        except (ValueError, TypeError) as error:
            raise ValueError(f"probe {name!r}: {error}") from None

    @staticmethod
    def _setting(value: Any, name: str, default: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if name in value:
            return value[name]
        if "*" in value:
            return value["*"]
        if default is None:
            raise ValueError(f"there is no margin for {name!r}; give one, or one for '*'")
        return default


def _mean(scores: Any) -> float:
    rows = scores.tolist() if hasattr(scores, "tolist") else list(scores)
    flat = [float(x) for row in rows for x in row] if rows and hasattr(rows[0], "__len__") else [float(x) for x in rows]
    return math.fsum(flat) / len(flat)
