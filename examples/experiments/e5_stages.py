"""E5, SFT -> DPO -> RL in a toy: a format is learnt, made shorter by preference, then a length reward is chased; which stage breaks it?

    python examples/experiments/e5_stages.py [--quick] [--seeds 5]

"529=" is to be answered by "[5,2,9]" and a newline; SFT shows lists with 0 to 3 spaces after the commas. DPO prefers no spaces to three. RL
(REINFORCE) rewards the answer's length alone, with nothing else, with a KL term to the SFT model, or with SFT replay. The probe is a
verifier: the answer must end and parse as the right list. Settings were chosen once, before the first run.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
from functools import partial

import torch
from matplotlib.figure import Figure
from report import Expectation, Experiment, collect
from tiny_lm import IGNORE, TinyLM, cross_entropy, fit, nats, pack, read_stdlib
from torch import Tensor, nn

from pymerge.losses import kl_estimate
from pymerge.metrics import RegressionGate
from pymerge.pipeline import StageMonitor

SETTINGS = {
    "base_steps": 200, "sft_steps": 300, "lr": 2e-3, "dpo_steps": 40, "dpo_lr": 2e-4, "dpo_beta": 0.1, "rl_steps": 60, "rl_lr": 5e-4,
    "kl_beta": 0.2, "replay_weight": 1.0, "batch": 32, "items": 200,
}  # fmt: skip
QUICK = {**SETTINGS, "base_steps": 5, "sft_steps": 100, "dpo_steps": 4, "rl_steps": 2, "items": 40}
PROMPT, LIMIT, END = 4, 24, ord("\n")
RL = {"RL": {}, "RL + KL": {"kl": True}, "RL + replay": {"replay": True}, "RL + KL + replay": {"kl": True, "replay": True}}


def prompts(count: int, rng: random.Random) -> list[str]:
    return ["".join(rng.choice("0123456789") for _ in range(3)) + "=" for _ in range(count)]


def answer(prompt: str, spaces: int) -> bytes:
    return f"{prompt}[{(',' + ' ' * spaces).join(prompt[:3])}]\n".encode()


def masked(samples: list[bytes]) -> tuple[Tensor, Tensor]:
    """Only the answers count."""
    ids, labels = pack(samples)
    labels[:, : PROMPT - 1] = IGNORE
    return ids, labels


def log_p(model: TinyLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Per token, 0 where the label does not count."""
    found = torch.log_softmax(model(ids), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return found * (labels != IGNORE)


@torch.no_grad()
def generate(model: TinyLM, asked: list[str], generator: torch.Generator | None = None) -> list[bytes]:
    """Prompts with their answers, cut after the first newline or LIMIT bytes; sampled with a generator, else the most likely byte."""
    ids = torch.tensor([list(p.encode()) for p in asked])
    for _ in range(LIMIT):
        logits = model(ids)[:, -1]
        step = logits.argmax(-1, keepdim=True) if generator is None else torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, step], 1)
    rows = [bytes(row) for row in ids.tolist()]
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


def valid(prompt: str, full: bytes) -> float:
    text = full[PROMPT:].decode("latin-1")
    try:
        return float(text.endswith("\n") and json.loads(text) == [int(d) for d in prompt[:3]])
    except ValueError:
        return 0.0


def dpo(model: TinyLM, s: dict, rng: random.Random) -> TinyLM:
    """Direct preference optimisation (Rafailov et al. 2023): short answers over long ones."""
    model, reference = copy.deepcopy(model), model
    optimizer = torch.optim.Adam(model.parameters(), lr=s["dpo_lr"])
    for _ in range(s["dpo_steps"]):
        asked = prompts(s["batch"], rng)
        sides = [masked([answer(p, spaces) for p in asked]) for spaces in (0, 3)]
        with torch.no_grad():
            anchors = [log_p(reference, *side).sum(1) for side in sides]
        chosen, rejected = (log_p(model, *side).sum(1) - anchor for side, anchor in zip(sides, anchors))
        optimizer.zero_grad()
        (-nn.functional.logsigmoid(s["dpo_beta"] * (chosen - rejected)).mean()).backward()
        optimizer.step()
    return model


def reinforce(model: TinyLM, sft: TinyLM, s: dict, seed: int, *, kl: bool = False, replay: bool = False) -> TinyLM:
    """The length of the answer is the reward; the batch's mean is the baseline."""
    model, rng, generator = copy.deepcopy(model), random.Random(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=s["rl_lr"])
    for _ in range(s["rl_steps"]):
        rollouts = generate(model, prompts(s["batch"], rng), generator)
        reward = torch.tensor([(len(r) - PROMPT) / LIMIT for r in rollouts])
        ids, labels = masked(rollouts)
        logp, counted = log_p(model, ids, labels), labels != IGNORE
        loss = -((reward - reward.mean()) / (reward.std() + 1e-6) * logp.sum(1)).mean()
        if kl:
            with torch.no_grad():
                anchor = log_p(sft, ids, labels)
            loss = loss + s["kl_beta"] * (kl_estimate(logp, anchor, estimator="k3") * counted).sum(1).mean()
        if replay:
            ids, labels = masked([answer(p, rng.randrange(4)) for p in prompts(s["batch"], rng)])
            loss = loss + s["replay_weight"] * cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def one_seed(seed: int, s: dict, prose: list[bytes], folder) -> tuple[dict, dict]:
    rng = random.Random(seed)
    prose = rng.sample(prose, len(prose))
    held, old = prose[: s["items"]], prose[s["items"] :]
    asked = prompts(s["items"], rng)
    torch.manual_seed(seed)
    batch = s["batch"]
    base = fit(TinyLM(), (rng.choices(old, k=batch) for _ in range(s["base_steps"])), s["lr"])
    shown = ([answer(p, rng.randrange(4)) for p in prompts(batch, rng)] for _ in range(s["sft_steps"]))
    sft = fit(copy.deepcopy(base), shown, s["lr"])
    short = dpo(sft, s, rng)
    stages = {"base": base, "SFT": sft, "DPO": short, **{arm: reinforce(short, sft, s, seed, **on) for arm, on in RL.items()}}
    found, verdicts, items = {}, {}, {}
    for name, model in stages.items():
        answers = generate(model, asked)
        items[name] = {"format": list(map(valid, asked, answers))}
        found[name] = {
            "format": statistics.fmean(items[name]["format"]), "length": statistics.fmean(len(a) - PROMPT for a in answers),
            "prose loss": nats(model, held),
        }  # fmt: skip
    for arm in RL:  # one record per kind of last stage
        path = folder / f"{seed}-{arm.replace(' ', '')}.jsonl"
        path.unlink(missing_ok=True)
        monitor = StageMonitor(path, gate=RegressionGate(margin=0.05), introduced={"format": "SFT"})
        verdicts[arm] = {}
        for name in ("base", "SFT", "DPO", arm):
            report = monitor.record(name, scores=items[name])
            if report is not None:
                verdicts[arm][name] = report.outcome
    return found, verdicts


def main() -> None:
    import tempfile
    from pathlib import Path

    experiment = Experiment.start("E5", "SFT, DPO and RL on a toy format")
    settings = QUICK if experiment.quick else SETTINGS
    prose, _ = read_stdlib(6 if experiment.quick else 30)
    with tempfile.TemporaryDirectory() as folder:
        seeds = experiment.run(partial(one_seed, s=settings, prose=prose, folder=Path(folder)))
    runs = collect([run for run, _ in seeds])
    fmt = {stage: row["format"] for stage, row in runs.items()}
    count = len(seeds)
    fired = [float(verdicts["RL"]["RL"] == "fail") for _, verdicts in seeds]
    expectations = [
        Expectation("the base cannot do the format: below 0.05", fmt["base"], [0.05] * count),
        Expectation("SFT learns it: above 0.95", [0.95] * count, fmt["SFT"]),
        Expectation("DPO costs a little: within 0.05 of SFT", fmt["DPO"], fmt["SFT"], within=0.05),
        Expectation("RL without a KL term breaks the format: more than 0.2 below DPO", [x + 0.2 for x in fmt["RL"]], fmt["DPO"]),
        *(Expectation(f"{arm} keeps more of the format than RL", fmt["RL"], fmt[arm]) for arm in RL if arm != "RL"),
        Expectation("RL lengthens the answers", runs["DPO"]["length"], runs["RL"]["length"]),
        Expectation("the gate fails the stage of RL without a KL term", [0.5] * count, fired),
    ]
    verdicts = [v for _, v in seeds]
    notes = [
        f"Gate, {arm}: " + "; ".join(f"{stage}: {', '.join(v[arm][stage] for v in verdicts)}" for stage in verdicts[0][arm]) for arm in RL
    ]
    full = [stage for stage, values in fmt.items() if min(values) == 1.0]
    notes.append(f"Saturation: the format probe is 1 in every seed for {', '.join(full) or 'no stage'}.")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for seed in range(count):
        axes.plot(["base", "SFT", "DPO"], [fmt[x][seed] for x in ("base", "SFT", "DPO")], "o-", color="0.6", markersize=4)
    for i, arm in enumerate(RL):
        axes.scatter([arm] * count, fmt[arm], color=f"C{i}")
    axes.set_xticks(range(3 + len(RL)), [label.replace(" + ", "\n+ ") for label in ("base", "SFT", "DPO", *RL)])
    axes.set(ylabel="answers in the right format", ylim=(-0.05, 1.05), title="each point a seed")
    experiment.finish(runs, expectations, figure, settings=settings, notes=notes, gate=verdicts)


if __name__ == "__main__":
    main()
