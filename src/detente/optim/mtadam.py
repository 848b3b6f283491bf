"""MTAdam: gradients of one length in every tensor, one denominator for all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch

from detente.autograd.flat import Gradients
from detente.optim.base import Pass, TaskOptimizer, check_options, decay, fresh_moments
from detente.optim.kernels import mean_size, real


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

    Cost: as :class:`MAO`, without the update of P numbers.

    Args:
        shared, task_specific, lr, betas, eps, weight_decay: as for :class:`MAO`.
        tasks: as for :class:`MAO`; the first is the anchor.
        norm_beta: decay rate of the running averages of norms.

    Attributes:
        tasks: the tasks known so far, None before the first step.
        balance: as for :class:`MAO`; the gradients in it are the given ones, not the rescaled.

    Raises:
        ValueError: an option is out of range, or there are no parameters.
        TypeError: parameters or tasks are of the wrong kind.

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
        check_options(defaults)
        if not 0 <= norm_beta < 1:
            raise ValueError(f"option norm_beta is {norm_beta}; give a number in [0, 1).")
        super().__init__(shared, task_specific, tasks, {**defaults, "norm_beta": norm_beta})

    def _fresh(self, parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        moments = fresh_moments(parameter)
        return {**moments, "norm": real(moments["exp_avg"]).new_zeros(())}

    def _take(self, name: str, gradients: Gradients, current: Pass) -> None:
        for part in self._parts(gradients, current, name):
            beta1, beta2 = part.group["betas"]
            moments = part.moments
            norms = torch._foreach_norm(moments.gradients)
            for place, (layer, gradient, norm) in enumerate(
                zip(part.parameters, moments.gradients, norms, strict=True)
            ):
                kept = part.states[place]["norm"]
                kept.lerp_(norm.to(kept), 1 - part.group["norm_beta"])
                rescaled = gradient * self._ratio(layer, name, current)
                moments.exp_avgs[place].lerp_(rescaled, 1 - beta1)
                moments.exp_avg_sqs[place].mul_(beta2).addcmul_(rescaled, rescaled, value=1 - beta2)
                if current.gauge is not None:
                    current.gauge.gradient(name, layer, mean_size(gradient))

    def _settle(self, current: Pass) -> None:
        for group, parameters in current.groups():
            decay([real(parameter) for parameter in parameters], group)
            for parameter in parameters:
                self._move(parameter, group, current)

    def _move(self, parameter: torch.Tensor, group: Mapping[str, Any], current: Pass) -> None:
        tasks, (beta1, beta2) = current.touched[parameter], group["betas"]
        states = [self.state[parameter][task] for task in tasks]
        largest: torch.Tensor | None = None
        for state in states:
            square = real(state["exp_avg_sq"]) / (1 - beta2 ** (state["step"] + 1))
            largest = square if largest is None else torch.maximum(largest, square, out=largest)
        assert largest is not None
        denominator = largest.sqrt_().add_(group["eps"])
        moving = real(parameter)
        for task, state in zip(tasks, states, strict=True):
            factor = float(group["lr"]) / (1 - beta1 ** (state["step"] + 1))
            average = real(state["exp_avg"])
            moving.addcdiv_(average, denominator, value=-factor)
            if current.gauge is not None:
                current.gauge.contribution(task, parameter, mean_size(average / denominator) * factor)

    def _ratio(self, parameter: torch.Tensor, name: str, current: Pass) -> torch.Tensor:
        """A scalar on the parameter's device: the anchor's norm over this task's, 0 where this task's is 0."""
        kept, touched = self.state[parameter], current.touched[parameter]
        # Counters go up only when the step is made; one that is still 0 belongs to a step that failed.
        seen = {task: state["step"] + (task in touched) for task, state in kept.items()}
        anchor = next(task for task in (*(self.tasks or ()), *touched) if seen.get(task))
        beta = current.group_of[parameter]["norm_beta"]
        theirs, mine = (kept[task]["norm"] / (1 - beta ** seen[task]) for task in (anchor, name))
        return torch.where(mine > 0, theirs / mine, torch.zeros_like(mine))
