"""E4, a tiny language model: it learns prose, then code; what is left of the prose, and does the drift on code tell?

    python examples/experiments/e4_language_model.py [--quick] [--seeds 5]

Base: a byte transformer trained on docstrings of the standard library; fine-tuned on the library's code. Old samples are shorter than new
ones, so that a share of samples is not a share of tokens. Settings were chosen before the first run; the numbers of
steps were cut once, to fit the time, before any result of the full form was seen.
"""

from __future__ import annotations

import copy
import random
import statistics

import torch
from matplotlib.figure import Figure
from report import Expectation, Experiment, collect
from scipy.stats import spearmanr
from tiny_lm import TinyLM, fit, nats, pack, read_stdlib

import pymerge
from pymerge.diagnostics import kl_drift
from pymerge.losses import KLRegularizer
from pymerge.replay import ReplayMixer

SETTINGS = {
    "base_steps": 300, "base_lr": 3e-3, "lr": [1e-4, 5e-4, 2e-3], "steps": [40, 120], "batch": 16, "replay_ratio": 0.1, "kl_beta": 1.0,
    "wise_ft_alphas": [0.25, 0.5, 0.75], "arms_lr": 2e-3, "held_out": 300,
}  # fmt: skip
QUICK = {**SETTINGS, "base_steps": 40, "lr": [1e-4, 2e-3], "steps": [4, 16], "batch": 8, "held_out": 40}


def batches(samples, steps: int, size: int, seed: int):
    order = random.Random(seed)
    return ([samples[order.randrange(len(samples))] for _ in range(size)] for _ in range(steps))


def in_batches(mixer: ReplayMixer, size: int):
    return ([mixer[i] for i in range(start, min(start + size, len(mixer)))] for start in range(0, len(mixer), size))


def drift(base: TinyLM, model: TinyLM, samples) -> float:
    ids, labels = pack(samples)
    return kl_drift(model, base, [{"ids": ids, "labels": labels}])


def one_seed(seed: int, s: dict, prose: list[bytes], code: list[bytes]) -> tuple[dict, dict]:
    shuffled = random.Random(seed)
    prose, code = shuffled.sample(prose, len(prose)), shuffled.sample(code, len(code))
    held = s["held_out"]
    old, new = prose[held:], code[held:]
    old_test, new_test = prose[:held], code[:held]
    torch.manual_seed(seed)
    base = fit(TinyLM(), batches(old, s["base_steps"], s["batch"], seed), s["base_lr"])
    before = nats(base, old_test)
    longest, lr = s["steps"][-1], s["arms_lr"]
    models: dict[str, TinyLM] = {"base": base}
    for rate in s["lr"]:
        for steps in s["steps"]:
            data = batches(new, steps, s["batch"], seed + 100)
            models[f"naive, lr {rate:g}, {steps} steps"] = fit(copy.deepcopy(base), data, rate)
    naive = f"naive, lr {lr:g}, {longest} steps"
    stream = list(batches(new, longest, s["batch"], seed + 100))
    pool = [sample for batch in stream for sample in batch]
    shares = {}
    for unit in ("samples", "tokens"):
        length = {"length_fn": lambda sample: len(sample) - 1} if unit == "tokens" else {}
        mixer = ReplayMixer(pool, old, ratio=s["replay_ratio"], unit=unit, order="sequential", tag=False, seed=seed, **length)
        models[f"replay {s['replay_ratio']:g} of the {unit}"] = fit(copy.deepcopy(base), in_batches(mixer, s["batch"]), lr)
        report = mixer.report()["sources"]
        shares[unit] = report["old"]["samples"] / len(mixer)
    for direction in ("forward", "reverse"):
        regularizer = KLRegularizer(copy.deepcopy(base).requires_grad_(False), s["kl_beta"], direction=direction)
        models[f"KL {direction}"] = fit(copy.deepcopy(base), stream, lr, penalty=regularizer)
    for alpha in s["wise_ft_alphas"]:
        model = copy.deepcopy(base)
        model.load_state_dict(pymerge.wise_ft(base, models[naive], alpha=alpha))
        models[f"WiSE-FT {alpha:g}"] = model
    found = {}
    for name, model in models.items():
        found[name] = {
            "new loss": nats(model, new_test), "old loss": nats(model, old_test), "old rise": nats(model, old_test) - before,
            "KL on new": drift(base, model, new_test),
        }  # fmt: skip
    return found, shares


def rank_correlation(run: dict, arms) -> float:
    return float(spearmanr([run[a]["KL on new"] for a in arms], [run[a]["old rise"] for a in arms]).statistic)


def main() -> None:
    experiment = Experiment.start("E4", "drift and forgetting of a tiny language model")
    settings = QUICK if experiment.quick else SETTINGS
    prose, code = read_stdlib(8 if experiment.quick else None)
    seeds = experiment.run(lambda seed: one_seed(seed, settings, prose, code))
    found = [run for run, _ in seeds]
    runs = collect(found)
    grid = [arm for arm in runs if arm.startswith("naive")]
    moved = [arm for arm in runs if arm != "base"]
    low, high = f"naive, lr {settings['lr'][0]:g}", f"naive, lr {settings['lr'][-1]:g}"
    short, long = (f", {n} steps" for n in settings["steps"])
    naive, (samples, tokens) = high + long, (f"replay {settings['replay_ratio']:g} of the {u}" for u in ("samples", "tokens"))

    def rise(arm: str) -> list[float]:
        return runs[arm]["old rise"]

    everywhere, on_grid = ([rank_correlation(run, arms) for run in found] for arms in (moved, grid))
    expectations = [
        Expectation("the base cannot do the new task: its loss there is above the tuned model's by 0.5 nats",
                    [x + 0.5 for x in runs[naive]["new loss"]], runs["base"]["new loss"]),
        Expectation("forgetting rises with the learning rate (most steps)", rise(low + long), rise(high + long)),
        Expectation("forgetting rises with the steps (largest learning rate)", rise(high + short), rise(high + long)),
        *(
            Expectation(f"old loss rises less with {arm} than naive", rise(arm), rise(naive))
            for arm in (samples, tokens, "KL forward", "KL reverse")
        ),
        Expectation("a share of tokens keeps more than the same share of shorter samples", rise(tokens), rise(samples)),
        Expectation("WiSE-FT 0.5 keeps more than naive", rise("WiSE-FT 0.5"), rise(naive)),
        Expectation("naive: rank correlation of KL on new data and rise of the old loss above 0.8", [0.8] * len(found), on_grid),
        Expectation("all arms lie on one rising curve: rank correlation above 0.8", [0.8] * len(found), everywhere),
    ]  # fmt: skip
    share = {unit: statistics.fmean(s[unit] for _, s in seeds) for unit in ("samples", "tokens")}
    lengths = [statistics.fmean(len(x) - 1 for x in kind) for kind in (prose, code)]
    notes = [
        f"Old samples have {lengths[0]:.0f} bytes on average, new ones {lengths[1]:.0f}: a ratio of {settings['replay_ratio']:g} of the "
        f"tokens is {share['tokens']:.3f} of the samples.",
        f"Rank correlation of KL on new data and rise of the old loss: naive grid {statistics.fmean(on_grid):.2f}, all arms "
        f"{statistics.fmean(everywhere):.2f}.",
        f"{sum(p.numel() for p in TinyLM().parameters())} parameters; {len(prose)} samples of prose, {len(code)} of code.",
    ]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, arm in enumerate(a for a in moved if a not in grid):
        axes.scatter(runs[arm]["KL on new"], rise(arm), s=22, color=f"C{i}", label=arm)
    axes.scatter(
        *([x for a in grid for x in runs[a][m]] for m in ("KL on new", "old rise")), s=16, color="0.6", marker="s", label="naive grid"
    )
    axes.set(xlabel="KL(base || tuned) on new data, nats per byte", ylabel="rise of the old loss, nats per byte", title="each point a seed")
    axes.legend(fontsize=7)
    experiment.finish(runs, expectations, figure, settings=settings, notes=notes)


if __name__ == "__main__":
    main()
