"""The recipes in examples/recipes parse and plan, on models of 32 tiny layers."""

from pathlib import Path

import pytest
import torch

from pymerge.checkpoint.merge import merge
from pymerge.checkpoint.plan import make_plan

from .files import save_model, tensors_of

FOLDER = Path(__file__).parents[2] / "examples/recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yml"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "assistant", "coder", "storyteller")):
        tensors = tensors_of(seed, layers=32, width=2)
        tensors |= {f"model.layers.{i}.{part}.weight": torch.ones(2) for i in range(32) for part in ("mlp.down_proj", "self_attn.o_proj")}
        save_model(folder / name, tensors, num_hidden_layers=32)
    for name in RECIPES:
        (folder / name).write_text((FOLDER / name).read_text())
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_plans(models, name, tmp_path):
    if name == "two-stages.yml":
        merge(models / name, tmp_path / "out")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"writers", "final"}
        return
    with make_plan(models / name, tmp_path / "out") as plan:
        layers = {t.output.name.split(".")[2] for t in plan.tensors if ".layers." in t.output.name}
        expected = {"deeper-44.yml": 44, "passthrough-stack.yml": 40}.get(name, 32)
        assert len(layers) == expected and not plan.warnings
        assert plan.changes.config.get(("num_hidden_layers",), 32) == expected


def test_gradients_and_filters_of_the_examples(models):
    with make_plan(models / "slerp-gradient.yml") as plan:
        t = {tensor.output.name: tensor.parameters["t"] for tensor in plan.tensors}
    assert t["model.layers.0.self_attn.q_proj.weight"] == 0.0 and t["model.layers.31.self_attn.q_proj.weight"] == 1.0
    assert t["model.layers.0.mlp.up_proj.weight"] == 1.0 and t["model.embed_tokens.weight"] == 0.5
    assert t["model.layers.1.self_attn.q_proj.weight"] == pytest.approx(0.4 * 4 / 31)
    with make_plan(models / "deeper-44.yml") as plan:
        weights = {tensor.output.name: tensor.parameters["weights"] for tensor in plan.tensors}
    assert weights["model.layers.12.mlp.up_proj.weight"] == pytest.approx((0.8, 0.2))
    assert weights["model.layers.27.mlp.up_proj.weight"] == pytest.approx((0.2, 0.8))
