"""Small cases with known answers, and the warning."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pymerge.academic import EWC, MAS, PackNet, ProgressiveColumn, SynapticIntelligence, agem_project, gem_project


def test_importing_warns_once_and_nothing_else_imports_it():
    code = (
        "import warnings, sys; warnings.simplefilter('always'); import pymerge, pymerge.metrics\n"
        "assert 'pymerge.academic' not in sys.modules and not hasattr(pymerge, 'EWC')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always'); import pymerge.academic\n"
        "assert [w.category.__name__ for w in caught] == ['AcademicMethodWarning'], caught"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def logistic():
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [1.0]]))
    return model


@pytest.mark.parametrize("fisher, samples", [("true", 4000), ("empirical", 2)])
def test_the_fisher_information_of_a_logistic_model(fisher, samples):
    """For x = 2 the probability of class 1 is s = sigmoid(2), and the Fisher information of either weight x^2 s (1 - s)."""
    model = logistic()
    ewc = EWC(model, lam=3.0, fisher=fisher)
    assert ewc.penalty() == 0
    labels = [0, 1] if fisher == "empirical" else [0] * samples
    ewc.end_task([(torch.tensor([2.0]), label) for label in labels])
    s = torch.sigmoid(torch.tensor(2.0)).item()
    want = 4 * s * (1 - s) if fisher == "true" else 4 * (s**2 + (1 - s) ** 2) / 2
    with torch.no_grad():
        model.weight += 0.1
    assert ewc.penalty().item() == pytest.approx(1.5 * 2 * want * 0.01, rel=0.1 if fisher == "true" else 1e-5)


def test_samples_are_squared_one_by_one():
    """Two samples with opposite gradients: the square of their mean would be 0."""
    model = logistic()
    with torch.no_grad():
        model.weight.zero_()
    ewc = EWC(model, lam=2.0, fisher="empirical")
    ewc.end_task([(torch.tensor([1.0]), 0), (torch.tensor([1.0]), 1)])
    assert ewc.tasks[0][0]["weight"].reshape(-1).tolist() == pytest.approx([0.25, 0.25])


def test_mas_by_hand():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(3.0)
    mas = MAS(model, lam=2.0)
    mas.end_task([torch.tensor([1.0]), torch.tensor([-2.0])])  # d (w x)^2 / d w = 2 w x^2: 6 and 24
    with torch.no_grad():
        model.weight.fill_(4.0)
    assert mas.penalty().item() == pytest.approx(2.0 * 15.0)


def test_synaptic_intelligence_counts_what_the_path_took_off_the_loss():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    si = SynapticIntelligence(model, c=1.0, xi=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.001)
    start = 0.5 * model.weight.item() ** 2
    for _ in range(2000):
        optimizer.zero_grad()
        (0.5 * model.weight**2).sum().backward()
        si.before_step()
        optimizer.step()
        si.after_step()
    moved = 1.0 - model.weight.item()
    si.end_task()
    taken = start - 0.5 * model.weight.item() ** 2
    assert si.tasks[0][0]["weight"].item() == pytest.approx(taken / (moved**2 + 0.5), rel=1e-2)


def test_gem_finds_the_nearest_gradient():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        g = torch.randn(30, generator=generator, dtype=torch.float64)
        memory = torch.randn(4, 30, generator=generator, dtype=torch.float64)
        found = gem_project(g, memory)
        products = memory @ found
        assert (products >= -1e-6).all()
        # Optimal: the correction is a non-negative sum of those memories only whose products are 0.
        v = torch.linalg.lstsq(memory.t(), (found - g)[:, None]).solution[:, 0]
        assert (v >= -1e-6).all() and (v * products).abs().max() < 1e-5
    fine = torch.ones(3)
    assert gem_project(fine, torch.ones(2, 3)) is fine
    assert (torch.ones(1, 3) @ gem_project(-fine, torch.ones(1, 3), margin=0.5)).item() == pytest.approx(0, abs=1e-6)


def test_agem():
    g, reference = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0])
    assert agem_project(g, reference).tolist() == [1.0, 0.0]
    assert agem_project(-g, reference) is not None and torch.equal(agem_project(-g, reference), -g)


def test_packnet_shares_weights_out_and_keeps_earlier_tasks():
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    pack = PackNet(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    for task, keep in enumerate((0.5, 0.5, 1.0)):
        for phase in (False, True):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(4, 8)).square().sum().backward()
                pack.freeze_gradients(finetune=phase)
                optimizer.step()
            if not phase:
                pack.prune(keep)
        pack.end_task()
        seen.append(pack.weights_of(task)["weight"].clone())
    owner = pack.owner["weight"]
    assert [(owner == t).sum().item() for t in range(3)] == [32, 16, 16]
    for task, weights in enumerate(seen):
        assert torch.equal(pack.weights_of(task)["weight"], weights)
    with pytest.raises(RuntimeError, match="prune"):
        pack.end_task()


def test_progressive_columns_leave_earlier_ones_alone():
    torch.manual_seed(0)
    first = ProgressiveColumn([4, 6, 5, 2])
    x = torch.randn(3, 4)
    before = first(x)
    second = ProgressiveColumn([4, 3, 3, 2], [first])
    assert {tuple(u.weight.shape) for level in second.lateral for u in level} == {(3, 6), (2, 5)}
    second(x).sum().backward()
    assert all(p.grad is None for p in first.parameters()) and all(p.grad is not None for p in second.parameters())
    assert torch.equal(first(x), before)
    with pytest.raises(ValueError, match="depth"):
        ProgressiveColumn([4, 2], [first])


@pytest.mark.parametrize("build", [
    lambda: EWC(logistic(), -1.0), lambda: EWC(logistic(), 1.0, fisher="diagonal"), lambda: EWC(logistic(), 1.0).end_task([]),
    lambda: SynapticIntelligence(logistic(), xi=0), lambda: EWC(logistic().requires_grad_(False), 1.0),
    lambda: gem_project(torch.zeros(2), torch.zeros(2)), lambda: agem_project(torch.zeros(2), torch.zeros(3)),
    lambda: PackNet(logistic(), ["bias"]), lambda: PackNet(logistic()).prune(0), lambda: ProgressiveColumn([3]),
])  # fmt: skip
def test_what_makes_no_sense_is_said(build):
    with pytest.raises(ValueError):
        build()
