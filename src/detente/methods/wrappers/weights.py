"""Wrappers that keep the weights of earlier steps: reused for k steps, or smoothed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from detente.methods.base import Method
from detente.methods.options import number, whole
from detente.methods.wrappers.base import Wrapper, register_wrapper
from detente.values import Combination, TaskGradients


class RetainedWeights(Wrapper):
    """Base of the wrappers that retain one row of weights per task: one column, or one per block of parameters.

    Args:
        method: any method that gives weights.

    Example:
        >>> import detente
        >>> method = detente.wrappers.Smooth(detente.create("mgda"))
        >>> _ = detente.combine(method, torch.eye(2))
        >>> method.kept
        tensor([[0.5000],
                [0.5000]], dtype=torch.float64)
    """

    accepts = frozenset({"weights", "blocks"})

    kept: torch.Tensor
    known: torch.Tensor

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.derive(stateful=True, nonconflict=False, stationary=None)

    def allocate(self, tasks: int) -> None:
        """Register weights sized by the first step, and which tasks have one."""
        self.register_buffer("kept", torch.zeros(tasks, 0, dtype=torch.float64))
        self.register_buffer("known", torch.zeros(tasks, dtype=torch.bool))

    def retained(self, names: Sequence[str], columns: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the retained weights [T, columns] of these tasks, and which of them [T] have any.

        Raises:
            ValueError: the number of blocks changed.
        """
        at = self.positions(names)
        return self._sized(columns).numpy()[at], self.known.numpy()[at]

    def retain(self, names: Sequence[str], weights: np.ndarray) -> None:
        """Replace the weights of these tasks by ``weights`` [T, W].

        Raises:
            ValueError: the number W of blocks changed.
        """
        at = torch.from_numpy(self.positions(names))
        self.kept = self._sized(weights.shape[1]).index_copy(0, at, torch.from_numpy(weights))
        self.known = self.known.index_fill(0, at, True)

    def weighted(self, weights: np.ndarray, notes: tuple[str, ...]) -> Combination:
        """Return weights [T, W] as the wrapped method would give them: of the tasks, or [B, T] of the blocks."""
        if self.declares.simplex:
            total = weights.sum(axis=0)
            weights = np.where(total > 0, weights / np.where(total > 0, total, 1.0), 1 / len(weights))
        if self.declares.gives == "blocks":
            return Combination(block_weights=torch.from_numpy(weights.T.copy()), notes=notes)
        return Combination(weights=torch.from_numpy(weights[:, 0].copy()), notes=notes)

    def _sized(self, columns: int) -> torch.Tensor:
        if self.kept.shape[1] == columns:
            return self.kept
        if self.kept.shape[1] > 0:
            raise ValueError(
                f"{self.declares.name} remembers weights of {self.kept.shape[1]} blocks and was given {columns}. "
                "Name the shared parameters with shared=, so that they stay the same, or create a new method."
            )
        return self.kept.new_zeros(len(self.kept), columns)


@register_wrapper
class Every(RetainedWeights):
    """Every k steps: let the wrapped method choose weights in every k-th step, and reuse them in between.

    In between no task gradients are taken: a step costs one backward of the weighted losses (and one more through the
    heads, where they take plain gradients). Nash-MTL's experiments do this (Navon et al. 2022, section 5). Only the
    weights of an accepted step that is not stationary are reused; after any other the wrapped method is asked again.

    The wrapped method sees nothing of the steps in between, except the ends of epochs. A task that was absent when the
    weights were chosen keeps its weight from before; if it has none, it takes the mean weight of the tasks present.
    Weights that add up to one by the method's declaration are rescaled to do so for the tasks present. Weights that
    differ between blocks are reused too, but need the task gradients in every step.

    When to use it: many tasks, where the task gradients or the method are what a step costs.

    Args:
        method: any method that gives weights.
        k: whole number >= 1; 1 changes nothing.

    Raises:
        ValueError: ``k`` is out of range, the method gives only a direction, or the number of blocks changed.

    Example:
        >>> import detente
        >>> method = detente.wrappers.Every(detente.create("mgda"), k=2)
        >>> detente.combine(method, torch.tensor([[1.0, 0.0], [0.0, 2.0]])).weights
        tensor([0.8000, 0.2000], dtype=torch.float64)
        >>> detente.combine(method, torch.eye(2)).weights
        tensor([0.8000, 0.2000], dtype=torch.float64)
        >>> detente.combine(method, torch.eye(2)).weights
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    name = "every"
    source = "Navon et al. 2022, section 5"
    search = {"k": (1, 5, 25)}  # noqa: RUF012

    age: torch.Tensor
    asked: torch.Tensor

    def __init__(self, method: Method, *, k: int = 5) -> None:
        super().__init__(method)
        self.k = whole("k", k, least=1)
        self.register_buffer("age", torch.zeros((), dtype=torch.int64))
        self.register_buffer("asked", torch.zeros((), dtype=torch.bool))

    def needs_now(self) -> frozenset[str]:
        """Return nothing in between, where one weight for each task is known."""
        if int(self.age) > 0 and self.method.declares.gives == "weights":
            return frozenset()
        return super().needs_now()

    def after_step(self, losses: Mapping[str, Any] | Sequence[Any]) -> None:
        """Hand the losses on, if the wrapped method chose the weights of the step."""
        if self.asked:
            self.method.after_step(losses)

    def solve(self, gradients: TaskGradients) -> Combination:
        """Return the wrapped method's weights, of this step or of an earlier one."""
        age = int(self.age)
        if age > 0:
            weights, known = self.retained(gradients.names, self.kept.shape[1])
            some = weights[known] if known.any() else self.kept[self.known].numpy()
            weights = np.where(known[:, None], weights, some.mean(axis=0))
            self.age = self.age.new_tensor((age + 1) % self.k)
            self.asked = self.asked.new_tensor(False)
            return self.weighted(weights, (f"weights of {age} step{'s' if age > 1 else ''} ago",))
        result = self.method.combine(gradients)
        if result.status == "ok" and self.k > 1:
            self.retain(gradients.names, self.weights_of(result, gradients))
            self.age = self.age.new_tensor(1)
        self.asked = self.asked.new_tensor(True)
        return result


@register_wrapper
class Smooth(RetainedWeights):
    """Smooth: let the weights follow those of the wrapped method slowly.

    w ← β w + (1 - β) ŵ with the wrapped method's weights ŵ, starting from the first ŵ: the correction CR-MOGM (Zhou et
    al. 2022, Algorithm 1), which takes away the bias that noisy weights and noisy gradients of the same batch have
    together. The paper lets β grow as the learning rate falls; here it stays.

    A task starts from its own first weight. Only the weights of an accepted step that is not stationary enter; any
    other step is handed on as it is. Weights that add up to one by the method's declaration do so for the tasks
    present. There is no transform: smoothed weights do not say how each gradient was altered.

    When to use it: weights that jump from batch to batch. Cost: none of note.

    Args:
        method: any method that gives weights.
        beta: in [0, 1), how much of the old weights stays; 0 changes nothing.

    Raises:
        ValueError: ``beta`` is out of range, the method gives only a direction, or the number of blocks changed.

    Example:
        >>> import detente
        >>> method = detente.wrappers.Smooth(detente.create("mgda"), beta=0.5)
        >>> _ = detente.combine(method, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # weights 0.8, 0.2
        >>> detente.combine(method, torch.eye(2)).weights
        tensor([0.6500, 0.3500], dtype=torch.float64)
    """

    name = "smooth"
    source = "CR-MOGM, Zhou et al. 2022, Algorithm 1"
    search = {"beta": (0.0, 0.5, 0.9, 0.99)}  # noqa: RUF012

    def __init__(self, method: Method, *, beta: float = 0.9) -> None:
        super().__init__(method)
        self.beta = number("beta", beta, least=0, below=1)

    def solve(self, gradients: TaskGradients) -> Combination:
        """Return the smoothed weights."""
        result = self.method.combine(gradients)
        if result.status != "ok":
            return result
        new = self.weights_of(result, gradients)
        kept, known = self.retained(gradients.names, new.shape[1])
        weights = np.where(known[:, None], self.beta * kept + (1 - self.beta) * new, new)
        self.retain(gradients.names, weights)
        smoothed = self.weighted(weights, result.notes)
        return replace(smoothed, kept_rank=result.kept_rank, dropped=result.dropped)
