"""Matrices on which every method must stay finite, and matrices whose stationarity is known by construction."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from laws.given import Case, case

Matrix = np.ndarray


def _normal(seed: int, *shape: int) -> Matrix:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def _ladder(tasks: int, ratio: float) -> Matrix:
    """Factors from 1 up to `ratio`, one per row, not in order."""
    factors = np.geomspace(1.0, ratio, tasks)
    return factors[np.random.default_rng(tasks).permutation(tasks), None]


@cache
def battery(dtype: torch.dtype = torch.float32) -> tuple[Case, ...]:
    """Ranks, degenerate rows, many tasks, scales and norm ratios."""
    base = _normal(1, 3, 8)
    u, v = _normal(2, 5), _normal(3, 5)
    matrices: dict[str, Matrix] = {
        **{f"rank {rank} of 4": _normal(rank, 4, rank) @ _normal(rank + 9, rank, 9) for rank in (1, 2, 3, 4)},
        "one task": _normal(4, 1, 5),
        "one task, one dimension": np.array([[-0.3]]),
        "one task, zero": np.zeros((1, 4)),
        "zero row": np.where(np.arange(3)[:, None] == 1, 0.0, _normal(5, 3, 5)),
        "two of three rows zero": np.where(np.arange(3)[:, None] != 1, 0.0, _normal(5, 3, 5)),
        "all zero": np.zeros((3, 5)),
        "identical rows": np.stack([u, u, u]),
        "two identical rows of three": np.stack([u, u, v]),
        "parallel rows of unequal length": np.stack([u, 30 * u, 0.01 * u]),
        "opposite rows": np.stack([u, -u]),
        "opposite rows of unequal length": np.stack([u, -1000 * u]),
        "opposite rows and a third": np.stack([u, -2 * u, v]),
        "nearly parallel": np.stack([u, u + 1e-4 * v]),
        "nearly opposite": np.stack([u, -u + 1e-4 * v]),
        "orthogonal": np.eye(4, 6),
        "more tasks than dimensions": _normal(6, 7, 3),
        "five tasks in one dimension": _normal(7, 5, 1),
        "40 tasks": _normal(8, 40, 60),
        "40 tasks in 10 dimensions": _normal(9, 40, 10),
        "40 tasks, norm ratio 1e6": _normal(10, 40, 60) * _ladder(40, 1e6),
        "two tasks, many parameters": _normal(11, 2, 1000),
        **{f"scale {scale:g}": scale * base for scale in (1e-12, 1e-6, 1e6, 1e12)},
        **{f"scale {scale:g}, identical rows": scale * np.stack([u, u]) for scale in (1e-12, 1e12)},
        **{f"scale {scale:g}, opposite rows": scale * np.stack([u, -u]) for scale in (1e-12, 1e12)},
        **{f"norm ratio {ratio:g}": base * _ladder(3, ratio) for ratio in (1e3, 1e6)},
        "norm ratio 1e6, two tasks": base[:2] * [[1.0], [1e-6]],
        "norm ratio 1e6, orthogonal": np.eye(3, 5) * [[1.0], [1e-6], [1e-3]],
        "norm ratio 1e6 at scale 1e-12": 1e-12 * base * _ladder(3, 1e6),
        "norm ratio 1e6 at scale 1e6": 1e6 * base * _ladder(3, 1e6),
    }
    cases = [case(torch.from_numpy(rows).to(dtype), seed=7, label=label) for label, rows in matrices.items()]
    plain = torch.from_numpy(base).to(dtype)
    cases.append(case(plain, losses=[1e-8, 1.0, 3e-4], label="tiny losses"))
    cases.append(case(plain, losses=[1e6, 1.0, 3e8], label="large losses"))
    return tuple(cases)


# ---- stationarity, known without solving anything


def _closed(rows: Matrix, coefficients: Matrix) -> Matrix:
    """The rows and one more, so that Σ coefficient × row = 0 over all of them."""
    return np.vstack([rows, -(coefficients[:-1] @ rows) / coefficients[-1]])


def _separated(seed: int, tasks: int, columns: int, margin: float = 0.05) -> Matrix:
    """Unit rows with an inner product of at least `margin` with one direction: 0 is outside their hull."""
    rows = _normal(seed, tasks, columns)
    rows[:, 0] = 0.0
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    heights = np.random.default_rng(seed).uniform(margin, 1.0, tasks)
    rows = rows * np.sqrt(1 - heights[:, None] ** 2)
    rows[:, 0] = heights
    return rows @ np.linalg.qr(_normal(seed + 50, columns, columns))[0]


def _level(seed: int, tasks: int, columns: int) -> Matrix:
    """Rows with the SAME inner product with one direction: 0 is outside their affine hull (and their hull)."""
    rows = _normal(seed, tasks, columns)
    rows[:, 0] = 0.7
    return rows @ np.linalg.qr(_normal(seed + 60, columns, columns))[0]


def _positive_combinations() -> dict[str, Matrix]:
    random = np.random.default_rng(3)
    corners = np.stack([np.cos(2 * np.pi * np.arange(5) / 5), np.sin(2 * np.pi * np.arange(5) / 5)], axis=1)
    u = _normal(22, 6)
    found = {
        "opposite": np.stack([u, -u]),
        "opposite, norm ratio 1e3": np.stack([u, -1e3 * u]),
        "five corners": corners,
        "five corners of unequal length": corners * [[1.0], [20.0], [0.3], [4.0], [100.0]],
    }
    for tasks, columns in ((3, 5), (4, 3), (6, 10), (12, 30)):
        weights = random.uniform(0.1, 1.0, tasks)
        found[f"closed {tasks}x{columns}"] = _closed(_normal(tasks, tasks - 1, columns), weights)
    return found


def stationary_matrices(kind: str) -> tuple[dict[str, Matrix], dict[str, Matrix]]:
    """Matrices at which a method with that declaration must be stationary, and matrices at which it must not be."""
    u, v, w = (_normal(seed, 6) for seed in (31, 32, 33))
    edge = {
        "opposite pair and a third": np.stack([u, -2 * u, v]),
        "closed triple and a fourth": np.vstack([_closed(np.stack([u, v]), np.array([0.5, 0.2, 0.3])), w]),
        "zero row": np.stack([u, np.zeros(6), v]),
    }
    outside = {
        f"separated {tasks}x{columns}": _separated(seed, tasks, columns)
        for seed, (tasks, columns) in enumerate(((1, 3), (2, 4), (3, 5), (5, 3), (8, 20), (12, 6)), start=40)
    }
    outside["separated 4x6, norm ratio 1e3"] = _separated(47, 4, 6) * _ladder(4, 1e3)
    level = {
        f"level {tasks}x{columns}": _level(seed, tasks, columns)
        for seed, (tasks, columns) in enumerate(((2, 3), (3, 5), (5, 9)), start=70)
    }
    positive = _positive_combinations()
    if kind == "hull":
        return positive | edge, outside | level
    if kind == "affine":
        signed = {
            "parallel rows of unequal length": np.stack([u, 3 * u]),
            "signed 4x6": _closed(_normal(81, 3, 6), np.array([1.5, -0.8, 0.9, -0.6])),
            "more tasks than dimensions": _normal(82, 6, 3),
        }
        return positive | edge | signed, level
    if kind == "cone":
        # One task outside every vanishing combination is enough to leave a direction that helps it.
        return positive, outside | level | edge
    raise AssertionError(f"no matrices are known for stationary={kind!r}; add them to tests/laws/battery.py")
