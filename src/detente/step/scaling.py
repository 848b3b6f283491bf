"""What a gradient scaler is told of a step that it is to skip, or to pass over."""

from __future__ import annotations

import weakref

import torch

from detente.autograd.jacobian import reached_by
from detente.autograd.layout import accumulate
from detente.autograd.numbers import GradientNotFinite
from detente.autograd.reduction import losses_of_all
from detente.autograd.roles import Memory
from detente.autograd.step import Step
from detente.values import StepRecord


def _reached(step: Step) -> set[torch.Tensor]:
    """Return the parameters that take part in a step, on all processes alike."""
    if step.reduction is None:
        return reached_by(step.roles)
    return {*step.reduction.shared, *step.reduction.own}


def left_to_the_scaler(step: Step, error: GradientNotFinite) -> StepRecord:
    """Fill every ``.grad`` with NaN, by which the scaler knows that this step is to be skipped."""
    accumulate([(tensor, torch.full_like(tensor, float("nan"))) for tensor in _reached(step)])
    known = losses_of_all(step.losses, step.reduction)
    told = str(error).partition(" Nothing was changed.")[0]
    return StepRecord(
        names=step.names,
        losses=tuple(known.tolist()),
        weights=(None,) * len(step.names),
        notes=(f"{told} The gradient scaler skips this step.",),
    )


def tell_scaler(step: Step) -> None:
    """Let a scaler pass over a refused step, which wrote no gradients for it to look at.

    It counts what its ``update()`` finds as one good step: an optimizer of a single number stands in for the user's. A
    loop that calls ``scaler.step`` all the same finds NaN where there was no gradient, and skips that step.
    """
    device, memory = step.losses[0].device, step.memory
    if memory.witness is None or memory.witness.param_groups[0]["params"][0].device != device:
        memory.witness = torch.optim.SGD([torch.nn.Parameter(torch.zeros((), device=device))], lr=0.0)
    (number,) = memory.witness.param_groups[0]["params"]
    number.grad = torch.zeros_like(number)
    try:
        step.request.scaler.unscale_(memory.witness)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise  # else a step before this one was refused too, and update() has not come yet
    without = [tensor for tensor in _reached(step) if tensor.grad is None]
    accumulate([(tensor, torch.full_like(tensor, float("nan"))) for tensor in without])
    memory.filled = [weakref.ref(tensor) for tensor in without]


def withdraw(memory: Memory) -> None:
    """Take back the NaN that a refused step before this one left for the scaler, where it still stands."""
    for reference in memory.filled:
        tensor = reference()
        if tensor is not None and tensor.grad is not None and bool(tensor.grad.isnan().all()):
            tensor.grad = None
    memory.filled = []
