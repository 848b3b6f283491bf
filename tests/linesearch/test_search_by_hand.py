"""Searches on functions simple enough for pencil and paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import detente
from detente.linesearch import Backtracking, FastBacktracking, NoDescent, SearchOptions, SearchRecord

F64 = torch.float64


def number(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=F64))


def value(parameter: nn.Parameter) -> float:
    return parameter.detach().item()


@pytest.mark.parametrize("c", [1e-4, 0.3, 0.8])
@pytest.mark.parametrize("inside", [True, False])
def test_longest_step_on_two_parabolas_with_heads(c: float, inside: bool) -> None:
    """L_i = ½ a_i θ² + ½ b_i φ_i², d = Σ a_i θ = κθ: the condition of task i holds exactly up to
    η_i = 2 (1 - c) (X + Y) / (X κ + Y b) with X = a θ² κ and Y = b² φ²; the smaller of both decides."""
    a, b, theta0, phi0 = (1.0, 3.0), (20.0, 0.5), 1.5, (0.4, -2.0)
    theta, phi = number(theta0), [number(start) for start in phi0]
    kappa = sum(a)
    bounds = []
    for curvature, own, start in zip(a, b, phi0, strict=True):
        x, y = curvature * theta0**2 * kappa, (own * start) ** 2
        bounds.append(2 * (1 - c) * (x + y) / (x * kappa + y * own))
    # The third length lies just inside, or just outside the bound: then the fourth is taken.
    lr_ub = 4 * min(bounds) * (1 - 1e-9 if inside else 1 + 1e-9)

    def closure(features: Any = None) -> Any:
        losses = [x * theta**2 / 2 + y * own**2 / 2 for x, y, own in zip(a, b, phi, strict=True)]
        return None, dict(zip(("first", "second"), losses, strict=True))

    own = {"first": [phi[0]], "second": phi[1]}
    found = Backtracking(detente.create("uniform"), [theta], own, lr_ub, c=c).step(closure)
    trials = 3 if inside else 4
    eta = lr_ub / 2 ** (trials - 1)
    assert (found.status, found.trials, found.eta) == ("accepted", trials, eta)
    assert value(theta) == pytest.approx(theta0 * (1 - eta * kappa), rel=1e-13)
    assert list(map(value, phi)) == pytest.approx(
        [start * (1 - eta * own) for start, own in zip(phi0, b, strict=True)], rel=1e-13
    )
    shared = [curvature * theta0 * kappa * theta0 for curvature in a]
    heads = [(own * start) ** 2 for own, start in zip(b, phi0, strict=True)]
    assert found.shared_slopes == pytest.approx(shared, rel=1e-13)
    assert found.slopes == pytest.approx([s + h for s, h in zip(shared, heads, strict=True)], rel=1e-13)
    # One forward with a graph, one for the check of the closure, one per trial.
    assert (found.head_forwards, found.trunk_forwards) == (2 + trials, 2 + trials)
    assert found.losses_before == pytest.approx(
        [x * theta0**2 / 2 + y * s**2 / 2 for x, y, s in zip(a, b, phi0, strict=True)], rel=1e-13
    )


@pytest.mark.parametrize("inside", [True, False])
def test_fast_search_moves_the_representation_and_carries_it_back(inside: bool) -> None:
    """z = Wx, L_i = ½ s_i ‖z‖²: along d = Σ s_i z = κz the bound is 2 (1 - c) / κ in Z, whatever the encoder; the
    weight then moves along κ z xᵀ."""
    s, c = (1.0, 3.0), 1e-4
    encoder = nn.Linear(2, 3, bias=False, dtype=F64)
    before = encoder.weight.detach().clone()
    x = torch.tensor([[10.0, -2.0]], dtype=F64)
    lr_ub = 2 * 2 * (1 - c) / sum(s) * (1 - 1e-9 if inside else 1 + 1e-9)
    asked = []

    def closure(features: Any = None) -> Any:
        asked.append(features is not None)
        z = encoder(x) if features is None else features
        return z, [factor * z.square().sum() / 2 for factor in s]

    search = FastBacktracking(
        detente.create("uniform"),
        encoder,
        [],
        lr_ub,
        c=c,
        options=SearchOptions(check_steps=0, check_true=True),
    )
    found = search.step(closure)
    eta = lr_ub / (2 if inside else 4)
    assert (found.trials, found.eta) == (2 if inside else 3, eta)
    z = before @ x[0]
    torch.testing.assert_close(encoder.weight.detach(), before - eta * sum(s) * torch.outer(z, x[0]))
    assert asked == [False] + [True] * found.trials + [False]
    assert (found.trunk_forwards, found.head_forwards) == (2, 2 + found.trials)
    # ‖x‖² = 104 times the move that was searched: far beyond the minimum.
    true_z = encoder(x).detach()
    assert found.true_losses == pytest.approx([factor * float(true_z.square().sum()) / 2 for factor in s])
    assert found.true_condition is False
    assert (search.true_condition_checks, search.true_condition_failures) == (1, 1)
    assert search.true_condition_rate == 1.0


def test_true_condition_is_looked_at_every_so_many_steps() -> None:
    encoder = nn.Linear(2, 2, dtype=F64)
    x = torch.ones(3, 2, dtype=F64)

    def closure(features: Any = None) -> Any:
        z = encoder(x) if features is None else features
        return z, [z.square().sum(), (z - 1).square().sum()]

    search = FastBacktracking(detente.create("mgda"), encoder, [], 0.01, options=SearchOptions(check_true=3))
    seen = [search.step(closure).true_condition for _ in range(7)]
    assert seen == [None, None, True, None, None, True, None]
    assert search.true_condition_rate == 0.0


def opposed(theta: nn.Parameter, heads: list[nn.Parameter], own: float = 1.0) -> Any:
    """L_1 = ½ θ² + own φ_1, L_2 = (θ - 3)² + own φ_2 at θ = 1: shared gradients 1 and -4."""

    def closure(features: Any = None) -> Any:
        shared = {"one": theta**2 / 2, "two": (theta - 3) ** 2}
        return None, {name: loss + own * phi for (name, loss), phi in zip(shared.items(), heads, strict=True)}

    return closure


def test_a_direction_up_the_hill_is_named_before_any_trial() -> None:
    """d = 1 - 4 = -3, slopes -3 and 12; the heads, with gradient 1, add 1 to each: -2 and 13."""
    theta, heads = number(1.0), [number(0.0), number(0.0)]
    calls = []
    closure = opposed(theta, heads)

    def counted(features: Any = None) -> Any:
        calls.append(features)
        return closure(features)

    search = Backtracking(
        detente.create("uniform"), [theta], heads, 0.5, options=SearchOptions(check_steps=0)
    )
    with pytest.raises(NoDescent, match=r"uniform is no descent for task 'one' \(-2\).*small_step="):
        search.step(counted)
    assert len(calls) == 1
    assert (value(theta), search.steps) == (1.0, 0)


def test_the_whole_slope_counts_not_only_the_shared_one() -> None:
    """Heads with gradient 2 make the slopes -3 + 4 and 12 + 4: every loss falls although the trunk climbs for one."""
    theta, heads = number(1.0), [number(0.0), number(0.0)]
    found = Backtracking(detente.create("uniform"), [theta], heads, 0.5).step(opposed(theta, heads, 2.0))
    assert found.shared_slopes == pytest.approx((-3, 12))
    assert found.slopes == pytest.approx((1, 16))
    # Along η: ½ (1 + 3η)² - 4η <= ½ - cη and (3η - 2)² - 4η <= 4 - 16 cη; the first asks for η <= 2 (1 - c) / 9.
    assert (found.trials, found.eta) == (3, 0.125)


def test_small_step_is_taken_without_a_search() -> None:
    theta, heads = number(1.0), [number(0.0), number(0.0)]
    search = Backtracking(
        detente.create("uniform"),
        [theta],
        heads,
        0.5,
        options=SearchOptions(on_no_descent="small-step", small_step=0.125),
    )
    found = search.step(opposed(theta, heads))
    assert (found.status, found.eta, found.trials, found.accepted) == ("small-step", 0.125, 1, True)
    assert value(theta) == 1 + 0.125 * 3
    assert list(map(value, heads)) == [-0.125, -0.125]
    assert found.losses_after == pytest.approx((1.375**2 / 2 - 0.125, 1.625**2 - 0.125))


def test_a_task_without_gradient_is_no_obstacle() -> None:
    """A task whose pixels are all masked has a connected zero for its loss."""
    theta = number(2.0)
    search = Backtracking(detente.create("uniform"), [theta], [], 0.25)
    found = search.step(lambda features=None: (None, [theta**2, 0 * theta]))
    assert (found.status, found.slopes, found.eta) == ("accepted", (16.0, 0.0), 0.25)
    assert value(theta) == 1.0


def test_stationary_moves_the_heads_only_and_nothing_where_there_are_none() -> None:
    theta, heads = number(0.0), [number(1.0), number(2.0)]

    def closure(features: Any = None) -> Any:
        return None, [
            (theta - 1) ** 2 + heads[0] ** 2,
            (theta + 1) ** 2 + heads[1] ** 2,
        ]

    found = Backtracking(detente.create("mgda"), [theta], heads, 0.25).step(closure)
    assert (found.status, found.record.status) == ("accepted", "stationary")
    assert (value(theta), list(map(value, heads))) == (0.0, [0.5, 1.0])
    assert found.shared_slopes == (0.0, 0.0)
    bare = Backtracking(detente.create("mgda"), [theta], [], 0.25, options=SearchOptions(check_steps=0)).step(
        closure
    )
    assert (bare.status, bare.trials, bare.eta, bare.accepted) == ("stationary", 0, 0.0, False)
    assert bare.losses_after is None


def test_rounding_does_not_stop_a_search_in_float32() -> None:
    """Near the optimum of a loss of size 1000 no step shows in float32; it is accepted, not sought for ever."""
    theta = nn.Parameter(torch.tensor(1e-4))
    search = Backtracking(detente.create("uniform"), [theta], [], 0.1, max_trials=3)
    found = search.step(lambda features=None: (None, [1000 + theta**2]))
    assert (found.status, found.trials) == ("accepted", 1)
    exact = Backtracking(
        detente.create("uniform"), [theta], [], 0.1, max_trials=3, options=SearchOptions(rounding=0)
    )
    assert exact.step(lambda features=None: (None, [1000 + theta**2])).status == "capped"


def test_own_parameters_that_two_losses_reach() -> None:
    """Named as own, reached by both: it moves along the sum, 2 + 6 = 8, and the slopes are 2 * 8 and 6 * 8."""
    theta, both = number(0.0), number(1.0)
    search = Backtracking(detente.create("uniform"), [theta], [both], 0.0625)
    found = search.step(lambda features=None: (None, [theta**2 + both**2, 3 * both**2 + theta**2]))
    assert found.slopes == pytest.approx((16, 48))
    assert value(both) == 1 - 0.0625 * 8


def test_no_grad_is_touched_and_methods_without_weights_work(net: Any, batch: Any) -> None:
    x = batch(0)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    for name in ("graddrop", "moco", "pcgrad", "dwa"):
        search = Backtracking(
            detente.create(name),
            net.encoder,
            net.heads,
            0.01,
            options=SearchOptions(on_no_descent="small-step", small_step=1e-6),
        )
        before = net.encoder[0].weight.detach().clone()
        assert search.step(net.closure(x)).accepted, name
        assert not before.equal(net.encoder[0].weight), name
    assert all(bool((parameter.grad == 7).all()) for parameter in net.parameters())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in (Backtracking, FastBacktracking)
        for name in ("graddrop", "mgda", "aligned-mtl", "moco", "pcgrad", "dwa")
        if kind.declares.direction.space in detente.methods()[name].spaces
    ],
)
def test_slopes_are_derivatives_along_the_step(name: str, kind: Any, net: Any, batch: Any) -> None:
    """(L(θ) - L(θ̃)) / η for a tiny η, for directions with weights and without."""
    search = kind(
        detente.create(name),
        net.encoder,
        net.heads,
        1e-6,
        options=SearchOptions(on_no_descent="small-step", small_step=1e-6),
    )
    found: SearchRecord = search.step(net.closure(batch(1)))
    assert found.slopes is not None and found.losses_after is not None
    drop = (np.array(found.losses_before) - np.array(found.losses_after)) / found.eta
    np.testing.assert_allclose(drop, found.slopes, rtol=1e-4)


def test_features_of_several_tensors() -> None:
    """A mapping goes in as a mapping, and a pair as a pair; the search in it equals the search in one tensor."""
    x = torch.randn(5, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    ends = []
    for form in ("one", "pair", "mapping"):
        torch.manual_seed(0)
        encoder = nn.Linear(4, 4, dtype=F64)

        def closure(features: Any = None, encoder: nn.Module = encoder, form: str = form) -> Any:
            if features is None:
                z = encoder(x)
                pair = (z[:, :2], z[:, 2:])
                features = {"one": z, "pair": pair, "mapping": {"low": pair[0], "high": pair[1]}}[form]
            parts = {"one": lambda f: (f[:, :2], f[:, 2:]), "pair": lambda f: f}
            low, high = parts[form](features) if form != "mapping" else (features["low"], features["high"])
            return features, [(low - 1).square().sum(), (low * high).square().sum() + high.square().sum()]

        search = FastBacktracking(detente.create("mgda"), encoder, [], 4.0)
        assert search.step(closure).trials > 1
        ends.append(encoder.weight.detach())
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])
