"""Where tensors lie, told from their names alone, against the tables of 60 architectures that mergekit has."""

import importlib.util
import json
from pathlib import Path

import pytest

from pymerge.recipe.layers import find_layer, side_of

SPEC = importlib.util.find_spec("mergekit")
FOLDER = Path(SPEC.submodule_search_locations[0]) / "_data/architectures" if SPEC else Path("nowhere")
TABLES = sorted(path.name for path in FOLDER.glob("*.json"))

LAYERS = 12
EXCEPTIONS = {
    "phi-1.json",  # the first versions of phi-1: embeddings are layer 0, the head is the layer after the last
    "whisper.json/decoder",  # the table lacks a dot: "model.decoderlayers"
}
# Neither side by their names; they go with the last slice, with a warning.
UNKNOWN = {"vision_model.vision_adapter.mlp.fc1.weight", "vision_model.vision_adapter.mlp.fc2.weight"}


def test_there_are_tables():
    if SPEC is None:
        pytest.skip("mergekit is not installed")
    assert len(TABLES) > 50


@pytest.mark.parametrize("table", TABLES)
def test_names(table):
    data = json.loads((FOLDER / table).read_text())
    modules = data["modules"] if data.get("kind") == "modular" else {"": {"architecture": data}}
    for module, description in modules.items():
        part, prefix = description["architecture"], description.get("weight_prefix") or ""
        if not part.get("num_layers_config_key") or {table, f"{table}/{module}"} & EXCEPTIONS:
            continue

        def names(weights, prefix=prefix):
            return [(prefix + w["name"]).replace("${num_layers}", str(LAYERS)).replace("${layer_index}", "7") for w in weights]

        for key, side in (("pre_weights", "before"), ("post_weights", "after")):
            for name in names(part.get(key, [])):
                assert find_layer(name) is None and side_of(name) == (None if name in UNKNOWN else side), name
        found = [find_layer(name) for name in names(part["layer_templates"]["weights"])]
        assert {layer for _, layer, _ in found} == {7} and len({stack for stack, _, _ in found}) == 1
