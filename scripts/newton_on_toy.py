"""Is a Newton direction for several objectives worth having? An experiment on the toy problem.

`python scripts/newton_on_toy.py` descends from the toy's five starts along two directions, with the same Armijo
condition and the same backtracking, until the shortest convex combination of the gradients is below 1e-6:

- steepest descent for several objectives (Fliege & Svaiter 2000), which is MGDA's direction, first length 16;
- the Newton direction of Fliege, Graña Drummond & Svaiter (2009), the minimiser over d of
  max_i <g_i, d> + ½ dᵀ H_i d, first length 1.

The Newton direction asks for positive definite Hessians. Where one is not, its eigenvalues are replaced by their
absolute values, and none is left below a thousandth of the largest; the table says in what share of the iterations
that was needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from detente.geometry.simplex import minimum_norm_point
from detente.linesearch.armijo import rounding_tolerance, sufficient_decrease
from detente.problems import Toy

C, GAMMA, TRIALS = 1e-4, 2.0, 40
STATIONARY = 1e-6
ITERATIONS = 2000
FLOOR = 1e-3
EPSILON = np.full(2, np.finfo(np.float64).eps)

Direction = Callable[[torch.Tensor, np.ndarray], tuple[np.ndarray, bool]]


@dataclass(frozen=True)
class Run:
    """One descent."""

    iterations: int
    evaluations: int
    changed: int
    norm: float
    end: tuple[float, ...]
    losses: tuple[float, ...]
    why: str


def losses_and_gradients(toy: Toy, point: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """[2] losses and [2, 2] gradients, one a row."""
    theta = point.clone().requires_grad_()
    losses = toy.losses(theta)
    rows = [torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses]
    return losses.detach().numpy(), torch.stack(rows).numpy()


def hessians(toy: Toy, point: torch.Tensor) -> np.ndarray:
    """[2, 2, 2] the Hessian of each loss."""
    found = [
        torch.autograd.functional.hessian(lambda theta, task=task: toy.losses(theta)[task], point)
        for task in range(2)
    ]
    return torch.stack(found).numpy()


def made_definite(hessian: np.ndarray) -> tuple[np.ndarray, bool]:
    """A positive definite matrix with the same eigenvectors, and whether it is another one."""
    values, vectors = np.linalg.eigh(hessian)
    size = np.abs(values)
    kept = np.maximum(size, FLOOR * size.max()) if size.max() > 0 else np.ones_like(size)
    return (vectors * kept) @ vectors.T, bool((kept != values).any())


def newton_direction(gradients: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """[2] the minimiser of max_i <g_i, d> + ½ dᵀ H_i d for two tasks.

    Its dual, -½ g(w)ᵀ H(w)⁻¹ g(w) with g and H mixed by weights (w, 1 - w), is concave, and its slope in w is the
    difference of the two models at d(w) = -H(w)⁻¹ g(w): bisection of that.
    """

    def at(w: float) -> tuple[np.ndarray, np.ndarray]:
        d = -np.linalg.solve(
            w * matrices[0] + (1 - w) * matrices[1], w * gradients[0] + (1 - w) * gradients[1]
        )
        return d, gradients @ d + 0.5 * np.einsum("i,tij,j->t", d, matrices, d)

    low, high = 0.0, 1.0
    for w in (0.0, 1.0):  # one task alone decides where its model is the larger one at its own minimiser
        d, models = at(w)
        if models[0 if w else 1] >= models[1 if w else 0]:
            return d
    for _ in range(200):
        middle = (low + high) / 2
        d, models = at(middle)
        if models[0] > models[1]:
            low = middle
        else:
            high = middle
    # Primal and dual must meet, or the direction is not the minimiser.
    dual = models @ (middle, 1 - middle)
    size = np.linalg.norm(gradients, axis=1).max() * np.linalg.norm(d)  # of the terms whose rounding remains
    assert models.max() - dual <= 1e-8 * size, (models, dual)
    return d


def steepest(toy: Toy) -> Direction:
    """Minus the shortest convex combination of the gradients."""
    return lambda point, gradients: (-(minimum_norm_point(gradients @ gradients.T) @ gradients), False)


def newton(toy: Toy) -> Direction:
    """The Newton direction, of Hessians made definite where they are not."""

    def direction(point: torch.Tensor, gradients: np.ndarray) -> tuple[np.ndarray, bool]:
        matrices, changed = zip(*map(made_definite, hessians(toy, point)), strict=True)
        return newton_direction(gradients, np.stack(matrices)), any(changed)

    return direction


def descend(toy: Toy, start: tuple[float, ...], direction: Direction, first: float) -> Run:
    """Follow a direction with the Armijo condition for every task."""
    point = torch.tensor(start, dtype=torch.float64)
    evaluations = changed = 0
    for iteration in range(ITERATIONS + 1):
        losses, gradients = losses_and_gradients(toy, point)
        evaluations += 1
        norm = float(np.linalg.norm(minimum_norm_point(gradients @ gradients.T) @ gradients))
        why = "stationary" if norm <= STATIONARY else "iterations" if iteration == ITERATIONS else ""
        if why:
            break
        d, other = direction(point, gradients)
        changed += other
        slopes = -gradients @ d
        if (slopes <= 0).any():
            why = "no descent"
            break
        for trial in range(TRIALS):
            eta = first / GAMMA**trial
            moved = point + eta * torch.from_numpy(d)
            after = toy.losses(moved).numpy()
            evaluations += 1
            tolerance = rounding_tolerance(losses, after, EPSILON)
            if sufficient_decrease(losses, after, slopes, eta, C, tolerance).all():
                point = moved
                break
        else:
            why = "no length"
            break
    return Run(iteration, evaluations, changed, norm, tuple(point.tolist()), tuple(losses.tolist()), why)


def main() -> None:
    """Print the table."""
    toy = Toy()
    print(
        "| start | direction | iterations | evaluations | Hessians changed | ends by | at | losses | shortest |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for start in toy.starts:
        for name, direction, first in (("steepest", steepest(toy), 16.0), ("Newton", newton(toy), 1.0)):
            run = descend(toy, start, direction, first)
            share = f"{run.changed / max(run.iterations, 1):.0%}" if name == "Newton" else ""
            at, losses = (", ".join(f"{v:.2f}" for v in values) for values in (run.end, run.losses))
            print(
                f"| {start} | {name} | {run.iterations} | {run.evaluations} | {share} | {run.why} | {at} | {losses} | "
                f"{run.norm:.1e} |"
            )


if __name__ == "__main__":
    main()
