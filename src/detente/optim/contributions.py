"""What each task contributes to the updates of an ordinary Adam, however the tasks were weighted."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch

from detente.autograd.flat import Layout
from detente.autograd.measure import Taken
from detente.optim.balance import Gauge, TaskBalance
from detente.optim.groups import read_groups
from detente.optim.kernels import mean_size, real


class Contributions:
    """Per-task first moments beside ``torch.optim.Adam`` or ``AdamW``, and the contributions that follow from them.

    Adam is linear in its first moment: with the gradient Σ_n w_n g_n its average is Σ_n m_n, where m_n averages w_n g_n
    alone. The contribution of task n to an update is therefore η m̂_n / (√v̂ + ε), with the same effective learning rate
    η / (√v̂ + ε) for all tasks, as Hervella et al. 2024 (section 5.2.6) measure it for weightings; :class:`MAO` measures
    its own contributions with ``step(losses, measure=True)``. Contributions of all tasks, signs included, add up to the
    update; weight decay is no task's.

    It reads the optimizer's second moments and step counters and changes nothing in it. Memory: T P numbers, P being
    the number of shared entries.

    Args:
        optimizer: with ``exp_avg_sq`` in its state and ``betas`` in its groups. It may have been at work before; the
            tasks' moments then start at zero, and contributions are too small for the first 1 / (1 - β1) steps.
        shared: the parameters to look at, as tensors or modules; all of them the optimizer's.

    Attributes:
        tasks: the tasks seen so far.

    Raises:
        ValueError: a parameter is not the optimizer's.
        TypeError: the optimizer is not of Adam's kind, or ``shared`` holds something else.

    Example:
        >>> import detente
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = torch.optim.Adam([weight], lr=0.1)
        >>> contributions = Contributions(optimizer, [weight])
        >>> taken = detente.task_gradients({"a": weight.sum(), "b": 3 * weight.sum()}, shared=[weight])
        >>> combination = detente.create("uniform").combine(taken.gradients)
        >>> detente.apply(taken, combination)
        >>> optimizer.step()
        >>> balance = contributions.measure(taken, combination.weights)
        >>> [round(value, 6) for value in balance.contributions[0]]
        [0.025, 0.075]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, shared: Any) -> None:
        if not all({"betas", "eps", "lr"} <= group.keys() for group in optimizer.param_groups):
            raise TypeError(
                f"{type(optimizer).__name__} is not of Adam's kind: its groups lack betas or eps. Contributions follow "
                "from an optimizer that keeps exp_avg_sq."
            )
        self.optimizer = optimizer
        self.tasks: tuple[str, ...] = ()
        _, named = read_groups(shared, "shared", "shared")
        self._names = {parameter: name for name, parameter in named}
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        stranger = next((name for name, parameter in named if parameter not in known), None)
        if stranger is not None:
            raise ValueError(f"parameter {stranger} of shared= is in no group of the optimizer.")
        self._seen = {parameter: self._steps(parameter) for parameter in self._names}
        self._moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {
            parameter: {} for parameter in self._names
        }

    @torch.no_grad()
    def measure(self, taken: Taken, weights: Sequence[float] | torch.Tensor | None = None) -> TaskBalance:
        """Take in one step's task gradients and measure the update that Adam has just made of them.

        Call it once for every step, after ``optimizer.step()`` and before a scheduler changes the learning rate.

        Args:
            taken: of :func:`detente.task_gradients`, in the exact space, with the same shared parameters.
            weights: T numbers by which the gradients were weighted (of a combination or a step's record); None for
                ones.

        Returns:
            A record over all tasks seen so far: one that is absent from this step has gradient 0 and still
            contributes by its momentum. A layer Adam did not move has only zeros. Gradients are the weighted ones.

        Raises:
            ValueError: a step was left out or measured twice, a moved parameter is not among the gradients, or the
                number of weights differs. Nothing was changed.
        """
        names, jacobian = taken.gradients.names, taken.gradients.jacobian
        if taken.gradients.space != "exact" or jacobian is None:
            raise ValueError(
                "contributions need gradients of the parameters themselves; leave features= and solve_on= "
                "out."
            )
        factors = torch.ones(len(names)) if weights is None else torch.as_tensor(weights).detach()
        if factors.shape != (len(names),):
            raise ValueError(f"{tuple(factors.shape)} weights for {len(names)} tasks ({', '.join(names)}).")
        columns = set(taken.graph.columns)
        moved = [parameter for parameter in self._names if self._steps(parameter) != self._seen[parameter]]
        for parameter in moved:
            made = self._steps(parameter) - self._seen[parameter]
            if made != 1:
                raise ValueError(
                    f"the optimizer has moved {self._names[parameter]} {made} times since the last call; measure every "
                    "step, once."
                )
            if parameter not in columns:
                raise ValueError(
                    f"the optimizer has moved {self._names[parameter]}, and its task gradients were not taken; pass "
                    "the same shared= to task_gradients()."
                )
        if not moved:
            raise ValueError(
                "the optimizer has moved no parameter since the last call; call its step() first."
            )
        self.tasks = (*self.tasks, *(name for name in names if name not in self.tasks))
        gauge = Gauge(self.tasks, tuple(self._names), self._names.__getitem__)
        pieces: dict[torch.Tensor, dict[str, torch.Tensor]] = {parameter: {} for parameter in moved}
        layout = Layout(taken.graph.columns)
        for name, row, factor in zip(names, jacobian, factors.tolist(), strict=True):
            for parameter, piece in zip(taken.graph.columns, layout.split(row), strict=True):
                if parameter in pieces:
                    pieces[parameter][name] = real(piece) * factor
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in pieces:
                    self._take(parameter, pieces[parameter], group, gauge)
        return gauge.read()

    def state_dict(self) -> dict[str, Any]:
        """The tasks' moments and what was seen of the optimizer, by position in ``shared``; a copy."""
        return {
            "tasks": list(self.tasks),
            "seen": list(self._seen.values()),
            "moments": deepcopy(list(self._moments.values())),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, beside an optimizer that goes on from its own.

        Raises:
            ValueError: it was saved for another number of parameters, or they have other shapes.
        """
        saved = state_dict["moments"]
        fits = len(saved) == len(self._names) and all(
            moment.shape == real(parameter).shape
            for parameter, kept in zip(self._names, saved, strict=True)
            for moment in kept.values()
        )
        if not fits:
            raise ValueError("the saved state is for other shared parameters.")
        self.tasks = tuple(state_dict["tasks"])
        self._seen = dict(zip(self._names, state_dict["seen"], strict=True))
        self._moments = {
            parameter: {task: moment.to(parameter.device, copy=True) for task, moment in kept.items()}
            for parameter, kept in zip(self._names, saved, strict=True)
        }

    def _take(
        self, parameter: torch.Tensor, gradients: dict[str, torch.Tensor], group: dict[str, Any], gauge: Gauge
    ) -> None:
        state, kept = self.optimizer.state[parameter], self._moments[parameter]
        count = self._seen[parameter] = self._steps(parameter)
        beta1, beta2 = map(float, group["betas"])
        square = real(state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"])
        denominator = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
        factor = float(group["lr"]) / (1 - beta1**count)
        for task in self.tasks:
            gradient = gradients.get(task)
            if gradient is None and task not in kept:
                continue
            if task not in kept:
                kept[task] = torch.zeros_like(square)
            moment = kept[task].mul_(beta1)
            if gradient is not None:
                moment.add_(gradient, alpha=1 - beta1)
                gauge.gradient(task, parameter, mean_size(gradient))
            gauge.contribution(task, parameter, mean_size(moment / denominator) * factor)

    def _steps(self, parameter: torch.Tensor) -> int:
        return int(self.optimizer.state.get(parameter, {}).get("step", 0))
