"""Methods around methods: weights every k steps, smoothed weights, normalised gradients.

The guards, which refuse a step, and one problem for each block have files of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from detente.methods.adaptive import Adaptive
from detente.methods.base import Method
from detente.methods.checks import positive_losses
from detente.methods.guard import EarlyTerminationWarning, Guard, Inexact
from detente.methods.options import number, one_of, whole
from detente.methods.per_block import PerBlock
from detente.methods.wrapping import Wrapper, WrapperInfo, register_wrapper, registered, wrap
from detente.values import Combination, TaskGradients

__all__ = [
    "Adaptive",
    "EarlyTerminationWarning",
    "Every",
    "Guard",
    "Inexact",
    "Normalize",
    "PerBlock",
    "Smooth",
    "Wrapper",
    "WrapperInfo",
    "register_wrapper",
    "registered",
    "wrap",
]


@register_wrapper
class Every(Wrapper):
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
    accepts = frozenset({"weights", "blocks"})
    search = {"k": (1, 5, 25)}  # noqa: RUF012

    kept: torch.Tensor
    known: torch.Tensor
    age: torch.Tensor
    asked: torch.Tensor

    def __init__(self, method: Method, *, k: int = 5) -> None:
        super().__init__(method)
        self.k = whole("k", k, least=1)
        self.register_buffer("age", torch.zeros((), dtype=torch.int64))
        self.register_buffer("asked", torch.zeros((), dtype=torch.bool))
        self.derive(stateful=True, nonconflict=False, stationary=None)

    def allocate(self, tasks: int) -> None:
        """Weights sized by the first step, and which tasks have one."""
        self.register_buffer("kept", torch.zeros(tasks, 0, dtype=torch.float64))
        self.register_buffer("known", torch.zeros(tasks, dtype=torch.bool))

    def needs_now(self) -> frozenset[str]:
        """Nothing in between, where one weight for each task is known."""
        if int(self.age) > 0 and self.method.declares.gives == "weights":
            return frozenset()
        return super().needs_now()

    def after_step(self, losses: Mapping[str, Any] | Sequence[Any]) -> None:
        """Hand the losses on, if the wrapped method chose the weights of the step."""
        if self.asked:
            self.method.after_step(losses)

    def solve(self, gradients: TaskGradients) -> Combination:
        """The wrapped method's weights, now or then."""
        at = torch.from_numpy(self.positions(gradients.names))
        age = int(self.age)
        if age > 0:
            weights, known = self.kept[at].numpy(), self.known[at].numpy()
            some = weights[known] if known.any() else self.kept[self.known].numpy()
            weights = np.where(known[:, None], weights, some.mean(axis=0))
            self.age = self.age.new_tensor((age + 1) % self.k)
            self.asked = self.asked.new_tensor(False)
            return _weighted(self, weights, (f"weights of {age} step{'s' if age > 1 else ''} ago",))
        result = self.method.combine(gradients)
        if result.status == "ok" and self.k > 1:
            weights = self.weights_of(result, gradients)
            kept = _fitting(self, self.kept, weights)
            self.kept = kept.index_copy(0, at, torch.from_numpy(weights))
            self.known = self.known.index_fill(0, at, True)
            self.age = self.age.new_tensor(1)
        self.asked = self.asked.new_tensor(True)
        return result


@register_wrapper
class Smooth(Wrapper):
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
    accepts = frozenset({"weights", "blocks"})
    search = {"beta": (0.0, 0.5, 0.9, 0.99)}  # noqa: RUF012

    kept: torch.Tensor
    known: torch.Tensor

    def __init__(self, method: Method, *, beta: float = 0.9) -> None:
        super().__init__(method)
        self.beta = number("beta", beta, least=0, below=1)
        self.derive(stateful=True, nonconflict=False, stationary=None)

    def allocate(self, tasks: int) -> None:
        """Weights sized by the first step, and which tasks have one."""
        self.register_buffer("kept", torch.zeros(tasks, 0, dtype=torch.float64))
        self.register_buffer("known", torch.zeros(tasks, dtype=torch.bool))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The smoothed weights."""
        result = self.method.combine(gradients)
        if result.status != "ok":
            return result
        at = torch.from_numpy(self.positions(gradients.names))
        new = self.weights_of(result, gradients)
        kept = _fitting(self, self.kept, new)
        known = self.known[at].numpy()[:, None]
        weights = np.where(known, self.beta * kept[at].numpy() + (1 - self.beta) * new, new)
        self.kept = kept.index_copy(0, at, torch.from_numpy(weights))
        self.known = self.known.index_fill(0, at, True)
        smoothed = _weighted(self, weights, result.notes)
        return replace(smoothed, kept_rank=result.kept_rank, dropped=result.dropped)


@register_wrapper
class Normalize(Wrapper):
    """Normalize: bring the tasks' gradients to comparable size before the wrapped method sees them.

    The gradient of task i is divided by n_i: its length (``l2``), its loss (``loss``, the gradient of log L), or both
    (``loss+``), and the n_i by their mean, so that the gradients keep their common scale. The wrapped method combines
    the normalised gradients, and so does the direction: g_i counts w_i / n_i. With ``apply="raw"`` the weights found
    for the normalised gradients are applied to the gradients as they are, as ``mgda(normalize=…)`` does; public codes
    do the one or the other.

    A gradient that vanishes stays as it is. Lengths are those in the space where the problem is solved.

    When to use it: losses of different units, around a method that follows the longest gradient.

    Args:
        method: any method; one that gives weights for ``apply="raw"``.
        by: ``l2``, ``loss`` or ``loss+``.
        apply: ``normalized``: combine the normalised gradients; ``raw``: apply the weights to the given ones.

    Raises:
        ValueError: an option is out of range; a loss that divides is not positive (the task is named).

    Example:
        >>> import detente
        >>> method = detente.wrappers.Normalize(detente.create("uniform"))
        >>> detente.combine(method, torch.tensor([[1.0, 0.0], [0.0, 3.0]])).direction
        tensor([2., 2.])
    """

    name = "normalize"
    source = "Sener & Koltun 2018, section 4 (normalisation in the published code)"
    search = {"by": ("l2", "loss", "loss+")}  # noqa: RUF012

    def __init__(
        self,
        method: Method,
        *,
        by: Literal["l2", "loss", "loss+"] = "l2",
        apply: Literal["normalized", "raw"] = "normalized",
    ) -> None:
        super().__init__(method)
        self.by = one_of("by", by, ("l2", "loss", "loss+"))
        self.onto = one_of("apply", apply, ("normalized", "raw"))
        given = self.inner_info()
        if apply == "raw" and given.gives == "direction":
            raise ValueError(
                f"normalize(apply='raw') applies weights, and {given.name} gives only a direction; use 'normalized'."
            )
        self.looks_at = frozenset({"l2": {"gramian"}, "loss": {"losses"}, "loss+": {"gramian", "losses"}}[by])
        self.derive(
            needs=given.needs | self.looks_at,
            native_scale="own",
            simplex=given.simplex and apply == "raw",
            nonconflict=given.nonconflict and apply == "normalized",
            stationary=None if given.stationary == "affine" else given.stationary,
        )

    def needs_now(self) -> frozenset[str]:
        """What the sizes take, and what the wrapped method needs now."""
        return self.looks_at | self.method.needs_now()

    def solve(self, gradients: TaskGradients) -> Combination:
        """What the wrapped method makes of the normalised gradients."""
        size = self._size(gradients)
        result = self.method.combine(self._scaled(gradients, size))
        if self.onto == "raw":
            return replace(result, transform=None)
        divisor = torch.from_numpy(size)
        return replace(
            result,
            weights=None if result.weights is None else result.weights / divisor,
            block_weights=None if result.block_weights is None else result.block_weights / divisor,
            transform=None if result.transform is None else result.transform / divisor,
        )

    def _size(self, gradients: TaskGradients) -> np.ndarray:
        """[T] positive numbers of mean one that divide the gradients."""
        size = np.ones(gradients.tasks)
        if self.by != "loss":
            assert gradients.gramian is not None
            norms = np.sqrt(np.diagonal(gradients.gramian))
            size = norms / (norms.max() or 1.0)
        if self.by != "l2":
            losses = positive_losses(self, gradients, "divides by the losses")
            size = size * (losses / losses.max())
        alive = size > 0
        return np.where(alive, size / (size[alive].mean() if alive.any() else 1.0), 1.0)

    def _scaled(self, gradients: TaskGradients, size: np.ndarray) -> TaskGradients:
        products = size[:, None] * size
        gramian, blocks, jacobian = gradients.gramian, gradients.block_gramians, gradients.jacobian
        looked_at = jacobian is not None and "jacobian" in self.method.declares.needs
        return replace(
            gradients,
            gramian=None if gramian is None else gramian / products,
            block_gramians=None if blocks is None else blocks / products,
            jacobian=jacobian / torch.from_numpy(size).to(jacobian)[:, None]
            if jacobian is not None and looked_at
            else None,
            extra=tuple(self._scaled(further, self._size(further)) for further in gradients.extra),
        )


# ---- private


def _weighted(wrapper: Wrapper, weights: np.ndarray, notes: tuple[str, ...]) -> Combination:
    """Weights [T, W] as the wrapped method would give them: of the tasks, or [B, T] of the blocks."""
    if wrapper.declares.simplex:
        total = weights.sum(axis=0)
        weights = np.where(total > 0, weights / np.where(total > 0, total, 1.0), 1 / len(weights))
    if wrapper.declares.gives == "blocks":
        return Combination(block_weights=torch.from_numpy(weights.T.copy()), notes=notes)
    return Combination(weights=torch.from_numpy(weights[:, 0].copy()), notes=notes)


def _fitting(wrapper: Wrapper, kept: torch.Tensor, weights: np.ndarray) -> torch.Tensor:
    """[tasks, W] remembered weights, zeros where there are none yet."""
    if kept.shape[1] == 0:
        return torch.zeros(len(kept), weights.shape[1], dtype=torch.float64)
    if kept.shape[1] != weights.shape[1]:
        raise ValueError(
            f"{wrapper.declares.name} remembers weights of {kept.shape[1]} blocks and was given {weights.shape[1]}. "
            "Name the shared parameters with shared=, so that they stay the same, or create a new method."
        )
    return kept
