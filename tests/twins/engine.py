"""The engine's slow and obvious twin, methods that do as they are told, and a zoo of models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import detente
from detente.values import TaskGradients

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


class Spy(detente.Method):
    """Keep a copy of what was shown, and decide as told."""

    declares = detente.Declaration(
        name="spy", source="a test", needs=frozenset({"gramian", "jacobian", "activations"})
    )

    def __init__(
        self,
        *,
        weights: Sequence[float] | Mapping[str, float] | None = None,
        direction: Callable[[torch.Tensor], torch.Tensor] | None = None,
        status: Any = "ok",
    ) -> None:
        super().__init__()
        self.weights, self.direction, self.status = weights, direction, status
        self.seen: TaskGradients | None = None

    def solve(self, gradients: TaskGradients) -> detente.Combination:
        kept = None if gradients.jacobian is None else gradients.jacobian.clone()
        self.seen = replace(gradients, jacobian=kept)
        if self.direction is not None:
            assert gradients.jacobian is not None
            return detente.Combination(direction=self.direction(gradients.jacobian), status=self.status)
        if isinstance(self.weights, Mapping):
            weights = [self.weights[name] for name in gradients.names]
        else:
            weights = [1.0] * gradients.tasks if self.weights is None else list(self.weights)
        if (
            len(weights) > gradients.tasks and self.tasks is not None
        ):  # of all tasks; some reach nothing shared
            weights = [weights[place] for place in self.positions(gradients.names)]
        return detente.Combination(weights=torch.tensor(weights, dtype=torch.float64), status=self.status)


class Weighting(detente.Method):
    """Weight the losses as told, without looking at gradients."""

    declares = detente.Declaration(name="weighting", source="a test")

    def __init__(self, *, weights: Sequence[float] = (), status: Any = "ok") -> None:
        super().__init__()
        self.weights, self.status = weights, status

    def solve(self, gradients: TaskGradients) -> detente.Combination:
        return detente.Combination(
            weights=torch.tensor(self.weights, dtype=torch.float64), status=self.status
        )


class Remembering(detente.Method):
    """Count the steps of each task and draw a number: everything a method may remember."""

    declares = detente.Declaration(
        name="remembering", source="a test", needs=frozenset({"gramian"}), stateful=True
    )

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)

    def allocate(self, tasks: int) -> None:
        self.register_buffer("steps", torch.zeros(tasks, dtype=torch.int64))

    def solve(self, gradients: TaskGradients) -> detente.Combination:
        weights = torch.rand(gradients.tasks, generator=self.generator, dtype=torch.float64)
        self.steps[self.positions(gradients.names)] += 1
        return detente.Combination(weights=weights)


class RememberingWeighting(Remembering):
    """The same as a weighting of the losses."""

    declares = detente.Declaration(
        name="remembering-weighting", source="a test", needs=frozenset({"losses"}), stateful=True
    )


def remembered(method: detente.Method) -> dict[str, Any]:
    """The whole state of a method, comparable with ``==``."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.tolist()
        return {key: plain(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value

    return {"tasks": method.tasks, **{key: plain(value) for key, value in method.state_dict().items()}}


def gradient(loss: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor | None:
    """One loss, one tensor; the graph stays."""
    if not tensor.requires_grad:
        return None
    found = torch.autograd.grad(loss, [tensor], retain_graph=True, allow_unused=True)[0]
    return None if found is None else found.to_dense() if found.layout is not torch.strided else found


def row(loss: torch.Tensor, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The gradients of one loss with respect to several tensors, one after another; zero where it depends on none."""
    pieces = []
    for tensor in tensors:
        found = gradient(loss, tensor)
        found = torch.zeros_like(tensor) if found is None else found
        pieces.append((torch.view_as_real(found) if found.is_complex() else found).reshape(-1).double())
    return torch.cat(pieces)


def expected(
    losses: Mapping[str, torch.Tensor],
    parameters: Iterable[torch.Tensor],
    weights: Sequence[float],
    *,
    heads: str = "own",
    shared: Iterable[torch.Tensor] = (),
) -> list[torch.Tensor | None]:
    """What every ``.grad`` must be for weights that are given: in every mode the same.

    A parameter that two losses reach (or one of ``shared``) takes the weighted sum, any other one the plain gradient.
    """
    also = {id(tensor) for tensor in shared}
    found: list[torch.Tensor | None] = []
    for parameter in parameters:
        terms = [
            (w, g)
            for w, loss in zip(weights, losses.values(), strict=True)
            if (g := gradient(loss, parameter)) is not None
        ]
        weighted = len(terms) > 1 or id(parameter) in also or heads == "weighted"
        total = None
        for weight, term in terms:
            part = weight * term if weighted else term
            total = part if total is None else total + part
        found.append(total)
    return found


def assert_grads(
    parameters: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor | None], **tolerance: float
) -> None:
    """Every ``.grad`` is as wanted, None included."""
    tolerance = tolerance or TOLERANCE
    for position, (parameter, want) in enumerate(zip(parameters, wanted, strict=True)):
        got = parameter.grad
        where = f"parameter {position} of shape {tuple(parameter.shape)}"
        if want is None:
            assert got is None, f"{where}: has a gradient and should have none"
            continue
        assert got is not None, f"{where}: has no gradient"
        assert got.dtype == parameter.dtype and got.shape == parameter.shape, where
        dense = got if got.layout is torch.strided else got.to_dense()
        assert torch.allclose(dense, want.to(dense.dtype), **tolerance), (
            f"{where}: off by {(dense - want).abs().max().item():.3g}"
        )
