"""What each task contributes: by hand, against the true update, and the promise on balance."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from twin_adams import Model

import detente
from detente.optim import MAO, Contributions, MTAdam, TaskBalance


def rows(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- the record


def test_a_record_is_plain_numbers() -> None:
    model = Model()
    optimizer = MAO(model.shared, model.heads)
    optimizer.step(model.losses(0), measure=True)
    balance = optimizer.balance
    assert balance is not None and balance.tasks == ("a", "b", "c")
    assert balance.sizes == tuple(p.numel() for module in model.shared for p in module.parameters())
    assert rows(balance.gradients).shape == rows(balance.contributions).shape == (6, 3)
    assert json.loads(json.dumps(balance.to_dict())) == balance.to_dict()
    weights = rows(balance.sizes) / sum(balance.sizes)
    torch.testing.assert_close(rows(balance.mean_gradients), weights @ rows(balance.gradients))
    torch.testing.assert_close(rows(balance.mean_contributions), weights @ rows(balance.contributions))
    with pytest.raises(AttributeError):
        balance.tasks = ()  # type: ignore[misc]
    optimizer.step(model.losses(0))
    assert optimizer.balance is None


def test_no_layers_no_numbers() -> None:
    optimizer = MAO((), nn.Linear(1, 1))
    layer = optimizer.param_groups[0]["params"][0]
    optimizer.step([layer.sum()], measure=True)
    assert optimizer.balance == TaskBalance(("0",), (), (), (), ())
    assert optimizer.balance.mean_contributions == (0.0,)


# ---- MAO, MTAdam


@pytest.mark.parametrize(
    "options",
    [{}, {"bias_correction": "paper"}, {"bias_correction": "none"}, {"variant": "sgd"}],
    ids=["adam", "paper", "none", "sgd"],
)
def test_contributions_are_the_update_where_signs_agree(options: dict[str, Any]) -> None:
    """Linear losses with positive slopes: every contribution has one sign, so sizes add up to the size of the step."""
    weight, bias = (
        nn.Parameter(torch.zeros(3, dtype=torch.float64)),
        nn.Parameter(torch.zeros(1, dtype=torch.float64)),
    )
    optimizer = MAO([weight, bias], lr=0.1, weight_decay=0.0, **options)
    slopes = torch.tensor([1.0, 2.0, 30.0], dtype=torch.float64)
    for step in range(5):
        before = [p.detach().clone() for p in (weight, bias)]
        factor = 1 + step % 2
        losses = {"a": factor * (slopes * weight).sum(), "b": 100 * weight.sum() + 5 * bias.sum()}
        optimizer.step(losses, measure=True)
        found = optimizer.balance
        assert found is not None
        torch.testing.assert_close(rows(found.gradients), rows([[11.0 * factor, 100.0], [0.0, 5.0]]))
        moved = [float((b - p.detach()).mean()) for b, p in zip(before, (weight, bias), strict=True)]
        torch.testing.assert_close(rows(found.contributions).sum(1), rows(moved))
    assert found.contributions[1][0] == 0


def test_each_task_contributes_its_own_adam() -> None:
    """With gradients of either sign: the mean size of what torch's Adam does with that task's gradients alone."""
    model = Model()
    shared = [p for module in model.shared for p in module.parameters()]
    optimizer = MAO(model.shared, model.heads, lr=0.01)
    copies = {name: [nn.Parameter(torch.zeros_like(p)) for p in shared] for name in "abc"}
    adams = {name: torch.optim.Adam(copies[name], lr=0.01) for name in "abc"}
    for step in range(10):
        expected = torch.zeros(6, 3, dtype=torch.float64)
        for task, (name, loss) in enumerate(model.losses(step).items()):
            found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
            for c, g in zip(copies[name], found, strict=True):
                c.data.zero_()
                c.grad = g
            adams[name].step()
            expected[:, task] = torch.stack([c.detach().abs().mean() for c in copies[name]])
        optimizer.step(model.losses(step), measure=True)
        assert optimizer.balance is not None
        torch.testing.assert_close(rows(optimizer.balance.contributions), expected)


def test_measuring_changes_nothing() -> None:
    for kind in (MAO, MTAdam):
        one, other = Model(), Model()
        first, second = kind(one.shared, one.heads), kind(other.shared, other.heads)
        for step in range(5):
            first.step(one.losses(step), measure=True)
            second.step(other.losses(step))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_mtadam_divides_by_what_the_tasks_have_in_common() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([weight], lr=0.1)
    optimizer.step({"a": 3 * weight[0] + 4 * weight[1], "b": 10 * weight[0]}, measure=True)
    assert optimizer.balance is not None
    torch.testing.assert_close(rows(optimizer.balance.gradients), rows([[3.5, 5.0]]))
    torch.testing.assert_close(rows(optimizer.balance.contributions), rows([[0.1 * (3 / 5 + 1) / 2, 0.05]]))


# ---- any weighting under Adam


def train_with_adam(
    model: Model, steps: range, weights: dict[str, float], optimizer: Any, contributions: Contributions
) -> list[tuple[TaskBalance, torch.Tensor]]:
    """Each step's record and by how much each layer moved on average, the sign kept."""
    shared = [p for module in model.shared for p in module.parameters()]
    method = detente.create("static", weights=weights)
    found = []
    for step in steps:
        losses = model.losses(step, detour="abc")
        taken = detente.task_gradients(losses, shared=shared, task_specific=model.heads, retain_graph=True)
        record = detente.backward(losses, method, shared=shared, task_specific=model.heads)
        before = [p.detach().clone() for p in shared]
        optimizer.step()
        optimizer.zero_grad()
        moved = torch.stack([(b - p.detach()).abs().mean() for b, p in zip(before, shared, strict=True)])
        found.append((contributions.measure(taken, record.weights), moved))
    return found


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_under_adam_the_tasks_share_the_update(kind: Any, amsgrad: bool) -> None:
    """One task alone is all of it; the tasks' averages add up to the optimizer's own."""
    model = Model("a")
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.0, amsgrad=amsgrad)
    contributions = Contributions(optimizer, model.shared)
    for balance, moved in train_with_adam(model, range(10), {"a": 0.3}, optimizer, contributions):
        torch.testing.assert_close(rows(balance.contributions)[:, 0], moved)
    model = Model()
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.0, amsgrad=amsgrad)
    contributions = Contributions(optimizer, model.shared)
    weights = {"a": 1.0, "b": 0.5, "c": 2.0}
    for balance, moved in train_with_adam(model, range(10), weights, optimizer, contributions):
        assert bool((rows(balance.contributions).sum(1) >= moved - 1e-15).all())
    for module in model.shared:
        for p in module.parameters():
            torch.testing.assert_close(sum(contributions._moments[p].values()), optimizer.state[p]["exp_avg"])
    assert contributions.tasks == ("a", "b", "c")


def test_an_absent_task_still_contributes_by_its_momentum() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    contributions = Contributions(optimizer, {"layer": weight})
    for losses in ({"a": weight.sum(), "b": weight.sum()}, {"b": weight.sum()}):
        taken = detente.task_gradients(losses, shared=[weight])
        detente.apply(taken, detente.create("uniform").combine(taken.gradients), scale="sum")
        optimizer.step()
        optimizer.zero_grad()
        balance = contributions.measure(taken, [1.0] * len(losses))
    # m of a: 0.1, then 0.09; of b: 0.1, then 0.19; v: 0.001 * 4, then 0.999 * 0.004 + 0.001.
    denominator = ((0.999 * 0.004 + 0.001) / (1 - 0.999**2)) ** 0.5 + 1e-8
    expected = [0.1 / (1 - 0.9**2) * m / denominator for m in (0.09, 0.19)]
    assert balance.layers == ("layer",) and balance.gradients == ((0.0, 1.0),)
    assert balance.contributions[0] == pytest.approx(expected)


def test_a_saved_state_goes_on() -> None:
    weights = {"a": 1.0, "b": 0.5, "c": 2.0}
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    contributions = Contributions(optimizer, model.shared)
    train_with_adam(model, range(5), weights, optimizer, contributions)
    other = Model()
    other.load_state_dict(model.state_dict())
    resumed = torch.optim.Adam(other.parameters(), lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again = Contributions(resumed, other.shared)
    again.load_state_dict(contributions.state_dict())
    whole = train_with_adam(model, range(5, 8), weights, optimizer, contributions)
    assert [b for b, _ in train_with_adam(other, range(5, 8), weights, resumed, again)] == [
        b for b, _ in whole
    ]
    with pytest.raises(ValueError, match="other shared parameters"):
        Contributions(resumed, other.trunk).load_state_dict(contributions.state_dict())


def test_a_saved_state_finds_its_parameters_by_name() -> None:
    """The same two layers, of one shape, handed over in another order."""
    first, second = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([3.0, 1.0]))
    optimizer = torch.optim.Adam([first, second], lr=0.1)
    one = Contributions(optimizer, [("first", first), ("second", second)])
    given = {"a": (3 * first).sum(), "b": first.sum() + (7 * second).sum()}
    taken = detente.task_gradients(given, shared=[first, second])
    detente.apply(taken, detente.create("uniform").combine(taken.gradients), scale="sum")
    optimizer.step()
    one.measure(taken, [1.0, 1.0])
    other = Contributions(optimizer, [("second", second), ("first", first)])
    other.load_state_dict(one.state_dict())
    assert set(other._moments[second]) == set(one._moments[second])
    for parameter, kept in one._moments.items():
        for task, moment in kept.items():
            assert torch.equal(other._moments[parameter][task], moment)
    earlier = {key: value for key, value in one.state_dict().items() if key != "names"}
    same = Contributions(optimizer, [("first", first), ("second", second)])
    same.load_state_dict(earlier)  # by position
    assert torch.equal(same._moments[first]["a"], one._moments[first]["a"])
    with pytest.raises(ValueError, match="other shared parameters"):
        Contributions(optimizer, [("first", first), ("third", second)]).load_state_dict(one.state_dict())


def test_what_cannot_be_measured_is_said_and_changes_nothing() -> None:
    model = Model()
    shared = [p for module in model.shared for p in module.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    contributions = Contributions(optimizer, model.shared)

    def taken(which: Any) -> Any:
        return detente.task_gradients(model.losses(0, detour="abc"), shared=which, task_specific=model.heads)

    good = taken(shared)
    ones = [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="has moved no parameter"):
        contributions.measure(good, ones)
    detente.apply(good, detente.create("uniform").combine(good.gradients))
    optimizer.step()
    with pytest.raises(ValueError, match=r"\(2,\) weights for 3 tasks"):
        contributions.measure(good, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"moved 1\.weight, and its task gradients were not taken"):
        contributions.measure(taken(model.trunk), ones)
    assert contributions.tasks == ()
    optimizer.step()
    with pytest.raises(ValueError, match=r"moved 0\.0\.weight 2 times"):
        contributions.measure(good, ones)
    assert contributions.tasks == () and not any(contributions._moments.values())
    z = model.trunk(torch.ones(1, 4, dtype=torch.float64))
    on_features = detente.task_gradients([head(z).sum() for head in model.heads.values()], features=z)
    with pytest.raises(ValueError, match="gradients of the parameters themselves"):
        contributions.measure(on_features, ones)
    with pytest.raises(ValueError, match="option tolerance is 0"):
        Contributions(optimizer, model.trunk, tolerance=0)
    with pytest.raises(ValueError, match=r"parameter 0\.weight of shared= is in no group"):
        Contributions(torch.optim.Adam(model.heads.parameters()), model.trunk)


class Logged(torch.optim.Adam):
    """Adam under another name."""


class Doubled(torch.optim.AdamW):
    """AdamW with another step."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Wrapped(torch.optim.Optimizer):
    """What a launcher makes of an optimizer: the same state, a step of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@pytest.mark.parametrize("name", ["RAdam", "NAdam", "Adamax", "SGD", "Adagrad", "Doubled"])
def test_optimizers_with_another_update_are_refused(name: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = Doubled([weight]) if name == "Doubled" else getattr(torch.optim, name)([weight])
    for one in (optimizer, Wrapped(optimizer)):
        with pytest.raises(TypeError, match=f"{name} is neither torch.optim.Adam nor AdamW"):
            Contributions(one, [weight])


def test_adam_may_be_wrapped_or_named_otherwise() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = Logged([weight], lr=0.1)
    contributions = Contributions(Wrapped(optimizer), [weight])
    losses = {"a": weight.sum(), "b": 3 * weight.sum()}
    taken = detente.task_gradients(losses, shared=[weight])
    detente.apply(taken, detente.create("uniform").combine(taken.gradients), scale="sum")
    Wrapped(optimizer).step()
    assert contributions.measure(taken, [1, 1]).contributions[0] == pytest.approx((0.025, 0.075))


# ---- the gradients Adam did not see


def two_losses(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    slopes = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 1.0, 2.0]])
    return {"a": (weight * slopes[0]).sum().square(), "b": 5 * (weight * slopes[1]).square().sum()}


def adam_step(
    weight: nn.Parameter, optimizer: Any, method: detente.Method, **arguments: Any
) -> tuple[Any, Any]:
    """The task gradients and the record of one step under a method."""
    taken = detente.task_gradients(two_losses(weight), shared=[weight])
    record = detente.backward(two_losses(weight), method, shared=[weight], task_specific=[], **arguments)
    optimizer.step()
    optimizer.zero_grad()
    return taken, record


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("make", "arguments", "right"),
    [
        (lambda: detente.create("mgda"), {"scale": "sum"}, None),
        (lambda: detente.create("inexact-mgda", epsilon=1e6, refuse="shared"), {}, [0.0, 0.0]),
        (lambda: detente.create("graddrop"), {}, None),
        (lambda: detente.create("db-mtl"), {}, None),
        (lambda: detente.wrappers.PerBlock(detente.create("mgda")), {}, None),
    ],
    ids=["scale", "shared part refused", "graddrop", "db-mtl", "per block"],
)
def test_what_adam_did_not_see_is_not_measured(
    make: Callable[[], detente.Method], arguments: dict[str, Any], right: list[float] | None, maximize: bool
) -> None:
    """Weights of another length or none are noticed in the first step in which they are wrong."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0, -1.0]))
    optimizer = torch.optim.Adam([weight], lr=0.01, maximize=maximize)
    contributions = Contributions(optimizer, [weight])
    taken, record = adam_step(weight, optimizer, detente.create("mgda"))
    contributions.measure(taken, record.weights)
    before = contributions.state_dict()
    taken, record = adam_step(weight, optimizer, make(), **arguments)
    wrong = [record.weights]
    said = "not those Adam saw: .*leave scale native"
    if record.weights == (None, None):
        with pytest.raises(ValueError, match=r"there are no weights: .*Nothing was changed"):
            contributions.measure(taken, record.weights)
        wrong = [[1.0, 1.0], [0.5, 0.5]]
    for weights in wrong:
        with pytest.raises(ValueError, match=f"{said}.*Nothing was changed"):
            contributions.measure(taken, weights)
        after = contributions.state_dict()
        assert all(before[key] == after[key] for key in ("tasks", "seen", "whole"))
        assert all(torch.equal(before["moments"][0][n], after["moments"][0][n]) for n in "ab")
    if right is not None:
        contributions.measure(taken, right)
        total = sum(contributions._moments[weight].values()) * (-1 if maximize else 1)
        torch.testing.assert_close(total, optimizer.state[weight]["exp_avg"])


@pytest.mark.parametrize(
    ("kind", "decay", "worked", "told"),
    [
        (torch.optim.Adam, 0.0, False, True),
        (torch.optim.AdamW, 0.1, False, True),
        (torch.optim.Adam, 0.1, False, False),
        (torch.optim.AdamW, 0.1, True, False),
    ],
)
def test_where_adams_average_holds_more_than_the_tasks_nothing_is_compared(
    kind: Any, decay: float, worked: bool, told: bool
) -> None:
    """Weight decay in the gradient, or steps from before; once in the average it stays there."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0, -1.0]))
    optimizer = kind([weight], lr=0.01, weight_decay=decay)
    if worked:
        weight.grad = torch.ones(3)
        optimizer.step()
        optimizer.zero_grad()
    contributions = Contributions(optimizer, [weight])
    for wrong in (1.0, 2.0):
        taken = detente.task_gradients(two_losses(weight), shared=[weight])
        detente.apply(taken, detente.create("uniform").combine(taken.gradients), scale="sum")
        optimizer.step()
        optimizer.zero_grad()
        if wrong == 2.0 and told:
            with pytest.raises(ValueError, match="not those Adam saw"):
                contributions.measure(taken, [wrong, wrong])
        else:
            contributions.measure(taken, [wrong, wrong])
        optimizer.param_groups[0]["weight_decay"] = 0.0


def test_rounding_of_one_tensor_is_no_difference() -> None:
    """The true gradient of a bias before a normalisation is zero; what is computed is noise, each time another."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
    trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    heads = nn.ModuleList([nn.Linear(32, 1), nn.Linear(32, 1)])
    optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=1e-3)
    contributions = Contributions(optimizer, trunk, tolerance=1e-4)
    for _ in range(3):
        z = trunk(torch.randn(8, 3, 12, 12))
        losses = [(head(z) - 1).square().mean() for head in heads]
        taken = detente.task_gradients(losses, shared=trunk, task_specific=heads, retain_graph=True)
        record = detente.backward(losses, detente.create("uniform"), shared=trunk, task_specific=heads)
        optimizer.step()
        optimizer.zero_grad()
        contributions.measure(taken, record.weights)
    bias = optimizer.state[trunk[0].bias]["exp_avg"]
    difference = sum(contributions._moments[trunk[0].bias].values()) - bias
    assert float(difference.norm() / bias.norm()) > 1e-2  # of this tensor alone


def test_a_measurement_is_one_copy_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    from detente.optim import balance

    model, copies = Model(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    contributions = Contributions(optimizer, model.shared)
    to_host = balance.to_host
    monkeypatch.setattr(balance, "to_host", lambda parts: copies.append(1) or to_host(parts))
    train_with_adam(model, range(3), {"a": 1.0, "b": 0.5, "c": 2.0}, optimizer, contributions)
    assert len(copies) == 3


def test_what_is_loaded_is_a_copy_with_what_was_seen() -> None:
    """Into one that was made beside a fresh optimizer, and beside one that had been at work."""
    weights = {"a": 1.0, "b": 0.5, "c": 2.0}
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    contributions = Contributions(optimizer, model.shared)
    train_with_adam(model, range(3), weights, optimizer, contributions)
    saved = contributions.state_dict()
    kept = copy.deepcopy(saved)
    for loaded_first in (False, True):
        other = Model()
        other.load_state_dict(model.state_dict())
        resumed = torch.optim.Adam(other.parameters(), lr=0.01)
        if loaded_first:
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        again = Contributions(resumed, other.shared)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        again.load_state_dict(saved)
        train_with_adam(other, range(3, 5), weights, resumed, again)
        for one, then in zip(saved["moments"], kept["moments"], strict=True):
            assert all(torch.equal(one[task], then[task]) for task in then)
        for p, number in again._seen.items():
            assert number == 5 and again._whole[p]


# ---- the promise


def test_balance_stays_when_one_loss_is_multiplied_by_100() -> None:
    """Per layer the ratio of two tasks' mean contributions over a run; Adam's layers rise from 8 to 100 times."""

    def mao(factor: float) -> torch.Tensor:
        model = Model("ab")
        optimizer, total = MAO(model.shared, model.heads, lr=0.003), torch.zeros(6, 2, dtype=torch.float64)
        for step in range(100):
            losses = model.losses(step, detour="ab")
            optimizer.step({**losses, "b": factor * losses["b"]}, measure=True)
            assert optimizer.balance is not None
            total += rows(optimizer.balance.contributions)
        return total[:, 1] / total[:, 0]

    def uniform(factor: float) -> torch.Tensor:
        model = Model("ab")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        found = train_with_adam(
            model, range(100), {"a": 1.0, "b": factor}, optimizer, Contributions(optimizer, model.shared)
        )
        total = sum(rows(balance.contributions) for balance, _ in found)
        return total[:, 1] / total[:, 0]

    assert bool(((mao(100.0) / mao(1.0) - 1).abs() < 0.05).all())
    rise = uniform(100.0) / uniform(1.0)
    assert rise.min() > 5 and rise.median() > 10
