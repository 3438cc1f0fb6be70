"""The same recipe file through mergekit and through pymerge, on small Llama checkpoints: the same weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pymerge.checkpoint.merge import merge
from tests.mergekit_run import merged_by_mergekit

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
    # A frankenmerge: 7 layers from two models of 4, the embeddings of the first, norm and head of the last.
    "passthrough": """
merge_method: passthrough
slices:
- sources:
  - {model: a, layer_range: [0, 3]}
- sources:
  - model: b
    layer_range: [1, 4]
    parameters:
      scale:
      - {filter: layers.1.mlp.down_proj, value: 0.5}  # the layer's number in b: layer 3 of the result
      - {filter: self_attn, value: [1.0, 2.0]}
      - value: 1.0
- sources:
  - {model: c, layer_range: [3, 4], parameters: {scale: [0.0, 0.25]}}
dtype: float32
""",
    "linear slices": """
merge_method: linear
slices:
- sources:
  - {model: a, layer_range: [0, 2], parameters: {weight: 0.25}}
  - {model: b, layer_range: [2, 4]}
  parameters: {weight: [0.5, 1.0], normalize: false}
- sources:
  - {model: c, layer_range: [1, 4]}
  - {model: a, layer_range: [0, 3], parameters: {weight: {filter: mlp, value: 3.0}}}
parameters:
  weight: [{filter: self_attn, value: [0.1, 0.7, 0.2]}, {value: 2.0}]
dtype: float32
""",
    "slerp slices": """
merge_method: slerp
base_model: a
slices:
- sources:
  - {model: a, layer_range: [0, 3]}
  - {model: b, layer_range: [1, 4]}
- base_model: c
  sources:
  - {model: b, layer_range: [0, 2]}
  - {model: c, layer_range: [2, 4]}
  parameters: {t: [{filter: mlp, value: 0.9}, {value: [0.3, 0.4]}]}
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - value: 0.5
dtype: float32
""",
    "ties of slices": """
merge_method: ties
base_model: base
slices:
- sources:
  - {model: base, layer_range: [1, 4]}
  - {model: a, layer_range: [1, 4], parameters: {weight: 1.0, density: [1, 0.2]}}
  - {model: b, layer_range: [1, 4], parameters: {weight: 0.5}}
parameters: {density: 0.4, normalize: true, int8_mask: true}
dtype: float32
""",
    "modules": """
merge_method: linear
modules:
  default:
    slices:
    - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4], parameters: {weight: 0.75}}]
    parameters: {weight: 0.5}
parameters: {weight: 7.0}
dtype: float32
""",
    # mergekit rounds every step to bf16, here there is one rounding; both within some units in the last place of the largest term.
    "bfloat16": """
merge_method: task_arithmetic
base_model: base
models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.25}}]
dtype: bfloat16
""",
    "out_dtype": """
merge_method: linear
models: [{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: 0.7}}]
dtype: float32
out_dtype: bfloat16
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


@pytest.mark.parametrize("name", RECIPES)
def test_same_weights(models, name, monkeypatch):
    monkeypatch.chdir(models)
    path = models / f"{name}.yml"
    path.write_text(RECIPES[name])
    theirs = merged_by_mergekit(RECIPES[name], models / f"{name}-mergekit", copy_tokenizer=False)
    merge(path, models / name)
    ours = load_file(models / name / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype == (torch.bfloat16 if "bfloat16" in RECIPES[name] else torch.float32)
        # Both round to bf16 once, from values that differ by roundings of fp32: now and then to different neighbours.
        rtol, atol = (2e-6, 1e-7) if tensor.dtype == torch.float32 else (2**-7, 1e-7) if name == "out_dtype" else (2**-6, 2**-12)
        torch.testing.assert_close(tensor, theirs[key], rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
    configs = [json.loads((models / folder / "config.json").read_text()) for folder in (name, f"{name}-mergekit")]
    assert configs[0]["num_hidden_layers"] == configs[1]["num_hidden_layers"]
    model = transformers.AutoModelForCausalLM.from_pretrained(models / name)
    assert model.config.num_hidden_layers == configs[0]["num_hidden_layers"]
    torch.testing.assert_close(dict(model.named_parameters())["lm_head.weight"], ours["lm_head.weight"])
