"""Networks the benchmarks share: a trunk, T heads, and losses as a user would write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
        encode: runs the trunk; returns the representation.
        heads: runs the heads, each on the representation under its task's name ("0", "1", …); returns the T losses.
        shared: parameters of the trunk.
        own: parameters of each head.
        batch: examples.
    """

    name: str
    tasks: int
    encode: Callable[[], torch.Tensor]
    heads: Callable[[Mapping[str, torch.Tensor]], list[torch.Tensor]]
    shared: list[nn.Parameter]
    own: list[list[nn.Parameter]]
    batch: int

    def forward(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the network, all heads on the same tensor; returns the representation and the T losses."""
        features = self.encode()
        return features, self.heads({str(task): features for task in range(self.tasks)})

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


def _case(
    name: str, trunk: nn.Module, heads: Iterable[nn.Module], inputs: torch.Tensor, classes: int
) -> Case:
    """Every head classifies what the trunk makes of the same inputs."""
    heads = nn.ModuleList(heads)
    batch = len(inputs)
    labels = torch.randint(0, classes, (len(heads), batch))

    def read(features: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        pairs = zip(heads, labels, strict=True)
        return [F.cross_entropy(h(features[str(task)]), y) for task, (h, y) in enumerate(pairs)]

    own = [list(head.parameters()) for head in heads]
    return Case(name, len(heads), lambda: trunk(inputs), read, list(trunk.parameters()), own, batch)


def lenet(tasks: int = 2, batch: int = 256) -> Case:
    """LeNet on digits; every task has ten classes and the head of LeNet."""
    torch.manual_seed(0)
    names = [f"digit {task}" for task in range(tasks)]
    model = LeNet(28, dict.fromkeys(names, 10))
    images = torch.randn(batch, 1, 28, 28)
    labels = torch.randint(0, 10, (tasks, batch))

    def read(features: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        pairs = enumerate(zip(names, labels, strict=True))
        return [F.cross_entropy(model.heads[name](features[str(task)]), y) for task, (name, y) in pairs]

    own = [model.task_parameters(name) for name in names]
    return Case("LeNet", tasks, lambda: model.encode(images), read, model.shared_parameters(), own, batch)


def resnet(tasks: int, batch: int = 32, side: int = 64) -> Case:
    """ResNet-18 with T linear heads of two classes."""
    torch.manual_seed(0)
    trunk = resnet18_trunk()
    heads = [nn.Linear(512, 2) for _ in range(tasks)]
    return _case(f"ResNet-18 {side}x{side}", trunk, heads, torch.randn(batch, 3, side, side), 2)


class _Averaged(nn.Module):
    """A transformer's encoder; the representation is the mean over the tokens."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.encoder(tokens).mean(dim=1)


def transformer(tasks: int, batch: int = 16, width: int = 128, tokens: int = 64) -> Case:
    """A transformer of four layers on sequences of embedded tokens, with T linear heads of ten classes."""
    torch.manual_seed(0)
    heads = [nn.Linear(width, 10) for _ in range(tasks)]
    return _case("transformer", _Averaged(width, 4), heads, torch.randn(batch, tokens, width), 10)


class _Last(nn.Module):
    """A recurrent network; the representation is its last state."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.cells = nn.GRU(inside, width, batch_first=True)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        return self.cells(sequence)[1][0]


def recurrent(tasks: int, batch: int = 32, width: int = 128, length: int = 64) -> Case:
    """A recurrent network (GRU) on sequences, with T linear heads of ten classes."""
    torch.manual_seed(0)
    heads = [nn.Linear(width, 10) for _ in range(tasks)]
    return _case("GRU", _Last(64, width), heads, torch.randn(batch, length, 64), 10)


def many_heads(tasks: int = 100, batch: int = 128, width: int = 64) -> Case:
    """Small heads of two layers, ten classes each, on a trunk of three layers."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, width),
        nn.ReLU(),
    ]
    heads = [nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10)) for _ in range(tasks)]
    return _case("small heads on a small trunk", nn.Sequential(*layers), heads, torch.randn(batch, 256), 10)
