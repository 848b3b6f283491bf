"""The arithmetic of one task's update on lists of tensors: moments forward, contribution into a target.

Nothing here knows a task, a loss or an optimizer. Two ways lead to the same numbers up to rounding: torch's fused Adam
kernel, which reads and writes everything once, and a chain of ``torch._foreach_*`` operations for what it does not
offer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from detente.autograd.host import to_host

Form = Literal["adam", "none", "paper", "sgd"]

# Entries whose denominators are held at once by the chain of operations.
_GROUP = 1 << 20
_FUSED_DEVICES = frozenset({"cpu", "cuda"})
_FUSED_TYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Rule:
    """How a gradient becomes a contribution, with m and v the running averages of g and g² and t their count.

    Attributes:
        form: ``adam``: lr · m̂ / (√v̂ + eps) with m̂ = m / (1 - β1^t), v̂ = v / (1 - β2^t); ``none``: the same with
            m̂ = m, v̂ = v; ``paper``: lr · m / √(v + eps) · (1 - β2^t) / (1 - β1^t); ``sgd``: lr · g / √(v + eps).
        lr: learning rate η.
        beta1, beta2: decay rates of the averages.
        eps: ε.
    """

    form: Form
    lr: float
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class Moments:
    """Tensors of one group that have seen the same number of gradients, all real and laid out alike, one to one.

    Attributes:
        gradients: of this step.
        exp_avgs: running averages of the gradients; empty where the form keeps none.
        exp_avg_sqs: running averages of their squares.
        count: gradients in the averages, this step's included.
    """

    gradients: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    count: int


def real(tensor: torch.Tensor) -> torch.Tensor:
    """The entries as real numbers; a complex tensor becomes a view with pairs in its last axis.

    Example:
        >>> real(torch.tensor([1 + 2j])).tolist()
        [[1.0, 2.0]]
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if a kernel may walk through the memory of both side by side.

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
    """True if torch's fused kernel takes such a tensor."""
    return tensor.device.type in _FUSED_DEVICES and tensor.dtype in _FUSED_TYPES


def subtract(rule: Rule, moments: Moments, targets: list[torch.Tensor]) -> None:
    """Move the averages by this step's gradients and subtract the contribution from the targets, in place.

    Args:
        rule: the form and its numbers.
        moments: gradients and averages, all on one device and of one dtype.
        targets: laid out like the averages: the fused kernel runs through memory and looks at no strides.

    Example:
        >>> rule = Rule("adam", lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8)
        >>> target, zero = torch.zeros(2), torch.zeros(2)
        >>> subtract(rule, Moments([torch.tensor([3.0, -4.0])], [zero], [zero.clone()], 1), [target])
        >>> target
        tensor([-0.1000,  0.1000])
    """
    if not targets:
        return
    if rule.form == "adam" and can_fuse(targets[0]):
        # Filled on the device, so that nothing waits; the kernel reads one count for each tensor.
        count = torch.full((), float(moments.count), dtype=torch.float32, device=targets[0].device)
        torch._fused_adam_(
            targets,
            moments.gradients,
            moments.exp_avgs,
            moments.exp_avg_sqs,
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
    advance(rule, moments)
    for few, numerators, denominators, factor in _quotients(rule, moments):
        torch._foreach_addcdiv_(targets[few], numerators, denominators, -factor)
        del denominators  # held here, they would live beside the next ones


def advance(rule: Rule, moments: Moments) -> None:
    """Move the averages by this step's gradients, in place.

    Example:
        >>> rule = Rule("adam", lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8)
        >>> square = torch.zeros(1)
        >>> advance(rule, Moments([torch.tensor([3.0])], [torch.zeros(1)], [square], 1))
        >>> square
        tensor([0.0900])
    """
    if moments.exp_avgs:
        torch._foreach_lerp_(moments.exp_avgs, moments.gradients, 1 - rule.beta1)
    torch._foreach_mul_(moments.exp_avg_sqs, rule.beta2)
    torch._foreach_addcmul_(moments.exp_avg_sqs, moments.gradients, moments.gradients, 1 - rule.beta2)


def contribution_means(rule: Rule, moments: Moments) -> list[torch.Tensor]:
    """For each tensor the mean absolute contribution, from averages that have been moved; on the device.

    Example:
        >>> rule = Rule("none", lr=0.1, beta1=0.9, beta2=0.99, eps=0.0)
        >>> contribution_means(rule, Moments([], [torch.tensor([2.0, -4.0])], [torch.tensor([4.0, 4.0])], 1))
        [tensor(0.1500)]
    """
    found: list[torch.Tensor] = []
    for _, numerators, denominators, factor in _quotients(rule, moments):
        for numerator, denominator in zip(numerators, denominators, strict=True):
            found.append(mean_size(torch.div(numerator, denominator, out=denominator)) * abs(factor))
            del denominator
        del denominators
    return found


def mean_size(tensor: torch.Tensor) -> torch.Tensor:
    """The mean absolute value of a real tensor as a scalar on its device; 0 for an empty one.

    Example:
        >>> mean_size(torch.tensor([1.0, -3.0]))
        tensor(2.)
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    total: torch.Tensor = torch.linalg.vector_norm(tensor, ord=1, dtype=dtype)
    return total / max(tensor.numel(), 1)


def norms(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Euclidean lengths of real tensors with finite entries, on the host, in one copy unless one is doubtful.

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


def largest_entry(tensor: torch.Tensor) -> torch.Tensor:
    """The largest absolute entry of a real tensor as a scalar on its device; 0 for an empty one.

    Example:
        >>> largest_entry(torch.tensor([1.0, -3.0]))
        tensor(3.)
    """
    if not tensor.numel():
        return tensor.new_zeros(())
    found: torch.Tensor = torch.linalg.vector_norm(tensor, ord=float("inf"))
    return found


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """``factor`` times a real tensor, also where the factor alone is out of its dtype's range.

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


def _quotients(
    rule: Rule, moments: Moments
) -> Iterator[tuple[slice, list[torch.Tensor], list[torch.Tensor], float]]:
    """A few tensors at a time: which, numerators, denominators, and the factor of their quotient."""
    numerators = moments.gradients if rule.form == "sgd" else moments.exp_avgs
    correction1, correction2 = 1 - rule.beta1**moments.count, 1 - rule.beta2**moments.count
    for few in _groups(moments.exp_avg_sqs):
        squares = moments.exp_avg_sqs[few]
        if rule.form in ("paper", "sgd"):
            denominators = list(torch._foreach_add(squares, rule.eps))
            torch._foreach_sqrt_(denominators)
        else:
            denominators = list(torch._foreach_sqrt(squares))
            if rule.form == "adam":
                torch._foreach_div_(denominators, correction2**0.5)
            torch._foreach_add_(denominators, rule.eps)
        factor = {
            "adam": rule.lr / correction1,
            "none": rule.lr,
            "paper": rule.lr * correction2 / correction1,
            "sgd": rule.lr,
        }[rule.form]
        yield few, numerators[few], denominators, factor
        del denominators


def _groups(tensors: Sequence[torch.Tensor]) -> Iterator[slice]:
    start = entries = 0
    for position, tensor in enumerate(tensors):
        entries += tensor.numel()
        if entries >= _GROUP or position == len(tensors) - 1:
            yield slice(start, position + 1)
            start, entries = position + 1, 0
