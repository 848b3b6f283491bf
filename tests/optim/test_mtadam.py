"""The numbers of MTAdam; what it shares with MAO is tested there."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from twin_adams import Model, TwinMTAdam

from detente.optim import MTAdam, kernels, mtadam


def farthest(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_one_task_is_adam(weight_decay: float) -> None:
    model, other = Model("a"), Model("a")
    optimizer = MTAdam(model.shared, model.heads, lr=0.01, weight_decay=weight_decay)
    reference = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=weight_decay)
    for step in range(100):
        optimizer.step(model.losses(step))
        reference.zero_grad()
        other.losses(step)["a"].backward()
        reference.step()
    assert farthest(model, Model("a")) > 0.1
    assert farthest(model, other) < 1e-12


def test_the_twin_goes_the_same_way() -> None:
    """Tasks come and go, the anchor too, one layer is passed by few, own parameters and weight decay."""
    present = ["abc", "bc", "ab", "ca", "b", "abc"]
    options = {"lr": 0.003, "norm_beta": 0.8, "weight_decay": 0.05}
    model, other = Model(), Model()
    optimizer = MTAdam(model.shared, model.heads, tasks=["a", "b", "c"], **options)
    shared = [p for module in other.shared for p in module.parameters()]
    twin = TwinMTAdam("abc", shared, list(other.heads.parameters()), **options)
    for step in range(100):
        names = present[step % len(present)]
        optimizer.step(model.losses(step, names, detour="bc"))
        twin.step(other.losses(step, names, detour="bc"))
    assert farthest(model.trunk, Model().trunk) > 0.1 and farthest(model.heads, Model().heads) > 0.1
    assert farthest(model, other) < 1e-12


def test_the_unit_of_a_loss_does_not_matter_but_that_of_the_anchor_is_everyones() -> None:
    """All gradients have the anchor's length, so a larger anchor enlarges all moments, and Adam divides by it again."""

    def train(**scales: float) -> Model:
        model = Model()
        optimizer = MTAdam(model.trunk, model.heads, lr=0.01, eps=1e-12)
        for step in range(60):
            optimizer.step({name: scales.get(name, 1.0) * loss for name, loss in model.losses(step).items()})
        return model

    plain = train()
    assert farthest(plain.trunk, Model().trunk) > 0.1
    assert farthest(plain.trunk, train(b=1000.0).trunk) < 1e-6
    assert farthest(plain.trunk, train(a=1000.0).trunk) < 1e-6


def test_the_anchor_is_the_first_known_task_whatever_the_order_of_a_step() -> None:
    def train(order: str) -> Model:
        model = Model()
        optimizer = MTAdam(model.shared, model.heads, tasks=["b", "a", "c"], lr=0.01)
        for step in range(5):
            losses = model.losses(step)
            optimizer.step({name: losses[name] for name in order})
        assert optimizer.state[model.trunk[0].weight]["b"]["norm"] > 0
        return model

    assert farthest(train("abc"), train("cba")) == 0


def test_gradients_take_the_anchors_length() -> None:
    """By hand: norms 5 and 10, an anchor that is absent in the second step, and one that is new in a tensor."""
    weight, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    optimizer = MTAdam([weight, late], tasks=["a", "b"], betas=(0.0, 0.0), norm_beta=0.5, lr=0.1)
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([10.0, 0.0])
    optimizer.step({"a": (a * weight).sum(), "b": (b * weight).sum() + 7 * late.sum()})
    kept = optimizer.state[weight]
    assert kept["a"]["norm"] == 2.5 and kept["b"]["norm"] == 5.0  # averages start at 0
    assert kept["b"]["exp_avg"].tolist() == [5.0, 0.0]  # the length of a's
    assert optimizer.state[late]["b"]["exp_avg"].tolist() == [
        7.0
    ]  # a has never reached it: b is the anchor there
    # Denominators: the larger of 3 and 5, and of 4 and 0.
    torch.testing.assert_close(weight.detach(), -0.1 * torch.tensor([3 / 5 + 1, 4 / 4]))
    before = weight.detach().clone()
    optimizer.step({"b": (2 * b * weight).sum()})
    # The norms of b, 10 and 20, average to (0.25 * 10 + 0.5 * 20) / 0.75 = 50 / 3; a's stays 5: 20 * 5 / (50 / 3) = 6.
    torch.testing.assert_close(kept["b"]["exp_avg"], torch.tensor([6.0, 0.0]))
    torch.testing.assert_close(weight.detach(), before - 0.1 * torch.tensor([1.0, 0.0]))


def test_a_task_without_gradient_is_not_divided_by_zero() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = MTAdam([weight], lr=0.1)
    optimizer.step({"a": weight.sum(), "b": 0 * weight.sum()})
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.9))
    optimizer.step({"a": 0 * weight.sum(), "b": weight.sum()})
    assert bool(torch.isfinite(weight).all())


def test_an_anchor_whose_first_step_failed_is_no_anchor_yet() -> None:
    """Its average of norms belongs to a step that was not made; dividing by its count of 0 would spoil everything."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = MTAdam([weight], tasks=["a", "b"], lr=0.1)
    with pytest.raises(ValueError, match="task 'b' is not finite"):
        optimizer.step({"a": weight.sum(), "b": (weight * 0).abs().sqrt().sum()})
    assert weight.tolist() == [0.0, 0.0] and not optimizer.state
    optimizer.step({"b": 5 * weight.sum()})
    torch.testing.assert_close(weight.detach(), torch.full((2,), -0.1))


# ---- the range of numbers


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30, 1e36])
def test_a_norm_may_be_beyond_what_single_precision_can_square(size: float) -> None:
    """Both tasks' gradients are constant, so that each contributes one learning rate in every step."""
    weight = nn.Parameter(torch.zeros(10))
    optimizer = MTAdam([weight], lr=1e-3)
    factor = torch.full((10,), size)
    for _ in range(3):
        optimizer.step([weight.sum(), (factor * weight).sum()])
    torch.testing.assert_close(weight.detach(), torch.full((10,), -0.006))
    assert optimizer.state[weight]["1"]["norm"] > 0


def test_a_norm_beyond_half_precision() -> None:
    """The length 100 * √10⁶ = 100000 is more than float16 holds; the entries, 100 and 1, are not."""
    weight = nn.Parameter(torch.zeros(1_000_000, dtype=torch.float16))
    optimizer = MTAdam([weight], lr=1e-2)
    record = optimizer.step([(weight.float() * 100).sum(), weight.float().sum()])
    assert record.accepted
    torch.testing.assert_close(weight.detach().float(), torch.full((1_000_000,), -0.02), rtol=2e-3, atol=0)
    assert optimizer.state[weight]["0"]["norm"] == pytest.approx(0.1 * 1e5, rel=2e-3)


def test_what_the_moments_cannot_hold_is_named_before_they_move() -> None:
    def losses(anchor: float, other: float) -> dict[str, torch.Tensor]:
        return {"a": anchor * (weight.sum() + late.sum()), "b": other * weight[0] + late.sum()}

    weight, late = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(1))
    optimizer = MTAdam([("weight", weight), ("late", late)], lr=1e-3)
    with pytest.raises(ValueError, match=r"task 'a'.* too large .* torch.float32, first in weight\. Nothing"):
        optimizer.step(losses(1e30, 1.0))
    assert not optimizer.state and optimizer.tasks is None and not bool(weight.any())
    # In all entries together the anchor is short enough, in the one of b it is not.
    for _ in range(2):
        optimizer.step(losses(1.0, 1.0))
    before = copy.deepcopy((optimizer.state_dict(), weight.detach(), late.detach()))
    with pytest.raises(ValueError, match=r"task 'b'.* first in weight\. .*the moments of task 'a', whose"):
        optimizer.step(losses(1.6e19, 1e38))
    after = optimizer.state_dict()
    assert torch.equal(weight, before[1]) and torch.equal(late, before[2])
    for position in (0, 1):
        then, now = before[0]["state"][position]["b"], after["state"][position]["b"]
        assert (then["norm"], then["step"]) == (now["norm"], now["step"]) == (now["norm"], 2)
        assert torch.equal(then["exp_avg"], now["exp_avg"])
        assert torch.equal(then["exp_avg_sq"], now["exp_avg_sq"])


def test_a_loaded_norm_is_not_rounded_to_the_parameters_dtype() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    first, second = MTAdam([weight]), MTAdam([weight])
    first.step([(weight / 3).sum().float(), weight.sum().float()])
    second.load_state_dict(first.state_dict())
    norms = [[o.state[weight][task]["norm"] for task in "01"] for o in (first, second)]
    assert norms[0] == norms[1] and norms[0][1] == pytest.approx(0.1 * 3**0.5, rel=1e-7)


def test_one_rescaled_gradient_lives_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, earlier, alive = Model(), [], []

    def watched(tensor: torch.Tensor, factor: float) -> torch.Tensor:
        alive.append(sum(reference() is not None for reference in earlier))
        found = kernels.scaled(tensor, factor)
        earlier.append(weakref.ref(found))
        return found

    monkeypatch.setattr(mtadam, "scaled", watched)
    MTAdam(model.shared, model.heads).step(model.losses(0))
    assert len(alive) > 10 and not any(alive)
