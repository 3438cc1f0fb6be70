"""Adapters taken out of tuned models: the nearest of their rank, which PEFT and this package put back."""

import json

import pytest
import torch

import pymerge
from pymerge.checkpoint.format import CheckpointError
from pymerge.checkpoint.load import load_tensor
from pymerge.checkpoint.lora import AdaptedCheckpoint, open_adapter
from pymerge.checkpoint.reader import open_checkpoint

from .files import save_model, tensors_of, tree


def tuned_by(base, rank):
    g = torch.Generator().manual_seed(9)
    return {
        name: t + torch.randn(t.shape[0], rank, generator=g) @ torch.randn(rank, t.shape[1], generator=g) if t.dim() == 2 else t + 0.5
        for name, t in base.items()
    }


def contents(store):
    return {name: load_tensor(store, info) for name, info in store.tensors.items()}


def test_a_change_of_low_rank_comes_back(tmp_path):
    base = tensors_of(0)
    tuned = tuned_by(base, 3)
    paths = save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", base)
    report = pymerge.extract_lora(*paths, tmp_path / "out", energy=1.0, rank=8)
    assert set(report.ranks.values()) == {3} and min(report.kept.values()) > 1 - 1e-6
    assert all("norm" in name or "embed" in name or "lm_head" in name for name in report.left_out)
    assert "not in the adapter" in report.warnings[0]
    with AdaptedCheckpoint(open_checkpoint(paths[1]), open_adapter(tmp_path / "out")) as store:
        for name, tensor in contents(store).items():
            assert torch.allclose(tensor, base[name] if name in report.left_out else tuned[name], atol=1e-4)


def test_truncation_is_the_best(tmp_path):
    base = tensors_of(0)
    tuned = {name: t + torch.randn_like(t) for name, t in base.items()}
    paths = save_model(tmp_path / "tuned", tuned), save_model(tmp_path / "base", base)
    report = pymerge.extract_lora(*paths, tmp_path / "out", rank=4, modules="up_proj|embed", whole=["lm_head"])
    assert set(report.ranks) == {*(f"model.layers.{i}.mlp.up_proj" for i in range(3)), "model.embed_tokens"}
    with AdaptedCheckpoint(open_checkpoint(paths[1]), open_adapter(tmp_path / "out")) as store:
        got = contents(store)
    assert torch.equal(got["lm_head.weight"], tuned["lm_head.weight"])
    for module, kept in report.kept.items():
        change = tuned[f"{module}.weight"] - base[f"{module}.weight"]
        values = torch.linalg.svdvals(change).square()
        assert abs(kept - float(values[:4].sum() / values.sum())) < 1e-6
        error = (got[f"{module}.weight"] - tuned[f"{module}.weight"]).square().sum()
        assert abs(float(error / values[4:].sum()) - 1) < 1e-3
    before = tree(tmp_path / "out")
    pymerge.extract_lora(*paths, tmp_path / "out", rank=4, modules="up_proj|embed", whole=["lm_head"], force=True)
    assert tree(tmp_path / "out") == before


def test_refused(tmp_path):
    base = save_model(tmp_path / "base", tensors_of(0))
    other = save_model(tmp_path / "other", tensors_of(1, width=8))
    fewer = save_model(tmp_path / "fewer", tensors_of(1, layers=2))
    for model, message in ((base, "no matrix that can be adapted differs"), (other, r"is \[40, 8\], in"), (fewer, "does not have")):
        with pytest.raises((CheckpointError, ValueError), match=message):
            pymerge.extract_lora(model, base, tmp_path / "out")
    with pytest.raises(CheckpointError, match="has 'model.layers.2"):
        pymerge.extract_lora(base, fewer, tmp_path / "out")
    for options in ({"rank": 0}, {"rank": None}, {"energy": 2.0}):
        with pytest.raises(ValueError, match="give a positive rank"):
            pymerge.extract_lora(other, base, tmp_path / "out", **options)
    with pytest.raises(FileExistsError):
        pymerge.extract_lora(other, base, base)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path):
    from click.testing import CliRunner

    from pymerge.cli.main import _group

    save_model(tmp_path / "base", tensors_of(0))
    save_model(tmp_path / "tuned", tuned_by(tensors_of(0), 2))
    args = ["lora", "extract", str(tmp_path / "tuned"), str(tmp_path / "base"), str(tmp_path / "out"), "--energy", "0.999999", "--json"]
    result = CliRunner().invoke(_group, args)
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["ranks"].values()) == {2}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_loads_it(tmp_path, kind):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}
        config = transformers.LlamaConfig(**sizes, tie_word_embeddings=False)
    else:
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "base")
    changed = [p for name, p in model.named_parameters() if "attn" in name and p.dim() == 2]
    for p in changed:
        p.data += torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1]) * 0.1
    assert changed
    model.save_pretrained(tmp_path / "tuned")
    ids = torch.arange(6)[None]
    expected = model(ids).logits
    pymerge.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=2)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(base(ids).logits, expected, atol=1e-3)
    assert torch.allclose(peft.PeftModel.from_pretrained(base, tmp_path / "out")(ids).logits, expected, atol=1e-4)
