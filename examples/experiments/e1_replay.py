"""E1, forgetting and replay: three tasks one after the other, and what each remedy keeps of the earlier ones.

    python examples/experiments/e1_replay.py [--quick] [--seeds 5]

Tasks: handwritten digits with three fixed orders of the pixels; one network and one head for all. A result matrix per arm and seed, the
metrics from pymerge.metrics. Settings were chosen once, before the first run.
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings

import torch
from digits import Task, accuracy, network, permuted
from matplotlib.figure import Figure
from report import Expectation, Experiment, collect
from torch import Tensor, nn

from pymerge.losses import KLRegularizer
from pymerge.metrics import ResultMatrix, average_accuracy, backward_transfer, learning_accuracy
from pymerge.pipeline import SequentialMerger
from pymerge.replay import ReplayMixer

with warnings.catch_warnings():  # that these methods are academic is said in the table
    warnings.simplefilter("ignore")
    from pymerge.academic import EWC, agem_project

RATIOS = (0.01, 0.05, 0.1, 0.3)
SETTINGS = {"epochs": 10, "lr": 1e-3, "batch": 32, "kl_beta": 1.0, "ema_decay": 0.5, "wise_ft_alpha": 0.5, "ewc_lam": [100, 1000]}
FISHER_SAMPLES, MEMORY_BATCH = 300, 32
LABELS = {
    "padB": "padB: extra steps on new data",
    "joint": "joint: all tasks so far, anew",
    "EMA": "EMA over stages",
    "A-GEM": "A-GEM (academic)",
    **{f"EWC {lam}": f"EWC {lam} (academic)" for lam in SETTINGS["ewc_lam"]},
}


class Stage:
    """Trains one task after others. Samples are numbered through all tasks, so that a stream of numbers is a stream of samples."""

    def __init__(self, tasks: list[Task], epochs: int, seed: int) -> None:
        self.x, self.y = torch.cat([t.train_x for t in tasks]), torch.cat([t.train_y for t in tasks])
        self.size, self.epochs, self.seed = len(tasks[0].train_x), epochs, seed

    def samples(self, number: int) -> range:
        return range(number * self.size, (number + 1) * self.size)

    def batches(self, number: int, ratio: float = 0.0, *, steps: int | None = None, joint: bool = False):
        """Batches of one stage: new data with old data mixed in, or all tasks so far."""
        new = range((number + 1) * self.size) if joint else self.samples(number)
        old = {f"task {i + 1}": self.samples(i) for i in range(number)} if ratio else {"none": self.samples(0)}
        mixer = ReplayMixer(new, old, ratio=ratio, seed=self.seed * 10 + number, tag=False)
        steps = math.ceil(len(mixer) / 32) * self.epochs if steps is None else steps
        epoch = 0
        while steps > 0:
            mixer.set_epoch(epoch)
            for batch in torch.tensor(list(mixer)).split(32)[:steps]:
                yield batch
                steps -= 1
            epoch += 1

    def train(self, model: nn.Module, batches, penalty=None, project=None) -> nn.Module:
        optimizer = torch.optim.Adam(model.parameters(), lr=SETTINGS["lr"])
        for batch in batches:
            optimizer.zero_grad()
            logits = model(self.x[batch])
            loss = nn.functional.cross_entropy(logits, self.y[batch])
            (loss if penalty is None else loss + penalty(logits, self.x[batch])).backward()
            if project is not None:
                project(model)
            optimizer.step()
        return model


def agem(stage: Stage, number: int):
    """Projects a step's gradient by that of a batch from all earlier tasks."""
    generator = torch.Generator().manual_seed(stage.seed)

    def flat(model: nn.Module) -> Tensor:
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def project(model: nn.Module) -> None:
        own = flat(model)
        memory = torch.randint(number * stage.size, (MEMORY_BATCH,), generator=generator)
        model.zero_grad()
        nn.functional.cross_entropy(model(stage.x[memory]), stage.y[memory]).backward()
        merged = agem_project(own, flat(model)).split([p.numel() for p in model.parameters()])
        for p, gradient in zip(model.parameters(), merged):
            p.grad = gradient.view_as(p)

    return project


def run_arm(arm: str, tasks: list[Task], stage: Stage, first: nn.Module, seed: int) -> list[dict[str, Tensor]]:
    """The model deployed after each of the stages."""
    model = copy.deepcopy(first)
    deployed = [copy.deepcopy(model.state_dict())]
    merger = {
        "EMA": lambda: SequentialMerger(deployed[0], "ema", decay=SETTINGS["ema_decay"]),
        "WiSE-FT": lambda: SequentialMerger(deployed[0], "wise_ft", alpha=SETTINGS["wise_ft_alpha"], init="last"),
    }.get(arm, lambda: None)()
    ewc = EWC(model, float(arm.split()[1]), seed=seed) if arm.startswith("EWC") else None
    for number in range(1, len(tasks)):
        if arm.startswith("replay"):
            stage.train(model, stage.batches(number, float(arm.split()[1])))
        elif arm == "padB":  # as many steps as the largest replay takes
            stage.train(model, stage.batches(number, steps=math.ceil(stage.size / (1 - RATIOS[-1]) / 32) * stage.epochs))
        elif arm == "KL":
            regularizer = KLRegularizer(copy.deepcopy(model).requires_grad_(False), SETTINGS["kl_beta"], direction="forward")
            stage.train(model, stage.batches(number), penalty=regularizer)
        elif arm == "joint":
            model = stage.train(network(seed), stage.batches(number, joint=True))
        elif arm == "A-GEM":
            stage.train(model, stage.batches(number), project=agem(stage, number))
        elif ewc is not None:
            picked = stage.samples(number - 1)[:FISHER_SAMPLES]
            ewc.end_task((stage.x[i], stage.y[i]) for i in picked)
            stage.train(model, stage.batches(number), penalty=lambda logits, x: ewc.penalty())
        else:
            stage.train(model, stage.batches(number))
        state = copy.deepcopy(model.state_dict())
        if merger is not None:
            state = merger.add(state, tasks[number].name)
            model.load_state_dict(merger.next_init())
        deployed.append(state)
    return deployed


ARMS = (
    "naive",
    "padB",
    "KL",
    "EMA",
    "WiSE-FT",
    *(f"replay {r}" for r in RATIOS),
    "joint",
    *(f"EWC {lam}" for lam in SETTINGS["ewc_lam"]),
    "A-GEM",
)


def main() -> None:
    experiment = Experiment.start("E1", "forgetting and replay on three tasks")
    epochs = 2 if experiment.quick else SETTINGS["epochs"]

    def one(seed: int) -> dict[str, ResultMatrix]:
        tasks = permuted(3, seed)
        stage = Stage(tasks, epochs, seed)
        start = network(seed)
        first = stage.train(copy.deepcopy(start), stage.batches(0))
        found = {}
        for arm in ARMS:
            states = [start.state_dict(), *run_arm(arm, tasks, stage, first, seed)]
            scores = [[accuracy(state, task) for task in tasks] for state in states]
            found[arm] = ResultMatrix(["start", *(f"stage {i + 1}" for i in range(3))], [t.name for t in tasks], scores, units="accuracy")
        return found

    matrices = experiment.run(one)
    metrics = {"ACC": average_accuracy, "BWT": backward_transfer, "LA": learning_accuracy}
    runs = collect([{LABELS.get(a, a): {k: float(f(m)) for k, f in metrics.items()} for a, m in seed.items()} for seed in matrices])

    def values(arm: str, measure: str = "ACC") -> list[float]:
        return runs[LABELS.get(arm, arm)][measure]

    expectations = [
        Expectation("naive training forgets: BWT < 0", values("naive", "BWT"), [0.0] * experiment.seeds),
        Expectation("extra steps on new data do not help: ACC of padB = naive within 0.05", values("naive"), values("padB"), within=0.05),
        *(Expectation(f"ACC: naive < {arm}", values("naive"), values(arm)) for arm in ("WiSE-FT", "EMA", "KL")),
        Expectation("ACC: EMA < replay 0.1", values("EMA"), values("replay 0.1")),
        Expectation("ACC: KL < replay 0.1", values("KL"), values("replay 0.1")),
        *(Expectation(f"ACC: replay {a} < replay {b}", values(f"replay {a}"), values(f"replay {b}")) for a, b in zip(RATIOS, RATIOS[1:])),
        Expectation("ACC: replay 0.3 < joint", values("replay 0.3"), values("joint")),
        *(Expectation(f"ACC: {arm} < replay 0.1", values(arm), values("replay 0.1")) for arm in ARMS if "EWC" in arm or arm == "A-GEM"),
        Expectation("replay costs plasticity: LA of replay 0.3 < naive", values("replay 0.3", "LA"), values("naive", "LA")),
    ]
    top = statistics.fmean(values("joint"))
    near = [arm for arm in runs if statistics.fmean(runs[arm]["ACC"]) > top - 0.01 and "joint" not in arm]
    before = statistics.fmean(m["naive"].score("start", t) for m in matrices for t in m["naive"].tasks)
    notes = [
        f"The untrained network scores {before:.3f}: it cannot do the tasks before they are trained.",
        f"Saturation: within 0.01 of joint training's ACC {top:.3f}: {', '.join(near) or 'no arm'}; LA spans "
        f"{min(min(r['LA']) for r in runs.values()):.3f} to {max(max(r['LA']) for r in runs.values()):.3f}.",
    ]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, (arm, row) in enumerate(runs.items()):
        axes.scatter(row["BWT"], row["LA"], color=f"C{i % 10}", marker="o" if i < 10 else "^", s=22, label=arm)
    axes.set(xlabel="backward transfer (0: nothing forgotten)", ylabel="learning accuracy", title="each point a seed")
    axes.legend(fontsize=7, loc="best")
    results = [{LABELS.get(arm, arm): m.to_dict() for arm, m in seed.items()} for seed in matrices]
    experiment.finish(runs, expectations, figure, settings={**SETTINGS, "epochs": epochs}, notes=notes, matrices=results)


if __name__ == "__main__":
    main()
