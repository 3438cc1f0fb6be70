"""The same recipe file through mergekit and through pymerge, on small Llama checkpoints in fp32: the same weights."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pymerge.checkpoint.merge import merge

pytest.importorskip("mergekit")
transformers = pytest.importorskip("transformers")

RECIPES = {
    "linear": """
merge_method: linear
models:
- {model: a, parameters: {weight: [0.2, 0.5, 1.0]}}
- {model: b, parameters: {weight: 0.3}}
dtype: float32
""",
    "ties": """
merge_method: ties
base_model: base
models:
- model: base
- model: a
  parameters:
    density: [1, 0.7, 0.1]
    weight: 1.0
- model: b
  parameters:
    density: 0.5
    weight: [0, 0.3, 0.7, 1]
- model: c
  parameters:
    density: 0.33
    weight:
    - {filter: mlp, value: 0.5}
    - {filter: self_attn, value: [0.1, 0.9]}
    - value: 0.25
parameters:
  normalize: true
  int8_mask: true
dtype: float32
""",
    "slerp": """
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - value: 0.5
dtype: float32
""",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: base
models:
- {model: a, parameters: {weight: 0.6}}
- {model: b, parameters: {weight: -0.3}}
parameters: {lambda: 1.2}
dtype: float32
""",
    "breadcrumbs_ties": """
merge_method: breadcrumbs_ties
base_model: base
models:
- {model: a, parameters: {weight: 0.6, density: [0.9, 0.5], gamma: 0.01}}
- {model: b, parameters: {weight: 0.3, density: 0.7, gamma: [0.0, 0.2]}}
parameters: {lambda: 1.2, normalize: true}
dtype: float32
""",
    "nuslerp": """
merge_method: nuslerp
base_model: base
models:
- {model: a, parameters: {weight: [0.2, 0.8]}}
- {model: b, parameters: {weight: 0.5}}
parameters: {nuslerp_flatten: false}
dtype: float32
""",
    "multislerp": """
merge_method: multislerp
models:
- {model: a, parameters: {weight: 0.6}}
- {model: b, parameters: {weight: 0.3}}
- {model: c, parameters: {weight: [0.1, 1.0]}}
dtype: float32
""",
    "karcher": "merge_method: karcher\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {tol: 1e-6}\ndtype: float32\n",
    "model_stock": "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}, {model: b}, {model: c}]\ndtype: float32\n",
    "nearswap": "merge_method: nearswap\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: [0.001, 0.02]}\ndtype: float32\n",
    "ram": "merge_method: ram\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {epsilon: 0.005}\ndtype: float32\n",
    "sce": "merge_method: sce\nbase_model: base\nmodels: [{model: a}, {model: b}, {model: c}]\ndtype: float32\n",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three fine-tunes of one base, of four layers, with an untied head."""
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for i, name in enumerate(("base", "a", "b", "c")):
        torch.manual_seed(i)
        model.load_state_dict({key: t + 0.01 * min(i, 1) * torch.randn_like(t) for key, t in base.items()})
        model.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("method", RECIPES)
def test_same_weights(models, method, monkeypatch):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    monkeypatch.chdir(models)
    path = models / f"{method}.yml"
    path.write_text(RECIPES[method])
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    # mergekit's loaders view mapped files: unwritten memory is not for it to fill.
    torch.utils.deterministic.fill_uninitialized_memory = False
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(path.read_text())), str(models / f"{method}-mergekit"), options)
    merge(path, models / method)
    theirs = {k: v for file in (models / f"{method}-mergekit").glob("*.safetensors") for k, v in load_file(file).items()}
    ours = load_file(models / method / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == torch.float32
        torch.testing.assert_close(tensor, theirs[name], rtol=2e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    configs = [json.loads((models / folder / "config.json").read_text()) for folder in (method, f"{method}-mergekit")]
    assert configs[0]["num_hidden_layers"] == configs[1]["num_hidden_layers"]
