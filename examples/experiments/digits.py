"""The data and network of the experiments on handwritten digits: tasks are the same digits with their pixels moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def _upright(seed: int) -> Task:
    digits = load_digits()
    parts = train_test_split(digits.data / 16.0, digits.target, test_size=0.25, stratify=digits.target, random_state=seed)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32) for x in parts[:2])
    return Task("upright", train_x, torch.tensor(parts[2]), test_x, torch.tensor(parts[3]))


def permuted(count: int, seed: int) -> list[Task]:
    """`count` tasks on 8 x 8 pixels in [0, 1]: as they are, then each with a fixed random permutation of the pixels."""
    first = _upright(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    orders = [torch.arange(64), *(torch.randperm(64, generator=generator) for _ in range(count - 1))]
    return [Task(f"task {i + 1}", first.train_x[:, o], first.train_y, first.test_x[:, o], first.test_y) for i, o in enumerate(orders)]


def rotated(degrees: list[float], seed: int) -> list[Task]:
    """The digits turned about their centre, a task per angle."""

    def turn(images: Tensor, angle: float) -> Tensor:
        a = math.radians(angle)
        matrix = torch.tensor([[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0]])
        square = images.view(-1, 1, 8, 8)
        grid = nn.functional.affine_grid(matrix.expand(len(images), 2, 3), list(square.shape), align_corners=False)
        return nn.functional.grid_sample(square, grid, align_corners=False).reshape(-1, 64)

    first = _upright(seed)
    return [Task(f"{d:g}°", turn(first.train_x, d), first.train_y, turn(first.test_x, d), first.test_y) for d in degrees]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def fit(model: nn.Module, task: Task, *, epochs: int, lr: float, seed: int) -> nn.Module:
    """Adam on batches of 32, in an order given by the seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(task.train_x), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(task.train_x[batch]), task.train_y[batch]).backward()
            optimizer.step()
    return model


@torch.no_grad()
def outputs(state: Mapping[str, Tensor], task: Task) -> Tensor:
    model = network(0)
    model.load_state_dict(state)
    return model(task.test_x)


def accuracy(state: Mapping[str, Tensor], task: Task) -> float:
    return (outputs(state, task).argmax(1) == task.test_y).float().mean().item()


def loss(state: Mapping[str, Tensor], task: Task) -> float:
    return nn.functional.cross_entropy(outputs(state, task), task.test_y).item()
