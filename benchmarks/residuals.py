"""How exactly the methods that are equations are solved: the largest relative residual of each over a battery.

Residuals are computed here from the gradients and the weights that a method returned, by the definition of the problem,
row by row, and over the terms that were summed: 1e-16 is rounding, 1 is as wrong as can be. The battery holds 1 to 200
tasks, more tasks than dimensions, scales 1e-12 to 1e+12, norm ratios to 1e6, low rank, equal, parallel, opposite and
nearly opposite gradients, zero gradients, and stationary sets.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import detente
from detente.geometry.simplex import minimum_norm_point, simplex_residual

PROMISED = 1e-10
TASKS = (
    (1, 5),
    (2, 1),
    (2, 5),
    (3, 2),
    (3, 8),
    (5, 3),
    (8, 8),
    (8, 20),
    (20, 50),
    (40, 20),
    (40, 60),
    (40, 2000),
)
MANY = ((100, 150), (200, 100), (200, 300), (200, 3))
EPS = float(np.finfo(np.float64).eps)


def battery(seed: int = 0, *, quick: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    """Names and gradients [T, P]; ``quick`` leaves out those of 100 tasks and more."""
    random = np.random.default_rng(seed)
    for tasks, columns in TASKS if quick else TASKS + MANY:
        rows = random.normal(size=(tasks, columns))
        common = random.normal(size=columns)
        ladder = np.geomspace(1.0, 1e6, tasks)[random.permutation(tasks), None]
        rank = max(1, min(tasks, columns) // 2)
        low = random.normal(size=(rank, columns))
        cases = {
            "independent": rows,
            "with a common part": rows + 2 * common,
            "norm ratio 1e6": rows * ladder,
            "common part, norm ratio 1e6": (rows + 2 * common) * ladder,
            "scale 1e-12": 1e-12 * rows,
            "scale 1e12": 1e12 * (rows + common),
            "low rank": random.normal(size=(tasks, rank)) @ low,
            "low rank, no conflict": np.abs(random.normal(size=(tasks, rank))) @ np.linalg.qr(low.T)[0].T,
            "equal": np.repeat(rows[:1], tasks, axis=0),
            "nearly equal": common + 1e-4 * rows,
        }
        if tasks > 1:
            first, second = rows[:1], rows[1:2]
            weights = random.uniform(0.1, 1.0, tasks)
            cases |= {
                "two equal": np.vstack([first, first, rows[2:]]),
                "two parallel": np.vstack([first, 3 * first, rows[2:] + common]),
                "two opposite": np.vstack([first, -2 * first, rows[2:]]),
                "two nearly opposite": np.vstack([first, -first + 1e-3 * second, rows[2:]]),
                "one zero": np.vstack([0 * first, rows[1:]]),
                "all cancel": np.vstack([rows[:-1], -(weights[:-1] @ rows[:-1])[None] / weights[-1]]),
            }
        for label, matrix in cases.items():
            yield f"{label}, {tasks} tasks in {columns} dimensions", matrix


# ---- residuals: from unit gradients' Gramian C, norms, and what a method returned


def hull(cosines: np.ndarray, norms: np.ndarray, weights: np.ndarray) -> float:
    """Optimality of weights over the simplex for the shortest vector."""
    return float(simplex_residual(cosines * np.outer(norms, norms), weights))


def bisector(cosines: np.ndarray, norms: np.ndarray, weights: np.ndarray) -> float:
    """The same for the unit gradients, the weights taken to them."""
    shares = weights * norms if norms.all() else weights
    return float(simplex_residual(cosines, shares / shares.sum()))


def equal_projections(cosines: np.ndarray, norms: np.ndarray, weights: np.ndarray, vanishes: bool) -> float:
    """Spread of the projections on the unit gradients (their size, where d = 0 is claimed); weights that sum to 1."""
    shares = weights * norms
    projections, sizes = cosines @ shares, np.abs(cosines) @ np.abs(shares)
    spread = projections if vanishes else projections - projections.mean()
    return max(_over(np.abs(spread), sizes), abs(weights.sum() - 1) / np.abs(weights).sum())


def bargain(cosines: np.ndarray, norms: np.ndarray, weights: np.ndarray, refused: bool) -> float:
    """Gw = 1/w; where the step was refused, how far the hull is from holding 0."""
    if refused:
        shares = minimum_norm_point(cosines)
        square, terms = float(shares @ cosines @ shares), float(shares @ np.abs(cosines) @ shares)
        return 0.0 if square <= 16 * len(norms) * EPS * terms else 1.0
    shares = weights * norms
    return _over(np.abs(cosines @ shares - 1 / shares), np.abs(cosines) @ shares + 1 / shares)


def half_spaces(
    cosines: np.ndarray, norms: np.ndarray, added: np.ndarray, start: np.ndarray, level: float
) -> float:
    """⟨g_i, d⟩ ≥ level with equality where something was added; d the start plus what was added."""
    total = (added + start) * norms
    levels = np.divide(level, norms, out=np.zeros_like(norms), where=norms > 0)
    gaps, sizes = cosines @ total - levels, np.abs(cosines) @ np.abs(total) + np.abs(levels)
    used = added > 1e-13 * (np.abs(start) + added)
    return max(_over(np.where(used, np.abs(gaps), -gaps), sizes), -float(added.min()), 0.0)


def duality_gap(cosines: np.ndarray, norms: np.ndarray, weights: np.ndarray, c: float) -> float:
    """CAGrad: min_i ⟨g_i, d⟩ against min over the simplex of ⟨g_w, g₀⟩ + c‖g₀‖‖g_w‖; ball and half-spaces."""
    gramian = cosines * np.outer(norms, norms)
    mean = np.full(len(norms), 1 / len(norms))
    centre = np.sqrt(max(mean @ gramian @ mean, 0.0))
    if centre**2 <= 16 * len(norms) * EPS * (mean @ np.abs(gramian) @ mean):
        return 0.0
    added = weights - mean
    square, terms = float(added @ gramian @ added), float(added @ np.abs(gramian) @ added)
    moved = np.sqrt(max(square, 0.0))
    outside = max(square - (c * centre) ** 2, 0.0) / (terms + c**2 * float(mean @ np.abs(gramian) @ mean))
    helped = int((gramian @ weights).argmin())
    value, summed = float(gramian[helped] @ weights), float(np.abs(gramian[helped]) @ np.abs(weights))
    shares = minimum_norm_point(gramian) if moved < (1 - 1e-6) * c * centre else added / added.sum()
    length, reach = float(shares @ gramian @ shares), float(shares @ np.abs(gramian) @ shares)
    if length <= 16 * len(norms) * EPS * reach:
        length = 0.0  # the rounding of a square is no length
    dual = shares @ gramian @ mean + c * centre * np.sqrt(length)
    sizes = summed + shares @ np.abs(gramian) @ mean + c * centre * np.sqrt(reach)
    signs = half_spaces(cosines, norms, added, mean, value)
    return max(outside, signs, float(abs(dual - value) / sizes) if sizes > 0 else 0.0)


def pulled(cosines: np.ndarray, norms: np.ndarray, weights: np.ndarray, strength: float) -> float:
    """SDMGrad: optimality over the simplex of min ‖g_w + λg₀‖²; the weights are those of d."""
    mean = np.full(len(norms), 1 / len(norms))
    shares = weights * (1 + strength) - strength * mean
    shares[np.abs(shares) <= 4 * EPS] = 0.0  # what the subtraction left
    total = weights * (1 + strength) * norms
    products, sizes = norms * (cosines @ total), norms * (np.abs(cosines) @ total)
    violation = np.maximum(shares @ products - products, 0.0)
    return max(_over(violation, sizes + np.abs(shares) @ sizes), abs(shares.sum() - 1), -float(shares.min()))


def residual(name: str, jacobian: np.ndarray) -> float:
    """The residual of one method, with its default options, on one matrix of gradients."""
    tasks = len(jacobian)
    norms = np.linalg.norm(jacobian, axis=1)
    gramian = jacobian @ jacobian.T
    gradients = detente.TaskGradients(names=tuple(map(str, range(tasks))), gramian=gramian)
    outcome = detente.create(name).combine(gradients)
    assert outcome.weights is not None
    weights = outcome.weights.numpy()
    longest = norms.max() if norms.any() else 1.0
    lengths = np.sqrt(gramian.diagonal())
    products = np.outer(lengths, lengths)
    cosines = np.divide(gramian, products, out=np.zeros_like(gramian), where=products > 0)
    norms = lengths / longest
    mean = np.full(tasks, 1 / tasks)
    if name == "mgda":
        return hull(cosines, norms, weights)
    if name == "edm":
        return bisector(cosines, norms, weights)
    if name == "imtl-g":
        if outcome.status == "refused":
            return 0.0 if tasks > np.linalg.matrix_rank(jacobian) else 1.0
        return equal_projections(cosines, norms, weights, outcome.status == "stationary")
    if name in ("nash-mtl", "fairgrad"):
        return bargain(cosines, norms, weights * longest, outcome.status == "refused")
    if name == "cagrad":
        return duality_gap(cosines, norms, weights, 0.5)
    if name == "dualproj":
        return half_spaces(cosines, norms, weights - mean, mean, 0.0)
    if name == "upgrad":
        assert outcome.transform is not None
        added = outcome.transform.numpy() - np.eye(tasks)
        starts = np.eye(tasks)
        # Each gradient's own length is the unit: a row of a short task has large weights of none but itself.
        rows = (half_spaces(cosines, norms, *pair, 0.0) for pair in zip(added, starts, strict=True))
        return max(rows)
    assert name == "sdmgrad", name
    return pulled(cosines, norms, weights, 0.3)


METHODS = ("mgda", "edm", "imtl-g", "nash-mtl", "fairgrad", "cagrad", "upgrad", "dualproj", "sdmgrad")


def rows(methods: tuple[str, ...] = METHODS, *, quick: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """One row per method: the largest residual, where it occurs, and the longest time of a call."""
    table = []
    for name in methods:
        worst, where, longest, count = 0.0, "", 0.0, 0
        for label, matrix in battery(seed, quick=quick):
            started = time.perf_counter()
            found = residual(name, matrix)
            longest, count = max(longest, time.perf_counter() - started), count + 1
            if found >= worst:
                worst, where = found, label
        table.append(
            {"method": name, "residual": worst, "where": where, "matrices": count, "slowest s": longest}
        )
    return table


def _over(values: np.ndarray, sizes: np.ndarray) -> float:
    return max(float((values / np.where(sizes > 0, sizes, 1.0)).max()), 0.0)


def main() -> None:
    """Print the table and whether the promise holds."""
    show: Callable[..., None] = print
    for row in rows(quick="--quick" in sys.argv):
        verdict = "kept" if row["residual"] <= PROMISED else "NOT KEPT"
        show(
            f"{row['method']:10} {row['residual']:.1e}  promised <= {PROMISED:g}: {verdict}   "
            f"({row['matrices']} matrices, slowest call {row['slowest s']:.2f} s; largest on: {row['where']})",
            flush=True,
        )
