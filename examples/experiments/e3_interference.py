"""E3, interference: does a merge of four experts depend on how their task vectors meet?

    python examples/experiments/e3_interference.py [--quick] [--seeds 5]

Two groups of four experts, each from one base of upright digits: related (digits turned by 15 to 60 degrees) and unrelated (four random
orders of the pixels). Merge settings are the usual ones; the sweep of task arithmetic's scale is reported whole. Settings were chosen
once, before the first run.
"""

from __future__ import annotations

import copy
import statistics

from digits import accuracy, fit, network, permuted, rotated
from matplotlib.figure import Figure
from report import Expectation, Experiment, collect

import pymerge
from pymerge.diagnostics import interference_report

SETTINGS = {
    "base_epochs": 10,
    "base_lr": 1e-3,
    "epochs": 10,
    "lr": 1e-3,
    "degrees": [15, 30, 45, 60],
    "scales": [0.1, 0.2, 0.3, 0.4, 0.6, 1.0],
}
MERGES = {
    "soup": lambda base, models: pymerge.model_soup(models),
    **{f"task arithmetic {s:g}": lambda base, models, s=s: pymerge.task_arithmetic(base, models, [s] * 4) for s in SETTINGS["scales"]},
    "TIES 20 %": lambda base, models: pymerge.ties(base, models, density=0.2),
    "DARE-TIES 50 %": lambda base, models: pymerge.dare_ties(base, models, density=0.5),
    "MagMax 0.5": lambda base, models: pymerge.magmax(base, models, scale=0.5),
}


def main() -> None:
    experiment = Experiment.start("E3", "interference of task vectors")
    shorter = 5 if experiment.quick else 1

    def one(seed: int) -> tuple[dict, dict]:
        groups = {"related": rotated([0, *SETTINGS["degrees"]], seed), "unrelated": permuted(5, seed)}
        upright = groups["related"][0]
        base = fit(network(seed), upright, epochs=SETTINGS["base_epochs"] // shorter, lr=SETTINGS["base_lr"], seed=seed)
        start, found, measures = base.state_dict(), {}, {}
        for group, (_, *tasks) in groups.items():
            experts = [
                fit(copy.deepcopy(base), task, epochs=SETTINGS["epochs"] // shorter, lr=SETTINGS["lr"], seed=10 * seed + i).state_dict()
                for i, task in enumerate(tasks)
            ]
            own = [accuracy(e, t) for e, t in zip(experts, tasks)]
            candidates = {
                "base": start, "experts, each at home": None, **{name: merge(start, experts) for name, merge in MERGES.items()},
            }  # fmt: skip
            for name, state in candidates.items():
                found.setdefault(name, {})[group] = statistics.fmean(own if state is None else [accuracy(state, t) for t in tasks])
            total = interference_report(start, {t.name: e for t, e in zip(tasks, experts)}, trim=0.2).total
            pairs = [total.cosines[i][j] for i in range(4) for j in range(i)]
            measures[group] = {
                "mean cosine": statistics.fmean(pairs), "sign conflict above chance": total.excess_conflict,
                "agreement mass": total.agreement_mass, "sum ratio": total.sum_ratio, "relative drift": statistics.fmean(total.relative),
            }  # fmt: skip
        return found, measures

    seeds = experiment.run(one)
    runs = collect([found for found, _ in seeds])
    measured = collect([measures for _, measures in seeds])

    def kept(merge: str, group: str) -> list[float]:
        """The share of what the experts gained at home that is left."""
        base, own = runs["base"][group], runs["experts, each at home"][group]
        return [(m - b) / (o - b) for m, b, o in zip(runs[merge][group], base, own)]

    related, unrelated = measured["related"], measured["unrelated"]
    best = {group: max(MERGES, key=lambda m: statistics.fmean(runs[m][group])) for group in ("related", "unrelated")}
    expectations = [
        Expectation("cosine: unrelated < related", unrelated["mean cosine"], related["mean cosine"]),
        Expectation("sign conflict: related < unrelated", related["sign conflict above chance"], unrelated["sign conflict above chance"]),
        Expectation("soup keeps more of the gain when related", kept("soup", "unrelated"), kept("soup", "related")),
        Expectation(
            "task arithmetic 0.4 keeps more of the gain when related",
            kept("task arithmetic 0.4", "unrelated"),
            kept("task arithmetic 0.4", "related"),
        ),
        Expectation("task arithmetic at scale 1 is worse than at 0.4 (related)",
                    runs["task arithmetic 1"]["related"], runs["task arithmetic 0.4"]["related"]),
        *(
            Expectation(f"{other} is better than the soup ({group}; not guaranteed)", runs["soup"][group], runs[other][group])
            for other in ("TIES 20 %", "DARE-TIES 50 %", "MagMax 0.5")
            for group in ("related", "unrelated")
        ),
    ]  # fmt: skip
    notes = [
        f"{group}: " + ", ".join(f"{name} {statistics.fmean(values):.3f}" for name, values in row.items())
        for group, row in measured.items()
    ]
    notes += [
        f"{group}: share of the experts' gain kept: soup {statistics.fmean(kept('soup', group)):.2f}, best merge "
        f"{statistics.fmean(kept(best[group], group)):.2f} ({best[group]}, chosen on the test data: an upper bound)."
        for group in best
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for i, group in enumerate(best):
        for j, merge in enumerate(runs):
            axes.plot(
                [j + 0.15 * (2 * i - 1)] * len(seeds), runs[merge][group], "o", color=f"C{i}", markersize=4, label=group if j == 0 else None
            )
    axes.set_xticks(range(len(runs)), runs, rotation=40, ha="right", fontsize=8)
    axes.set(ylabel="mean accuracy on the four tasks", title="each point a seed")
    axes.legend(fontsize=8)
    experiment.finish(runs, expectations, figure, settings=SETTINGS, notes=notes, interference=measured)


if __name__ == "__main__":
    main()
