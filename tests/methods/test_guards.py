"""The guards: the test against its definition in angles and against α_min, what a refusal does, what is counted."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from twins.guards import NAMES, Model, drawn, ended, named, statuses

import detente
from detente.methods.registry import info_of
from detente.methods.wrappers import Adaptive, EarlyTerminationWarning, Every, Inexact, PerBlock
from detente.methods.wrappers.guard import shortfalls

# ---- the test


def by_angles(q: np.ndarray, g: np.ndarray, epsilon: float) -> bool:
    """γ >= φ, equations 2.9 to 2.11 of the thesis, in the space of the parameters."""
    length = np.linalg.norm(g)
    if epsilon > length:
        return False  # the error cone is the whole space
    gamma = math.pi / 2 - math.acos(np.clip(q @ g / (np.linalg.norm(q) * length), -1, 1))
    return gamma >= math.asin(epsilon / length)


def alpha_min(weights: np.ndarray, rows: np.ndarray, epsilon: np.ndarray, power: int) -> np.ndarray:
    """Equation 2.12 with the power of ‖g_i‖ in the denominator as an argument, sum by sum."""
    q = sum(w * g for w, g in zip(weights, rows, strict=True))
    found = []
    for i, row in enumerate(rows):
        others = sum(weights[j] * (rows[j] @ row) for j in range(len(rows)) if j != i)
        found.append((np.linalg.norm(q) * epsilon[i] - others) / np.linalg.norm(row) ** power)
    return np.array(found)


@pytest.mark.parametrize("inner", ["mgda", "uniform", "aligned-mtl", "upgrad"])
def test_it_is_the_rule_of_the_angles_and_alpha_min_with_the_square(inner: str) -> None:
    random = np.random.default_rng(3)
    seen, printed_differs = set(), 0
    for seed in range(200):
        matrix = drawn(seed, tasks=2 + seed % 3)
        rows = matrix.numpy()
        weights = detente.combine(inner, matrix).weights
        assert weights is not None
        epsilon = 10.0 ** random.uniform(-3, 0.5, len(rows))
        guard = Inexact(detente.create(inner), epsilon=epsilon.tolist())
        accepted = detente.combine(guard, matrix).accepted
        q = weights.numpy() @ rows
        assert accepted == all(by_angles(q, g, e) for g, e in zip(rows, epsilon, strict=True))
        assert accepted == bool((weights.numpy() >= alpha_min(weights.numpy(), rows, epsilon, 2)).all())
        printed_differs += accepted != bool(
            (weights.numpy() >= alpha_min(weights.numpy(), rows, epsilon, 1)).all()
        )
        seen.add(accepted)
    assert seen == {True, False}
    assert printed_differs > 0  # the denominator as printed is another rule


def test_for_exact_mgda_the_direction_must_be_as_long_as_the_bounds_of_the_tasks_with_a_weight() -> None:
    seen = set()
    for seed, epsilon in itertools.product(range(60), (0.05, 0.3, 1.0)):
        matrix = drawn(seed)
        plain = detente.combine("mgda", matrix)
        assert plain.weights is not None and plain.direction is not None
        outcome = detente.combine(detente.create("inexact-mgda", epsilon=epsilon), matrix)
        long_enough = float(plain.direction.norm()) >= epsilon
        inactive = matrix @ plain.direction >= plain.direction.norm() * epsilon
        assert outcome.accepted == (long_enough or bool(inactive.all()))
        if bool((plain.weights > 1e-9).all()):
            assert outcome.accepted == long_enough
        assert torch.equal(outcome.weights, plain.weights)  # type: ignore[arg-type]
        assert torch.equal(outcome.direction, plain.direction)  # type: ignore[arg-type]  # reported all the same
        seen.add(outcome.accepted)
    assert seen == {True, False}


def test_the_bound_itself_is_enough() -> None:
    matrix = torch.tensor([[3.0, 4.0]])
    assert detente.combine(detente.create("inexact-mgda", epsilon=5.0), matrix).accepted
    assert not detente.combine(detente.create("inexact-mgda", epsilon=5.0001), matrix).accepted


@pytest.mark.parametrize("inner", ["mgda", "upgrad", "dualproj", "edm"])
def test_epsilon_zero_accepts_what_the_method_accepts(inner: str) -> None:
    """Directions that help every task by construction, down to the last digits before stationarity."""
    generator = torch.Generator().manual_seed(0)
    checked = 0
    for exponent, tasks in itertools.product(np.linspace(0, -9, 19), (2, 3, 6)):
        rows = torch.randn(tasks, 9, generator=generator, dtype=torch.float64)
        rows = rows * 10.0 ** (4 * torch.rand(tasks, 1, generator=generator, dtype=torch.float64))
        combination = torch.rand(tasks - 1, generator=generator, dtype=torch.float64) @ rows[:-1]
        rows[-1] = -combination + 10.0**exponent * rows[-1]  # nearly a vanishing combination
        plain = detente.combine(inner, rows)
        guarded = detente.combine(Inexact(detente.create(inner)), rows)
        assert guarded.status == plain.status, (inner, exponent, tasks)
        checked += plain.status == "ok"
    assert checked > 20


def test_epsilon_zero_still_refuses_a_direction_against_a_task() -> None:
    guard = Inexact(detente.create("uniform"))
    conflict = torch.tensor([[1.0, 0.0], [-2.0, 1.0]])  # q·g = (-1, 1)·(1, 0) = -1
    outcome = detente.combine(guard, conflict)
    assert outcome.status == "refused" and outcome.direction is not None
    assert outcome.direction.tolist() == [-1.0, 1.0]
    assert outcome.notes == ("inexact(uniform) refused the step: for task '0' <q, g> is 1 short of ‖q‖ε",)
    assert detente.combine(guard, torch.eye(2)).status == "ok"


def test_a_direction_of_zero_is_accepted() -> None:
    opposite = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert detente.combine(Inexact(detente.create("uniform"), epsilon=1.0), opposite).status == "ok"
    method = detente.create("inexact-mgda", epsilon=1.0)
    assert detente.combine(method, opposite).status == "stationary"
    assert method.refused_share == 0.0


def test_a_direction_that_cancels_up_to_float32_counts_as_zero_and_a_longer_one_does_not() -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(2 + seed % 3, 50, generator=generator) * 10.0 ** (seed % 7 - 3)
        rows = torch.cat([rows, -rows.sum(0, keepdim=True)])
        assert detente.combine(Inexact(detente.create("uniform"), epsilon=1.0), rows).status == "ok"
    # ‖q‖ beside ‖g_1‖ + ‖g_2‖ = 2, in units of float32's machine epsilon
    for left, accepted in ((3.9, True), (4.1, False)):
        rest = 2 * left * 2.0**-23
        rows = torch.tensor([[1.0, rest], [-1.0, 0.0]], dtype=torch.float64)
        for scale in (1e-9, 1.0, 1e9):
            guard = Inexact(detente.create("uniform"), epsilon=scale)
            assert detente.combine(guard, scale * rows).accepted is accepted
        b = torch.ones(2, dtype=torch.float64, requires_grad=True)
        a = torch.ones(2, dtype=torch.float64, requires_grad=True)
        guard = Inexact(PerBlock(detente.create("uniform"), by="tensor"), epsilon=1.0)
        record = detente.backward([row @ a + row @ b for row in rows], guard)  # each √2 as long
        assert record.accepted is accepted


def test_rounding_of_an_inner_product_is_measured_by_the_lengths_of_what_was_summed() -> None:
    for part, lacking in ((0.9, False), (1.1, True), (1e3, True)):
        short = (
            part * 1e-12 * (1 + math.sqrt(2))
        )  # q = g_1 + g_2 with lengths 1 and √2, ‖q‖ = 1, <q, g_1> = -short
        gramian = np.array([[1.0, -1.0 - short], [-1.0 - short, 2.0]])
        found = shortfalls(gramian[None], np.ones((1, 2)), np.zeros(2))
        assert (found[0] > 0) == lacking and found[1] == 0, part
    # Weights of both signs must not cancel in the measure: <q, g_1> = -1e-13 of terms of length 1, and ‖q‖ = 1e-3.
    gramian = np.array([[1.0, 1.0 + 1e-13, 0.0], [1.0 + 1e-13, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert not shortfalls(gramian[None], np.array([[1.0, -1.0, 1e-3]]), np.array([0.0, np.nan, 0.0])).any()


def test_what_the_wrapped_method_refuses_stays_refused_and_counts() -> None:
    guard = Inexact(detente.create("nash-mtl"))
    outcome = detente.combine(guard, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert outcome.status == "refused" and guard.refused_share == 1.0


# ---- weights that differ between blocks, and weights of earlier steps


def two_losses(a: torch.Tensor, b: torch.Tensor, seed: int) -> list[torch.Tensor]:
    rows = drawn(seed, 4, 6)
    return [a @ rows[0, :3] + b @ rows[1, 3:], a @ rows[2, :3] + b @ rows[3, 3:]]


@pytest.mark.parametrize("inner", ["mgda", "uniform"])
def test_weights_of_blocks_are_judged_by_the_direction_they_give(inner: str) -> None:
    seen = set()
    for seed, epsilon in itertools.product(range(25), (0.0, 0.2, 0.6)):
        a, b = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        losses = two_losses(a, b, seed)
        rows = [torch.cat(torch.autograd.grad(loss, (a, b), retain_graph=True)) for loss in losses]
        detente.backward(losses, PerBlock(detente.create(inner), by="tensor"), retain_graph=True)
        assert a.grad is not None and b.grad is not None
        q = torch.cat((a.grad, b.grad))
        a.grad = b.grad = None
        guard = Inexact(PerBlock(detente.create(inner), by="tensor"), epsilon=epsilon)
        record = detente.backward(losses, guard)
        assert record.accepted == all(float(q @ g) >= float(q.norm()) * epsilon - 1e-12 for g in rows)
        assert (a.grad is None) == (not record.accepted)
        seen.add(record.accepted)
    assert seen == {True, False}


def test_reused_weights_are_judged_in_every_step() -> None:
    guard = Inexact(Every(detente.create("mgda"), k=3))
    good, bad = torch.eye(2), torch.tensor([[1.0, 0.0], [-3.0, 0.1]])  # weights ½: q = (-1, 0.05)
    assert statuses(guard, [good, bad, good]) == ["ok", "refused", "ok"]
    assert guard.needs_now() == {"gramian"}


# ---- bounds for each task


def test_bounds_by_name_by_position_and_for_the_tasks_present() -> None:
    rows = {"left": (1.0, 0.0), "right": (0.0, 1.0)}  # ‖q‖ = 0.707, <q, g> = 0.5 for both
    for epsilon, accepted in (
        ({"right": 0.8, "left": 0.1}, False),
        ({"right": 0.7, "left": 0.1}, True),
        ([0.8, 0.1], False),
        (np.array([0.1, 0.7]), True),
        (0.7, True),
        (0.8, False),
        (np.float64(0.8), False),
    ):
        assert named(detente.create("inexact-mgda", epsilon=epsilon), rows).accepted is accepted, epsilon
    method = detente.create("inexact-mgda", epsilon={"left": 0.1, "right": 5.0, "middle": 9.0})
    assert named(method, {"left": (1.0, 0.0)}).accepted  # the tasks with large bounds are absent
    assert set(method.tasks or ()) == set(NAMES)
    outcome = named(method, rows)
    assert not outcome.accepted and "'right'" in outcome.notes[0]
    assert not named(method, dict(reversed(rows.items()))).accepted
    assert named(method, {"left": (0.1, 0.0)}).accepted
    assert not named(method, {"right": (4.9, 0.0)}).accepted
    assert named(method, {"right": (5.1, 0.0)}).accepted


def test_bad_bounds_name_the_task_and_change_nothing() -> None:
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"option epsilon is {bad}"):
            detente.create("inexact-mgda", epsilon=bad)
        with pytest.raises(ValueError, match=rf"epsilon of task 'right' is {bad}; .* finite number >= 0"):
            detente.create("inexact-mgda", epsilon={"left": 1.0, "right": bad})
        with pytest.raises(ValueError, match="epsilon of task '1'"):
            detente.create("inexact-mgda", epsilon=[1.0, bad])
    for text in ("0.1", {"left": "much"}, ["much"]):
        with pytest.raises(TypeError, match=r"epsilon.* is '(0\.1|much)'"):
            detente.create("inexact-mgda", epsilon=text)
    odd = (None, True, np.True_, 1 + 0j, (x for x in (0.1, 0.2)), {0.1}, torch.ones(1, 1), np.ones((2, 2)))
    for value in odd:
        with pytest.raises(TypeError, match="option epsilon is"):
            detente.create("inexact-mgda", epsilon=value)
    for inside in (None, True, 1j, [0.1]):
        with pytest.raises(TypeError, match="epsilon of task 'right' is"):
            detente.create("inexact-mgda", epsilon={"left": 1.0, "right": inside})
        with pytest.raises(TypeError, match="epsilon of task '1' is"):
            detente.create("inexact-mgda", epsilon=[1.0, inside])
    for fine in (torch.tensor(0.5), np.float32(0.5), torch.tensor([0.5, 0.5]), (0.5, np.int64(1))):
        detente.create("inexact-mgda", epsilon=fine)
    with pytest.raises(ValueError, match="epsilon names no value for task 'right'"):
        detente.create("inexact-mgda", tasks=["left", "right"], epsilon={"left": 1.0})
    method = detente.create("inexact-mgda", epsilon=[0.0, 0.0])
    with pytest.raises(ValueError, match="epsilon has 2 values for 3 tasks"):
        detente.combine(method, drawn(0))
    assert method.tasks is None and method.refused_share is None
    detente.combine(method, drawn(0, 2), {"left": 1.0, "right": 1.0})
    with pytest.raises(
        ValueError, match="'middle' appeared after the first step, and the epsilon is given by position"
    ):
        detente.combine(method, drawn(0), dict.fromkeys(NAMES, 1.0))
    assert int(method.steps) == 1


# ---- what a refusal does


SPACES: dict[str, Callable[[Model, torch.Tensor], dict[str, Any]]] = {
    "exact": lambda model, z: {},
    "features": lambda model, z: {"features": z},
    "layer": lambda model, z: {"solve_on": model.last},
}


@pytest.mark.parametrize("space", SPACES)
def test_a_refused_step_leaves_every_grad_as_found(space: str) -> None:
    model = Model()
    z, losses = model(0)
    kept = torch.full_like(model.last.weight, 7.0)
    model.last.weight.grad = kept
    record = detente.backward(losses, detente.create("inexact-mgda", epsilon=1e6), **SPACES[space](model, z))
    assert not record.accepted and record.status == "refused" and record.space == space
    assert record.weights is not None and sum(record.weights) == pytest.approx(1)
    assert model.last.weight.grad is kept and bool((kept == 7).all())
    assert all(p.grad is None for p in model.parameters() if p is not model.last.weight)


@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("space", SPACES)
def test_only_the_shared_part_refused_lets_the_heads_move(space: str, heads: str) -> None:
    model = Model()
    z, losses = model(0)
    method = detente.create("inexact-mgda", epsilon=1e6, refuse="shared")
    plain = {
        name: torch.autograd.grad(losses[name], list(model.heads[name].parameters()), retain_graph=True)
        for name in NAMES
    }
    record = detente.backward(losses, method, heads=heads, **SPACES[space](model, z))  # type: ignore[arg-type]
    assert record.accepted and record.status == "stationary"
    assert any("refused the shared part" in note for note in record.notes)
    assert all(p.grad is not None and not p.grad.any() for p in model.shared())
    assert record.weights is not None
    for name, weight in zip(record.names, record.weights, strict=True):
        for parameter, gradient in zip(model.heads[name].parameters(), plain[name], strict=True):
            assert parameter.grad is not None
            expected = gradient * (weight if heads == "weighted" else 1.0)
            assert torch.allclose(parameter.grad, expected, rtol=1e-5, atol=1e-8)
    assert method.refused_share == 1.0


def test_nothing_is_left_of_the_altered_gradients_where_the_shared_part_is_refused() -> None:
    matrix = torch.tensor([[1.0, 0.0], [-0.5, 1.0]])
    assert detente.combine("pcgrad", matrix).transform is not None
    for refuse in ("all", "shared"):
        guard = Inexact(detente.create("pcgrad"), epsilon=1e6, refuse=refuse)  # type: ignore[arg-type]
        outcome = detente.combine(guard, matrix)
        assert (outcome.transform is None) == (refuse == "shared")
        assert outcome.weights is not None and outcome.status == (
            "refused" if refuse == "all" else "stationary"
        )
    assert detente.combine(Inexact(detente.create("pcgrad"), refuse="shared"), matrix).transform is not None


# ---- counts and the warning


@pytest.mark.parametrize(
    ("steps", "accepted", "warned"), [(100, 1, False), (101, 1, True), (5, 1, False), (3, 0, True)]
)
def test_an_epoch_with_more_than_99_percent_refused_warns(steps: int, accepted: int, warned: bool) -> None:
    method = detente.create("inexact-mgda", epsilon=2.0)
    for number in range(steps):
        detente.combine(method, torch.eye(2) * (10.0 if number < accepted else 1.0))
    assert method.refused_share == (steps - accepted) / steps and method.last_refused_share is None
    messages = ended(method)
    assert bool(messages) == warned
    if warned:
        assert f"inexact-mgda refused {steps - accepted} of {steps} steps" in messages[0]
        assert "Lower epsilon" in messages[0]
    assert method.refused_share is None and method.last_refused_share == (steps - accepted) / steps
    assert method.epoch_record() == {"refused_share": (steps - accepted) / steps}
    assert not ended(method)  # no step since then: nothing to close
    assert method.last_refused_share == (steps - accepted) / steps


def test_epoch_steps_closes_the_count_by_itself() -> None:
    method = detente.create("inexact-mgda", epsilon=2.0, epoch_steps=4)
    short, long = torch.eye(2), 10 * torch.eye(2)
    for number, matrix in enumerate((short, long, long, long, short), start=1):
        detente.combine(method, matrix)
        method.end_epoch()  # is left to the wrapped method
        assert (method.last_refused_share is None) == (number < 4)
    assert (method.last_refused_share, method.refused_share) == (0.25, 1.0)
    for _ in range(2):
        detente.combine(method, short)
    with pytest.warns(EarlyTerminationWarning, match="refused 4 of 4"):
        detente.combine(method, short)
    assert method.last_refused_share == 1.0


def test_as_an_error_the_warning_undoes_its_step_and_comes_once_in_an_epoch() -> None:
    short, long = torch.eye(2), 10 * torch.eye(2)
    guard = Adaptive(Inexact(detente.create("mgda"), epsilon=2.0, epoch_steps=2))
    inner = guard.method
    assert isinstance(inner, Inexact)

    def raises(matrix: torch.Tensor) -> None:
        before = {name: buffer.clone() for name, buffer in guard.named_buffers()}
        with pytest.raises(EarlyTerminationWarning, match="refused 2 of 2"):
            detente.combine(guard, matrix)
        assert all(torch.equal(buffer, before[name]) for name, buffer in guard.named_buffers())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            detente.combine(guard, short)
            raises(short)
            detente.combine(guard, short)
            assert (inner.last_refused_share, inner.refused_share) == (1.0, None)
        # The step that is taken instead may end the epoch well; the next epoch has a warning of its own.
        detente.combine(guard, short)
        raises(short)
        detente.combine(guard, long)
        assert inner.last_refused_share == 0.5
        detente.combine(guard, short)
        raises(short)


def test_as_an_error_the_warning_of_end_epoch_leaves_every_epoch_closed() -> None:
    guard = Inexact(Inexact(detente.create("mgda"), epsilon=2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            detente.combine(guard, torch.eye(2))
            with pytest.raises(EarlyTerminationWarning):
                guard.end_epoch()
            assert guard.last_refused_share == guard.method.last_refused_share == 1.0
            assert guard.refused_share is None and guard.method.refused_share is None


def test_an_epoch_record_holds_what_the_wrapped_method_has_to_say() -> None:
    guard = Inexact(Adaptive(detente.create("mgda")), epsilon=2.0)
    statuses(guard, [torch.eye(2), 2 * torch.eye(2)])
    ended(guard)
    assert guard.epoch_record() == {"refused_share": 1.0, "epsilon_squared": {"0": 0.25, "1": 0.25}}
    assert guard.method.epoch_record()["refused_share"] == 0.0


def test_the_wrapped_method_hears_of_epochs_and_losses() -> None:
    inner = detente.create("dwa")
    guard = Inexact(inner)
    for _ in range(2):
        detente.combine(guard, torch.eye(2), losses=[1.0, 2.0])
        guard.end_epoch()
    assert inner.epochs.tolist() == [2, 2]
    famo = Inexact(detente.create("famo"))
    detente.combine(famo, torch.eye(2), losses=[1.0, 2.0])
    famo.after_step([0.9, 1.9])


# ---- declarations


def test_declarations_follow_the_options() -> None:
    info = detente.methods()["inexact-mgda"]
    assert info.needs == {"gramian"} and info.spaces == {"exact", "features", "layer"} and not info.stateful
    assert (info.homogeneity, info.stationary, info.nonconflict) == (1, "hull", True)
    assert info_of(detente.create("inexact-mgda", epsilon=[0.0, 0.1])).homogeneity is None
    assert info_of(detente.create("inexact-mgda", refuse="shared")).stationary is None
    assert info_of(Inexact(detente.create("uniform"))).nonconflict
    assert not info_of(Adaptive(detente.create("uniform"))).nonconflict  # the first epoch is not guarded
    assert info_of(Adaptive(detente.create("mgda"))).spaces == {"exact", "layer"}
    assert info_of(detente.wrap("inexact", detente.create("uniform"))).name == "inexact(uniform)"
