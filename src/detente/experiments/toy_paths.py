"""Runs methods on analytic problems: the paths from several starts, all starts in one backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from detente.geometry.adam import adam_step
from detente.methods import Method, create, info_of
from detente.problems import AnalyticProblem
from detente.step import with_direction
from detente.values import TaskGradients


@dataclass(frozen=True)
class Descent:
    """Where a method went.

    Attributes:
        paths: [S, K, D] float64: K points of each of the S paths, the start first.
        steps: [K] the number of steps taken before each of these points.
        refused: for each start the number of steps the method refused; the point then stayed where it was.
        stationary: for each start the number of steps with a direction of exactly zero; Adam may still move.
        stopped: for each start why its path ended early (the method rejected its input, or the point left the finite
            numbers), or None. The remaining points repeat the last.

    Example:
        >>> from detente.problems import Toy
        >>> descend(Toy(), "mgda", steps=100, stride=50).paths.shape
        torch.Size([5, 3, 2])
    """

    paths: torch.Tensor
    steps: tuple[int, ...]
    refused: tuple[int, ...]
    stationary: tuple[int, ...]
    stopped: tuple[str | None, ...]


def descend(
    problem: AnalyticProblem,
    method: str,
    *,
    options: Mapping[str, Any] | None = None,
    starts: Sequence[Sequence[float]] | None = None,
    steps: int = 35_000,
    lr: float = 1e-3,
    stride: int = 100,
    positive: bool = False,
) -> Descent:
    """Follow a method with Adam from every start.

    Each start has a method and an Adam of its own; their gradients are taken together. One step counts as one epoch,
    and methods that ask for the losses after the step are given them. A method that wants independent batches is
    given none: there is only one.

    Args:
        problem: the losses.
        method: name of the method, see :func:`detente.methods`.
        options: the method's options.
        starts: S points; None takes the problem's own.
        steps: how many steps to take.
        lr: Adam's step length, > 0.
        stride: keep every so many points, and the last.
        positive: let the method see each loss raised by a constant that makes it positive: its lower bound times
            -1.05. The gradients stay as they are. Weightings that look at losses are made for positive ones.

    Raises:
        ValueError: ``steps``, ``stride`` or ``lr`` is out of range, or the method's options are.

    Example:
        >>> from detente.problems import Toy
        >>> toy = Toy()
        >>> end = descend(toy, "uniform", starts=[(9, -4)], steps=200, lr=0.3).paths[0, -1]
        >>> bool((end - toy.optimum([1, 1])).norm() < 1e-3)
        True
    """
    if steps < 1 or stride < 1 or not 0 < lr < float("inf"):
        raise ValueError(
            f"steps={steps}, stride={stride}, lr={lr}: give steps and stride >= 1 and a finite lr > 0."
        )
    walkers = [
        _Walker(create(method, tasks=problem.tasks, **(options or {})), problem.tasks)
        for _ in (problem.starts if starts is None else starts)
    ]
    points = np.array(problem.starts if starts is None else starts, dtype=np.float64)
    moments = np.zeros((points.size, 3))
    raised = -1.05 * problem.lower if positive else torch.zeros(len(problem.tasks), dtype=torch.float64)
    kept, numbers = [points], [0]
    for step in range(1, steps + 1):
        losses, jacobians, gramians = _look(problem, points, raised)
        found = [
            walker.ask(*seen) for walker, *seen in zip(walkers, losses, jacobians, gramians, strict=True)
        ]
        directions = np.array([np.zeros(problem.dimension) if one is None else one for one in found])
        # Who did not take the step keeps point and moments: an optimizer that was not called.
        moving = np.repeat([one is not None for one in found], problem.dimension)
        moved, new_moments = adam_step(points.ravel(), moments, directions.ravel(), lr=lr)
        points = np.where(moving, moved, points.ravel()).reshape(points.shape)
        moments = np.where(moving[:, None], new_moments, moments)
        if step % stride == 0 or step == steps:
            kept.append(points)
            numbers.append(step)
    return Descent(
        torch.from_numpy(np.stack(kept, axis=1)),
        tuple(numbers),
        tuple(walker.refused for walker in walkers),
        tuple(walker.stationary for walker in walkers),
        tuple(walker.stopped for walker in walkers),
    )


class _Walker:
    """One start's method, with what became of its steps."""

    def __init__(self, method: Method, tasks: tuple[str, ...]) -> None:
        self.method, self.tasks = method, tasks
        self.wants_losses_after = "after_step" in info_of(method).needs
        self.stepped = False
        self.refused = self.stationary = 0
        self.stopped: str | None = None

    def ask(self, losses: np.ndarray, jacobian: torch.Tensor, gramian: np.ndarray) -> np.ndarray | None:
        """The direction [D] from what is seen at the point: losses [T], Jacobian [T, D], Gramian [T, T].

        None if no step is to be taken.
        """
        if self.stopped is not None:
            return None
        if not (np.isfinite(losses).all() and np.isfinite(gramian).all()):
            self.stopped = "a loss or a gradient is not finite"
            return None
        seen = TaskGradients(
            names=self.tasks,
            losses=losses,
            gramian=gramian,
            jacobian=jacobian,
            # The point is one tensor, so one block and one layer.
            block_gramians=gramian[None],
            block_names=("point",),
            block_sizes=(jacobian.shape[1],),
            block_layers=(0,),
        )
        try:
            # The losses of the same batch after the step are those of the point it led to.
            if self.wants_losses_after and self.stepped:
                self.method.after_step(losses.tolist())
            combination = with_direction(self.method.combine(seen), seen)
            self.method.end_epoch()
        except ValueError as error:
            self.stopped = str(error)
            return None
        self.stepped = combination.accepted
        if not combination.accepted:
            self.refused += 1
            return None
        self.stationary += combination.status == "stationary"
        assert combination.direction is not None
        return combination.direction.numpy()


def _look(
    problem: AnalyticProblem, points: np.ndarray, raised: torch.Tensor
) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """[S, T] losses, [S, T, D] Jacobians and [S, T, T] Gramians at points [S, D], with one backward."""
    tasks = len(problem.tasks)
    # A copy of the points for every task: the sum of task t's losses at copy t has all its gradients in one backward.
    copies = torch.from_numpy(np.repeat(points[None], tasks, axis=0)).requires_grad_()
    own = torch.diagonal(problem.losses(copies), dim1=0, dim2=2)  # [S, T]
    (gradients,) = torch.autograd.grad(own.sum(), copies)
    jacobians = gradients.transpose(0, 1).contiguous()
    return (own.detach() + raised).numpy(), jacobians, (jacobians @ jacobians.mT).numpy()
