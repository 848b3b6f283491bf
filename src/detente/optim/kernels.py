"""Adam's arithmetic on lists of tensors, the only one there is: averages forward, contribution into a target.

Nothing here knows a task, a loss or an optimizer. Two ways lead to the same numbers up to rounding: torch's fused Adam
kernel, which reads and writes everything once, and a chain of ``torch._foreach_*`` operations for what it does not
offer. (``geometry.adam`` moves the few numbers that a method learns, in numpy and with a count for every entry.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from detente.autograd.numbers import to_host

Form = Literal["adam", "none", "paper", "sgd"]

# Entries whose denominators are held at once by the chain of operations.
_GROUP = 1 << 20
_FUSED_DEVICES = frozenset({"cpu", "cuda"})
_FUSED_TYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Rule:
    """Tell how a gradient becomes a contribution, with m and v the running averages of g and g² and t their count.

    Attributes:
        form: ``adam``: lr · m̂ / (√v̂ + eps) with m̂ = m / (1 - β1^t), v̂ = v / (1 - β2^t); ``none``: the same with
            m̂ = m, v̂ = v; ``paper``: lr · m / √(v + eps) · (1 - β2^t) / (1 - β1^t); ``sgd``: lr · g / √(v + eps).
        lr: learning rate η.
        beta1, beta2: decay rates of the averages.
        eps: ε.
    """

    form: Form = "adam"
    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    @classmethod
    def of(cls, group: Mapping[str, Any], form: Form = "adam") -> Rule:
        """Read the numbers of a parameter group, as they are now: schedulers change them."""
        beta1, beta2 = group["betas"]
        return cls(form, float(group["lr"]), float(beta1), float(beta2), float(group["eps"]))

    def factor(self, count: int) -> float:
        """Give what multiplies the quotient of numerator and denominator after ``count`` gradients.

        Example:
            >>> Rule(lr=0.1, beta1=0.5).factor(1)
            0.2
        """
        correction1, correction2 = 1 - self.beta1**count, 1 - self.beta2**count
        scale = {"adam": 1 / correction1, "none": 1.0, "paper": correction2 / correction1, "sgd": 1.0}
        return self.lr * scale[self.form]

    def denominators(self, squares: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
        """Give new tensors with √v̂ + ε, or with √(v + ε), for averages of ``count`` squares.

        Example:
            >>> Rule(eps=1.0, beta2=0.75).denominators([torch.tensor([1.0])], 1)
            [tensor([3.])]
        """
        squares = list(squares)
        if self.form in ("paper", "sgd"):
            found = list(torch._foreach_add(squares, self.eps))
            torch._foreach_sqrt_(found)
            return found
        found = list(torch._foreach_sqrt(squares))
        if self.form == "adam":
            torch._foreach_div_(found, (1 - self.beta2**count) ** 0.5)
        torch._foreach_add_(found, self.eps)
        return found


@dataclass(frozen=True)
class Bundle:
    """Tensors that go through a kernel together: of one rule and count, one device and dtype, one to one.

    Attributes:
        rule: what becomes of the gradients.
        count: gradients in the averages, this step's included.
        gradients: of this step; these and the averages are real and laid out alike.
        exp_avgs: running averages of the gradients; empty where the form keeps none.
        exp_avg_sqs: running averages of their squares.
        parameters: as the caller knows them.
        states: where their averages are kept.
    """

    rule: Rule
    count: int
    gradients: list[torch.Tensor] = field(default_factory=list)
    exp_avgs: list[torch.Tensor] = field(default_factory=list)
    exp_avg_sqs: list[torch.Tensor] = field(default_factory=list)
    parameters: list[torch.Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)


def fresh_moments(parameter: torch.Tensor) -> dict[str, Any]:
    """Make zero averages in the parameter's layout; the counter is a plain number.

    Example:
        >>> fresh_moments(torch.ones(2))
        {'step': 0, 'exp_avg': tensor([0., 0.]), 'exp_avg_sq': tensor([0., 0.])}
    """
    return {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def laid_out(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Lay a dense gradient out like a tensor of its shape; autograd may hand out any strides, expanded ones included.

    Example:
        >>> laid_out(torch.ones(()).expand(2, 2), torch.zeros(2, 2)).stride()
        (2, 1)
    """
    if gradient.stride() == like.stride() and gradient.dtype == like.dtype:
        return gradient
    return torch.empty_like(like).copy_(gradient)


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether a kernel may walk through the memory of both side by side.

    Example:
        >>> alike(torch.zeros(2, 3), torch.zeros(3, 2).t())
        False
    """
    return one.shape == other.shape and (one.stride(), one.dtype, one.device) == (
        other.stride(),
        other.dtype,
        other.device,
    )


def can_fuse(tensor: torch.Tensor) -> bool:
    """Tell whether torch's fused kernel takes such a tensor."""
    return tensor.device.type in _FUSED_DEVICES and tensor.dtype in _FUSED_TYPES


def subtract(bundle: Bundle, targets: list[torch.Tensor]) -> None:
    """Move the averages by this step's gradients and subtract the contribution from the targets, in place.

    Args:
        bundle: rule, gradients and averages.
        targets: laid out like the averages: the fused kernel runs through memory and looks at no strides.

    Example:
        >>> target, zero = torch.zeros(2), torch.zeros(2)
        >>> subtract(Bundle(Rule(lr=0.1), 1, [torch.tensor([3.0, -4.0])], [zero], [zero.clone()]), [target])
        >>> target
        tensor([-0.1000,  0.1000])
    """
    if not targets:
        return
    rule = bundle.rule
    if rule.form == "adam" and can_fuse(targets[0]):
        # Filled on the device, so that nothing waits; the kernel reads one count for each tensor.
        count = torch.full((), float(bundle.count), dtype=torch.float32, device=targets[0].device)
        torch._fused_adam_(
            targets,
            bundle.gradients,
            bundle.exp_avgs,
            bundle.exp_avg_sqs,
            [],
            [count] * len(targets),
            lr=rule.lr,
            beta1=rule.beta1,
            beta2=rule.beta2,
            weight_decay=0.0,
            eps=rule.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )
        return
    advance(bundle)
    for few, numerators, denominators in _quotients(bundle):
        torch._foreach_addcdiv_(targets[few], numerators, denominators, -rule.factor(bundle.count))
        del denominators  # held here, they would live beside the next ones


def advance(bundle: Bundle) -> None:
    """Move the averages by this step's gradients, in place.

    Example:
        >>> square = torch.zeros(1)
        >>> advance(Bundle(Rule(beta2=0.99), 1, [torch.tensor([3.0])], [torch.zeros(1)], [square]))
        >>> square
        tensor([0.0900])
    """
    gradients, rule = bundle.gradients, bundle.rule
    if bundle.exp_avgs:
        torch._foreach_lerp_(bundle.exp_avgs, gradients, 1 - rule.beta1)
    torch._foreach_mul_(bundle.exp_avg_sqs, rule.beta2)
    torch._foreach_addcmul_(bundle.exp_avg_sqs, gradients, gradients, 1 - rule.beta2)


def contribution_means(bundle: Bundle) -> list[torch.Tensor]:
    """Give for each tensor the mean absolute contribution, from averages that have been moved; on the device.

    Example:
        >>> moments = {"exp_avgs": [torch.tensor([2.0, -4.0])], "exp_avg_sqs": [torch.tensor([4.0, 4.0])]}
        >>> contribution_means(Bundle(Rule("none", lr=0.1, eps=0.0), 1, **moments))
        [tensor(0.1500)]
    """
    found: list[torch.Tensor] = []
    for _, numerators, denominators in _quotients(bundle):
        for numerator, denominator in zip(numerators, denominators, strict=True):
            quotient = torch.div(numerator, denominator, out=denominator)
            found.append(mean_size(quotient) * abs(bundle.rule.factor(bundle.count)))
            del denominator, quotient
        del denominators
    return found


def mean_size(tensor: torch.Tensor) -> torch.Tensor:
    """Give the mean absolute value of a real tensor as a scalar on its device; 0 for an empty one.

    Example:
        >>> mean_size(torch.tensor([1.0, -3.0]))
        tensor(2.)
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    total: torch.Tensor = torch.linalg.vector_norm(tensor, ord=1, dtype=dtype)
    return total / max(tensor.numel(), 1)


def norms(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Give the Euclidean lengths of real tensors, on the host, in one copy unless one is doubtful.

    A length is finite exactly if every entry is.

    In single precision the squares of entries beyond 1e19 overflow and those below 1e-19 vanish; tensors with such a
    length are divided by their largest entry first.

    Example:
        >>> norms([torch.tensor([3.0, 4.0]), torch.tensor([3e30, 4e30]), torch.zeros(2)])
        [5.0, 5.0...e+30, 0.0]
    """
    if not tensors:
        return []
    (found,) = to_host([_norms(tensors)])
    lengths: list[float] = found.tolist()
    doubtful = [
        place
        for place, (tensor, length) in enumerate(zip(tensors, lengths, strict=True))
        if not _trusted(tensor) <= length < float("inf")
    ]
    if doubtful:
        (largest,) = to_host([[largest_entry(tensors[place]) for place in doubtful]])
        places = [(place, size) for place, size in zip(doubtful, largest.tolist(), strict=True) if size]
        (parts,) = to_host([[norm for place, size in places for norm in _norms([tensors[place] / size])]])
        for (place, size), part in zip(places, parts.tolist(), strict=True):
            lengths[place] = size * part
    return lengths


def all_finite(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Tell for each real tensor whether every entry is finite, in one copy to the host unless one is doubtful.

    Example:
        >>> all_finite([torch.ones(2), torch.tensor([1.0, float("nan")]), torch.tensor([3e38])])
        [True, False, True]
    """
    if not tensors:
        return []
    (lengths,) = to_host([_norms(tensors)])
    return [
        math.isfinite(length) or bool(torch.isfinite(tensor).all())
        for tensor, length in zip(tensors, lengths.tolist(), strict=True)
    ]


def largest_entry(tensor: torch.Tensor) -> torch.Tensor:
    """Give the largest absolute entry of a real tensor as a scalar on its device; 0 for an empty one.

    Example:
        >>> largest_entry(torch.tensor([1.0, -3.0]))
        tensor(3.)
    """
    if not tensor.numel():
        return tensor.new_zeros(())
    found: torch.Tensor = torch.linalg.vector_norm(tensor, ord=float("inf"))
    return found


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply a real tensor by a factor, also where the factor alone is out of its dtype's range.

    Example:
        >>> scaled(torch.tensor([1e-30]), 1e40)
        tensor([1.0000e+10])
    """
    limits = torch.finfo(torch.promote_types(tensor.dtype, torch.float32))
    if limits.tiny <= factor <= limits.max or factor == 0:
        return tensor * factor
    root = math.sqrt(factor)
    return (tensor * root).mul_(root)


def _norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors):
        return list(torch._foreach_norm(list(tensors)))  # one launch for many tensors
    return [
        torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        for tensor in tensors
    ]


def _trusted(tensor: torch.Tensor) -> float:
    """The least length whose squares lose nothing to the smallest numbers there are."""
    limits = torch.finfo(torch.promote_types(tensor.dtype, torch.float32))
    return math.sqrt(limits.tiny / limits.eps)


def _quotients(bundle: Bundle) -> Iterator[tuple[slice, list[torch.Tensor], list[torch.Tensor]]]:
    """Give a few tensors at a time: which, numerators, denominators."""
    numerators = bundle.gradients if bundle.rule.form == "sgd" else bundle.exp_avgs
    for few in _groups(bundle.exp_avg_sqs):
        denominators = bundle.rule.denominators(bundle.exp_avg_sqs[few], bundle.count)
        yield few, numerators[few], denominators
        del denominators


def _groups(tensors: Sequence[torch.Tensor]) -> Iterator[slice]:
    start = entries = 0
    for position, tensor in enumerate(tensors):
        entries += tensor.numel()
        if entries >= _GROUP or position == len(tensors) - 1:
            yield slice(start, position + 1)
            start, entries = position + 1, 0
