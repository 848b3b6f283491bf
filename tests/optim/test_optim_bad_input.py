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
from detente.values import Combination, TaskGradients

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


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize(("size", "dtype"), [(1e30, torch.float32), (300.0, torch.float16)])
def test_a_gradient_whose_square_overflows_is_refused(size: float, dtype: torch.dtype, own: bool) -> None:
    """The average of squares would be infinite from then on, and the entry would never move again."""
    weight, trunk = nn.Parameter(torch.ones(4, dtype=dtype)), nn.Parameter(torch.ones(1, dtype=dtype))
    optimizer = MAO([trunk], {"w": weight}) if own else MAO([("w", weight)], [trunk])
    optimizer.step({"a": weight.sum() + trunk.sum(), "b": trunk.sum()})
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"task 'a' is too large for its square .* {dtype}, first in w"):
        optimizer.step({"a": (weight.float() * size).sum() + trunk.sum(), "b": trunk.sum()})
    after = optimizer.state_dict()
    kept = [state["state"][1 if own else 0] for state in (before, after)]
    assert not differences(*kept) and bool((weight - 1).abs().max() < 0.01)


@BOTH
def test_a_step_that_is_not_finite_is_refused(kind: Callable[..., Any]) -> None:
    """Without eps an entry that no gradient has moved yet is 0 / 0."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = kind([("w", weight)], eps=0.0, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"the step of w is not finite .* Look for eps 0"):
        optimizer.step({"a": weight[0], "b": 2 * weight[0]})
    assert weight.tolist() == [1.0, 1.0] and not optimizer.state and optimizer.tasks is None
    assert optimizer.step({"a": weight.sum(), "b": weight.sum()}).accepted


@BOTH
def test_an_own_step_that_is_not_finite_moves_nothing(kind: Callable[..., Any]) -> None:
    trunk, head = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = kind([trunk], [{"params": {"h": head}, "eps": 0.0}])
    with pytest.raises(ValueError, match=r"the step of h is not finite"):
        optimizer.step({"a": trunk.sum() + head[0], "b": trunk.sum()})
    assert trunk.tolist() == head.tolist() == [1.0, 1.0] and not optimizer.state


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
        ({"lr": None}, TypeError, "option lr is None; give a number"),
        ({"lr": "0.1"}, TypeError, "option lr is '0.1'"),
        ({"eps": True}, TypeError, "option eps is True"),
        ({"betas": (0.9, 1.0)}, ValueError, "option betas"),
        ({"betas": 0.9}, TypeError, "option betas is 0.9; give two numbers"),
        ({"betas": (0.9, 0.9, 0.9)}, ValueError, "option betas"),
        ({"betas": (0.9, "0.9")}, TypeError, "option betas is '0.9'"),
        ({"weight_decay": -0.1}, ValueError, "option weight_decay"),
        ({"variant": "rmsprop"}, ValueError, "option variant is 'rmsprop'; choose one of 'adam', 'sgd'"),
        ({"bias_correction": None}, ValueError, "option bias_correction"),
        ({"tasks": "abc"}, TypeError, "tasks is 'abc'"),
        ({"tasks": ["a", "a"]}, ValueError, "every name once"),
        ({"transform": "pcgrad"}, TypeError, "transform is a str; give a method from detente.create"),
        ({"task_specific": [3]}, TypeError, "task_specific= takes parameters or modules, got int"),
        ({"shared": ["trunk"]}, TypeError, "shared= takes parameters or modules, got str"),
        ({"shared": [{"params": nn.Linear(1, 1)}, nn.Linear(1, 1)]}, TypeError, "mixes parameter groups"),
        ({"shared": [{"params": nn.Linear(1, 1), "lr": -2.0}]}, ValueError, "option lr is -2.0"),
        ({"shared": {"params": nn.Linear(1, 1), "variant": "rmsprop"}}, ValueError, "option variant"),
        ({"shared": {"params": nn.Linear(1, 1), "bias_correction": 1}}, ValueError, "option bias_corr"),
        ({"shared": {"params": nn.Linear(1, 1), "lr": None}}, TypeError, "option lr is None"),
        ({"shared": (), "task_specific": ()}, ValueError, "empty parameter list"),
    ],
)
def test_bad_options(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MAO(**{"shared": nn.Linear(2, 2), **arguments})


def test_bad_groups() -> None:
    model = Model()
    with pytest.raises(
        ValueError, match=r"parameter heads\.a\.weight is in two groups, as shared and as task-sp"
    ):
        MAO(model, [("heads.a.weight", model.heads["a"].weight)])
    layer = nn.Linear(2, 2)
    optimizer = MAO(layer)
    for group, error, message in (
        ({"params": nn.Linear(1, 1), "role": "mine"}, ValueError, "option role is 'mine'"),
        (
            {"params": [layer.weight]},
            ValueError,
            "parameter weight is in two groups, as shared and as shared",
        ),
        ({"params": nn.Linear(1, 1), "variant": "rmsprop"}, ValueError, "option variant is 'rmsprop'"),
        ({"params": nn.Linear(1, 1), "betas": 0.9}, TypeError, "option betas is 0.9"),
        ({"lr": 0.1}, ValueError, "a parameter group needs params"),
        ({}, ValueError, "a parameter group needs params"),
        ([], TypeError, "a parameter group is a mapping with params and options, got list"),
        ("layer", TypeError, "got str"),
    ):
        with pytest.raises(error, match=message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    optimizer.defaults["lr"] = -1.0  # the group has none of its own
    with pytest.raises(ValueError, match=r"option lr is -1\.0"):
        optimizer.add_param_group({"params": nn.Linear(1, 1)})
    for wrong in (1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"option norm_beta is {wrong}"):
            MTAdam(layer, norm_beta=wrong)
        with pytest.raises(ValueError, match=f"option norm_beta is {wrong}"):
            MTAdam({"params": layer, "norm_beta": wrong})
    with pytest.raises(TypeError, match="option norm_beta is None"):
        MTAdam(layer, norm_beta=None)


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
        (
            MAO(shared[1:], model.heads).state_dict(),
            r"group 0 \(shared\) of the saved state has 5 parameters; this optimizer's has 6",
        ),
        ({**good, "param_groups": [{**g, "lr": None} for g in good["param_groups"]]}, "option lr is None"),
        ({key: good[key] for key in good if key != "param_groups"}, "has no 'param_groups'. Give what state"),
        ({key: good[key] for key in good if key != "state"}, "has no 'state'"),
        ({**good, "state": {**good["state"], 0: {"a": {"step": 1}}}}, "of task 'a' has no 'exp_avg_sq'"),
        ({**good, "state": {**good["state"], 0: {"a": 1}}}, "of task 'a' has no 'step'"),
        ({**good, "state": {**good["state"], 6: {"step": 1, "exp_avg": 1}}}, "a.weight has no 'exp_avg_sq'"),
        (3, "the saved state is a int, not a mapping. Give what"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.load_state_dict(state)
        assert not differences(everything(model, optimizer), before)


# ---- shapes


class Wide(Model):
    """Another first layer; a third head of another width."""

    def __init__(self, which: str) -> None:
        super().__init__()
        if which == "shared":
            self.trunk[0] = nn.Linear(4, 600).double()
            self.trunk[2] = nn.Linear(600, 5).double()
        else:
            self.heads["c"] = nn.Linear(5, 700).double()

    def losses(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        head, self.heads["c"] = self.heads["c"], nn.Linear(5, 2).double()
        found = super().losses(*args, **kwargs)
        self.heads["c"] = head
        return {**found, "c": found["c"] + head.weight.square().sum() + head.bias.square().sum()}


@BOTH
@pytest.mark.parametrize(
    ("which", "message"),
    [
        (
            "shared",
            r"parameter 0\.0\.weight has the shape \[600, 4\], and its saved exp_avg of task 'a' \[6, 4\]",
        ),
        ("own", r"parameter c\.weight has the shape \[700, 5\], and its saved exp_avg \[2, 5\]"),
    ],
)
def test_moments_of_another_shape_are_not_loaded(kind: Callable[..., Any], which: str, message: str) -> None:
    """The fused kernel would run beyond the memory of the smaller tensors."""
    model, other = Model(), Wide(which)
    first, second = kind(model.shared, model.heads), kind(other.shared, other.heads)
    first.step(model.losses(0))
    second.step(other.losses(0))
    before = everything(other, second)
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(first.state_dict())
    assert not differences(everything(other, second), before)
    second.step(other.losses(1))


@BOTH
@pytest.mark.parametrize("which", ["shared", "own"])
def test_a_parameter_that_was_resized_is_named(kind: Callable[..., Any], which: str) -> None:
    other, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    roles = ([other, ("late", late)], ()) if which == "shared" else ([other], [("late", late)])

    def losses() -> dict[str, torch.Tensor]:
        return {"a": other.square().sum(), "b": other.sum() + late.square().sum()}

    optimizer = kind(*roles, lr=0.1)
    optimizer.step(losses())
    late.data = torch.ones(1000)
    before = copy.deepcopy((other.data, late.data, optimizer.state_dict()))
    with pytest.raises(
        ValueError, match=r"parameter late has another shape than its moments.*delete optimizer"
    ):
        optimizer.step(losses())
    assert not differences((other.data, late.data, optimizer.state_dict()), before)
    del optimizer.state[late]
    optimizer.step(losses())
    torch.testing.assert_close(late.detach(), torch.full((1000,), 0.9))
    # Losses from before a change have gradients of the old shape.
    stale = {"b": other.sum() + late.sum()}
    late.data = torch.ones(7)
    del optimizer.state[late]
    before = copy.deepcopy((other.data, late.data))
    with pytest.raises(ValueError, match="parameter late has another shape than its moments or its gradient"):
        optimizer.step(stale)
    assert not differences((other.data, late.data), before) and late not in optimizer.state


def test_moments_on_another_device_are_named() -> None:
    for roles, task in (((1, 0), "0"), ((0, 1), None)):
        weight = nn.Parameter(torch.ones(2))
        optimizer = MAO(*([("weight", weight)] if role else () for role in roles))
        optimizer.step([weight.sum()])
        kept = optimizer.state[weight] if task is None else optimizer.state[weight][task]
        kept.update({key: kept[key].to("meta") for key in ("exp_avg", "exp_avg_sq")})
        with pytest.raises(ValueError, match="parameter weight is on cpu, and its moments on meta"):
            optimizer.step([weight.sum()])


# ---- nothing half-made


@BOTH
def test_a_module_may_be_cast_between_two_steps(kind: Callable[..., Any]) -> None:
    """Constant gradients: each task moves what it reaches by the learning rate, whatever the dtype."""
    trunk, head = nn.Linear(3, 2), nn.Linear(2, 1)
    optimizer = kind(trunk, head, lr=0.1)

    def losses(names: str) -> dict[str, torch.Tensor]:
        both = {"a": [trunk, head], "b": [trunk]}
        return {name: sum(p.sum() for m in both[name] for p in m.parameters()) for name in names}

    optimizer.step(losses("a"))
    for number, module in enumerate((head, trunk)):
        module.double()
        before = [p.detach().clone() for m in (trunk, head) for p in m.parameters()]
        optimizer.step(losses("ab"[: number + 1]))  # the moments of b are of the new dtype
        after = [p.detach() for m in (trunk, head) for p in m.parameters()]
        moved = [float((b - a).mean()) for b, a in zip(before, after, strict=True)]
        assert moved == pytest.approx([0.1 * (number + 1)] * 2 + [0.1] * 2, rel=1e-5)


@BOTH
def test_what_fails_for_own_parameters_fails_before_the_shared_ones_move(kind: Callable[..., Any]) -> None:
    model = Model()
    optimizer = kind(model.shared, model.heads)
    optimizer.step(model.losses(0))
    parameters, own = numbers(model), copy.deepcopy(optimizer.state[model.heads["a"].bias])
    optimizer.param_groups[1]["lr"] = None
    with pytest.raises(TypeError):
        optimizer.step(model.losses(1))
    assert same(numbers(model), parameters)
    assert not differences(optimizer.state[model.heads["a"].bias], own)
    assert {s["step"] for p in model.trunk.parameters() for s in optimizer.state[p].values()} == {1}


@BOTH
@pytest.mark.parametrize("steps", [0, 2])
def test_a_failed_step_leaves_no_moments_of_a_mistyped_name(kind: Callable[..., Any], steps: int) -> None:
    model = Model()
    optimizer = kind(model.shared, model.heads)
    for step in range(steps):
        optimizer.step(model.losses(step, "ab"))
    before = everything(model, optimizer)
    losses = model.losses(steps)
    bad = {"a": losses["a"], "typo": losses["b"], "z": losses["c"] + huge(model.trunk[0].bias)}
    with pytest.raises(ValueError, match="task 'z' is not finite") as error:
        optimizer.step(bad)
    if steps:
        assert "the moments of task 'a', whose" in str(error.value)
        assert set(optimizer.state[model.trunk[0].bias]) == {"a", "b"}
    else:
        assert "Nothing was changed" in str(error.value)
        assert not differences(everything(model, optimizer), before) and not optimizer.state
    assert optimizer.tasks == (("a", "b") if steps else None)


# ---- the transform's state


class Counting(detente.Method):
    """Alters nothing, and counts its calls in place; takes part in no registry."""

    declares = detente.Declaration(name="counting", source="this test", needs=frozenset({"gramian"}))

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def solve(self, gradients: TaskGradients) -> Combination:
        self.calls.add_(1)
        return Combination(
            weights=torch.ones(gradients.tasks, dtype=torch.float64),
            transform=torch.eye(gradients.tasks, dtype=torch.float64),
        )


def test_the_saved_state_of_a_transform_is_a_copy() -> None:
    model = Model()
    optimizer = MAO(model.shared, model.heads, transform=Counting())
    optimizer.step(model.losses(0))
    saved = optimizer.state_dict()
    optimizer.step(model.losses(1))
    assert int(saved["transform"]["calls"]) == 1 and int(optimizer.transform.calls) == 2


def test_a_state_whose_transform_does_not_fit_changes_nothing() -> None:
    model, other = Model(), Model()
    optimizer = MAO(model.shared, model.heads, transform=Counting())
    optimizer.step(model.losses(0))
    further = MAO(other.shared, other.heads, transform=Counting())
    for step in range(3):
        further.step(other.losses(step))
    good = further.state_dict()
    before = everything(model, optimizer)
    for transform in (
        {"_extra_state": good["transform"]["_extra_state"]},
        {**good["transform"], "momentum": torch.ones(2)},
    ):
        with pytest.raises(RuntimeError, match=r"calls|momentum"):
            optimizer.load_state_dict({**good, "transform": transform})
        assert not differences(everything(model, optimizer), before)
    optimizer.load_state_dict(good)
    assert int(optimizer.transform.calls) == 3
