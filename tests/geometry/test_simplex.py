"""The minimum-norm point against exact rational arithmetic, three public solvers, and its own slow twin."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detente.geometry import simplex
from detente.geometry.gramian import unit_rows
from detente.geometry.simplex import minimum_norm_point, simplex_residual

SCALES = (1e-12, 1.0, 1e12)
Generator = np.random.Generator


def spread(rng: Generator, tasks: int) -> np.ndarray:
    """Norms that differ by exactly 1e6."""
    exponents = rng.uniform(-6, 0, (tasks, 1))
    exponents[[0, -1], 0] = -6, 0
    return 10.0**exponents


# Gradients [T, P] by rank, ratio of norms and position of zero.
KINDS: dict[str, Callable[[Generator, int], np.ndarray]] = {
    "gaussian": lambda rng, t: rng.standard_normal((t, 500)),
    "correlated": lambda rng, t: (
        rng.standard_normal((t, 500)) + rng.standard_normal(500) * rng.uniform(0, 3, (t, 1))
    ),
    "square": lambda rng, t: rng.standard_normal((t, t)),
    "norm ratio 1e6": lambda rng, t: rng.standard_normal((t, 500)) * spread(rng, t),
    "correlated, norm ratio 1e6": lambda rng, t: (rng.standard_normal((t, 500)) + 2) * spread(rng, t),
    "orthogonal, norm ratio 1e6": lambda rng, t: np.eye(t) * spread(rng, t),
    "orthogonal twice, norm ratio 1e6": lambda rng, t: np.repeat(np.eye(t) * spread(rng, t), 2, axis=0)[:t],
    "zero in the hull": lambda rng, t: balanced(rng.standard_normal((t - 1, 500))),
    "zero in the hull, norm ratio 1e6": lambda rng, t: balanced(
        rng.standard_normal((t - 1, 500)) * spread(rng, t - 1)
    ),
    "more tasks than dimensions": lambda rng, t: rng.standard_normal((t, max(2, t // 4))),
    "more tasks than dimensions, far": lambda rng, t: rng.standard_normal((t, max(2, t // 4))) + 3,
    "more tasks than dimensions, norm ratio 1e6": lambda rng, t: (
        rng.standard_normal((t, max(2, t // 4))) * spread(rng, t)
    ),
    "rank one": lambda rng, t: rng.standard_normal((t, 1)),
    "rank one, one side": lambda rng, t: np.abs(rng.standard_normal((t, 1))),
    "small integers": lambda rng, t: rng.integers(-1, 3, (t, 3)).astype(float),
    "identical": lambda rng, t: rng.standard_normal((1, 500))[np.zeros(t, dtype=int)],
    "groups of identical": lambda rng, t: rng.standard_normal((max(1, t // 3), 500))[
        rng.integers(0, max(1, t // 3), t)
    ],
    "opposite": lambda rng, t: np.outer((-1.0) ** np.arange(t), rng.standard_normal(500)),
    "zero row": lambda rng, t: np.vstack([rng.standard_normal((t - 1, 500)), np.zeros(500)]),
    "near duplicates 1e-4": lambda rng, t: near(rng, t, 500, 1e-4),
    "near duplicates 1e-7": lambda rng, t: near(rng, t, 500, 1e-7),
    "near duplicates 1e-10": lambda rng, t: near(rng, t, 500, 1e-10),
    "near duplicates in 3 dimensions": lambda rng, t: near(rng, t, 3, 1e-7),
    "nearly flat": lambda rng, t: np.hstack(
        [rng.standard_normal((t, 3)), 1e-6 * rng.standard_normal((t, 1)) + 1e-5]
    ),
}


def balanced(gradients: np.ndarray) -> np.ndarray:
    """One more gradient, so that equal weights give zero."""
    return np.vstack([gradients, -gradients.sum(axis=0)])


def near(rng: Generator, tasks: int, dimension: int, distance: float) -> np.ndarray:
    centres = rng.standard_normal((max(1, tasks // 3), dimension))
    chosen = centres[rng.integers(0, len(centres), tasks)]
    return chosen + distance * rng.standard_normal((tasks, dimension))


def draw(kind: str, tasks: int, seed: int) -> np.ndarray:
    return KINDS[kind](np.random.default_rng([seed, tasks, len(kind)]), tasks)


def battery(tasks: int, draws: int = 4) -> Iterator[tuple[str, np.ndarray]]:
    for kind, seed in itertools.product(KINDS, range(draws)):
        yield kind, draw(kind, tasks, seed)


def gram(gradients: np.ndarray) -> np.ndarray:
    return gradients @ gradients.T


def assert_on_simplex(weights: np.ndarray) -> None:
    assert weights.dtype == np.float64
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------------------------- the promise


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("tasks", [2, 3, 5, 8, 20, 40])
def test_residual_at_rounding_on_the_battery(tasks: int, scale: float) -> None:
    for kind, gradients in battery(tasks):
        gramian = gram(gradients * scale)
        given = gramian.copy()
        weights = minimum_norm_point(gramian)
        assert_on_simplex(weights)
        assert simplex_residual(gramian, weights) <= 1e-11, kind
        np.testing.assert_array_equal(gramian, given)


@pytest.mark.parametrize("tasks", [100, 200])
def test_residual_at_rounding_for_many_tasks(tasks: int) -> None:
    for kind, gradients in battery(tasks, draws=1):
        gramian = gram(gradients)
        assert simplex_residual(gramian, minimum_norm_point(gramian)) <= 1e-11, kind


@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith(("zero in", "opposite", "zero row"))])
def test_zero_in_the_hull_gives_a_vanishing_vector(kind: str) -> None:
    for tasks in (2, 4, 10, 40):
        gradients = draw(kind, tasks, 1)
        weights = minimum_norm_point(gram(gradients))
        terms = weights @ np.linalg.norm(gradients, axis=1)
        # The square is known to rounding only: 1e-7 is the root of 1e-14.
        assert np.linalg.norm(weights @ gradients) <= 1e-7 * terms


# ---------------------------------------------------------------------------------- against rational numbers


def exact_minimum(gradients: list[list[int]]) -> Fraction:
    """min αᵀGα over the simplex in rational arithmetic: the best of all supports (Carathéodory)."""
    products = [
        [Fraction(sum(a * b for a, b in zip(g, h, strict=True))) for h in gradients] for g in gradients
    ]
    best = min(products[i][i] for i in range(len(products)))
    for size in range(2, len(products) + 1):
        for support in itertools.combinations(range(len(products)), size):
            rows = [[products[i][j] for j in support] + [Fraction(-1), Fraction(0)] for i in support]
            rows.append([Fraction(1)] * size + [Fraction(0), Fraction(1)])
            solution = solve_exactly(rows)
            if solution is not None and min(solution[:-1]) >= 0:
                best = min(best, solution[-1])
    return best


def solve_exactly(rows: list[list[Fraction]]) -> list[Fraction] | None:
    """Gauss-Jordan elimination; None if singular."""
    rows = [row[:] for row in rows]
    for column in range(len(rows)):
        pivot = next((r for r in range(column, len(rows)) if rows[r][column] != 0), None)
        if pivot is None:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [entry / rows[column][column] for entry in rows[column]]
        for r in range(len(rows)):
            if r != column and rows[r][column] != 0:
                rows[r] = [x - rows[r][column] * y for x, y in zip(rows[r], rows[column], strict=True)]
    return [row[-1] for row in rows]


integers = st.integers(2, 5).flatmap(
    lambda tasks: st.integers(1, 4).flatmap(
        lambda size: st.lists(
            st.lists(st.integers(-3, 3), min_size=size, max_size=size), min_size=tasks, max_size=tasks
        )
    )
)


@settings(max_examples=300)
@given(gradients=integers)
def test_value_equals_the_exact_minimum(gradients: list[list[int]]) -> None:
    weights = minimum_norm_point(gram(np.array(gradients, dtype=float)))
    assert_on_simplex(weights)
    exact = [Fraction(w) for w in weights.tolist()]
    vector = [sum(w * g[p] for w, g in zip(exact, gradients, strict=True)) for p in range(len(gradients[0]))]
    reached = float(sum(v * v for v in vector) - exact_minimum(gradients))
    longest = max(sum(x * x for x in g) for g in gradients)
    assert abs(reached) <= 1e-13 * longest


@settings(max_examples=200)
@given(gradients=integers, seed=st.integers(0, 10**6))
def test_permuting_tasks_permutes_weights_ties_included(gradients: list[list[int]], seed: int) -> None:
    matrix = np.array(gradients, dtype=float)
    order = np.random.default_rng(seed).permutation(len(matrix))
    np.testing.assert_allclose(
        minimum_norm_point(gram(matrix[order])), minimum_norm_point(gram(matrix))[order], rtol=0, atol=1e-9
    )


@given(
    tasks=st.integers(2, 8),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-12, 12),
    kind=st.sampled_from(["gaussian", "correlated", "norm ratio 1e6", "more tasks than dimensions"]),
)
def test_scale_changes_nothing(tasks: int, seed: int, exponent: int, kind: str) -> None:
    gradients = draw(kind, tasks, seed)
    weights = minimum_norm_point(gram(gradients))
    np.testing.assert_allclose(
        minimum_norm_point(gram(gradients * 10.0**exponent)), weights, rtol=1e-8, atol=1e-14
    )


# ------------------------------------------------------------------------------------ against public solvers


def by_quadprog(gramian: np.ndarray) -> np.ndarray:
    import quadprog

    tasks = len(gramian)
    constraints = np.hstack([np.ones((tasks, 1)), np.eye(tasks)])
    bounds = np.zeros(tasks + 1)
    bounds[0] = 1.0
    return np.asarray(quadprog.solve_qp(gramian, np.zeros(tasks), constraints, bounds, meq=1)[0])


def by_clarabel(gramian: np.ndarray) -> np.ndarray:
    import clarabel
    from scipy import sparse

    tasks = len(gramian)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-13
    matrix = sparse.csc_matrix(np.vstack([np.ones((1, tasks)), -np.eye(tasks)]))
    side = np.zeros(tasks + 1)
    side[0] = 1.0
    cones = [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(tasks)]
    quadratic = sparse.csc_matrix(np.triu(gramian))
    solution = clarabel.DefaultSolver(quadratic, np.zeros(tasks), matrix, side, cones, settings).solve()
    weights = np.maximum(np.array(solution.x), 0)
    return weights / weights.sum()


def by_nnls(gradients: np.ndarray) -> np.ndarray:
    """On the gradients themselves: min ‖Σβg‖² + (Σβ − 1)² over β ≥ 0 has the same solution up to a factor."""
    from scipy.optimize import nnls

    rows = np.vstack([gradients.T, np.ones(len(gradients))])
    side = np.zeros(len(rows))
    side[-1] = 1.0
    weights = nnls(rows, side)[0]
    return np.asarray(weights / weights.sum())


REGULAR = ["gaussian", "correlated", "zero row", "near duplicates 1e-4"]


@pytest.mark.parametrize("tasks", [2, 3, 5, 8, 20, 40])
@pytest.mark.parametrize("kind", ["gaussian", "correlated"])
def test_weights_equal_those_of_quadprog(kind: str, tasks: int) -> None:
    for seed in range(5):
        gramian = gram(draw(kind, tasks, seed))
        reference = by_quadprog(gramian)
        np.testing.assert_allclose(minimum_norm_point(gramian), reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("tasks", [2, 3, 8, 40])
def test_never_longer_than_what_other_solvers_reach(tasks: int) -> None:
    for kind, gradients in battery(tasks, draws=2):
        if "ratio" in kind:
            continue  # they do not solve these: see the next test
        gradients = gradients / np.linalg.norm(gradients, axis=1).max()
        gramian = gram(gradients)
        weights = minimum_norm_point(gramian)
        level = weights @ gramian @ weights
        references = [by_clarabel(gramian)]
        if kind not in ("identical", "opposite"):
            references.append(by_nnls(gradients))
        for reference in references:
            reached = reference @ gramian @ reference
            assert level <= reached + 1e-14, kind
            assert reached <= level + 1e-6, kind


@pytest.mark.parametrize("tasks", [3, 8, 20])
def test_norm_ratio_against_high_precision(tasks: int) -> None:
    """With norms 1e6 apart and full support, the solution is that of a linear system in 60 digits."""
    import mpmath

    weights_of_orthogonal = (
        1.0 / np.linalg.norm(gradients := draw("orthogonal, norm ratio 1e6", tasks, 0), axis=1) ** 2
    )
    np.testing.assert_allclose(
        minimum_norm_point(gram(gradients)), weights_of_orthogonal / weights_of_orthogonal.sum(), rtol=1e-13
    )
    with mpmath.workdps(60):
        for seed in range(10):
            gramian = gram(draw("norm ratio 1e6", tasks, seed))
            weights = minimum_norm_point(gramian)
            inside = np.flatnonzero(weights)
            part = mpmath.matrix(gramian[np.ix_(inside, inside)].tolist())
            solution = mpmath.lu_solve(part, mpmath.ones(len(inside), 1))
            expected = np.array([float(entry / sum(solution)) for entry in solution])
            np.testing.assert_allclose(weights[inside], expected, rtol=1e-11)


# ------------------------------------------------------------------------------------------- known solutions


@pytest.mark.parametrize(
    ("gramian", "expected"),
    [
        ([[4.0]], [1.0]),
        ([[0.0]], [1.0]),
        ([[1.0, 0.0], [0.0, 4.0]], [0.8, 0.2]),
        ([[1.0, -1.0], [-1.0, 4.0]], [5 / 7, 2 / 7]),
        ([[1.0, 1.5], [1.5, 4.0]], [1.0, 0.0]),  # the vertex itself, not 0.999
        ([[4.0, 1.5], [1.5, 1.0]], [0.0, 1.0]),
        ([[1.0, 1.0], [1.0, 1.0]], [0.5, 0.5]),
        ([[1.0, -1.0], [-1.0, 1.0]], [0.5, 0.5]),
        ([[1e-12, 0.0], [0.0, 1.0]], [1 / (1 + 1e-12), 1e-12 / (1 + 1e-12)]),
        ([[0.0, 0.0], [0.0, 1.0]], [1.0, 0.0]),
        (np.diag([1.0, 2.0, 4.0]), [4 / 7, 2 / 7, 1 / 7]),
        (np.diag([1.0, 0.0, 4.0, 0.0]), [0.0, 0.5, 0.0, 0.5]),
        (np.zeros((3, 3)), [1 / 3] * 3),
        (np.ones((4, 4)), [0.25] * 4),
    ],
)
def test_hand_computed(gramian: object, expected: list[float]) -> None:
    for scale in (1e-24, 1.0, 1e24):
        np.testing.assert_allclose(
            minimum_norm_point(np.array(gramian) * scale), expected, rtol=1e-14, atol=0
        )


def test_of_many_solutions_the_one_with_the_smallest_sum_of_squared_terms() -> None:
    # On a line with ±1 and ±2 zero is reached in many ways; Σ α_i²‖g_i‖² is smallest for α_i ∝ 1 / ‖g_i‖².
    line = np.array([[1.0], [-1.0], [2.0], [-2.0]])
    np.testing.assert_allclose(minimum_norm_point(gram(line)), [0.4, 0.4, 0.1, 0.1], rtol=1e-12)
    # Two equal shortest gradients and one that stays out; three equal ones of which two were given as copies.
    assert minimum_norm_point(gram(np.array([[1.0, 0], [1, 0], [3, 1]]))).tolist() == pytest.approx(
        [0.5, 0.5, 0]
    )
    # The foot (1, 0) is a gradient and also the middle of two others: [1, a, a] with a from the tie rule.
    triple = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0]])
    # min x² + 4 y² with x + 2 y = 1: x = 1/2, y = 1/4.
    np.testing.assert_allclose(minimum_norm_point(gram(triple)), [0.5, 0.25, 0.25], rtol=1e-12)


# --------------------------------------------------------------------------------------- paths and batches


@pytest.mark.parametrize("tasks", [2, 3, 8, 20])
def test_batch_equals_loop(tasks: int) -> None:
    stack = np.stack([gram(gradients) for _, gradients in battery(tasks, draws=2)])
    looped = np.stack([minimum_norm_point(gramian) for gramian in stack])
    batch = minimum_norm_point(stack)
    vectors = np.einsum("bij,bj->bi", stack, batch - looped)
    sizes = np.einsum("bij,bj->bi", np.abs(stack), looped) + 1e-300
    assert np.abs(vectors / sizes).max() <= 1e-7  # the same point; near duplicates may share differently
    plain = [
        i for i, (kind, _) in enumerate(battery(tasks, draws=2)) if not kind.startswith(("near", "zero in"))
    ]
    np.testing.assert_allclose(batch[plain], looped[plain], rtol=0, atol=1e-10)
    shaped = minimum_norm_point(stack[:24].reshape(2, 3, 4, tasks, tasks))
    np.testing.assert_allclose(shaped.reshape(24, tasks), batch[:24], rtol=0, atol=1e-10)
    assert np.max(simplex_residual(stack, batch)) <= 1e-11
    assert minimum_norm_point(np.zeros((0, tasks, tasks))).shape == (0, tasks)


def squared_length(cosines: np.ndarray, limits: np.ndarray, scaled: np.ndarray) -> tuple[float, float]:
    """‖d‖² in units of the shortest gradient, and the terms that were summed for it."""
    total = float(scaled @ limits) ** 2
    return float(scaled @ cosines @ scaled) / total, float(scaled @ np.abs(cosines) @ scaled) / total


@pytest.mark.parametrize("tasks", [3, 8, 20])
def test_each_solver_agrees_with_the_slow_one(tasks: int) -> None:
    solved = {"fast": 0, "dependent": 0}
    for kind, gradients in battery(tasks):
        norms, cosines = unit_rows(gram(gradients))
        if not norms.all():
            continue
        limits = norms.min() / norms
        slow = simplex._wolfe(cosines, limits)
        weights = slow * limits / (slow @ limits)
        assert simplex_residual(gram(gradients), weights) <= 1e-11, kind
        level, rounding = squared_length(cosines, limits, slow)
        for name, found in (
            ("fast", simplex._pivot(cosines, limits)),
            ("dependent", simplex._pivot_dependent(cosines, limits)),
        ):
            if found is not None:
                solved[name] += 1
                assert abs(squared_length(cosines, limits, found)[0] - level) <= 1e-13 * rounding, (
                    kind,
                    name,
                )
                continue
            assert name == "fast" or not kind.startswith(("more tasks", "rank", "near duplicates in")), kind
    assert min(solved.values()) >= 4 * 8  # both do settle: at least eight kinds each


def test_slow_solver_alone_keeps_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplex, "_pivot", lambda cosines, limits: None)
    monkeypatch.setattr(simplex, "_pivot_dependent", lambda cosines, limits: None)
    for tasks in (3, 8, 20):
        for kind, gradients in battery(tasks, draws=2):
            gramian = gram(gradients)
            assert simplex_residual(gramian, minimum_norm_point(gramian)) <= 1e-11, kind


def test_ties_are_settled_after_the_slow_solver_too(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = simplex._pivot_dependent, []

    def fails_first(cosines: np.ndarray, limits: np.ndarray) -> np.ndarray | None:
        calls.append(len(limits))
        return None if len(calls) % 2 else original(cosines, limits)

    monkeypatch.setattr(simplex, "_pivot_dependent", fails_first)
    line = np.array([[1.0], [-1.0], [2.0], [-2.0]])
    np.testing.assert_allclose(minimum_norm_point(gram(line)), [0.4, 0.4, 0.1, 0.1], rtol=1e-12)
    face = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0], [2.0, 0.0]])
    np.testing.assert_allclose(minimum_norm_point(gram(face)), [0.5, 0.25, 0.25, 0], rtol=1e-12, atol=1e-15)
    assert calls == [4, 4, 4, 3]  # the second time only the tasks on the face


def test_independent_gradients_never_need_the_slow_solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(simplex, "_solve_dependent")
    for kind in ("gaussian", "correlated", "square", "norm ratio 1e6", "correlated, norm ratio 1e6"):
        for tasks in (3, 8, 40):
            stack = np.stack([gram(draw(kind, tasks, seed)) for seed in range(6)])
            batch = minimum_norm_point(stack)
            looped = np.stack([minimum_norm_point(gramian) for gramian in stack])
            np.testing.assert_allclose(batch, looped, rtol=1e-9, atol=1e-15)


def test_slow_solver_never_goes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def to_the_corner(
        cosines: np.ndarray, limits: np.ndarray, scaled: np.ndarray, entering: int
    ) -> np.ndarray:
        tried.append(entering)
        corner = np.zeros_like(scaled)
        corner[entering] = 1 / limits[entering]
        return corner

    monkeypatch.setattr(simplex, "_descend", to_the_corner)
    limits = 1 / np.array([2.0, 1.0, 3.0])
    np.testing.assert_array_equal(simplex._wolfe(np.eye(3), limits), [0, 1, 0])
    assert sorted(tried) == [0, 2]  # each once, then set aside


@given(seed=st.integers(0, 10**6), tasks=st.integers(2, 6))
def test_solvers_check_themselves_by_the_public_residual(seed: int, tasks: int) -> None:
    rng = np.random.default_rng(seed)
    gramian = gram(rng.standard_normal((tasks, 4)) * 10.0 ** rng.uniform(-3, 0, (tasks, 1)))
    weights = rng.dirichlet(np.ones(tasks)) * (rng.random(tasks) < 0.7)
    weights = weights / weights.sum() if weights.sum() else np.full(tasks, 1 / tasks)
    norms, cosines = unit_rows(gramian)
    limits = norms.min() / norms
    inside = simplex._residual(cosines, limits, weights / limits)
    assert max(inside, 0) == pytest.approx(simplex_residual(gramian, weights), abs=1e-12)


@pytest.mark.parametrize("batch", [False, True])
def test_a_wrong_linear_solution_is_noticed(monkeypatch: pytest.MonkeyPatch, batch: bool) -> None:
    gramian = gram(draw("gaussian", 8, 0))
    expected, solve = minimum_norm_point(gramian), np.linalg.solve
    monkeypatch.setattr(np.linalg, "solve", lambda a, b: solve(a, b) * (1 + 1e-6 * np.arange(8)[:, None]))
    found = minimum_norm_point(np.stack([gramian, gramian]))[1] if batch else minimum_norm_point(gramian)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_wrong_settling_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    gramian = gram(draw("more tasks than dimensions, far", 8, 0))
    expected = minimum_norm_point(gramian)
    monkeypatch.setattr(
        simplex, "_pivot_dependent", lambda cosines, limits: np.ones_like(limits) / limits.sum()
    )
    np.testing.assert_allclose(minimum_norm_point(gramian), expected, rtol=1e-10, atol=1e-14)
