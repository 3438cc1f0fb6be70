"""E2, linear mode connectivity: between which pairs of networks is the loss low on the straight line?

    python examples/experiments/e2_connectivity.py [--quick] [--seeds 5]

Pairs are trained on the same digits (turned by 45 degrees) in different orders: from one base with small steps, from one base with large
steps, and from two initialisations. The base has seen upright digits only. Settings were chosen once, before the first run.
"""

from __future__ import annotations

import copy
import statistics

from digits import accuracy, fit, loss, network, rotated
from matplotlib.figure import Figure
from report import Expectation, Experiment, collect

from pymerge.diagnostics import check_shared_base, interpolate_eval, weight_drift

ARMS = {
    "shared base, small drift": {"epochs": 10, "lr": 3e-4},
    "shared base, large drift": {"epochs": 30, "lr": 1e-2},
    "different initialisations": {"epochs": 30, "lr": 1e-3},
}
SETTINGS = {"base_epochs": 10, "base_lr": 1e-3, "degrees": 45, "alphas": 11, "arms": ARMS}


def main() -> None:
    experiment = Experiment.start("E2", "loss barriers between networks")
    shorter = 5 if experiment.quick else 1

    def one(seed: int) -> tuple[dict, dict, dict]:
        upright, turned = rotated([0, SETTINGS["degrees"]], seed)
        bases = [
            fit(network(2 * seed + i), upright, epochs=SETTINGS["base_epochs"] // shorter, lr=SETTINGS["base_lr"], seed=seed)
            for i in (0, 1)
        ]
        found, curves, verdicts = {}, {}, {}
        for arm, how in ARMS.items():
            starts = bases if arm.startswith("different") else [bases[0], bases[0]]
            epochs = max(1, how["epochs"] // shorter)
            a, b = (
                fit(copy.deepcopy(m), turned, epochs=epochs, lr=how["lr"], seed=10 * seed + i).state_dict() for i, m in enumerate(starts)
            )
            curve = interpolate_eval(a, b, lambda state: loss(state, turned), alphas=SETTINGS["alphas"])
            errors = interpolate_eval(a, b, lambda state: 1 - accuracy(state, turned), alphas=SETTINGS["alphas"])
            kinship = check_shared_base({"a": a, "b": b})
            found[arm] = {
                "base accuracy": accuracy(bases[0].state_dict(), turned),
                "accuracy of the ends": 1 - (errors.losses[0] + errors.losses[-1]) / 2,
                "loss barrier": curve.barrier(), "error barrier (mean)": errors.barrier("mean"),
                "drift": weight_drift(starts[0].state_dict(), a).total.relative, "median cosine": kinship.pairs[0].median,
            }  # fmt: skip
            curves[arm], verdicts[arm] = curve.to_dict(), kinship.verdict
        return found, curves, verdicts

    seeds = experiment.run(one)
    runs = collect([found for found, _, _ in seeds])
    small, large, different = ARMS
    barrier = {arm: runs[arm]["loss barrier"] for arm in ARMS}
    zero = [0.0] * len(seeds)
    expectations = [
        Expectation("shared base, small drift: loss barrier 0 within 0.01", zero, barrier[small], within=0.01),
        Expectation("loss barrier: small drift < large drift", barrier[small], barrier[large]),
        Expectation("loss barrier: large drift < different initialisations", barrier[large], barrier[different]),
        Expectation(
            "error barrier of different initialisations above the 2 % that count as stable",
            [0.02] * len(seeds),
            runs[different]["error barrier (mean)"],
        ),
        *(
            Expectation(f"check_shared_base says {word} for {arm}", [0.5] * len(seeds), [float(v[arm] == word) for _, _, v in seeds])
            for arm, word in ((small, "PASS"), (large, "PASS"), (different, "FAIL"))
        ),
    ]
    notes = [f"check_shared_base, {arm}: {', '.join(v[arm] for _, _, v in seeds)}." for arm in ARMS]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for i, arm in enumerate(ARMS):
        for _, curves, _ in seeds:
            axes.plot(curves[arm]["alphas"], curves[arm]["losses"], color=f"C{i}", alpha=0.3)
        middle = [statistics.fmean(x) for x in zip(*(curves[arm]["losses"] for _, curves, _ in seeds))]
        axes.plot(seeds[0][1][arm]["alphas"], middle, "o-", color=f"C{i}", label=arm, markersize=4)
    axes.set(xlabel="alpha", ylabel="test loss, nats", title="thin: seeds; thick: their mean")
    axes.legend(fontsize=8)
    experiment.finish(runs, expectations, figure, settings=SETTINGS, notes=notes, curves=[curves for _, curves, _ in seeds])


if __name__ == "__main__":
    main()
