"""Which direction is a descent, whose fault it is where it is none, and lengths that drown in rounding."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

import detente
from detente.linesearch import Backtracking, FastBacktracking, NoDescent, SearchFailed, SearchOptions
from detente.methods import Method
from detente.values import Combination

KINDS = [Backtracking, FastBacktracking]
F64 = torch.float64


class Projected(Method):
    """The second gradient without its part along the first: no slope for the first task, up to rounding.

    ``extra`` times the first gradient is added; ``by_weights`` says which way the direction is told.
    """

    declares = detente.Declaration(name="projected", source="this test", needs=frozenset({"jacobian"}))
    extra, by_weights = 0.0, True

    def solve(self, gradients: Any) -> Combination:
        gramian = gradients.gramian
        weights = torch.tensor([self.extra - gramian[0, 1] / gramian[0, 0], 1.0], dtype=F64)
        if self.by_weights:
            return Combination(weights=weights)
        return Combination(direction=weights.to(gradients.jacobian.dtype) @ gradients.jacobian)


@pytest.mark.parametrize("by_weights", [True, False])
def test_a_slope_that_is_zero_by_construction_is_no_coin_toss(by_weights: bool) -> None:
    """As the weights are rounded up or down, the slope comes out as a few units in the last place of either sign."""
    for seed in range(10):
        torch.manual_seed(seed)
        centres, theta = torch.randn(2, 20, dtype=F64), nn.Parameter(torch.randn(20, dtype=F64))
        method = Projected()
        method.by_weights = by_weights

        def closure(
            features: Any = None, theta: torch.Tensor = theta, centres: torch.Tensor = centres
        ) -> Any:
            return None, {name: (theta - c).square().sum() for name, c in zip("ab", centres, strict=True)}

        for units in (-2, 0, 2):
            method.extra = units * 2.0**-52
            with pytest.raises(NoDescent, match=r"task 'a' \(zero up to rounding\) \(in") as raised:
                Backtracking(
                    method, [theta], [], 0.01, max_trials=60, options=SearchOptions(check_steps=0)
                ).step(closure)
            assert raised.value.tasks == ("a",)
        method.extra = 1e-9  # far below everything, and no rounding
        assert Backtracking(method, [theta], [], 0.01, max_trials=60).step(closure).status == "accepted"


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_two_tasks_that_moves_against_one(kind: Any) -> None:
    """h has gradients 1 and -3 and moves along -2: slope 1 · -2 for the first, beside 0.02 along the trunk."""
    encoder = nn.Parameter(torch.ones(1, dtype=F64))
    head, calls = nn.Parameter(torch.ones(1, dtype=F64)), []

    def closure(features: Any = None) -> Any:
        calls.append(features)
        z = encoder * 1.0 if features is None else features
        return z, {"a": (0.1 * z + head).sum(), "b": (0.1 * z - 3 * head).sum()}

    search = kind(detente.create("uniform"), [encoder], [head], 0.1, options=SearchOptions(check_steps=0))
    with pytest.raises(
        NoDescent, match=r"task 'a' \(-1.98\).*several tasks use.*name them in shared="
    ) as raised:
        search.step(closure)
    assert raised.value.tasks == ("a",)
    assert len(calls) == 1, "it is known before any trial"
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.tasks, again.told) == (str(raised.value), ("a",), raised.value.told)


def test_moments_that_turn_a_descent_are_named() -> None:
    """Adam's mean still points where the first step went; the second batch has the opposite slope."""
    theta, sign = nn.Parameter(torch.zeros(1, dtype=F64)), [1.0]
    search = Backtracking(
        detente.create("mgda"), [theta], [], 0.1, options=SearchOptions(precondition="adam")
    )

    def closure(features: Any = None) -> Any:
        return None, {"a": sign[0] * theta.sum(), "b": 2 * sign[0] * theta.sum()}

    search.step(closure)
    sign[0] = -0.1
    with pytest.raises(NoDescent, match="divided by running moments: leave precondition='adam' out"):
        search.step(closure)


def test_small_step_into_nan_says_so() -> None:
    theta = nn.Parameter(torch.tensor(1.0))
    search = Backtracking(
        detente.create("uniform"),
        [theta],
        [],
        1.0,
        options=SearchOptions(on_no_descent="small-step", small_step=1.0),
    )
    with pytest.raises(
        SearchFailed, match=r"task '1' is not finite .* small step of 1.*Lower small_step"
    ) as raised:
        search.step(lambda features=None: (None, [-2 * theta, 3 * theta.log()]))
    assert "lr_ub" not in str(raised.value) and raised.value.tasks == ("1",)


def jumping(kind: Any) -> tuple[nn.Parameter, Any]:
    """A loss that is twice as large wherever the parameter is not exactly where it was."""
    theta = nn.Parameter(torch.tensor([3.0]))
    home = theta.detach().clone()

    def closure(features: Any = None) -> Any:
        z = theta * 1.0 if features is None else features
        away = not (torch.equal(z, home) and torch.equal(theta, home))
        return z, [z.square().sum() * (2 if away else 1)]

    return theta, closure


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gamma", "most", "trials"), [(1e30, 20, 2), (10.0, 400, None), (1e200, 20, 2)])
def test_a_length_that_moves_nothing_is_no_step(
    kind: Any, gamma: float, most: int, trials: int | None
) -> None:
    theta, closure = jumping(kind)
    search = kind(detente.create("mgda"), [theta], [], 0.1, gamma, max_trials=most)
    found = search.step(closure)
    assert (found.status, found.eta, found.losses_after) == ("capped", 0.0, None)
    assert 1 < found.trials <= 12 and trials in (None, found.trials)
    assert found.notes[0].endswith("moves nothing: it is lost in rounding")
    assert theta.item() == 3.0
    strict = kind(
        detente.create("mgda"),
        [theta],
        [],
        0.1,
        gamma,
        max_trials=most,
        options=SearchOptions(on_cap="error"),
    )
    with pytest.raises(SearchFailed, match="no parameter moves any more at the last trial"):
        strict.step(closure)


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_first_length_moves_nothing_the_point_is_stationary(kind: Any) -> None:
    theta, closure = jumping(kind)
    search = kind(
        detente.create("mgda"), [theta], [], 1e-30, options=SearchOptions(lower_ub="cap", patience=1)
    )
    found = search.step(closure)
    assert (found.status, found.trials, found.accepted, search.capped) == ("stationary", 1, False, 0)
    assert search.lowered == 0


def test_the_look_at_the_network_uses_the_masks_of_the_search(net: Any, batch: Any) -> None:
    """After a step of no length to speak of the network has the losses it had, if dropout drops the same."""
    search = FastBacktracking(
        detente.create("mgda"), net.encoder, net.heads, 1e-9, options=SearchOptions(check_true=True)
    )
    found = search.step(net.closure(batch(0)))
    assert found.true_losses == pytest.approx(found.losses_before, rel=1e-6)


def test_a_constant_small_step_is_not_looked_at() -> None:
    encoder = nn.Linear(2, 2, dtype=F64)
    x = torch.ones(3, 2, dtype=F64)

    def closure(features: Any = None) -> Any:
        z = encoder(x) if features is None else features
        return z, [z.sum(), -2 * z.sum()]

    search = FastBacktracking(
        detente.create("uniform"),
        encoder,
        [],
        0.1,
        options=SearchOptions(check_true=True, on_no_descent="small-step", small_step=1e-3),
    )
    found = search.step(closure)
    assert (found.status, found.true_losses, found.true_condition) == ("small-step", None, None)
    assert (search.true_condition_checks, search.true_condition_rate) == (0, None)


def test_a_task_that_says_nothing_about_the_trunk_is_noted() -> None:
    """MGDA takes the shortest combination, which is then zero: the trunk stays, and the record says why."""
    encoder, heads = nn.Linear(2, 2), nn.ModuleDict({name: nn.Linear(2, 1) for name in "ab"})
    x = torch.ones(3, 2)

    def closure(features: Any = None) -> Any:
        return None, {"a": heads["a"](encoder(x)).square().mean(), "b": heads["b"](x).square().mean()}

    before = encoder.weight.detach().clone()
    found = Backtracking(detente.create("mgda"), encoder, heads, 1e-3).step(closure)
    assert found.notes == ("task 'b' has no gradient on what is shared",)
    assert found.accepted and before.equal(encoder.weight)
