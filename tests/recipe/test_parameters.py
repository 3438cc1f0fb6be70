"""What parameters mean for each tensor: gradients, filters and precedence, by numbers worked out by hand."""

import pytest

from pymerge.merge_methods.registry import REQUIRED, Method, Parameter
from pymerge.recipe import Problems
from pymerge.recipe.layers import LayerDepths
from pymerge.recipe.parameters import Parameters
from pymerge.recipe.values import convert

METHOD = Method(
    "m",
    lambda **_: None,
    "required",
    (
        Parameter("weights", "weight", float, REQUIRED, True),
        Parameter("density", "density", float, 1.0, True),
        Parameter("scale", "lambda", float, 1.0),
        Parameter("normalize", "normalize", bool, None),
        Parameter("mode", "mode", str, "x"),
        Parameter("seed", "seed", int, 0),
    ),
)
NAMES = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"] + [
    f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("self_attn.q_proj", "mlp.up_proj")
]


def resolve(name, model_parameters=({}, {}), problems=None, names=NAMES, **given):
    found = Problems() if problems is None else problems
    parameters = Parameters(METHOD, found)
    own = [parameters.level(p, ("models", i, "parameters"), True) for i, p in enumerate(model_parameters)]
    shared = [parameters.level(given, ("parameters",))]
    values = parameters.resolve(name, LayerDepths(names).depth(name), shared, own, [name] * len(own))
    parameters.report_missing()
    parameters.warn_unused_filters(names)
    if problems is None:
        found.raise_if_any()
    return values


def layer(i, part="mlp.up_proj"):
    return f"model.layers.{i}.{part}.weight"


def test_defaults_and_scalars():
    assert resolve(layer(0), weight=0.5, seed=7) == {
        "weights": (0.5, 0.5), "density": (1.0, 1.0), "scale": 1.0, "normalize": None, "mode": "x", "seed": 7,
    }  # fmt: skip


def test_model_before_global():
    assert resolve(layer(0), [{"weight": 2}, {}], weight=1)["weights"] == (2.0, 1.0)
    assert resolve(layer(0), [{"weight": None}, {"weight": "3e-1"}], weight=1)["weights"] == (1.0, 0.3)


@pytest.mark.parametrize(("index", "expected"), [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)])
def test_gradient_of_two(index, expected):
    assert resolve(layer(index), weight=[0, 1])["weights"] == (expected, expected)


def test_gradient_of_three_bends_in_the_middle():
    # 5 layers: t = 0, 1/4, 1/2, 3/4, 1; three values lie at t = 0, 1/2, 1.
    got = [resolve(layer(i), weight=1, **{"lambda": [0.0, 1.0, 0.5]})["scale"] for i in range(5)]
    assert got == [0.0, 0.5, 1.0, 0.75, 0.5]


def test_gradient_outside_layers_is_its_first_value():
    for name in NAMES[:3]:
        assert resolve(name, weight=[0.25, 1])["weights"] == (0.25, 0.25)


def test_gradient_of_one_layer_is_its_last_value():
    assert resolve(layer(0), weight=[0, 1], names=[layer(0)])["weights"] == (1.0, 1.0)


def test_gradient_of_one_value():
    assert [resolve(layer(i), weight=[0.5])["weights"][0] for i in range(5)] == [0.5] * 5


def test_booleans_and_texts_step():
    # values[int(t * (len - 1))]
    assert [resolve(layer(i), weight=1, normalize=[True, False])["normalize"] for i in range(5)] == [True] * 4 + [False]
    assert [resolve(layer(i), weight=1, mode=["a", "b", "c"])["mode"] for i in range(5)] == ["a", "a", "b", "b", "c"]


def test_filters():
    weight = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.5}, {"value": 0.125}]
    assert resolve(layer(2, "self_attn.q_proj"), weight=weight)["weights"] == (0.5, 0.5)
    assert resolve(layer(2), weight=weight)["weights"] == (0.5, 0.5)
    assert resolve(layer(4, "self_attn.q_proj"), weight=weight)["weights"] == (1.0, 1.0)
    assert resolve("lm_head.weight", weight=weight)["weights"] == (0.125, 0.125)


def test_first_filter_wins_and_star_matches_all():
    assert resolve(layer(0), weight=[{"filter": "up", "value": 1}, {"filter": "mlp", "value": 2}])["weights"][0] == 1.0
    assert resolve(layer(0), weight=[{"filter": "*", "value": 3}, {"filter": "mlp", "value": 2}])["weights"][0] == 3.0
    assert resolve(layer(0), weight={"filter": "mlp", "value": 4})["weights"][0] == 4.0


def test_filters_that_do_not_match_fall_through():
    own = {"weight": [{"filter": "self_attn", "value": 2}]}
    assert resolve(layer(0), [own, {}], weight=1)["weights"] == (1.0, 1.0)
    assert resolve(layer(0, "self_attn.q_proj"), [own, {}], weight=1)["weights"] == (2.0, 1.0)
    assert resolve(layer(0), weight=1, density=[{"filter": "self_attn", "value": 0.5}])["density"] == (1.0, 1.0)


def test_stacks_have_their_own_depth():
    names = [f"vision.blocks.{i}.w" for i in range(3)] + [f"model.layers.{i}.w" for i in range(5)]
    depths = LayerDepths(names)
    assert [depths.depth(n) for n in names] == [0.0, 0.5, 1.0, 0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.h.1.attn.c_attn.weight", 0.5), ("h.1.ln_1.bias", 0.5), ("encoder.layer.1.output.dense.weight", 0.5),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", 0.5), ("model.layers.1.block_sparse_moe.experts.7.w1.weight", 0.5),
        ("layers.1", 0.5), ("model.layersx.1.w", 0.0), ("experts.1.w", 0.0),
    ],
)  # fmt: skip
def test_where_layers_are_found(name, expected):
    assert LayerDepths([name.replace(".1", f".{i}", 1) for i in range(3)] + [name]).depth(name) == expected


PLACES = [
    ({"weigth": 1, "weight": 1}, "parameters.weigth: unknown parameter of 'm'; did you mean 'weight'?"),
    ({}, "models[0].parameters: 'weight' is required by 'm' and is not given here nor in the global parameters"),
    ({"weight": 1, "density": 1.5}, "parameters.density: is 1.5; density is the fraction kept, between 0 and 1"),
    ({"weight": 1, "density": [0.5, -1]}, "parameters.density[1]: is -1; density is the fraction kept, between 0 and 1"),
    ({"weight": "big"}, "parameters.weight: is 'big'; write a finite number"),
    ({"weight": True}, "parameters.weight: is True; write a finite number"),
    ({"weight": float("nan")}, "parameters.weight: is nan; write a finite number"),
    ({"weight": 10**400}, "write a finite number"),
    ({"weight": []}, "parameters.weight: is an empty list; a gradient has at least one value"),
    ({"weight": {"filter": "mlp"}}, "parameters.weight.value: is missing"),
    ({"weight": {"filtr": "mlp", "value": 1}}, "parameters.weight.filtr: unknown key; did you mean 'filter'?"),
    ({"weight": [{"value": "x"}]}, "parameters.weight[0].value: is 'x'; write a finite number"),
    ({"weight": [{"filter": 3, "value": 1}]}, "parameters.weight[0].filter: is 3; write a part of the names"),
    ({"weight": [{"filter": "mlp", "value": 1}, 2]}, "parameters.weight[1]: is 2 among filters; write '- value: 2'"),
    ({"weight": 1, "normalize": "yes"}, "parameters.normalize: is 'yes'; write true or false"),
    ({"weight": 1, "seed": 1.5}, "parameters.seed: is 1.5; write a whole number"),
    ({"weight": 1, "mode": 1}, "parameters.mode: is 1; write text"),
]


@pytest.mark.parametrize(("given", "message"), PLACES)
def test_problems(given, message):
    problems = Problems()
    resolve(layer(0), problems=problems, **given)
    assert message in str(problems.found()[0])


def test_shared_parameter_with_a_model():
    problems = Problems()
    resolve(layer(0), [{"weight": 1, "lambda": 2}], problems)
    assert "models[0].parameters.lambda: is one value for the whole merge" in str(problems.found()[0])


def test_warnings():
    problems = Problems()
    resolve(layer(0), [{"weight": 1}, {}], problems, weight=[{"filter": "mpl", "value": 1}, {"value": 2}])
    assert not problems
    assert len(problems.warnings) == 1 and "filter 'mpl' is part of no tensor's name" in problems.warnings[0]


def test_convert():
    assert convert("1e-5", float, "weight") == 1e-5 and convert(1, bool, "x") is True and convert(-3, int, "x") == -3
