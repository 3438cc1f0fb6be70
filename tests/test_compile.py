"""The operators under torch.library's checks and under torch.compile."""

import pytest
import torch

import pymerge
from pymerge import many_ops, ops  # noqa: F401, registers the operators
from pymerge.conventions import Convention
from pymerge.spec import MergeSpec

BASE = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
MODELS = [BASE + 0.1 * torch.randn(6, 5, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)]
SPECS = {
    "sum": MergeSpec((1.0, 0.5, -1.0), (1.0,) * 3, convention=Convention(divisor="none")),
    "ties": MergeSpec((1.0,) * 3, (0.3, 0.5, 1.0), "magnitude", True),
    "dare": MergeSpec((1.0,) * 3, (0.5,) * 3, "bernoulli", False, Convention(rescale="density"), seed=2**63 + 1),
}
ARGS = {name: ops._spec_args(BASE, MODELS, spec, "w", None) for name, spec in SPECS.items()}
CALLS = {
    "select": ([BASE], MODELS, [3, 4, 30], "first"),
    "vote_balance": ARGS["ties"],
    "lerp": (BASE, MODELS[0], 0.3, torch.float32),
    "dots": (BASE, MODELS[0]),
}


@pytest.mark.parametrize("spec", ARGS)
@pytest.mark.usefixtures("each_backend")
def test_opcheck_of_merge(spec):
    torch.library.opcheck(torch.ops.pymerge.merge.default, (*ARGS[spec], None, torch.bfloat16, True))
    torch.library.opcheck(torch.ops.pymerge.merge_out.default, (*ARGS[spec], None, True, torch.zeros(6, 5)))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("each_backend")
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.pymerge, name).default, CALLS[name])


@pytest.mark.usefixtures("each_backend")
def test_opcheck_of_the_writing_operators():
    torch.library.opcheck(torch.ops.pymerge.lerp_.default, (BASE.clone(), MODELS[0], 0.3))
    torch.library.opcheck(torch.ops.pymerge.lerp_out.default, (BASE, MODELS[0], 0.3, torch.zeros(6, 5)))


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.usefixtures("each_backend")
def test_opcheck_of_operators_on_many_tensors(scope):
    outs = [torch.zeros(6, 5), torch.zeros(6, 5)]
    args = ([BASE, BASE + 1], [*MODELS, *MODELS], *ARGS["ties"][2:-2], scope, ["v", "w"], True, outs)
    torch.library.opcheck(torch.ops.pymerge.merge_many_out.default, args)
    lerp_args = ([BASE, BASE], MODELS[:2], 0.3, ["v", "w"], "a", "b", True, outs)
    torch.library.opcheck(torch.ops.pymerge.lerp_many_out.default, lerp_args)
    torch.library.opcheck(torch.ops.pymerge.lerp_many_.default, ([BASE.clone(), BASE.clone()], MODELS[:2], 0.3))


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def test_operators_compile_into_one_graph():
    settings = ARGS["ties"][2:]

    def function(base, models):
        merged = torch.ops.pymerge.merge(base, models, *settings, None, torch.float32, False)
        torch.ops.pymerge.lerp_(merged, models[0], 0.25)
        return torch.ops.pymerge.lerp(merged, models[1], 0.5, torch.float32) * torch.ops.pymerge.dots(*models[:2])[2].float()

    assert torch.equal(compiled(function)(BASE, MODELS), function(BASE, MODELS))
    assert torch.equal(compiled(function, "inductor")(BASE, MODELS), function(BASE, MODELS))


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "task_arithmetic"])
def test_methods_on_tensors_compile_into_one_graph(method):
    def function(base, a, b):
        return getattr(pymerge, method)(base * 2, [a, b]) + 1

    assert torch.equal(compiled(function)(BASE, *MODELS[:2]), function(BASE, *MODELS[:2]))


def test_soup_compiles_with_changing_shapes():
    function = compiled(lambda a, b: pymerge.model_soup([a, b]) + 1)
    for n in (3, 7, 11):
        a, b = torch.randn(n), torch.randn(n)
        assert torch.equal(function(a, b), pymerge.model_soup([a, b]) + 1)
