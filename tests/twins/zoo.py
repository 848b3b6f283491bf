"""Models that have tripped one library or another, each as an encoder and heads with their losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Features = list[torch.Tensor]


@dataclass
class Specimen:
    """One odd model.

    Attributes:
        encode: makes the features (the batch is inside).
        heads: makes the losses from them.
        parameters: everything that may receive a gradient.
        layer: shared parameters to solve on.
    """

    encode: Callable[[], Features]
    heads: Callable[[Features], dict[str, torch.Tensor]]
    parameters: list[torch.Tensor]
    layer: list[torch.Tensor] = field(default_factory=list)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=torch.float64)


def _input(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _two(left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"left": left.square().mean(), "right": (right + 0.3).sin().sum()}


def _of(*modules: Any) -> list[torch.Tensor]:
    return list(
        dict.fromkeys(p for m in modules for p in (m.parameters() if isinstance(m, nn.Module) else [m]))
    )


def _around(trunk: nn.Module, inputs: torch.Tensor, width: int, **more: Any) -> Specimen:
    left, right = _linear(width, 2), _linear(width, 3)
    layer = more.pop("layer", [next(p for p in trunk.parameters() if p.requires_grad)])
    return Specimen(
        lambda: [trunk(inputs)],
        lambda z: _two(left(z[0]), right(z[0].tanh())),
        _of(trunk, left, right),
        layer,
        **more,
    )


def plain() -> Specimen:
    return _around(nn.Sequential(_linear(3, 5), nn.Tanh(), _linear(5, 4)), _input(6, 3), 4)


def frozen() -> Specimen:
    trunk = nn.Sequential(_linear(3, 5), nn.Tanh(), _linear(5, 4))
    trunk[0].requires_grad_(False)
    found = _around(trunk, _input(6, 3), 4)
    found.parameters[-1].requires_grad_(False)
    return found


def unused() -> Specimen:
    found = plain()
    return Specimen(found.encode, found.heads, [*found.parameters, nn.Parameter(_input(2))], found.layer)


def reused() -> Specimen:
    once, head = _linear(4, 4), _linear(4, 2)
    x = _input(6, 4)
    return Specimen(
        lambda: [once(once(x).tanh())],
        lambda z: {"left": (head(z[0]) * head(z[0] + 1)).mean(), "right": z[0].cos().sum()},
        _of(once, head),
        [once.weight],
    )


def tied_to_encoder() -> Specimen:
    first, second, right = _linear(3, 4), _linear(4, 4), _linear(4, 2)
    x = _input(6, 3)
    return Specimen(
        lambda: [second(first(x).tanh())],
        lambda z: _two(functional.linear(z[0], first.weight.T), right(z[0])),
        _of(first, second, right),
        [second.weight],
    )


def tied_heads() -> Specimen:
    trunk, left, right = _linear(3, 4), _linear(4, 2), _linear(4, 2)
    right.weight = left.weight
    x = _input(6, 3)
    return Specimen(
        lambda: [trunk(x).tanh()],
        lambda z: _two(left(z[0]), right(z[0])),
        _of(trunk, left, right),
        [trunk.weight],
    )


def layer_shared_by_heads() -> Specimen:
    trunk, common, left, right = _linear(3, 4), _linear(4, 4), _linear(4, 2), _linear(4, 2)
    x = _input(6, 3)

    def heads(z: Features) -> dict[str, torch.Tensor]:
        deeper = common(z[0]).tanh()
        return _two(left(deeper), right(deeper))

    return Specimen(lambda: [trunk(x)], heads, _of(trunk, common, left, right), [common.weight])


def partly_shared() -> Specimen:
    trunk, pair, c = _linear(3, 4), _linear(4, 4), _linear(4, 1)
    x = _input(6, 3)

    def heads(z: Features) -> dict[str, torch.Tensor]:
        deeper = pair(z[0]).tanh()
        return {"a": deeper.square().mean(), "b": deeper.sin().sum(), "c": c(z[0]).cos().mean()}

    return Specimen(lambda: [trunk(x).tanh()], heads, _of(trunk, pair, c), [trunk.weight])


def dropout() -> Specimen:
    return _around(
        nn.Sequential(_linear(3, 8), nn.Dropout(0.5), _linear(8, 4), nn.Dropout(0.2)), _input(6, 3), 4
    )


def batch_norm() -> Specimen:
    return _around(
        nn.Sequential(_linear(3, 5), nn.BatchNorm1d(5, dtype=torch.float64), nn.ReLU(), _linear(5, 4)),
        _input(6, 3),
        4,
    )


def convolution_channels_last() -> Specimen:
    trunk = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 2, 3), nn.Flatten()
    )
    trunk = trunk.double().to(memory_format=torch.channels_last)
    return _around(trunk, _input(3, 2, 5, 5).to(memory_format=torch.channels_last), 18)


class _Last(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x)[0][:, -1]


def lstm() -> Specimen:
    return _around(_Last(nn.LSTM(3, 4, batch_first=True, dtype=torch.float64)), _input(2, 5, 3), 4)


def gru() -> Specimen:
    cell = nn.GRU(3, 2, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    return _around(_Last(cell), _input(2, 4, 3), 4)


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def checkpointed() -> Specimen:
    first = _Checkpointed(nn.Sequential(_linear(3, 5), nn.Dropout(0.3), nn.Tanh()))
    return _around(nn.Sequential(first, _Checkpointed(_linear(5, 4))), _input(6, 3), 4)


def several_features() -> Specimen:
    first, other, left, right = _linear(3, 4), _linear(3, 2), _linear(4, 2), _linear(6, 2)
    x = _input(6, 3)
    return Specimen(
        lambda: [first(x).tanh(), other(x).sin()],
        lambda z: _two(left(z[0]), right(torch.cat(z, dim=1))),
        _of(first, other, left, right),
        [first.weight],
    )


def features_of_one_operation() -> Specimen:
    trunk, left, right = _linear(3, 8), _linear(4, 2), _linear(4, 2)
    x = _input(6, 3)
    return Specimen(
        lambda: list(trunk(x).tanh().chunk(2, dim=1)),
        lambda z: _two(left(z[0]), right(z[0] * z[1])),
        _of(trunk, left, right),
        [trunk.weight],
    )


def nested_features() -> Specimen:
    first, second, left, right = _linear(3, 4), _linear(4, 4), _linear(8, 2), _linear(4, 2)
    x = _input(6, 3)

    def encode() -> Features:
        shallow = first(x).tanh()
        return [shallow, second(shallow).sin()]

    return Specimen(
        encode,
        lambda z: _two(left(torch.cat(z, dim=1)), right(z[1] * 2)),
        _of(first, second, left, right),
        [first.weight],
    )


def thrice_nested_features() -> Specimen:
    first, left = _linear(3, 4), _linear(4, 2)
    x = _input(6, 3)

    def encode() -> Features:
        a = first(x)
        b = a.tanh()  # no parameters between
        return [b * a, a, b]  # and the deepest one first

    return Specimen(
        encode,
        lambda z: _two(left(z[0]) + z[1][:, :2], left(z[2]) - z[0][:, :2]),
        _of(first, left),
        [first.weight],
    )


def skip_around_features() -> Specimen:
    first, second, left, right = _linear(3, 4), _linear(4, 4), _linear(4, 2), _linear(4, 2)
    x = _input(6, 3)
    early: Features = []

    def encode() -> Features:
        early[:] = [first(x).tanh()]
        return [second(early[0])]

    return Specimen(
        encode,
        lambda z: _two(left(z[0] + early[0]), right(z[0])),
        _of(first, second, left, right),
        [second.weight],
    )


def feature_is_a_leaf() -> Specimen:
    prompt = nn.Parameter(_input(1, 4))
    trunk, left, right = _linear(3, 4), _linear(4, 2), _linear(4, 2)
    x = _input(6, 3)
    return Specimen(
        lambda: [trunk(x), prompt],
        lambda z: _two(left(z[0] * z[1]), right(z[0])),
        _of(trunk, prompt, left, right),
        [trunk.weight],
    )


def feature_is_a_loss() -> Specimen:
    trunk, right = _linear(3, 1), _linear(1, 2)
    x = _input(6, 3)
    return Specimen(
        lambda: [trunk(x).square().mean()],
        lambda z: {"left": z[0], "right": right(z[0].reshape(1)).sin().sum()},
        _of(trunk, right),
        [trunk.weight],
    )


def sparse_embeddings() -> Specimen:
    shared = nn.Embedding(7, 3, sparse=True, dtype=torch.float64)
    own = nn.Embedding(5, 4, sparse=True, dtype=torch.float64)
    trunk, right = _linear(3, 4), _linear(4, 2)
    tokens, others = torch.tensor([1, 4, 4, 6]), torch.tensor([0, 2, 2, 3])
    return Specimen(
        lambda: [trunk(shared(tokens)).tanh()],
        lambda z: _two(z[0] * own(others), right(z[0])),
        _of(shared, own, trunk, right),
        [trunk.weight],
    )


def heads_without_parameters() -> Specimen:
    trunk = _linear(3, 4)
    x = _input(6, 3)
    return Specimen(lambda: [trunk(x)], lambda z: _two(z[0], z[0].tanh()), _of(trunk), [trunk.bias])


def mixed_dtypes() -> Specimen:
    half, trunk, left, right = nn.Linear(3, 3), _linear(3, 4), nn.Linear(4, 2), _linear(4, 2)
    x = torch.randn(6, 3)
    return Specimen(
        lambda: [trunk(half(x).double()).tanh()],
        lambda z: {"left": left(z[0].float()).square().mean(), "right": right(z[0]).sin().sum()},
        _of(half, trunk, left, right),
        [trunk.weight],
    )


def in_place() -> Specimen:
    trunk, left, right = _linear(3, 4), _linear(4, 2), _linear(4, 2)
    x = _input(6, 3)

    def encode() -> Features:
        z = trunk(x)
        z[:, 0] = z[:, 1] * 2
        z.add_(0.1)
        return [z.relu_()]

    return Specimen(
        encode, lambda z: _two(left(z[0]).mul_(2), right(z[0])), _of(trunk, left, right), [trunk.weight]
    )


def complex_numbers() -> Specimen:
    kernel = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
    left, own = _linear(4, 2), nn.Parameter(torch.randn(4, dtype=torch.complex128))
    x = torch.randn(6, 3, dtype=torch.complex128)
    return Specimen(
        lambda: [x @ kernel],
        lambda z: _two(left(z[0].abs()), (z[0] * own).real),
        [kernel, left.weight, left.bias, own],
        [kernel],
    )


class _Passing(torch.autograd.Function):
    """Reaches both inputs in the graph and has a gradient for one of them."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.variable = ["a name the engine's own nodes use"]
        return a * 2 + b.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient * 2, None


def function_without_gradient() -> Specimen:
    trunk, without, left = _linear(3, 4), nn.Parameter(_input(4)), _linear(4, 2)
    x = _input(6, 3)
    return Specimen(
        lambda: [_Passing.apply(trunk(x), without)],
        lambda z: _two(left(z[0]), _Passing.apply(z[0], without)),
        _of(trunk, without, left),
        [trunk.weight],
    )


def parametrised() -> Specimen:
    trunk = nn.Sequential(nn.utils.parametrizations.weight_norm(_linear(3, 5)), nn.Tanh(), _linear(5, 4))
    return _around(trunk, _input(6, 3), 4)


def forty_heads() -> Specimen:
    trunk, heads = _linear(3, 4), nn.ModuleList(_linear(4, 1) for _ in range(40))
    x = _input(6, 3)
    return Specimen(
        lambda: [trunk(x).tanh()],
        lambda z: {f"task {number}": (head(z[0]) + number).sin().mean() for number, head in enumerate(heads)},
        _of(trunk, heads),
        [trunk.weight],
    )


def one_grouped_head() -> Specimen:
    trunk, head = _linear(3, 4), _linear(4, 5)
    x = _input(6, 3)

    def heads(z: Features) -> dict[str, torch.Tensor]:
        return {str(task): column.square().mean() for task, column in enumerate(head(z[0]).unbind(1))}

    return Specimen(lambda: [trunk(x)], heads, _of(trunk, head), [trunk.weight])


NO_VMAP = frozenset({"checkpointed", "sparse_embeddings"})
"""Models with an operation that cannot be vectorised."""

ZOO: dict[str, Callable[[], Specimen]] = {
    make.__name__: make
    for make in (
        plain,
        frozen,
        unused,
        reused,
        tied_to_encoder,
        tied_heads,
        layer_shared_by_heads,
        partly_shared,
        dropout,
        batch_norm,
        convolution_channels_last,
        lstm,
        gru,
        checkpointed,
        several_features,
        features_of_one_operation,
        nested_features,
        thrice_nested_features,
        skip_around_features,
        feature_is_a_leaf,
        feature_is_a_loss,
        sparse_embeddings,
        heads_without_parameters,
        mixed_dtypes,
        in_place,
        complex_numbers,
        function_without_gradient,
        parametrised,
        forty_heads,
        one_grouped_head,
    )
}
