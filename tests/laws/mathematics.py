"""Laws about one call: what comes out for which matrix. Each takes a `Subject` and raises AssertionError."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from laws.battery import battery, stationary_matrices
from laws.given import (
    SPACES,
    Case,
    Subject,
    block_sizes,
    case,
    cosine,
    drawn,
    filled,
    given,
    length,
    reach,
    run,
    same_bits,
    step,
)

import detente

COSINE = 1e-9  # what a cosine may lack to one
ROUNDING = 1e-8  # of the length a direction would have without cancellation, in float64


def law_finite_on_the_battery(one: Subject) -> None:
    """Every number is finite, of its type and shape, and what belongs together agrees; in every declared space."""
    spaces = [space for space in SPACES if space in one.info.spaces]
    for number, now in enumerate(battery()):
        for space in spaces if number % 4 == 0 else [one.space]:
            check_outcome(one, step(one, one.make(), now, space=space), now)
    for now in battery(torch.float64):
        if "scale" in now.label or "ratio" in now.label:
            check_outcome(one, step(one, one.make(), now), now)


def check_outcome(one: Subject, outcome: detente.Combination, now: Case) -> None:
    tasks, columns = now.jacobian.shape
    where = f"{one.label} on '{now.label}'"
    direction = outcome.direction
    assert direction is not None, where
    assert direction.shape == (columns,) and direction.dtype == now.jacobian.dtype, where
    assert direction.isfinite().all(), f"{where}: the direction is not finite"
    blocks = len(block_sizes(columns))
    shapes = {"weights": (tasks,), "transform": (tasks, tasks), "block_weights": (blocks, tasks)}
    for name, shape in shapes.items():
        value = getattr(outcome, name)
        if value is not None:
            assert value.shape == shape and value.dtype == torch.float64 and value.device.type == "cpu", (
                where,
                name,
            )
            assert value.isfinite().all(), f"{where}: {name} is not finite"
    assert outcome.status in ("ok", "stationary", "refused"), where
    assert outcome.accepted is (outcome.status != "refused"), where
    if outcome.status == "stationary":
        assert not direction.any(), f"{where}: stationary, and the direction is not exactly zero"
    if outcome.weights is not None and outcome.status == "ok":
        expected = outcome.weights @ now.jacobian.to(torch.float64)
        tolerance = 1e-5 if direction.dtype == torch.float32 else ROUNDING
        difference = length(direction.to(torch.float64) - expected)
        assert difference <= tolerance * reach(outcome, now), (
            f"{where}: the direction is not weights @ jacobian"
        )
    assert set(outcome.dropped) <= set(now.names), where
    assert outcome.kept_rank is None or 0 <= outcome.kept_rank <= min(tasks, columns), where
    assert all(isinstance(note, str) for note in outcome.notes), where


def law_inputs_stay_untouched(one: Subject) -> None:
    """Gradients, losses, everything handed in, and the global generators are as before."""
    method = one.make()
    for seed in range(3):
        now = drawn(4, 6, seed, torch.float32)
        handed = given(one, now)
        kept = given(one, replace(now, jacobian=now.jacobian.clone(), activations=now.activations.clone()))
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        filled(method.combine(handed), handed, now)
        assert torch.equal(torch.get_rng_state(), torch_state), (
            f"{one.label} draws from torch's global generator"
        )
        assert np.array_equal(np.random.get_state()[1], numpy_state), f"{one.label} draws from numpy's"  # noqa: NPY002
        _same_gradients(one, handed, kept)


def _same_gradients(one: Subject, a: detente.TaskGradients, b: detente.TaskGradients) -> None:
    for name in a.__dataclass_fields__:
        before, now = getattr(b, name), getattr(a, name)
        if name == "extra":
            for further, copy in zip(now, before, strict=True):
                _same_gradients(one, further, copy)
        elif isinstance(now, np.ndarray):
            assert np.array_equal(now, before), f"{one.label} changed {name}"
        else:
            assert same_bits(now, before), f"{one.label} changed {name}"


def law_same_seed_same_output(one: Subject) -> None:
    """Two fresh methods agree in every bit; another seed gives another outcome where the method draws at all."""
    cases = [drawn(5, 4, seed, torch.float32) for seed in range(5)]
    first = run(one, one.make(), cases)
    torch.manual_seed(1234)
    assert same_bits(first, run(one, one.make(), cases)), f"{one.label}: two fresh methods differ"
    method = one.make()
    seeded = "seed" in one.info.options
    assert (method.generator is not None) == seeded, f"{one.label}: a generator and `seed=` belong together"
    draws = any(isinstance(part, detente.Method) and part.generator is not None for part in method.modules())
    if one.info.permutation == "distribution":
        assert draws, f"{one.label} declares permutation='distribution' and draws nothing"
        assert not same_bits(first, run(one, one.make(seed=5), cases)), f"{one.label} ignores its seed"


def law_public_combine_agrees(one: Subject) -> None:
    """`detente.combine` on the matrix gives what the method gives on the same task gradients."""
    for tasks, columns in ((2, 5), (4, 3)):
        now = drawn(tasks, columns, 3, torch.float32)
        if one.info.spaces >= {"exact"}:
            expected = step(one, one.make(), now, space="exact")
            losses = dict(zip(now.names, now.losses, strict=True))
            actual = detente.combine(one.make(), now.jacobian, losses)
            assert actual.status == expected.status
            assert actual.direction is not None and expected.direction is not None
            # Without further batches this one stands for all, and a matrix is one block: other problems.
            if one.batches == 1 and "blocks" not in one.info.needs:
                assert torch.allclose(actual.direction, expected.direction, rtol=1e-5, atol=1e-6), one.label


def law_one_task(one: Subject) -> None:
    """A single task's direction is its gradient up to the declared factor."""
    for seed, scale in enumerate((1.0, 1e-6, 1e6, 1e-12, 1e12)):
        _same_direction(one, drawn(1, 6, seed).scaled(scale))


def law_identical_tasks(one: Subject) -> None:
    """Identical tasks give the single-task direction up to the declared factor."""
    for tasks in (2, 3, 7):
        row = drawn(1, 6, tasks)
        for scale in (1.0, 1e-6, 1e6):
            same = case(row.jacobian.expand(tasks, -1).clone() * scale, losses=np.full(tasks, 0.7))
            _same_direction(one, same)


def _same_direction(one: Subject, now: Case) -> None:
    outcome = step(one, one.make(), now)
    where = f"{one.label} on {now.tasks} identical gradients"
    assert outcome.status == "ok", f"{where}: {outcome.status}"
    direction, gradient = outcome.direction, now.jacobian[0]
    assert direction is not None and length(direction) > 0, f"{where}: zero"
    assert cosine(direction, gradient) >= 1 - COSINE, f"{where}: another direction"
    factor = {"sum": now.tasks, "mean": 1.0, "simplex": 1.0, "unit": 1 / length(gradient)}.get(
        one.info.native_scale
    )
    if factor is not None:
        ratio = length(direction) / length(gradient)
        assert math.isclose(ratio, factor, rel_tol=1e-6), (
            f"{where}: {ratio} times the gradient, native_scale={one.info.native_scale!r} promises {factor}"
        )


def law_permutation(one: Subject) -> None:
    """Permuting the tasks, through several steps with their hooks, permutes the weights and keeps the direction."""
    random = np.random.default_rng(11)
    for tasks, columns in ((2, 4), (3, 6), (5, 4), (8, 20)):
        cases = [drawn(tasks, columns, seed) for seed in range(3)]
        order = random.permutation(tasks)
        names = [cases[0].names[i] for i in order]
        shuffled = [now.only(names) for now in cases]
        _agree(one, run(one, one.make(), cases), run(one, one.make(), shuffled), cases, order)
        if one.preference is not None:
            values = random.uniform(0.1, 1.0, tasks)
            here = one.make(**{one.preference: values.tolist()})
            there = one.make(**{one.preference: values[order].tolist()})
            _agree(one, run(one, here, cases), run(one, there, shuffled), cases, order)


def law_order_of_presentation(one: Subject) -> None:
    """Losses given in another order than in the first step: names decide, state and preference follow them."""
    names = drawn(4, 7, 0).names
    order = np.array([2, 0, 3, 1])
    options = {one.preference: dict(zip(names, (0.4, 0.1, 0.2, 0.3), strict=True))} if one.preference else {}
    here, there = one.make(**options), one.make(**options)
    start, later = [drawn(4, 7, seed) for seed in (0, 1)], [drawn(4, 7, seed) for seed in (2, 3)]
    run(one, here, start)
    run(one, there, start)
    shuffled = [now.only([names[i] for i in order]) for now in later]
    _agree(one, run(one, here, later, start=2), run(one, there, shuffled, start=2), later, order)


def _agree(
    one: Subject,
    here: list[detente.Combination],
    there: list[detente.Combination],
    cases: list[Case],
    order: np.ndarray,
) -> None:
    for a, b, now in zip(here, there, cases, strict=True):
        where = f"{one.label} on {now.label}, permuted"
        assert a.status == b.status, where
        assert a.direction is not None and b.direction is not None
        assert length(a.direction - b.direction) <= ROUNDING * reach(a, now), f"{where}: another direction"
        unique = (
            now.tasks <= now.jacobian.shape[1]
        )  # dependent gradients: other weights may give the same direction
        if a.weights is not None and b.weights is not None and unique:
            largest = float(a.weights.abs().max())
            assert torch.allclose(a.weights[order], b.weights, rtol=0, atol=1e-7 * largest), (
                f"{where}: weights"
            )


def law_permutation_in_distribution(one: Subject) -> None:
    """Over many seeds, the mean and the spread of the direction do not depend on the order of the tasks."""
    draws = 250
    now = drawn(4, 3, 21)
    order = [2, 3, 1, 0]
    shuffled = now.only([now.names[i] for i in order])
    here = _samples(one, now, range(draws))
    there = _samples(one, shuffled, range(draws, 2 * draws))
    for power in (1, 2):
        a, b = here**power, there**power
        error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / draws) + 1e-9 * np.abs(a).max()
        deviations = np.abs(a.mean(axis=0) - b.mean(axis=0)) / error
        assert deviations.max() < 5, (
            f"{one.label}: the order of the tasks shows, {deviations.max():.1f} deviations"
        )


def _samples(one: Subject, now: Case, seeds: range) -> np.ndarray:
    directions = [step(one, one.make(seed=seed), now).direction for seed in seeds]
    return np.stack([direction.numpy() for direction in directions if direction is not None])


def law_rotation(one: Subject) -> None:
    """Another orthonormal basis of the parameters (of each block) gives the same direction in that basis."""
    for tasks, columns in ((2, 4), (3, 6), (5, 12), (6, 4)):
        sizes = block_sizes(columns) if "blocks" in one.info.needs else (columns,)
        random = np.random.default_rng(columns)
        blocks = [np.linalg.qr(random.normal(size=(size, size)))[0] for size in sizes]
        rotation = torch.block_diag(*map(torch.from_numpy, blocks))
        cases = [drawn(tasks, columns, seed) for seed in range(3)]
        here, there = (
            run(one, one.make(), cases),
            run(one, one.make(), [now.rotated(rotation) for now in cases]),
        )
        for a, b, now in zip(here, there, cases, strict=True):
            assert a.status == b.status and a.direction is not None and b.direction is not None
            difference = length(a.direction @ rotation - b.direction)
            assert difference <= ROUNDING * reach(a, now), f"{one.label} on {now.label}: the basis shows"


def law_homogeneity(one: Subject) -> None:
    """All gradients times s: the same direction, s^k times as long, step after step."""
    degree = one.info.homogeneity
    assert degree is not None
    for tasks, columns in ((1, 3), (2, 5), (3, 8), (5, 12), (6, 4)):
        cases = [drawn(tasks, columns, seed) for seed in range(3)]
        _scaled(one, cases, (1e-12, 1e-6, 1e6, 1e12), degree)
        exact = [replace(now, jacobian=now.jacobian.to(torch.float32)) for now in cases]
        _scaled(one, exact, (2.0**-40, 2.0**40), degree)  # exact in float32 as well


def _scaled(one: Subject, cases: list[Case], factors: tuple[float, ...], degree: float) -> None:
    here = run(one, one.make(), cases)
    for factor in factors:
        there = run(one, one.make(), [now.scaled(factor) for now in cases])
        for a, b, now in zip(here, there, cases, strict=True):
            where = f"{one.label} on {now.label} times {factor:g}"
            assert a.status == b.status, f"{where}: {a.status} became {b.status}"
            assert a.direction is not None and b.direction is not None
            if length(a.direction) <= 1e-6 * reach(a, now):
                continue  # what cancellation leaves has no direction to compare
            assert cosine(a.direction, b.direction) >= 1 - COSINE, f"{where}: another direction"
            ratio = length(b.direction) / length(a.direction) / factor**degree
            assert math.isclose(ratio, 1.0, rel_tol=1e-6), f"{where}: {ratio} times the declared length"


def law_nonconflict(one: Subject) -> None:
    """The direction has a non-negative inner product with every gradient."""
    for now in (*battery(torch.float64), *(drawn(6, 5, seed) for seed in range(20))):
        outcome = step(one, one.make(), now)
        assert outcome.direction is not None
        if not outcome.accepted:
            continue
        unit = reach(outcome, now)
        for name, gradient in zip(now.names, now.jacobian, strict=True):
            inner = float((outcome.direction / max(unit, 1e-300)) @ gradient)
            assert inner >= -1e-9 * length(gradient), (
                f"{one.label} on '{now.label}' conflicts with task {name}"
            )


def law_simplex(one: Subject) -> None:
    """Weights are not negative and sum to one."""
    for now in (*battery(), *(drawn(6, 5, seed) for seed in range(10))):
        weights = step(one, one.make(), now).weights
        assert weights is not None and (weights >= 0).all(), f"{one.label} on '{now.label}'"
        assert math.isclose(float(weights.sum()), 1.0, rel_tol=1e-9), f"{one.label} on '{now.label}'"


def law_stationarity(one: Subject) -> None:
    """Exactly zero and `stationary` where the declared set contains 0, and nowhere else; at every scale."""
    assert one.info.stationary is not None
    at, away = stationary_matrices(one.info.stationary)
    for scale in (1.0, 1e-12, 1e12):
        for label, rows in at.items():
            outcome = step(one, one.make(), case(torch.from_numpy(scale * rows)))
            assert outcome.status == "stationary", (
                f"{one.label} on '{label}' times {scale:g}: {outcome.status}"
            )
            assert outcome.direction is not None and not outcome.direction.any(), f"{one.label} on '{label}'"
        for label, rows in away.items():
            outcome = step(one, one.make(), case(torch.from_numpy(scale * rows)))
            assert outcome.status == "ok", f"{one.label} on '{label}' times {scale:g}: {outcome.status}"
            assert outcome.direction is not None and outcome.direction.any(), f"{one.label} on '{label}'"


def law_preference(one: Subject) -> None:
    """By position as by name; equal numbers are no preference, other numbers show; absent tasks drop out."""
    assert one.preference is not None
    now = drawn(3, 6, 5)
    values = (0.6, 0.3, 0.1)
    by_position = step(one, one.make(**{one.preference: values}), now)
    shuffled = {name: values[now.names.index(name)] for name in reversed(now.names)}
    by_name = step(one, one.make(**{one.preference: shuffled}), now)
    assert same_bits(by_position, by_name), f"{one.label}: {one.preference} by name differs from by position"
    none, equal = step(one, one.make(), now), step(one, one.make(**{one.preference: [0.25] * 3}), now)
    assert none.direction is not None and equal.direction is not None and by_name.direction is not None
    assert cosine(none.direction, equal.direction) >= 1 - COSINE, f"{one.label}: equal {one.preference} shows"
    assert cosine(none.direction, by_name.direction) < 1 - 1e-6, f"{one.label} ignores {one.preference}"
    present = now.names[:2]
    absent = step(one, one.make(**{one.preference: shuffled}), now.only(present))
    alone = step(
        one, one.make(**{one.preference: {name: shuffled[name] for name in present}}), now.only(present)
    )
    assert absent.direction is not None and alone.direction is not None
    assert cosine(absent.direction, alone.direction) >= 1 - COSINE, (
        f"{one.label}: an absent task's {one.preference}"
    )
