"""Write N checkpoints in the shape of a Llama: a base of small random weights and experts that differ from it a little, in bf16.

    python benchmarks/make_checkpoints.py /tmp/bench --experts 3

makes /tmp/bench/{base,expert1,expert2,expert3} (sharded, with index and config.json) and a recipe for each method that is timed. The same
arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path

import torch

from pymerge.checkpoint.layout import OutputTensor, make_layout
from pymerge.checkpoint.sizes import format_bytes, parse_bytes
from pymerge.checkpoint.writer import CheckpointWriter

VOCABULARY = 32_000


def llama_shapes(hidden: int, intermediate: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama without grouped queries and with an untied head."""
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (VOCABULARY, hidden), "model.embed_tokens.weight": (VOCABULARY, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        for name in "kqvo":
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (hidden, hidden)
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def normal(name: str, model: int, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers that depend on the arguments alone."""
    digest = hashlib.blake2s(f"{seed}/{model}/{name}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")))


def write_models(folder: Path, shapes: dict[str, tuple[int, ...]], config: dict, experts: int, shard_size: int, seed: int) -> None:
    """Write the base and the experts at once, a tensor at a time."""
    layout = make_layout([OutputTensor(name, "BF16", shape) for name, shape in shapes.items()], shard_size, {"format": "pt"})
    names = ["base", *(f"expert{i + 1}" for i in range(experts))]
    writers = [CheckpointWriter(folder / name, layout, force=True).__enter__() for name in names]
    try:
        for writer in writers:
            writer.add_file("config.json", (json.dumps(config, indent=2) + "\n").encode())
        for name, shape in shapes.items():
            base = normal(name, 0, seed, shape).mul_(0.02).bfloat16()
            for i, writer in enumerate(writers):
                tensor = base if i == 0 else (normal(name, i, seed, shape).mul_(1e-3).add_(base)).bfloat16()
                writer.write(name, memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        for writer in writers:
            writer.commit()
    finally:
        for writer in writers:
            writer.__exit__(None, None, None)


def write_recipes(folder: Path, experts: int) -> None:
    """ties.yml and linear.yml beside the models."""
    names = [f"expert{i + 1}" for i in range(experts)]
    ties = ["merge_method: ties", "base_model: base", "models:"]
    for name in names:
        ties += [f"- model: {name}", "  parameters:", f"    weight: {1 / experts:.4f}", "    density: 0.2"]
    ties += ["parameters:", "  normalize: true", "dtype: bfloat16", ""]
    models = [f"- model: {name}" for name in names]
    linear = ["merge_method: linear", "models:", *models, "parameters:", "  weight: 1", "dtype: bfloat16", ""]
    (folder / "ties.yml").write_text("\n".join(ties))
    (folder / "linear.yml").write_text("\n".join(linear))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=3, help="models besides the base (default 3)")
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--intermediate", type=int, default=4224)
    parser.add_argument("--layers", type=int, default=26, help="the defaults make 0.85 billion parameters")
    parser.add_argument("--shard-size", type=parse_bytes, default="500MB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shapes = llama_shapes(args.hidden, args.intermediate, args.layers)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": args.hidden, "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers, "num_attention_heads": max(1, args.hidden // 128), "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    need = 2 * count * (args.experts + 1)
    args.folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(args.folder).free < need:
        parser.error(f"{format_bytes(need)} are needed in {args.folder}")
    began = time.perf_counter()
    write_models(args.folder, shapes, config, args.experts, args.shard_size, args.seed)
    write_recipes(args.folder, args.experts)
    seconds = time.perf_counter() - began
    print(f"{args.experts + 1} models of {count / 1e9:.3f} billion parameters, {format_bytes(need)}, in {seconds:.0f} s")


if __name__ == "__main__":
    main()
