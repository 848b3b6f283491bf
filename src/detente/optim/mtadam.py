"""MTAdam: gradients of one length in every tensor, one denominator for all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch

from detente.autograd.entries import real
from detente.methods.options import number
from detente.optim.base import TaskOptimizer
from detente.optim.kernels import Bundle, Rule, advance, fresh_moments, mean_size, scaled
from detente.optim.update import Update


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

    Cost: as :class:`MAO`; the update of P numbers is held only after the last backward, where no gradient is, and
    beside it two copies of the largest tensor.

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
        number("norm_beta", options.get("norm_beta", 0.0), least=0, below=1)

    def _fresh(self, parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        # A plain number: a tensor would be cast to the parameter's dtype by torch when a state is loaded.
        return {**fresh_moments(parameter), "norm": 0.0}

    def _take(
        self, task: str, bundles: Sequence[Bundle], lengths: Mapping[torch.Tensor, float], update: Update
    ) -> None:
        norms, ratios = {}, {}
        for bundle in bundles:  # nothing has moved before
            for layer, state in zip(bundle.parameters, bundle.states, strict=True):
                beta = float(update.group_of[layer]["norm_beta"])
                norms[layer] = beta * state["norm"] + (1 - beta) * lengths[layer]
                ratios[layer] = self._ratio(layer, task, norms[layer], update)
            self._check_range(task, bundle, lengths, update, ratios)
        for bundle in bundles:
            averages = zip(bundle.exp_avgs, bundle.exp_avg_sqs, strict=True)
            for layer, state, gradient, (mean, square) in zip(
                bundle.parameters, bundle.states, bundle.gradients, averages, strict=True
            ):
                state["norm"] = norms[layer]
                advance(
                    Bundle(bundle.rule, bundle.count, [scaled(gradient, ratios[layer])], [mean], [square])
                )
                if update.gauge is not None:
                    update.gauge.gradient(task, layer, mean_size(gradient))

    def _moves(
        self, group: Mapping[str, Any], parameters: Sequence[torch.Tensor], update: Update
    ) -> list[torch.Tensor]:
        return [self._move_of(parameter, Rule.of(group), update) for parameter in parameters]

    def _move_of(self, parameter: torch.Tensor, rule: Rule, update: Update) -> torch.Tensor:
        tasks = update.touched[parameter]
        states = [self.state[parameter][task] for task in tasks]
        (denominator,) = rule.denominators([real(states[0]["exp_avg_sq"])], states[0]["step"] + 1)
        for state in states[1:]:
            (other,) = rule.denominators([real(state["exp_avg_sq"])], state["step"] + 1)
            torch.maximum(denominator, other, out=denominator)
            del other
        move = torch.zeros_like(denominator)
        for task, state in zip(tasks, states, strict=True):
            factor, average = rule.factor(state["step"] + 1), real(state["exp_avg"])
            move.addcdiv_(average, denominator, value=-factor)
            if update.gauge is not None:
                update.gauge.contribution(task, parameter, mean_size(average / denominator) * factor)
        return move

    def _ratio(self, parameter: torch.Tensor, name: str, mine: float, update: Update) -> float:
        """Divide the anchor's average norm by this task's (``mine``, not corrected); 0 where this task's is 0."""
        kept, touched = self.state[parameter], update.touched[parameter]
        anchor = next(task for task in (*(self.tasks or ()), *touched) if task in kept)
        if anchor == name or mine == 0:
            return float(mine > 0)
        beta = float(update.group_of[parameter]["norm_beta"])
        theirs = kept[anchor]["norm"] / (1 - beta ** (kept[anchor]["step"] + (anchor in touched)))
        return float(theirs / (mine / (1 - beta ** (kept[name]["step"] + 1))))
