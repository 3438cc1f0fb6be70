"""What recipes see of the methods: names, parameters, defaults, and per-tensor functions that agree with the public ones."""

import pytest
import torch

import pymerge
from pymerge.merge_methods.registry import _METHODS, REQUIRED, Parameter, get_method

G = torch.Generator().manual_seed(0)
BASE, *MODELS = torch.randn(4, 300, generator=G).unbind()
REST = {"name": "w", "dtype": torch.float32, "out": None, "check_finite": True}


def defaults(name):
    return {p.recipe: p.default for p in get_method(name).parameters}


def recipe(method, base, models, **given):
    """Calls a method as a recipe would: every parameter by name, per-model ones as tuples."""
    arguments = {}
    for p in get_method(method).parameters:
        value = given.pop(p.recipe, p.default)
        assert value is not REQUIRED, p.recipe
        arguments[p.name] = (value,) * len(models) if p.per_model and not isinstance(value, tuple) else value
    assert not given
    return get_method(method).tensor(base, models, **arguments, **REST)


def public(method, *args, **kwargs):
    """The public function on a mapping, so that the tensor has the name that the random draws depend on."""
    named = [[{"w": x} for x in a] if isinstance(a, list) else {"w": a} for a in args]
    return getattr(pymerge, method)(*named, **kwargs)["w"]


def test_names():
    assert pymerge.methods() == (
        "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "karcher", "linear",
        "magmax", "model_soup", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl", "sce", "slerp",
        "task_arithmetic", "ties", "wise_ft",
    )  # fmt: skip
    for name in pymerge.methods():
        assert get_method(name).summary
        assert all(p.doc for p in get_method(name).parameters)


def test_parameters_have_mergekits_names_and_defaults():
    switches = {"normalize": None, "rescale": None, "int8_mask": False}
    deltas = {"weight": REQUIRED, "density": 1.0, **switches, "lambda": 1.0, "convention": "mergekit"}
    assert defaults("ties") == deltas
    assert defaults("dare_linear") == defaults("dare_ties") == {**deltas, "seed": 0}
    assert defaults("task_arithmetic") == {"weight": REQUIRED, "normalize": False, "int8_mask": False, "lambda": 1.0}
    assert defaults("linear") == {"weight": REQUIRED, "normalize": True}
    assert defaults("model_soup") == {"weight": 1.0, "normalize": True}
    assert defaults("slerp") == {"t": REQUIRED} and defaults("wise_ft") == {"alpha": 0.5} and defaults("passthrough") == {"scale": 1.0}
    assert repr(REQUIRED) == "REQUIRED"


@pytest.mark.usefixtures("each_backend")
def test_recipes_agree_with_the_functions():
    w, d = (1.0, 0.5, -0.25), (0.2, 0.5, 1.0)
    same = torch.equal
    assert same(recipe("ties", BASE, MODELS, weight=w, density=d), public("ties", BASE, MODELS, weights=w, density=d))
    for method in ("dare_linear", "dare_ties"):
        want = public(method, BASE, MODELS, weights=w, density=d, scale=0.5, seed=3, convention="mergekit")
        assert same(recipe(method, BASE, MODELS, weight=w, density=d, seed=3, **{"lambda": 0.5}), want)
    assert same(recipe("task_arithmetic", BASE, MODELS, weight=w), pymerge.task_arithmetic(BASE, MODELS, w))
    assert same(recipe("linear", None, MODELS, weight=w), pymerge.linear(MODELS, weights=w))
    assert same(recipe("model_soup", None, MODELS), pymerge.model_soup(MODELS))
    assert same(recipe("slerp", BASE, MODELS[:1], t=0.3), pymerge.slerp(BASE, MODELS[0], t=0.3))
    assert same(recipe("wise_ft", BASE, MODELS[:1]), pymerge.wise_ft(BASE, MODELS[0]))
    assert same(recipe("passthrough", None, MODELS[:1]), MODELS[0])
    assert same(recipe("passthrough", None, MODELS[:1], scale=(2.0,)), MODELS[0] * 2)


def test_recipe_switches():
    """normalize and rescale change what the preset says, int8_mask nothing."""
    w = (1.0, 2.0, 3.0)
    ties, dare = pymerge.Convention.preset("mergekit", "ties"), pymerge.Convention.preset("mergekit", "dare_ties")
    for given, method, convention in [
        ({"normalize": True}, "ties", ties),
        ({"normalize": False}, "ties", ties.replace(divisor="none")),
        ({"rescale": True}, "ties", ties.replace(rescale="norm")),
        ({"int8_mask": True}, "ties", ties),
        ({"normalize": True}, "dare_ties", dare.replace(divisor="weights")),
        ({"rescale": False}, "dare_ties", dare.replace(rescale="none")),
        ({"convention": "peft"}, "ties", "peft"),
        ({"convention": "peft", "normalize": True}, "ties", "peft"),
        ({"convention": "default"}, "dare_ties", "default"),
    ]:
        want = public(method, BASE, MODELS, weights=w, density=0.4, convention=convention)
        assert torch.equal(recipe(method, BASE, MODELS, weight=w, density=(0.4,) * 3, **given), want), (method, given)


def test_which_values_recipes_cannot_have():
    with pytest.raises(ValueError, match="convention 'paper' does not define 'dare_ties'"):
        recipe("dare_ties", BASE, MODELS, weight=1.0, convention="paper")
    with pytest.raises(ValueError, match="sum to zero"):
        recipe("linear", None, MODELS[:2], weight=(1.0, -1.0))


def test_passthrough_is_a_copy():
    x = torch.tensor([-0.0, 1.0])
    out = recipe("passthrough", None, [x])
    assert out is not x and out.signbit().tolist() == [True, False]
    with pytest.raises(pymerge.NonFiniteError):
        recipe("passthrough", None, [x / 0])


def test_a_method_of_ones_own():
    @pymerge.register_method(
        "halfway", base="required", max_models=1, parameters=(Parameter("scale", recipe="lambda", kind=float, default=1.0),)
    )
    def halfway(base, models, *, scale, name, dtype, out, check_finite):
        return (base + 0.5 * scale * (models[0] - base)).to(dtype)

    try:
        assert "halfway" in pymerge.methods()
        assert torch.equal(recipe("halfway", BASE, MODELS[:1]), BASE + 0.5 * (MODELS[0] - BASE))
        with pytest.raises(ValueError, match="merge method 'halfway' is registered already, by tests.methods.test_registry"):
            pymerge.register_method("halfway", base="required")(halfway)
    finally:
        del _METHODS["halfway"]


def test_unknown_method():
    with pytest.raises(ValueError, match="merge method 'dare-ties' does not exist; did you mean 'dare_ties'?"):
        get_method("dare-ties")
