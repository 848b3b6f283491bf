"""Guards: a method's step is taken only if it helps every task, whatever the error of the tasks' gradients.

A gradient from a batch is off by some error; ε_i bounds the error of task i. :class:`Inexact` is told the bounds,
``Adaptive`` estimates them from the gradients it has seen. Both go around any method that gives weights.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from detente.methods.base import Method
from detente.methods.checks import Array
from detente.methods.options import ByTask, by_task, number, one_of, weight_by_name, whole_or_none
from detente.methods.wrappers.base import Wrapper, register_wrapper
from detente.values import Combination, TaskGradients

Bounds = float | Mapping[str, float] | Sequence[float]
Refuse = Literal["all", "shared"]

# An inner product below its bound by less than this times the lengths of what was summed is rounding.
ROUNDING = 1e-12
# A direction shorter than this times the lengths of what was summed is rounding too: of the gradients themselves, which
# come in float32, as well as of its length, which is the root of a float64 sum that cancels.
CANCELLED = 4 * float(np.finfo(np.float32).eps)
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
    """Measure by how much [T] <q, g_i> falls short of ‖q‖ ε_i; zero where the guard's test holds, and for a q of zero.

    The inner product and the length of the direction q = Σ α_j g_j are read off the Gramian G in float64: q·g_i =
    (Gα)_i and ‖q‖² = αᵀGα, summed over the blocks of parameters where their weights differ.

    Args:
        gramians: [B, T, T], one Gramian for each block.
        weights: [B, T], α in each block.
        bounds: [T] the ε_i >= 0, NaN for a task that is not tested.

    Returns:
        Numbers >= 0. Less than 1e-12 Σ_j |α_j| ‖g_j‖ ‖g_i‖ counts as rounding, and as zero; so does a ‖q‖ of no more
        than 4.8e-7 Σ_j |α_j| ‖g_j‖, four machine epsilons of float32.

    Example:
        >>> orthogonal, q = np.diag([1.0, 4.0])[None], np.array([[0.8, 0.2]])  # <q, g_i> = 0.8 = ‖q‖²
        >>> shortfalls(orthogonal, q, np.array([0.5, 1.0])).round(4)
        array([0.    , 0.0944])
    """
    products = np.matmul(gramians, weights[:, :, None])[:, :, 0]
    length = np.sqrt(max(float((weights * products).sum()), 0.0))
    norms = np.sqrt(np.diagonal(gramians, axis1=1, axis2=2))
    summed = (np.abs(weights) * norms).sum(axis=1, keepdims=True)
    if length <= CANCELLED * float(np.linalg.norm(summed)):
        return np.zeros(len(bounds))
    lacking = np.nan_to_num(length * bounds - products.sum(axis=0), nan=0.0)
    return np.where(lacking > ROUNDING * (norms * summed).sum(axis=0), lacking, 0.0)


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
        self.epoch_steps = whole_or_none("epoch_steps", epoch_steps, least=1)
        self._place = ""
        self._warned = False  # of the epoch that the next step closes again, see _count
        for name in ("steps", "refused", "last_steps", "last_refused"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    # ---- what a guard writes

    @abstractmethod
    def bounds(self, gradients: TaskGradients) -> tuple[Array, tuple[str, ...]]:
        """Return [T] the ε_i of the tasks present, NaN for those not tested, and notes for the record.

        Whatever can fail in a guard fails here: the wrapped method has then not been asked yet.
        """

    def learn(self, gradients: TaskGradients) -> None:
        """Take in this step's gradients, after the step was judged."""

    def epoch_ended(self) -> None:
        """Close what was learned in an epoch."""

    # ---- what everybody calls

    @property
    def refused_share(self) -> float | None:
        """Return the share in [0, 1] of refused steps in this epoch so far; None before its first step."""
        return _share(self.refused, self.steps)

    @property
    def last_refused_share(self) -> float | None:
        """Return the share in [0, 1] of refused steps in the epoch that ended last; None before one ended."""
        return _share(self.last_refused, self.last_steps)

    def epoch_record(self) -> dict[str, Any]:
        """Return the share of refused steps in the epoch that ended last, beside the wrapped method's record."""
        return {**self.method.epoch_record(), "refused_share": self.last_refused_share}

    def locate(self, place: str) -> None:
        """Take in of which block of parameters this is the guard, for the warning."""
        self._place = place

    def solve(self, gradients: TaskGradients) -> Combination:
        """Return what the wrapped method found, refused where the test fails for some task."""
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
        if self.refuse == "all":
            return replace(result, status="refused")
        # Nothing is left of the altered gradients that the transform would give.
        return replace(result, status="stationary", transform=None)

    def end_epoch(self) -> None:
        """Tell the wrapped method, and close the epoch unless ``epoch_steps`` is given.

        Warns:
            EarlyTerminationWarning: more than 99 % of the epoch's steps were refused. As an error it comes when the
                epoch is closed.
        """
        try:
            self.method.end_epoch()
        finally:
            told = self._close() if self.epoch_steps is None else None
            if told is not None:
                warnings.warn(told, EarlyTerminationWarning, stacklevel=2)

    # ---- private

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
        if self.epoch_steps is None or int(self.steps) < self.epoch_steps:
            return
        told, warned = self._close(), self._warned
        if told is not None and not warned:
            # Where warnings are errors this undoes the step. The next one closes the same epoch and says nothing.
            self._warned = True
            warnings.warn(told, EarlyTerminationWarning, stacklevel=2)
        self._warned = False

    def _close(self) -> str | None:
        """Close the epoch; return the warning it is worth, if any."""
        steps, refused = int(self.steps), int(self.refused)
        if steps == 0:
            return None
        self.last_steps, self.last_refused = self.steps, self.refused
        self.steps, self.refused = torch.zeros_like(self.steps), torch.zeros_like(self.refused)
        self.epoch_ended()
        if refused <= TERMINATED * steps:
            return None
        return (
            f"{self.declares.name} refused {refused} of {steps} steps of the epoch{self._place}: if the next ones go "
            f"the same way, the training has ended. {self.advice}, or enlarge the batch, so that the gradients are "
            "less noisy; or stop here, if the losses are where you want them."
        )


@register_wrapper
class Inexact(Guard):
    """Inexact: take a step only if it helps every task whatever the error of the gradients, with given bounds.

    Let the gradient g_i of task i be off by at most ε_i, and let q = Σ α_j g_j be the direction of the wrapped method.
    The step is accepted if <q, g_i> >= ‖q‖ ε_i for every task present.

    The true gradient then lies within the angle arcsin(ε_i / ‖g_i‖) of g_i, and the test keeps q on the right side of
    the plane of every gradient within the bound (Aygar 2019, equations 2.9 to 2.11). The page on guards derives it,
    says why equation 2.12 needs ‖g_i‖² where it prints ‖g_i‖, and what counts as rounding. At q = 0 the step is
    accepted. With ε = 0 only a direction against some task is refused. A step that the wrapped method refuses stays
    refused.

    Steps and refused steps are counted, for this epoch in ``refused_share`` and for the one before in
    ``last_refused_share``; an epoch ends with ``end_epoch()`` or after ``epoch_steps`` calls. If neither happens, the
    count goes on and nothing else changes.

    When to use it: to see, or to avoid, steps that noise may have turned against a task. Cost: the task gradients, for
    a method that does not take them anyway; beside them the test on the Gramian, some tenths of a millisecond however
    many parameters there are.

    Args:
        method: any method that gives weights, for tasks or for blocks of parameters.
        epsilon: >= 0, in the unit of a gradient's length in the space where the problem is solved: one number for all
            tasks, or one for each, by name or by position.
        refuse: ``all``: a refused step leaves every ``.grad`` as it was found. ``shared``: only the shared part stays
            where it is, and the heads move; the status is then ``stationary``, with a note and without a transform.
            The shared parameters are given a gradient of zero: momentum and weight decay still move them.
        epoch_steps: steps after which the guard itself ends an epoch of its counts; ``end_epoch()`` then goes to the
            wrapped method alone. None waits for ``end_epoch()``.

    Raises:
        ValueError: a bound is negative or not finite (the task is named), or does not fit the tasks; bounds by position
            meet a saved state with the tasks in another order; an option is out of range; the method gives only a
            direction.
        TypeError: ``epsilon`` is no number, mapping or sequence, or holds something that is no number.

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
        self.epsilon: float | ByTask
        if isinstance(epsilon, Mapping | Sequence) or getattr(epsilon, "ndim", 0) == 1:
            several: Any = epsilon  # also an array or a tensor of one dimension
            self.epsilon = self._preference = by_task("epsilon", several, least=0)
        else:
            self.epsilon = number("epsilon", epsilon, least=0)
        given = self.epsilon.values() if isinstance(self.epsilon, dict) else np.atleast_1d(self.epsilon)
        inner = self.method.declares
        self.derive(
            nonconflict=True,
            homogeneity=None if any(bound > 0 for bound in given) else inner.homogeneity,
            stationary=None if refuse == "shared" else inner.stationary,
        )

    def bounds(self, gradients: TaskGradients) -> tuple[Array, tuple[str, ...]]:
        """Return the given bounds."""
        if isinstance(self.epsilon, float):
            return np.full(gradients.tasks, self.epsilon), ()
        assert self.tasks is not None
        everyone = weight_by_name(self.epsilon, self.tasks, "epsilon")
        assert everyone is not None
        return np.asarray(everyone[self.positions(gradients.names)]), ()


def _share(refused: torch.Tensor, steps: torch.Tensor) -> float | None:
    return int(refused) / int(steps) if int(steps) else None
