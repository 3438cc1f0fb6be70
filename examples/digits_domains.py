"""The demo's data, network and training: handwritten digits in four domains, one small network."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

DOMAINS = ("upright", "rotated", "inverted", "noised")


@dataclass(frozen=True)
class Domain:
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def _shift(images: Tensor, domain: str, seed: int) -> Tensor:
    if domain == "rotated":
        angle = torch.tensor(math.radians(30))
        turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]])
        grid = nn.functional.affine_grid(turn.expand(len(images), 2, 3), [len(images), 1, *images.shape[1:]], align_corners=False)
        return nn.functional.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)
    if domain == "inverted":
        return 1.0 - images
    if domain == "noised":
        return images + 0.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return images


def load_domains() -> dict[str, Domain]:
    """1797 images of 8 x 8 pixels in [0, 1], the same quarter of them held out in every domain.

    Rotated by 30 degrees, inverted (black on white), or with Gaussian noise of half the range added.
    """
    digits = load_digits()
    parts = train_test_split(digits.images / 16.0, digits.target, test_size=0.25, stratify=digits.target, random_state=0)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32) for x in parts[:2])
    train_y, test_y = (torch.tensor(y) for y in parts[2:])
    return {name: Domain(_shift(train_x, name, 1), train_y, _shift(test_x, name, 2), test_y) for name in DOMAINS}


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def train(model: nn.Module, domain: Domain, *, epochs: int, lr: float, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(domain.train_x), generator=generator).split(64):
            loss = nn.functional.cross_entropy(model(domain.train_x[batch]), domain.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracies(state: dict[str, Tensor], domains: dict[str, Domain]) -> list[float]:
    """Test accuracy in percent, one per domain."""
    model = network()
    model.load_state_dict(state)
    return [100.0 * (model(d.test_x).argmax(1) == d.test_y).float().mean().item() for d in domains.values()]


def save_checkpoint(state: dict[str, Tensor], folder: Path, shards: int = 1) -> None:
    """A folder as model hubs have it: one safetensors file, or several with an index, and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["DigitsNetwork"], "torch_dtype": "float32"}) + "\n")
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, where = list(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def load_checkpoint(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no .safetensors file in {folder}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
