"""Parameters beside their moments: those that go through a kernel together, and one step under way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from detente.optim.balance import Gauge
from detente.optim.kernels import Moments, Rule, real


@dataclass(frozen=True)
class Part:
    """Parameters that go through a kernel together: of one group, one count of gradients, one device and dtype.

    Attributes:
        group: their parameter group.
        parameters: as the caller knows them.
        moments: real tensors, in the order of the parameters.
        states: where their moments are kept.
    """

    group: dict[str, Any]
    parameters: list[torch.Tensor] = field(default_factory=list)
    moments: Moments = field(default_factory=lambda: Moments([], [], [], 0))
    states: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class OwnMove:
    """Everything the move of some task-specific parameters needs, so that it cannot fail half-way.

    Attributes:
        part: parameters and moments.
        rule: the numbers of their group.
        shrinkage: by what weight decay multiplies them.
        targets: what the contribution is subtracted from, laid out like the moments: a parameter, or zeros beside it.
    """

    part: Part
    rule: Rule
    shrinkage: float
    targets: list[torch.Tensor]


@dataclass
class Pass:
    """One step under way.

    Attributes:
        group_of: the group of every parameter.
        gauge: collects contributions, None if nobody asked.
        touched: shared parameters some task's moments took a gradient of, each with those tasks.
        states: whose counters go up by one when the step is made.
        born: parameter and task (None for a task-specific parameter) of moments that did not exist before the step.
    """

    group_of: dict[torch.Tensor, dict[str, Any]]
    gauge: Gauge | None
    touched: dict[torch.Tensor, list[str]] = field(default_factory=dict)
    states: list[dict[str, Any]] = field(default_factory=list)
    born: list[tuple[torch.Tensor, str | None]] = field(default_factory=list)

    def groups(self) -> Iterable[tuple[dict[str, Any], list[torch.Tensor]]]:
        """The touched parameters, group by group."""
        found: dict[int, tuple[dict[str, Any], list[torch.Tensor]]] = {}
        for parameter in self.touched:
            group = self.group_of[parameter]
            found.setdefault(id(group), (group, []))[1].append(parameter)
        return found.values()


def fresh_moments(parameter: torch.Tensor) -> dict[str, Any]:
    """Zero moments in the parameter's layout; the counter is a plain number.

    Example:
        >>> fresh_moments(torch.ones(2))
        {'step': 0, 'exp_avg': tensor([0., 0.]), 'exp_avg_sq': tensor([0., 0.])}
    """
    return {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def rule_of(group: Mapping[str, Any], form: Any) -> Rule:
    """The numbers of a group, as they are now: schedulers change them."""
    beta1, beta2 = group["betas"]
    return Rule(form, float(group["lr"]), float(beta1), float(beta2), float(group["eps"]))


def shrinkage(group: Mapping[str, Any]) -> float:
    """The factor of decoupled weight decay, 1 - ηλ.

    Example:
        >>> shrinkage({"lr": 0.5, "weight_decay": 0.5})
        0.75
    """
    return 1 - float(group["lr"]) * float(group["weight_decay"])


def decay(parameters: list[torch.Tensor], factor: float) -> None:
    """Decoupled weight decay by a :func:`shrinkage`, in place."""
    if factor != 1:
        torch._foreach_mul_(parameters, factor)


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient as a real tensor with all its entries."""
    return real(gradient if gradient.layout is torch.strided else gradient.to_dense())


def laid_out(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A dense gradient laid out like a tensor of its shape; autograd may hand out any strides, expanded ones included.

    Example:
        >>> laid_out(torch.ones(()).expand(2, 2), torch.zeros(2, 2)).stride()
        (2, 1)
    """
    if gradient.stride() == like.stride() and gradient.dtype == like.dtype:
        return gradient
    return torch.empty_like(like).copy_(gradient)
