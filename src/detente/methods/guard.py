"""Guards: a method's step is taken only if it helps every task, whatever the error of the tasks' gradients.

A gradient from a batch is off by some error; ε_i bounds the error of task i. :class:`Inexact` is told the bounds,
:class:`detente.methods.adaptive.Adaptive` estimates them from the gradients it has seen. Both go around any method that
gives weights.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from detente.methods.base import Declaration, Method, one_of, weight_by_name
from detente.methods.checks import Array, count, number
from detente.methods.wrapping import Wrapper, register_wrapper
from detente.values import Combination, TaskGradients

Bounds = float | Mapping[str, float] | Sequence[float]
Refuse = Literal["all", "shared"]

# An inner product below its bound by less than this times the lengths of what was summed is rounding.
ROUNDING = 1e-12
# An epoch with a larger share of refused steps has all but ended the training.
TERMINATED = 0.99


class EarlyTerminationWarning(UserWarning):
    """A guard refused more than 99 % of an epoch's steps: hardly any update is made any more.

    Aygar 2019, section 3.1.1, met this with large bounds and called it the early termination of the training.

    Example:
        >>> import detente
        >>> guard = detente.create("inexact-mgda", epsilon=10.0)
        >>> _ = detente.combine(guard, torch.eye(2))  # much shorter than the bound
        >>> with warnings.catch_warnings(category=EarlyTerminationWarning, action="ignore"):
        ...     guard.end_epoch()
        >>> guard.last_refused_share
        1.0
    """


def shortfalls(gramians: np.ndarray, weights: np.ndarray, bounds: np.ndarray) -> Array:
    """[T] by how much <q, g_i> falls short of ‖q‖ ε_i; zero where the guard's test holds.

    The inner product and the length of the direction q = Σ α_j g_j are read off the Gramian G in float64: q·g_i =
    (Gα)_i and ‖q‖² = αᵀGα, summed over the blocks of parameters where their weights differ.

    Args:
        gramians: [B, T, T], one Gramian for each block.
        weights: [B, T], α in each block.
        bounds: [T] the ε_i >= 0, NaN for a task that is not tested.

    Returns:
        Numbers >= 0. Less than 1e-12 Σ_j |α_j| ‖g_j‖ ‖g_i‖ counts as rounding, and as zero.

    Example:
        >>> orthogonal, q = np.diag([1.0, 4.0])[None], np.array([[0.8, 0.2]])  # <q, g_i> = 0.8 = ‖q‖²
        >>> shortfalls(orthogonal, q, np.array([0.5, 1.0])).round(4)
        array([0.    , 0.0944])
    """
    products = np.matmul(gramians, weights[:, :, None])[:, :, 0]
    length = np.sqrt(max(float((weights * products).sum()), 0.0))
    norms = np.sqrt(np.diagonal(gramians, axis1=1, axis2=2))
    terms = norms * (np.abs(weights) * norms).sum(axis=1, keepdims=True)
    lacking = np.nan_to_num(length * bounds - products.sum(axis=0), nan=0.0)
    return np.where(lacking > ROUNDING * terms.sum(axis=0), lacking, 0.0)


class Guard(Wrapper):
    """Base of the guards: the test, what a refusal does, and how many steps were refused.

    An author writes ``bounds``, and ``learn`` and ``epoch_ended`` where bounds are learned.

    Args:
        method: any method that gives weights, for tasks or for blocks of parameters.
        refuse: ``all`` or ``shared``, see :class:`Inexact`.
        epoch_steps: steps after which the guard itself ends an epoch; None waits for ``end_epoch()``.

    Raises:
        ValueError: an option is out of range, or the method gives only a direction.

    Example:
        >>> import detente
        >>> guard = detente.wrappers.Inexact(detente.create("uniform"))
        >>> for matrix in (torch.eye(2), torch.tensor([[1.0, 0.0], [-2.0, 0.0]])):
        ...     status = detente.combine(guard, matrix).status  # the second one conflicts
        >>> status, guard.refused_share
        ('refused', 0.5)
    """

    accepts = frozenset({"weights", "blocks"})
    looks_at = frozenset({"gramian"})
    advice = "Lower the bounds"

    steps: torch.Tensor
    refused: torch.Tensor
    last_steps: torch.Tensor
    last_refused: torch.Tensor

    def __init__(self, method: Method, *, refuse: Refuse = "all", epoch_steps: int | None = None) -> None:
        super().__init__(method)
        self.refuse = one_of("refuse", refuse, ("all", "shared"))
        self.epoch_steps = count("epoch_steps", epoch_steps, least=1)
        for name in ("steps", "refused", "last_steps", "last_refused"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    # ---- what a guard writes

    @abstractmethod
    def bounds(self, gradients: TaskGradients) -> tuple[Array, tuple[str, ...]]:
        """[T] the ε_i of the tasks present, NaN for those not tested, and notes for the record.

        Whatever can fail in a guard fails here: the wrapped method has then not been asked yet.
        """

    def learn(self, gradients: TaskGradients) -> None:
        """Take in this step's gradients, after the step was judged."""

    def epoch_ended(self) -> None:
        """Close what was learned in an epoch."""

    # ---- what everybody calls

    @property
    def refused_share(self) -> float | None:
        """In [0, 1], the share of refused steps in this epoch so far; None before its first step."""
        return _share(self.refused, self.steps)

    @property
    def last_refused_share(self) -> float | None:
        """In [0, 1], the share of refused steps in the epoch that ended last; None before one ended."""
        return _share(self.last_refused, self.last_steps)

    def epoch_record(self) -> dict[str, Any]:
        """The share of refused steps in the epoch that ended last, beside what the wrapped method has to say."""
        return {**self.method.epoch_record(), "refused_share": self.last_refused_share}

    def needs_now(self) -> frozenset[str]:
        """What the test takes, and what the wrapped method needs now."""
        return self.looks_at | self.method.needs_now()

    def solve(self, gradients: TaskGradients) -> Combination:
        """What the wrapped method found, if the test holds for every task."""
        bounds, notes = self.bounds(gradients)
        result = self.method.combine(gradients)
        lacking = np.zeros(gradients.tasks)
        if result.status == "ok":
            weights = self.weights_of(result, gradients).T
            blocks = gradients.gramian if result.weights is not None else gradients.block_gramians
            assert blocks is not None
            lacking = shortfalls(blocks.reshape(-1, gradients.tasks, gradients.tasks), weights, bounds)
        if lacking.any():
            notes = (*notes, self._reason(gradients, lacking))
        self.learn(gradients)
        self._count(result.status == "refused" or bool(lacking.any()))
        result = replace(result, notes=(*result.notes, *notes))
        if not lacking.any():
            return result
        return replace(result, status="refused" if self.refuse == "all" else "stationary")

    def end_epoch(self) -> None:
        """Tell the wrapped method, and close the epoch unless ``epoch_steps`` is given.

        Warns:
            EarlyTerminationWarning: more than 99 % of the epoch's steps were refused.
        """
        self.method.end_epoch()
        if self.epoch_steps is None:
            self._close()

    # ---- private

    def _declare(self, always: Mapping[str, Any], by_option: Mapping[str, Any]) -> None:
        """Declare as a wrapper; a method with a declaration of its own declares what its options change."""
        self.derive(**{**always, **by_option})
        if by_option and isinstance(getattr(type(self), "declares", None), Declaration):
            self.declares = replace(self.declares, **by_option)

    def _reason(self, gradients: TaskGradients, lacking: Array) -> str:
        worst = int(np.argmax(lacking))
        what = "step" if self.refuse == "all" else "shared part of the step"
        return (
            f"{self.declares.name} refused the {what}: for task {gradients.names[worst]!r} <q, g> is "
            f"{lacking[worst]:.3g} short of ‖q‖ε"
        )

    def _count(self, refused: bool) -> None:
        # New tensors, not new numbers in the old ones: a call that fails later puts the old ones back.
        self.steps = self.steps + 1
        self.refused = self.refused + int(refused)
        if self.epoch_steps is not None and int(self.steps) >= self.epoch_steps:
            self._close()

    def _close(self) -> None:
        steps, refused = int(self.steps), int(self.refused)
        if steps == 0:
            return
        self.last_steps, self.last_refused = self.steps, self.refused
        self.steps, self.refused = torch.zeros_like(self.steps), torch.zeros_like(self.refused)
        self.epoch_ended()
        if refused > TERMINATED * steps:
            warnings.warn(
                f"{self.declares.name} refused {refused} of {steps} steps of the epoch: if the next ones go the same "
                f"way, the training has ended. {self.advice}, or enlarge the batch, so that the gradients are less "
                "noisy; or stop here, if the losses are where you want them.",
                EarlyTerminationWarning,
                stacklevel=3,
            )


@register_wrapper
class Inexact(Guard):
    """Inexact: take a step only if it helps every task whatever the error of the gradients, with given bounds.

    Let the gradient g_i of task i be off by at most ε_i, and let q = Σ α_j g_j be the direction of the wrapped method.
    The step is accepted if <q, g_i> >= ‖q‖ ε_i for every task present.

    This follows from the thesis of Aygar (2019). The true gradient lies within the angle φ_i = arcsin(ε_i / ‖g_i‖) of
    g_i (equation 2.9). The angle between q and the plane orthogonal to g_i is γ_i = π/2 - arccos(<q, g_i> /
    (‖q‖ ‖g_i‖)) = arcsin(<q, g_i> / (‖q‖ ‖g_i‖)) (equation 2.10, for the q that is subtracted). The rule γ_i >= φ_i
    (equation 2.11) keeps q on the right side of the plane of every gradient within the bound. Since arcsin grows, it
    reads <q, g_i> / (‖q‖ ‖g_i‖) >= ε_i / ‖g_i‖, which is the test. Where ε_i > ‖g_i‖ the angle φ_i does not exist and
    the test fails, as it should: the true gradient may point anywhere.

    With <q, g_i> = α_i ‖g_i‖² + Σ_{j≠i} α_j <g_j, g_i> the same test is α_i >= α_min,i = (‖q‖ ε_i - Σ_{j≠i} α_j <g_j,
    g_i>) / ‖g_i‖². Equation 2.12 prints this with ‖g_i‖ where ‖g_i‖² is needed: as printed, α_i would have the unit of
    a gradient.

    At q = 0 both sides are zero and the step is accepted; a stationary step stays one. With ε = 0 only a direction
    against some task is refused, and a method that never gives one is left as it is: an inner product below the bound
    by less than 1e-12 Σ_j |α_j| ‖g_j‖ ‖g_i‖ counts as rounding. A step that the wrapped method refuses stays refused.

    Steps and refused steps are counted, for this epoch in ``refused_share`` and for the one before in
    ``last_refused_share``; an epoch ends with ``end_epoch()`` or after ``epoch_steps`` calls. If neither happens, the
    count goes on and nothing else changes.

    When to use it: to see, or to avoid, steps that noise may have turned against a task. Cost: none of note beside the
    task gradients.

    Args:
        method: any method that gives weights, for tasks or for blocks of parameters.
        epsilon: >= 0, in the unit of a gradient's length in the space where the problem is solved: one number for all
            tasks, or one for each, by name or by position.
        refuse: ``all``: a refused step leaves every ``.grad`` as it was found. ``shared``: only the shared part stays
            where it is, and the heads move; the step then counts as accepted, its status is ``stationary`` and a note
            says what was refused. The shared parameters are given a gradient of zero: momentum and weight decay of the
            optimizer still move them.
        epoch_steps: steps after which the guard itself ends an epoch of its counts; ``end_epoch()`` then goes to the
            wrapped method alone. None waits for ``end_epoch()``.

    Raises:
        ValueError: a bound is negative or not finite (the task is named), or does not fit the tasks; an option is out
            of range; the method gives only a direction.
        TypeError: ``epsilon`` is no number, mapping or sequence.

    Example:
        >>> import detente
        >>> guard = detente.wrappers.Inexact(detente.create("mgda"), epsilon={"left": 0.5, "right": 0.9})
        >>> guard.bind(["left", "right"])
        >>> shorter = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # ‖q‖ = √½, and <q, g_i> = ½
        >>> [detente.combine(guard, scale * shorter).status for scale in (1, 2)]
        ['refused', 'ok']
    """

    name = "inexact"
    source = "Aygar 2019, section 2.2, equations 2.8 to 2.12, after Peitz & Dellnitz 2018"
    advice = "Lower epsilon"
    _preference_option = "epsilon"  # kept where a preference is, so that it is held against the tasks as one

    def __init__(
        self,
        method: Method,
        *,
        epsilon: Bounds = 0.0,
        refuse: Refuse = "all",
        epoch_steps: int | None = None,
    ) -> None:
        super().__init__(method, refuse=refuse, epoch_steps=epoch_steps)
        self.epsilon = check_bounds("epsilon", epsilon)
        if not isinstance(self.epsilon, float):
            self._preference = self.epsilon
        given = self.inner_info()
        by_option: dict[str, Any] = {}
        if np.any(self._bounds_of(None) > 0):
            by_option["homogeneity"] = None
        if refuse == "shared" and given.stationary is not None:
            by_option["stationary"] = None
        self._declare({"needs": given.needs | self.looks_at, "nonconflict": True}, by_option)

    def bounds(self, gradients: TaskGradients) -> tuple[Array, tuple[str, ...]]:
        """The given bounds."""
        return self._bounds_of(gradients.names), ()

    def _bounds_of(self, names: Sequence[str] | None) -> Array:
        if isinstance(self.epsilon, float):
            return np.full(1 if names is None else len(names), self.epsilon)
        if names is None:
            values = self.epsilon.values() if isinstance(self.epsilon, Mapping) else self.epsilon
            return np.array(list(values))
        assert self.tasks is not None
        everyone = weight_by_name(self.epsilon, self.tasks, "epsilon")
        assert everyone is not None
        return np.asarray(everyone[self.positions(names)])


# ---- checks


def check_bounds(option: str, value: Bounds) -> float | dict[str, float] | tuple[float, ...]:
    """A finite number >= 0, or a mapping or sequence of such, copied.

    Raises:
        ValueError: one is negative or not finite; the option, and the task by name or position, is named.
        TypeError: it is a text, or holds one.

    Example:
        >>> check_bounds("epsilon", {"left": 0.1, "right": -0.1})
        Traceback (most recent call last):
        ...
        ValueError: epsilon of task 'right' is -0.1; it must be a finite number >= 0.
    """
    if isinstance(value, Mapping):
        named = {str(name): float(bound) for name, bound in value.items()}
        for name, bound in named.items():
            _check_bound(option, name, bound)
        return named
    if isinstance(value, str):
        raise TypeError(f"option {option} is the text {value!r}; give a number, or one for each task.")
    if np.ndim(value) == 0:
        return number(option, value, least=0)  # type: ignore[arg-type]
    listed = tuple(float(bound) for bound in value)  # type: ignore[union-attr]
    for position, bound in enumerate(listed):
        _check_bound(option, str(position), bound)
    return listed


def _check_bound(option: str, task: str, bound: float) -> None:
    if not (np.isfinite(bound) and bound >= 0):
        raise ValueError(f"{option} of task {task!r} is {bound}; it must be a finite number >= 0.")


def _share(refused: torch.Tensor, steps: torch.Tensor) -> float | None:
    return int(refused) / int(steps) if int(steps) else None
