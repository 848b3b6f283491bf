"""MTAdam: gradients of one length in every tensor, one denominator for all tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch

from detente.autograd.flat import Gradients
from detente.autograd.host import to_host
from detente.optim.base import TaskOptimizer
from detente.optim.kernels import largest_entry, mean_size, norms, real, scaled
from detente.optim.options import number
from detente.optim.parts import Pass, decay, fresh_moments, shrinkage
from detente.optim.streams import standing


@final
class MTAdam(TaskOptimizer):
    """MTAdam: rescale every task's gradient to the first task's length, tensor by tensor, then step like Adam.

    For each shared tensor and task i (Malkiel & Wolf 2021): n_i is a running average (decay rate ``norm_beta``) of the
    norm ‖g_i‖; the gradient is rescaled to g_i n_1 / n_i, with n_1 that of the anchor, the first task; m_i and v_i are
    Adam's averages of the rescaled gradient and its square; the tensor moves by -η Σ_i m̂_i / (√max_j v̂_j + ε).

    Beside :class:`MAO`: the tasks are balanced tensor by tensor, not entry by entry, and share the largest of their
    denominators, so that within a tensor the proportions of each gradient are kept.

    Where the paper is silent: averages of norms start at 0 and are corrected for that by each task's own count, so that
    the first ratio is that of the first norms; a task absent from a step keeps its averages and has no part in the
    maximum; an anchor that is absent lends its remembered norm; in a tensor it has never reached, the first known task
    that has takes its place. Where the anchor's gradient has always been zero nothing moves, as in the formula.
    Weight decay is decoupled, and own parameters take plain Adam steps, as in :class:`MAO`.

    A gradient whose rescaled square its moments cannot hold is an error that names task and parameter; norms and their
    ratios are kept as float64 numbers on the host.

    Cost: as :class:`MAO`, without the update of P numbers; a second wait for the device in every backward, for the
    norms; a copy of the largest tensor, and another while contributions are measured or counts of steps differ.

    Args:
        shared, task_specific, lr, betas, eps, weight_decay: as for :class:`MAO`.
        tasks: as for :class:`MAO`; the first is the anchor.
        norm_beta: decay rate of the running averages of norms.

    Attributes:
        tasks: the tasks known so far, None before the first step.
        takes_transform: False.
        balance: as for :class:`MAO`; the gradients in it are the given ones, not the rescaled.

    Raises:
        ValueError: an option is out of range, or there are no parameters.
        TypeError: parameters, tasks or the value of an option are of the wrong kind.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = MTAdam([weight], lr=0.1)
        >>> record = optimizer.step({"a": weight.square().sum(), "b": 100 * weight.square().sum()})
        >>> weight.data
        tensor([ 0.8000, -1.8000])
    """

    def __init__(
        self,
        shared: Any,
        task_specific: Any = (),
        tasks: Sequence[str] | int | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        norm_beta: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(shared, task_specific, tasks, {**defaults, "norm_beta": norm_beta})

    def _check_options(self, options: Mapping[str, Any]) -> None:
        super()._check_options(options)
        if not 0 <= number("norm_beta", options.get("norm_beta", 0.0)) < 1:
            raise ValueError(f"option norm_beta is {options['norm_beta']}; give a number in [0, 1).")

    def _fresh(self, parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        # A plain number: a tensor would be cast to the parameter's dtype by torch when a state is loaded.
        return {**fresh_moments(parameter), "norm": 0.0}

    def _take(self, name: str, gradients: Gradients, current: Pass) -> None:
        parts = list(self._parts(gradients, current, name))
        lengths = iter(norms([gradient for part in parts for gradient in part.moments.gradients]))
        plan = []
        for part in parts:
            beta = float(part.group["norm_beta"])
            for place, state in enumerate(part.states):
                length = next(lengths)
                norm = beta * state["norm"] + (1 - beta) * length
                ratio = self._ratio(part.parameters[place], name, norm, current)
                self._check_range(
                    part.parameters[place], part.moments.gradients[place], length, ratio, name, current
                )
                plan.append((part, place, norm, ratio))
        for part, place, norm, ratio in plan:  # nothing has moved before
            beta1, beta2 = part.group["betas"]
            moments, gradient = part.moments, part.moments.gradients[place]
            part.states[place]["norm"] = norm
            rescaled = scaled(gradient, ratio)
            moments.exp_avgs[place].lerp_(rescaled, 1 - beta1)
            moments.exp_avg_sqs[place].mul_(beta2).addcmul_(rescaled, rescaled, value=1 - beta2)
            del rescaled  # held here, it would live beside the next one
            if current.gauge is not None:
                current.gauge.gradient(name, part.parameters[place], mean_size(gradient))

    def _settle(self, current: Pass) -> None:
        for group, parameters in current.groups():
            decay([real(parameter) for parameter in parameters], shrinkage(group))
            for parameter in parameters:
                self._move(parameter, group, current)

    def _move(self, parameter: torch.Tensor, group: Mapping[str, Any], current: Pass) -> None:
        tasks, (beta1, beta2) = current.touched[parameter], group["betas"]
        states = [self.state[parameter][task] for task in tasks]
        denominator = _largest(states, beta2).sqrt_().add_(group["eps"])
        moving = real(parameter)
        for task, state in zip(tasks, states, strict=True):
            factor = float(group["lr"]) / (1 - beta1 ** (state["step"] + 1))
            average = real(state["exp_avg"])
            moving.addcdiv_(average, denominator, value=-factor)
            if current.gauge is not None:
                current.gauge.contribution(task, parameter, mean_size(average / denominator) * factor)

    def _ratio(self, parameter: torch.Tensor, name: str, mine: float, current: Pass) -> float:
        """The anchor's average norm over this task's (``mine``, not corrected), 0 where this task's is 0."""
        kept, touched = self.state[parameter], current.touched[parameter]
        anchor = next(task for task in (*(self.tasks or ()), *touched) if task in kept)
        if anchor == name or mine == 0:
            return float(mine > 0)
        beta = float(current.group_of[parameter]["norm_beta"])
        theirs = kept[anchor]["norm"] / (1 - beta ** (kept[anchor]["step"] + (anchor in touched)))
        return float(theirs / (mine / (1 - beta ** (kept[name]["step"] + 1))))

    def _check_range(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        length: float,
        ratio: float,
        name: str,
        current: Pass,
    ) -> None:
        """See that the moments can hold the rescaled gradient and its square."""
        limit = math.sqrt(torch.finfo(gradient.dtype).max)
        if length * ratio <= limit:
            return  # no entry is larger than the whole
        (largest,) = to_host([largest_entry(gradient)])
        if float(largest) * ratio <= limit:
            return
        taken = dict.fromkeys(task for tasks in current.touched.values() for task in tasks if task != name)
        raise ValueError(
            f"the gradient of task {name!r}, rescaled to the length of the first task's, is too large for its square "
            f"to be held in {gradient.dtype}, first in {self._name_of(parameter)}. "
            f"{standing(list(taken), self._remembers)} Multiply the first task's loss by a smaller constant, or keep "
            "the parameters in a wider type."
        )


def _largest(states: Sequence[Mapping[str, Any]], beta2: float) -> torch.Tensor:
    """A new tensor with the largest corrected average of squares; another beside it only where counts differ."""
    largest: torch.Tensor | None = None
    for count in sorted({state["step"] for state in states}):
        squares = [real(state["exp_avg_sq"]) for state in states if state["step"] == count]
        square = squares[0].clone()
        for other in squares[1:]:
            torch.maximum(square, other, out=square)
        square.div_(1 - beta2 ** (count + 1))
        largest = square if largest is None else torch.maximum(largest, square, out=largest)
        del square
    assert largest is not None
    return largest
