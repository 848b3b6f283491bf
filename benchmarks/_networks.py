"""Networks the benchmarks share: a trunk, T heads, and losses as a user would write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from detente.models import LeNet


@dataclass
class Case:
    """One network on one batch.

    Attributes:
        name: for the table.
        tasks: T.
        forward: runs the network; returns the representation and the T losses.
        shared: parameters of the trunk.
        own: parameters of each head.
    """

    name: str
    tasks: int
    forward: Callable[[], tuple[torch.Tensor, list[torch.Tensor]]]
    shared: list[nn.Parameter]
    own: list[list[nn.Parameter]]

    def clear(self) -> None:
        """Forget every gradient."""
        for parameter in (*self.shared, *(p for head in self.own for p in head)):
            parameter.grad = None


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.skip = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.skip(x))


def resnet18_trunk() -> nn.Sequential:
    """ResNet-18 with its usual stem (7×7, stride 2, max-pooling); 512 features after average pooling."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inside = 64
    for outside, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(inside, outside, stride), _Block(outside, outside, 1)]
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def lenet(batch: int = 256) -> Case:
    """LeNet on two digits."""
    torch.manual_seed(0)
    model = LeNet(28, {"left": 10, "right": 10})
    images = torch.randn(batch, 1, 28, 28)
    labels = torch.randint(0, 10, (2, batch))

    def forward() -> tuple[torch.Tensor, list[torch.Tensor]]:
        output = model(images)
        losses = [F.cross_entropy(z, y) for z, y in zip(output.predictions.values(), labels, strict=True)]
        return output.features, losses

    own = [model.task_parameters(task) for task in ("left", "right")]
    return Case("LeNet", 2, forward, model.shared_parameters(), own)


def resnet(tasks: int, batch: int = 32, side: int = 64) -> Case:
    """ResNet-18 with T linear heads of two outputs."""
    torch.manual_seed(0)
    trunk = resnet18_trunk()
    heads = nn.ModuleList(nn.Linear(512, 2) for _ in range(tasks))
    images = torch.randn(batch, 3, side, side)
    labels = torch.randint(0, 2, (tasks, batch))

    def forward() -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = trunk(images)
        losses = [F.cross_entropy(h(features), y) for h, y in zip(heads, labels, strict=True)]
        return features, losses

    own = [list(head.parameters()) for head in heads]
    return Case(f"ResNet-18 {side}x{side}", tasks, forward, list(trunk.parameters()), own)
