"""Trains a base and three experts, merges their checkpoints with the `pymerge` command, and measures every model on every domain.

    python examples/digits_demo.py [output folder]

Base: scikit-learn's handwritten digits. Experts: the base fine-tuned on the same digits rotated, inverted or noised. No merge
setting was searched for: densities and scales are the usual ones, and the table is what comes out. The experts' training was changed once
after a first look (rotation by 30 instead of 90 degrees, 40 epochs instead of 10): the inverted expert had not learnt its own domain.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from digits_domains import DOMAINS, accuracies, load_checkpoint, load_domains, network, save_checkpoint, train
from digits_report import Row, findings, print_table, write_picture
from rich.console import Console

EXPERTS = DOMAINS[1:]


def recipes() -> dict[str, dict]:
    """Row name -> recipe, in mergekit's format. A relative path starts at the recipe's own folder."""

    def models(**parameters: float) -> list[dict]:
        return [{"model": f"../{name}", "parameters": {"weight": 1.0, **parameters}} for name in EXPERTS]

    base = {"base_model": "../base"}
    return {
        "soup": {"merge_method": "linear", "models": models(), "parameters": {"normalize": True}},
        "task arithmetic, 0.4": {"merge_method": "task_arithmetic", **base, "models": models(), "parameters": {"lambda": 0.4}},
        "TIES, 20 %": {"merge_method": "ties", **base, "models": models(density=0.2), "parameters": {"normalize": True, "lambda": 1.0}},
        "DARE-TIES, 50 %": {
            "merge_method": "dare_ties",
            **base,
            "models": models(density=0.5),
            "parameters": {"normalize": True, "lambda": 1.0},
        },
        **{
            f"WiSE-FT {name}, 0.5": {
                "merge_method": "wise_ft",
                **base,
                "models": [{"model": f"../{name}"}],
                "parameters": {"alpha": 0.5},
            }
            for name in EXPERTS
        },
    }


def drift(state: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> float:
    """|model - base| / |base| over all weights."""
    return (sum((state[k] - base[k]).square().sum() for k in base) / sum(base[k].square().sum() for k in base)).sqrt().item()


def train_all(root: Path, domains, console: Console) -> list[Row]:
    torch.manual_seed(0)
    base = train(network(), domains["upright"], epochs=30, lr=1e-3, seed=0)
    save_checkpoint(base.state_dict(), root / "base", shards=2)
    rows, drifts = [Row("base", "base", accuracies(base.state_dict(), domains))], []
    for seed, name in enumerate(EXPERTS, start=1):
        expert = train(copy.deepcopy(base), domains[name], epochs=40, lr=5e-4, seed=seed)
        save_checkpoint(expert.state_dict(), root / name)
        rows.append(Row("expert", f"expert {name}", accuracies(expert.state_dict(), domains)))
        drifts.append(f"{name} {drift(expert.state_dict(), base.state_dict()):.2f}")
    console.print(f"drift of the experts, |expert - base| / |base|: {', '.join(drifts)}", highlight=False, soft_wrap=True)
    return rows


def merge_all(root: Path, domains, console: Console) -> list[Row]:
    rows = []
    for name, recipe in recipes().items():
        slug = name.lower().replace(", ", "-").replace(" %", "").replace(" ", "-")
        file, out = root / "recipes" / f"{slug}.yml", root / "merged" / slug
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump({**recipe, "dtype": "float32"}, sort_keys=False))
        # The command that `pip install` put beside this Python, so that the demo runs without activating the environment.
        command = [str(Path(sys.executable).with_name("pymerge")), "merge", str(file), str(out), "--force"]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"pymerge merge {file} {out} failed:\n{done.stdout}{done.stderr}".rstrip())
        console.print(f"pymerge merge {file} {out}   [dim]{time.perf_counter() - started:.1f} s[/dim]", highlight=False, soft_wrap=True)
        rows.append(Row("merge", name, accuracies(load_checkpoint(out), domains)))
    return rows


def main(root: Path) -> None:
    torch.set_num_threads(1)
    console = Console()
    domains = load_domains()
    console.print(f"training a base and {len(EXPERTS)} experts; checkpoints in {root}/", highlight=False)
    rows = train_all(root, domains, console)
    rows += merge_all(root, domains, console)
    console.print()
    print_table(rows, DOMAINS, console)
    for line in findings(rows, DOMAINS):
        console.print(line, highlight=False, soft_wrap=True)
    picture = root / "accuracy.png"
    write_picture(rows, DOMAINS, picture)
    console.print(f"Picture: {picture.resolve()}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output"))
