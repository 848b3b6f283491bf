"""What each task contributes to the updates of an ordinary Adam, however the tasks were weighted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch

from detente.autograd.entries import real
from detente.methods.options import number
from detente.optim.balance import Gauge, TaskBalance
from detente.optim.groups import read_groups
from detente.optim.kernels import Bundle, Rule, contribution_means, mean_size
from detente.optim.streams import Taken, columns_by_task, full_precision

# The optimizers whose update this room knows how to share out.
KINDS = (torch.optim.Adam, torch.optim.AdamW)
Weighted = tuple[torch.Tensor, float]


class Contributions:
    """Per-task first moments beside ``torch.optim.Adam`` or ``AdamW``, and the contributions that follow from them.

    Adam is linear in its first moment: with the gradient Σ_n w_n g_n its average is Σ_n m_n, where m_n averages w_n g_n
    alone. The contribution of task n to an update is therefore η m̂_n / (√v̂ + ε), with the same effective learning rate
    η / (√v̂ + ε) for all tasks, as Hervella et al. 2024 (section 5.2.6) measure it for weightings; :class:`MAO` measures
    its own contributions with ``step(losses, measure=True)``. Contributions of all tasks, signs included, add up to the
    update; weight decay is no task's.

    It reads the optimizer's moments and step counters and changes nothing in it. That Σ_n m_n is Adam's own average is
    seen to in every step, for the parameters that had taken no step when this object was made and whose weight decay
    is decoupled: wrong weights, another length of the direction (``scale=``), clipped gradients and steps in which only
    the heads moved are errors, not wrong numbers. For other parameters nobody can tell.

    Memory: T P numbers, P being the number of shared entries; about five times the largest tensor while measuring.

    Args:
        optimizer: ``torch.optim.Adam`` or ``AdamW``, or what wraps one and calls it ``optimizer``. It may have been at
            work before; the tasks' moments then start at zero, and contributions are too small for the first
            1 / (1 - β1) steps.
        shared: the parameters to look at, as tensors or modules; all of them the optimizer's.
        tolerance: by how much Σ_n m_n may differ from Adam's average, as a part of the longest of these vectors. One
            backward for all tasks rounds otherwise than one for each: by 1e-6 in float32, by 1e-2 where autocast
            computes in bfloat16.

    Attributes:
        tasks: the tasks seen so far.

    Raises:
        ValueError: a parameter is not the optimizer's, or the tolerance is not positive.
        TypeError: the optimizer is not Adam or AdamW, or a subclass with another step; or ``shared`` holds something
            else.

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

    def __init__(self, optimizer: torch.optim.Optimizer, shared: Any, tolerance: float = 0.02) -> None:
        inner = _unwrapped(optimizer)
        if not any(isinstance(inner, kind) and _step(type(inner)) is _step(kind) for kind in KINDS):
            raise TypeError(
                f"{type(inner).__name__} is neither torch.optim.Adam nor AdamW. Contributions follow from the form of "
                "their update, which others change."
            )
        number("tolerance", tolerance, above=0)
        self.optimizer, self.tolerance = inner, tolerance
        self.tasks: tuple[str, ...] = ()
        _, named = read_groups(shared, "shared", "shared")
        self._names = {parameter: name for name, parameter in named}
        known = {parameter for group in inner.param_groups for parameter in group["params"]}
        stranger = next((name for name, parameter in named if parameter not in known), None)
        if stranger is not None:
            raise ValueError(f"parameter {stranger} of shared= is in no group of the optimizer.")
        self._seen = {parameter: self._steps(parameter) for parameter in self._names}
        # Where Adam's whole average is the tasks': from the first step on, and no weight decay in it.
        self._whole = {parameter: seen == 0 for parameter, seen in self._seen.items()}
        self._moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {
            parameter: {} for parameter in self._names
        }

    @torch.no_grad()
    @full_precision()
    def measure(self, taken: Taken, weights: Sequence[float | None] | torch.Tensor | None) -> TaskBalance:
        """Take in one step's task gradients and measure the update that Adam has just made of them.

        Call it once for every step, after ``optimizer.step()`` and before a scheduler changes the learning rate.

        Args:
            taken: of :func:`detente.task_gradients`, in the exact space, with the same shared parameters.
            weights: numbers by which the gradients were weighted (of a combination or a step's record, whose None for a
                task outside of the shared problem is left out); ones for
                plain sums, zeros for a step in which only the heads moved.

        Returns:
            A record over all tasks seen so far: one that is absent from this step has gradient 0 and still
            contributes by its momentum. A layer Adam did not move has only zeros. Gradients are the weighted ones.

        Raises:
            ValueError: a step was left out or measured twice, a moved parameter is not among the gradients, weights
                are None (the method gives only a direction) or of another number, or the weighted gradients are not
                those Adam saw. Nothing was changed.
        """
        names, jacobian = taken.gradients.names, taken.gradients.jacobian
        if taken.gradients.space != "exact" or jacobian is None:
            raise ValueError(
                "contributions need gradients of the parameters themselves; leave features= and solve_on= "
                "out."
            )
        known = [] if weights is None else [weight for weight in weights if weight is not None]
        if not known:
            raise ValueError(
                "there are no weights: the method gives one direction for all tasks, so that no task's contribution is "
                "defined. Give ones if the gradients were summed. Nothing was changed."
            )
        factors = torch.as_tensor(known).detach()
        if factors.shape != (len(names),):
            raise ValueError(f"{tuple(factors.shape)} weights for {len(names)} tasks ({', '.join(names)}).")
        columns = columns_by_task(taken)
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
        tasks = (*self.tasks, *(name for name in names if name not in self.tasks))
        pieces: dict[torch.Tensor, dict[str, Weighted]] = {
            parameter: {
                name: (real(columns[parameter][name]), factor)
                for name, factor in zip(names, factors.tolist(), strict=True)
            }
            for parameter in moved
        }
        groups = [
            (parameter, group)
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter in pieces
        ]
        gauge = Gauge(tasks, tuple(self._names), self._names.__getitem__)
        whole = {p: self._whole[p] and not _decay_in_average(self.optimizer, group) for p, group in groups}
        lengths: list[torch.Tensor] = []
        for parameter, group in groups:
            found = self._look(parameter, pieces[parameter], group, tasks, gauge)
            lengths += found if whole[parameter] else []
        balance, table = gauge.read_beside(lengths)
        self._compare(table.reshape(-1, len(tasks) + 2))
        # From here on nothing fails; the same arithmetic once more is cheaper than T P numbers of memory.
        for parameter, group in groups:
            beta1 = float(group["betas"][0])
            for task in tasks:
                moment = self._moment(parameter, task, pieces[parameter].get(task), beta1)
                if moment is not None:
                    self._moments[parameter][task] = moment
            self._seen[parameter], self._whole[parameter] = self._steps(parameter), whole[parameter]
        self.tasks = tasks
        return balance

    def state_dict(self) -> dict[str, Any]:
        """Save the tasks' moments and what was seen of the optimizer, with the parameters' names; a copy."""
        return {
            "names": list(self._names.values()),
            "tasks": list(self.tasks),
            "seen": list(self._seen.values()),
            "whole": list(self._whole.values()),
            "moments": deepcopy(list(self._moments.values())),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, beside an optimizer that goes on from its own.

        Raises:
            ValueError: it was saved for other parameters, by number, name or shape.
        """
        saved, ours = state_dict["moments"], list(self._names.values())
        # A state of an earlier version, and names that occur twice: by position.
        named = len(set(ours)) == len(ours)
        theirs = state_dict.get("names", ours) if named else [str(at) for at in range(len(ours))]
        ours = ours if named else theirs
        if len(saved) != len(ours) or sorted(theirs) != sorted(ours):
            raise ValueError("the saved state is for other shared parameters.")
        place = {parameter: theirs.index(name) for parameter, name in zip(self._names, ours, strict=True)}
        if any(moment.shape != real(p).shape for p, at in place.items() for moment in saved[at].values()):
            raise ValueError("the saved state is for other shared parameters.")
        self.tasks = tuple(state_dict["tasks"])
        self._seen = {parameter: state_dict["seen"][at] for parameter, at in place.items()}
        self._whole = {parameter: state_dict["whole"][at] for parameter, at in place.items()}
        self._moments = {
            parameter: {task: moment.to(parameter.device, copy=True) for task, moment in saved[at].items()}
            for parameter, at in place.items()
        }

    def _look(
        self,
        parameter: torch.Tensor,
        gradients: Mapping[str, Weighted],
        group: Mapping[str, Any],
        tasks: Sequence[str],
        gauge: Gauge,
    ) -> list[torch.Tensor]:
        """Note one tensor's numbers; the lengths of Σ_n m_n less Adam's average, of that average, and of each m_n."""
        state, count = self.optimizer.state[parameter], self._steps(parameter)
        rule = Rule.of(group)
        square = real(state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"])
        average = real(state["exp_avg"])
        rest = average.clone() if group.get("maximize") else -average
        lengths = []
        for task in tasks:
            given = gradients.get(task)
            if given is not None:
                gauge.gradient(task, parameter, mean_size(given[0]) * abs(given[1]))
            moment = self._moment(parameter, task, given, rule.beta1)
            if moment is None:
                lengths.append(rest.new_zeros(()))
                continue
            rest.add_(moment)
            lengths.append(_length(moment))
            bundle = Bundle(rule, count, exp_avgs=[moment], exp_avg_sqs=[square])
            gauge.contribution(task, parameter, contribution_means(bundle)[0])
            del moment, bundle  # held here, it would live beside the next one
        return [_length(rest), _length(average), *lengths]

    def _moment(
        self, parameter: torch.Tensor, task: str, given: Weighted | None, beta1: float
    ) -> torch.Tensor | None:
        """A task's average after this step, as a new tensor; None for one that has never reached the parameter."""
        kept = self._moments[parameter].get(task)
        if given is None:
            return None if kept is None else kept * beta1
        if kept is None:
            kept = torch.zeros_like(real(self.optimizer.state[parameter]["exp_avg"]))
        gradient, factor = given
        return (kept * beta1).add_(gradient, alpha=(1 - beta1) * factor)

    def _compare(self, lengths: np.ndarray) -> None:
        """Raise unless the tasks' averages add up to Adam's, over all tensors: of one alone all may be rounding."""
        difference, *others = np.sqrt(np.square(lengths).sum(axis=0)).tolist() if len(lengths) else [0.0, 0.0]
        if difference <= self.tolerance * max(others):
            return
        raise ValueError(
            f"the gradients given are not those Adam saw: the tasks' averages miss Adam's by {difference:.3g}, and the "
            f"longest of them has the length {max(others):.3g}. Pass the weights that were applied (times the factor "
            "of clipping; zeros where only the heads moved), leave scale native, and take the gradients of the same "
            "forward. Nothing was changed."
        )

    def _steps(self, parameter: torch.Tensor) -> int:
        return int(self.optimizer.state.get(parameter, {}).get("step", 0))


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside those that launchers put around it."""
    inner = getattr(optimizer, "optimizer", None)
    return _unwrapped(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


def _step(kind: type) -> Any:
    """The function below torch's hooks."""
    return inspect.unwrap(kind.step)  # type: ignore[attr-defined]


def _decay_in_average(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """True where weight decay is added to the gradient, and so to Adam's average."""
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    return bool(group["weight_decay"]) and not decoupled


def _length(tensor: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vector_norm(
        tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)
    )
    return found
