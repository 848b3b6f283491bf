"""Errors of the optimizers: they name the task or the option, and say truly what has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from twin_adams import Model, numbers, same

import detente
from detente.optim import MAO, MTAdam

BOTH = pytest.mark.parametrize("kind", [MAO, MTAdam])


def everything(model: nn.Module, optimizer: Any) -> Any:
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def differences(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return not torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() != other.keys() or any(differences(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) != len(other) or any(differences(a, b) for a, b in zip(one, other, strict=True))
    return bool(one != other)


def huge(x: torch.Tensor) -> torch.Tensor:
    """Finite, with a gradient that is not."""
    return (x * 0).abs().sqrt().sum()


@BOTH
@pytest.mark.parametrize("where", ["shared", "own"])
def test_a_gradient_that_is_not_finite_leaves_parameters_and_counters(
    kind: Callable[..., Any], where: str
) -> None:
    model = Model()
    optimizer = kind(model.shared, model.heads, lr=0.01, weight_decay=0.1)
    for step in range(3):
        optimizer.step(model.losses(step))
    parameters, before = numbers(model), copy.deepcopy(optimizer.state_dict())
    losses = model.losses(3)
    bad = model.trunk[2].bias if where == "shared" else model.heads["b"].bias
    layer = r"0\.2\.bias" if where == "shared" else r"b\.bias"
    with pytest.raises(
        ValueError, match=f"task 'b' is not finite .*{layer}.* the moments of task 'a', whose"
    ) as error:
        optimizer.step({**losses, "b": losses["b"] + huge(bad)})
    assert "Parameters, step counters and the moments of this task are as they were" in str(error.value)
    assert same(numbers(model), parameters)
    after = optimizer.state_dict()
    for position, state in after["state"].items():
        for name, kept in state.items():
            if isinstance(kept, dict):
                assert kept["step"] == before["state"][position][name]["step"] == 3
                advanced = differences(kept, before["state"][position][name])
                assert advanced == (name == "a"), (position, name)
            else:
                assert not differences(kept, before["state"][position][name])
    # Training goes on from there.
    for step in range(4, 8):
        optimizer.step(model.losses(step))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters()) and not same(
        numbers(model), parameters
    )


@BOTH
def test_the_first_task_s_gradient_changes_nothing_at_all(kind: Callable[..., Any]) -> None:
    model = Model()
    optimizer = kind(model.shared, model.heads)
    optimizer.step(model.losses(0))
    before = everything(model, optimizer)
    losses = model.losses(1)
    with pytest.raises(ValueError, match=r"task 'a' is not finite.*Nothing was changed"):
        optimizer.step({**losses, "a": losses["a"] + huge(model.trunk[0].weight)})
    assert not differences(everything(model, optimizer), before)


def test_with_a_transform_no_moments_advance() -> None:
    model = Model()
    optimizer = MAO(model.shared, model.heads, transform=detente.create("pcgrad"))
    optimizer.step(model.losses(0))
    before = everything(model, optimizer)
    losses = model.losses(1)
    for bad in (model.trunk[0].weight, model.heads["c"].bias):
        with pytest.raises(ValueError, match=r"task 'c' is not finite.*Nothing was changed"):
            optimizer.step({**losses, "c": losses["c"] + huge(bad)})
        losses = model.losses(1)
    assert not differences(everything(model, optimizer), before)


def test_gradients_that_only_overflow_their_sum_are_fine() -> None:
    weight = nn.Parameter(torch.zeros(4))
    MAO([weight], lr=0.1).step([3e38 * weight.sum(), weight.sum()])
    assert bool(torch.isfinite(weight).all())


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (lambda m: lambda: 1.0, TypeError, "a closure is not supported"),
        (lambda m: None, TypeError, "a closure is not supported"),
        (lambda m: {}, ValueError, "losses is empty"),
        (lambda m: torch.ones(2, requires_grad=True).sum(), ValueError, "one tensor"),
        (lambda m: {"a": m.losses(0)["a"], "b": torch.zeros(())}, ValueError, "'b' has no graph"),
        (lambda m: {**m.losses(0), "c": m.trunk[0].weight.sum(0)}, ValueError, "'c' has shape"),
        (lambda m: {**m.losses(0), "b": m.losses(0)["b"] / 0}, ValueError, "'b' is not finite"),
        (lambda m: {"a": 1.0}, TypeError, "'a' is a float"),
        (lambda m: {**m.losses(0), "d": m.losses(0)["a"]}, ValueError, "task 'd' is not one of the tasks"),
        (lambda m: list(m.losses(0).values()), ValueError, "task '0' is not one of the tasks"),
        (lambda m: {"a": nn.Parameter(torch.ones(3)).sum()}, ValueError, "no loss reaches any of the 6 shared"),
    ],
    ids=[
        "closure", "none", "empty", "stacked", "no-graph", "shape", "infinite", "float", "unknown", "unnamed", "far",
    ],
)  # fmt: skip
@BOTH
def test_bad_losses_change_nothing(
    kind: Callable[..., Any], losses: Callable[[Model], Any], error: type[Exception], message: str
) -> None:
    model = Model()
    optimizer = kind(model.shared, model.heads, tasks=["a", "b", "c"])
    optimizer.step(model.losses(0))
    before = everything(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(losses(model))
    assert not differences(everything(model, optimizer), before)


def test_unnamed_losses_must_keep_their_number() -> None:
    model = Model()
    optimizer = MAO(model.shared, model.heads)
    optimizer.step(list(model.losses(0).values()))
    with pytest.raises(ValueError, match="3 unnamed losses became 2"):
        optimizer.step(list(model.losses(0, "ab").values()))
    with pytest.raises(ValueError, match="task 'a' is not one of the tasks"):
        optimizer.step(model.losses(0))
    MAO(model.shared, model.heads, tasks=3).step(list(model.losses(0).values()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "option lr is -1.0"),
        ({"lr": float("nan")}, ValueError, "option lr is nan"),
        ({"eps": -1e-8}, ValueError, "option eps"),
        ({"betas": (0.9, 1.0)}, ValueError, "option betas"),
        ({"weight_decay": -0.1}, ValueError, "option weight_decay"),
        ({"variant": "rmsprop"}, ValueError, "option variant is 'rmsprop'; give one of adam, sgd"),
        ({"bias_correction": None}, ValueError, "option bias_correction"),
        ({"tasks": "abc"}, TypeError, "tasks is 'abc'"),
        ({"tasks": ["a", "a"]}, ValueError, "every name once"),
        ({"transform": "pcgrad"}, TypeError, "transform is a str; give a method from detente.create"),
        ({"task_specific": [3]}, TypeError, "task_specific= takes parameters or modules, got int"),
        ({"shared": ["trunk"]}, TypeError, "shared= takes parameters or modules, got str"),
        ({"shared": [{"params": nn.Linear(1, 1)}, nn.Linear(1, 1)]}, TypeError, "mixes parameter groups"),
        ({"shared": [{"params": nn.Linear(1, 1), "lr": -2.0}]}, ValueError, "option lr is -2.0"),
        ({"shared": (), "task_specific": ()}, ValueError, "empty parameter list"),
    ],
)
def test_bad_options(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MAO(**{"shared": nn.Linear(2, 2), **arguments})


def test_bad_groups() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        MAO(layer, [layer.bias])
    optimizer = MAO(layer)
    for group, message in (
        ({"params": nn.Linear(1, 1), "role": "mine"}, "option role is 'mine'"),
        ({"params": [layer.weight]}, "more than one parameter group"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="option norm_beta is 1"):
        MTAdam(layer, norm_beta=1)


def test_states_that_do_not_fit() -> None:
    model = Model()
    optimizer = MAO(model.shared, model.heads, tasks=["a", "b", "c"])
    optimizer.step(model.losses(0))
    before = everything(model, optimizer)
    good = optimizer.state_dict()
    shared = [p for module in model.shared for p in module.parameters()]
    for state, message in (
        (torch.optim.Adam(model.parameters()).state_dict(), "is of another optimizer, not of MAO"),
        (MTAdam(model.shared, model.heads).state_dict(), "is of MTAdam, not of MAO"),
        ({**good, "tasks": ["a", "b"]}, "is for tasks a, b; this optimizer was created for a, b, c"),
        ({**good, "transform": detente.create("pcgrad").state_dict()}, "was saved with transform="),
        (
            MAO(shared).state_dict(),
            "has groups with the roles shared; this optimizer has shared, task-specific",
        ),
        (MAO(shared[1:], model.heads).state_dict(), "doesn't match the size"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert not differences(everything(model, optimizer), before)
