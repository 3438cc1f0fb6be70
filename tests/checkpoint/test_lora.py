"""Adapters added to their base while it is read: the arithmetic, what PEFT itself merges to, and what is refused."""

import json
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import pymerge
import pymerge.checkpoint.lora.product as product_module
from pymerge.checkpoint.format import CheckpointError
from pymerge.checkpoint.load import load_tensor
from pymerge.checkpoint.lora import AdaptedCheckpoint, open_adapter
from pymerge.checkpoint.reader import open_checkpoint

from .adapters import save_adapter
from .files import save_model


def adapted(base, adapter):
    return AdaptedCheckpoint(open_checkpoint(base), open_adapter(adapter))


def contents(store):
    return {name: load_tensor(store, info) for name, info in store.tensors.items()}


def by_definition(x, b, a, scale):
    """The arithmetic that docs/lora.md states, an element and an operation at a time."""
    total = b[:, :1].float() * a[0].float()
    for k in range(1, a.shape[0]):
        total = total + b[:, k : k + 1].float() * a[k].float()
    return (x.float() + (total * torch.tensor(scale, dtype=torch.float32)).view(x.shape)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_arithmetic(tmp_path, dtype):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(37, 29, generator=g).to(dtype)
    a, b = torch.randn(5, 29, generator=g).bfloat16(), torch.randn(37, 5, generator=g).bfloat16()
    base = save_model(tmp_path / "base", {"m.weight": w, "other.weight": w.clone()})
    save_adapter(tmp_path / "a", {"m": (a, b)}, lora_alpha=7)
    got = contents(adapted(base, tmp_path / "a"))
    assert torch.equal(got["m.weight"].view(torch.uint8), by_definition(w, b, a, 7 / 5).view(torch.uint8))
    assert torch.equal(got["other.weight"].view(torch.uint8), w.view(torch.uint8))


def test_any_piece_has_the_same_bytes(tmp_path, monkeypatch):
    w = torch.randn(40, 33).bfloat16()
    base = save_model(tmp_path / "base", {"m.weight": w})
    save_adapter(tmp_path / "a", {"m": (torch.randn(3, 33), torch.randn(40, 3))})
    store = adapted(base, tmp_path / "a")
    info = store.tensors["m.weight"]
    whole = bytearray(info.nbytes)
    store.read_into(info, memoryview(whole))
    pick = random.Random(0)
    for block in (1, 100, 10**6):
        monkeypatch.setattr(product_module, "BLOCK", block)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(30):
                start, end = sorted((pick.randint(0, info.nbytes), pick.randint(0, info.nbytes)))
                piece = bytearray(end - start)
                store.read_into(info, memoryview(piece), start)
                assert piece == whole[start:end]
    with pytest.raises(ValueError, match="were asked for"):
        store.read_into(info, memoryview(bytearray(10)), info.nbytes - 9)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.data())
def test_ranges_of_a_product(rows, columns, rank, data):
    left, right = torch.randn(rows, rank), torch.randn(rank, columns)
    whole = product_module.product(left, right, 0.3)
    start = data.draw(st.integers(0, rows * columns))
    part = torch.zeros(data.draw(st.integers(0, rows * columns - start)))
    product_module.add_product(part, start, left, right, 0.3)
    assert torch.equal(part, whole.view(-1)[start : start + len(part)])
    assert torch.allclose(whole, 0.3 * left @ right, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "rank", "columns"), [(1, 1, 1), (9, 3, 33), (37, 5, 29), (6, 7, 1100), (130, 64, 513)])
def test_every_instruction_set_has_the_same_bits(rows, rank, columns, dtype):
    native = pytest.importorskip("pymerge.native")
    g = torch.Generator().manual_seed(rows)
    left, right = torch.randn(rows, rank, generator=g), torch.randn(rank, columns, generator=g)
    x = torch.randn(rows * columns, generator=g).to(dtype)
    before = native.current_isa()
    try:
        for start, end in {(0, len(x)), (len(x) // 3, len(x)), (0, max(1, len(x) - 3)), (len(x) // 5, len(x) // 2 + 1)}:
            with pymerge.backend("reference"):
                product_module.add_product(expected := x[start:end].clone(), start, left, right, 0.37)
            for isa in native.available_isas():
                native.use_isa(isa)
                product_module.add_product(got := x[start:end].clone(), start, left, right, 0.37)
                assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), (isa, start, end)
    finally:
        native.use_isa(before)


def test_fp64_is_computed_in_fp64(tmp_path):
    w, a, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(2, 6), torch.randn(4, 2)
    base = save_model(tmp_path / "base", {"m.weight": w})
    save_adapter(tmp_path / "a", {"m": (a, b)}, lora_alpha=3)
    got = contents(adapted(base, tmp_path / "a"))["m.weight"]
    assert torch.allclose(got, w + 1.5 * b.double() @ a.double(), rtol=1e-15, atol=1e-15)


def test_scales(tmp_path):
    """rsLoRA, and ranks and alphas by module: PEFT's patterns match a name or its end after a dot, the first of them."""
    pairs = {f"model.layers.{i}.{m}": (torch.ones(r, 4), torch.ones(4, r)) for i, m, r in ((0, "q", 2), (0, "up", 3), (11, "up", 5))}
    config = {"r": 2, "lora_alpha": 8, "rank_pattern": {"0.up": 3, "up": 5}, "alpha_pattern": {r"layers\.11\..*": 10}}
    for rslora in (False, True):
        save_adapter(tmp_path / str(rslora), pairs, use_rslora=rslora, **config)
        adapter = open_adapter(tmp_path / str(rslora))
        root = math.sqrt if rslora else float
        assert {name: change.scale for name, change in adapter.modules.items()} == {
            "model.layers.0.q": 8 / root(2),
            "model.layers.0.up": 8 / root(3),
            "model.layers.11.up": 10 / root(5),
        }


def test_bare_base_and_wrapped_base(tmp_path):
    """gpt2 on the hub has "h.0...", and adapters trained on it "transformer.h.0..."."""
    a, b, w = torch.randn(2, 3), torch.randn(4, 2), torch.zeros(4, 3)
    save_adapter(tmp_path / "a", {"transformer.h.0.c": (a, b)}, {"transformer.h.0.c.bias": torch.ones(4), "score.weight": torch.ones(2, 3)})
    for prefix in ("", "transformer.", "wrapper.transformer."):
        base = save_model(tmp_path / f"base{prefix}", {f"{prefix}h.0.c.weight": w, f"{prefix}h.0.c.bias": torch.zeros(4)})
        got = contents(adapted(base, tmp_path / "a"))
        assert torch.allclose(got[f"{prefix}h.0.c.weight"], 8 / 2 * b @ a, atol=1e-5)
        assert torch.equal(got[f"{prefix}h.0.c.bias"], torch.ones(4))
        assert torch.equal(got["score.weight"], torch.ones(2, 3))
        assert len(got) == 3


def test_adapter_in_a_pickle_and_threads(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    pairs = {f"m{i}": (torch.randn(2, 8), torch.randn(8, 2)) for i in range(12)}
    base = save_model(tmp_path / "base", {f"m{i}.weight": torch.randn(8, 8) for i in range(12)})
    save_adapter(tmp_path / "s", pairs)
    save_adapter(tmp_path / "p", pairs, pickled=True)
    one, other = adapted(base, tmp_path / "s"), adapted(base, tmp_path / "p")
    expected = contents(one)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: contents(other), range(16)):
            assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert {file.name for file in other.files} == {"model.safetensors", "adapter_config.json", "adapter_model.bin"}
    one.close(), other.close()
    assert torch.equal(contents(one)["m0.weight"], expected["m0.weight"])


def test_square_weights_follow_the_others(tmp_path):
    a, b = torch.randn(2, 4), torch.randn(4, 2)
    c_attn = (torch.randn(2, 4), torch.randn(12, 2))
    base = save_model(tmp_path / "base", {"h.c_attn.weight": torch.zeros(4, 12), "h.c_proj.weight": torch.zeros(4, 4)})
    # PEFT wrote fan_in_fan_out: false because the last layer that it looked at was a Linear.
    save_adapter(tmp_path / "both", {"h.c_attn": c_attn, "h.c_proj": (a, b)}, fan_in_fan_out=False, lora_alpha=2)
    save_adapter(tmp_path / "alone", {"h.c_proj": (a, b)}, fan_in_fan_out=True, lora_alpha=2)
    save_adapter(tmp_path / "linear", {"h.c_proj": (a, b)}, lora_alpha=2)
    for name, transposed in (("both", True), ("alone", True), ("linear", False)):
        got = contents(adapted(base, tmp_path / name))["h.c_proj.weight"]
        assert torch.allclose(got, (b @ a).T if transposed else b @ a, atol=1e-5)


def test_convolutions(tmp_path):
    """As PEFT defines them: A is a convolution with the base's kernel, B one by one."""
    g = torch.Generator().manual_seed(1)
    pairs, tensors, expected = {}, {}, {}
    for name, kernel in (("c1", (3,)), ("c2", (3, 3)), ("one", (1, 1)), ("c3", (2, 2, 2))):
        a, b = torch.randn(4, 5, *kernel, generator=g), torch.randn(6, 4, *(1,) * len(kernel), generator=g)
        pairs[name], tensors[f"{name}.weight"] = (a, b), torch.randn(6, 5, *kernel, generator=g)
        expected[f"{name}.weight"] = tensors[f"{name}.weight"] + 2 * torch.einsum("or...,ri...->oi...", b, a)
    base = save_model(tmp_path / "base", tensors)
    save_adapter(tmp_path / "a", pairs)
    for name, tensor in contents(adapted(base, tmp_path / "a")).items():
        assert torch.allclose(tensor, expected[name], atol=1e-5)


REFUSED = {
    "use_dora": True,
    "use_qalora": True,
    "layer_replication": [],
    "target_parameters": ["x"],
    "trainable_token_indices": [1],
    "init_lora_weights": "pissa_niter_4",
    "kasa_config": {"x": 1},
}


@pytest.mark.parametrize("key", REFUSED)
def test_variants_are_refused_by_name(tmp_path, key):
    save_adapter(tmp_path / "a", {"m": (torch.ones(2, 3), torch.ones(3, 2))}, **{key: REFUSED[key]})
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {key} is .*"):
        open_adapter(tmp_path / "a")


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "LOKR", "IA3", "PROMPT_TUNING", None, 3])
def test_other_kinds_are_refused_by_name(tmp_path, kind):
    save_adapter(tmp_path / "a", {"m": (torch.ones(2, 3), torch.ones(3, 2))}, peft_type=kind)
    with pytest.raises(CheckpointError, match=f"peft_type {kind!r} is not supported"):
        open_adapter(tmp_path / "a")


PAIR = (torch.ones(2, 3), torch.ones(4, 2))


@pytest.mark.parametrize(
    ("pairs", "others", "config", "message"),
    [
        ({"m": PAIR}, {}, {"r": 3}, "says that its rank is 3"),
        ({"m": PAIR}, {}, {"r": "2"}, "r is '2', not a positive integer"),
        ({"m": PAIR}, {}, {"lora_alpha": "x"}, "lora_alpha is 'x', not a finite number"),
        ({"m": PAIR}, {}, {"use_rslora": 2}, "use_rslora is 2, neither true nor false"),
        ({"m": PAIR}, {}, {"rank_pattern": {"(a+)+": 2}}, "pattern '\\(a\\+\\)\\+' is too complicated"),
        ({"m": PAIR}, {}, {"rank_pattern": {"(": 2}}, "is not a regular expression"),
        ({"m": PAIR}, {}, {"alpha_pattern": {"m": None}}, "alpha_pattern\\['m'\\] is None, not a finite number"),
        ({"m": (torch.ones(2, 3), torch.ones(4, 3))}, {}, {}, "lora_A is \\[2, 3\\] and lora_B \\[4, 3\\]"),
        ({}, {"m.lora_A.weight": torch.ones(2, 3)}, {}, "module 'm' has lora_A; a pair"),
        ({"m": PAIR}, {"m.lora_magnitude_vector": torch.ones(4)}, {}, "DoRA's magnitudes"),
        ({}, {"lora_unet_x.lora_down.weight": torch.ones(4, 2)}, {}, "kohya's format"),
        ({"m": PAIR}, {"n.lora_X.weight": torch.ones(4)}, {}, "is not a factor that PEFT saves"),
        ({}, {}, {}, "has no tensors"),
    ],
)
def test_malformed_adapters(tmp_path, pairs, others, config, message):
    save_adapter(tmp_path / "a", pairs, others, **config)
    with pytest.raises(CheckpointError, match=message):
        open_adapter(tmp_path / "a")


def test_not_an_adapter(tmp_path):
    with pytest.raises(CheckpointError, match="is not a LoRA adapter"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    with pytest.raises(CheckpointError, match="neither adapter_model.safetensors nor adapter_model.bin"):
        open_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="is a LoRA adapter, not a model"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("base", "config", "message"),
    [
        ({"n.weight": torch.ones(4, 3)}, {}, "does not fit .*: a weight that it changes is not there, the first: 'm.weight'"),
        ({"x.m.weight": torch.ones(4, 3), "y.m.weight": torch.ones(4, 3)}, {}, "can be several tensors"),
        ({"m.weight": torch.ones(5, 3)}, {}, r"'m.weight' is \[5, 3\] in .*, and the adapter changes one of \[4, 3\] \(was the vocab"),
        ({"m.weight": torch.ones(12, dtype=torch.uint8)}, {}, "its weights look quantised"),
        ({"m.weight": torch.ones(4, 3, dtype=torch.int32)}, {}, "is of dtype I32: nothing can be added to quantised weights"),
    ],
)
def test_does_not_fit(tmp_path, base, config, message):
    save_adapter(tmp_path / "a", {"m": PAIR})
    with pytest.raises(CheckpointError, match=message):
        adapted(save_model(tmp_path / "base", base, **config), tmp_path / "a")


def test_tied_head_is_refused(tmp_path):
    save_adapter(tmp_path / "a", {"lm_head": PAIR}, {"lm_head.base_layer.weight": torch.ones(4, 3)})
    base = save_model(tmp_path / "base", {"model.embed_tokens.weight": torch.ones(4, 3)}, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="'lm_head.weight', which is the input embedding in"):
        adapted(base, tmp_path / "a")
    base = save_model(tmp_path / "base2", {"model.embed_tokens.weight": torch.ones(4, 3)}, tie_word_embeddings=False)
    assert torch.equal(contents(adapted(base, tmp_path / "a"))["lm_head.weight"], torch.full((4, 3), 1.0 + 4 * 2))


def test_aliases_of_changed_tensors_end(tmp_path):
    w = torch.ones(4, 3)
    torch.save({"embed.weight": w, "m.weight": w, "x": torch.ones(2), "y": torch.ones(2)}, tmp_path / "base.bin")
    save_adapter(tmp_path / "a", {"m": PAIR})
    store = adapted(tmp_path / "base.bin", tmp_path / "a")
    assert store.base.aliases == {"m.weight": "embed.weight"} and store.aliases == {}
    got = contents(store)
    assert torch.equal(got["embed.weight"], w) and not torch.equal(got["m.weight"], w)


# --- PEFT itself -----------------------------------------------------------------------------------------------------------------------


def tiny(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))
    if kind == "llama-tied":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=8, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


CASES = {
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"], "r": 3, "lora_alpha": 5}),
    "llama patterns": (
        "llama",
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {".*down_proj": 3}},
    ),
    "llama rslora": ("llama", {"target_modules": ["v_proj"], "use_rslora": True, "modules_to_save": ["lm_head"]}),
    "llama tied": ("llama-tied", {"target_modules": ["embed_tokens", "o_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"], "bias": "all"}),
    "gpt2 square": ("gpt2", {"target_modules": [f"h.{i}.attn.c_proj" for i in range(2)]}),
    "bert": ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only", "task_type": "SEQ_CLS"}),
    "bert lora_bias": ("bert", {"target_modules": ["query"], "lora_bias": True}),
}


def randomised(model):
    g = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=g) * 0.2
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_same_as_merge_and_unload(tmp_path, case):
    peft = pytest.importorskip("peft")
    kind, options = CASES[case]
    model = tiny(kind)
    model.save_pretrained(tmp_path / "base")
    model = randomised(peft.get_peft_model(model, peft.LoraConfig(**options)))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = load_file(tmp_path / "merged/model.safetensors")
    base = load_file(tmp_path / "base/model.safetensors")
    store = adapted(tmp_path / "base", tmp_path / "adapter")
    got = contents(store)
    assert set(got) == set(expected)
    changed = 0
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, rtol=1e-5, atol=1e-6), name
        changed += not torch.equal(tensor, base[name])
    assert changed >= 2
    assert bool(store.warnings) == (case in ("llama tied", "gpt2"))


def test_config_file_is_bounded_json(tmp_path):
    save_adapter(tmp_path / "a", {"m": PAIR})
    for content in ("[1]", "{", '{"r": 1, "r": 2}', json.dumps({"peft_type": "LORA", "r": 2, "rank_pattern": []})):
        (tmp_path / "a/adapter_config.json").write_text(content)
        with pytest.raises(CheckpointError, match="adapter_config.json"):
            open_adapter(tmp_path / "a")


def test_factors_that_are_not_numbers(tmp_path):
    base = save_model(tmp_path / "base", {"m.weight": torch.ones(4, 3)})
    save_adapter(tmp_path / "a", {})
    save_file(
        {"m.lora_A.weight": torch.ones(2, 3, dtype=torch.int8), "m.lora_B.weight": torch.ones(4, 2)},
        tmp_path / "a/adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match="'m.lora_A.weight' is of dtype I8"):
        contents(adapted(base, tmp_path / "a"))
