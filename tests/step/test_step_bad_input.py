"""Bad input: each has its own message, which names the task or option, and leaves nothing behind."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from twins.engine import Remembering, RememberingWeighting, Spy, Weighting, remembered

import detente


class _Poison(torch.autograd.Function):
    """The identity forwards; backwards every gradient becomes ``value``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return torch.full_like(gradient, ctx.value), None


class Net(nn.Module):
    """A trunk and two heads; ``poisoned`` says where a gradient turns bad."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 4)
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

    def losses(
        self, poisoned: str = "", value: float = torch.nan
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        def bad(x: torch.Tensor, where: str) -> torch.Tensor:
            return _Poison.apply(x, value) if poisoned == where else x

        z = self.last(bad(self.first(torch.ones(2, 3)).tanh(), "behind"))
        right = (
            functional.linear(bad(z, "shared"), bad(self.right.weight, "head"), self.right.bias)
            .square()
            .mean()
        )
        return z, {
            "left": self.left(z).square().mean(),
            "right": right * value if poisoned == "loss" else right,
        }


def options_for(space: str, net: Net, z: torch.Tensor) -> dict[str, Any]:
    return {"features": {"features": z}, "layer": {"solve_on": net.last}}.get(space, {})


def assert_untouched(
    net: nn.Module, method: Any, losses: Any, error: type[Exception], match: str, **options: Any
) -> None:
    """The step fails as it should; every ``.grad`` and all the method knows are as before."""
    for parameter in list(net.parameters())[::2]:  # some with, some without
        parameter.grad = torch.randn_like(parameter)
    before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    known = remembered(method) if isinstance(method, detente.Method) else None
    with pytest.raises(error, match=match):
        detente.backward(losses, method, **options)
    for parameter, was in zip(net.parameters(), before, strict=True):
        assert (parameter.grad is None) if was is None else torch.equal(parameter.grad, was)
    if isinstance(method, detente.Method):
        assert remembered(method) == known


# ---- numbers that are not finite


def _message(poisoned: str, space: str) -> str:
    if poisoned == "loss":
        return "the loss of task 'right' is not finite"
    if poisoned == "head":
        return "own parameters of task 'right' is not finite"
    if poisoned == "behind" and space != "exact":
        return "of tasks left, right are finite where the problem was solved and not finite .* behind it"
    if space == "features":
        return "the gradient with respect to the features of task 'right' is not finite"
    return f"the shared gradient of task '{'left' if poisoned == 'behind' else 'right'}' is not finite"


@pytest.mark.parametrize("known", ["fresh", "used", "used for another task"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("space", "poisoned"),
    [
        ("batched", "loss"),
        *itertools.product(["exact", "features", "layer"], ["loss", "shared", "head", "behind"]),
    ],
)
def test_what_is_not_finite_names_the_task(space: str, poisoned: str, value: float, known: str) -> None:
    for make in (Remembering, lambda: detente.create("mgda")):
        net, method = Net(), make()
        if known != "fresh":
            _, losses = net.losses()
            if known == "used for another task":
                losses = {"left": losses["left"], "other": losses["right"]}
            detente.backward(losses, method)
            net.zero_grad()
        z, losses = net.losses(poisoned, value)
        options = {"memory": "batched"} if space == "batched" else options_for(space, net, z)
        match = _message(poisoned, "exact" if space == "batched" else space)
        assert_untouched(net, method, losses, ValueError, match, **options)
        net.zero_grad()
        _, losses = net.losses()
        assert detente.backward(losses, method).accepted, "the step after is as if nothing had happened"


@pytest.mark.parametrize("known", ["fresh", "used", "used for another task"])
@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize(
    ("poisoned", "match"),
    [
        ("loss", "the loss of task 'right' is not finite"),
        ("shared", "of the weighted losses of tasks left, right is not finite .* measure=True"),
        ("head", "own parameters of task 'right' is not finite"),
        ("behind", "of the weighted losses of tasks left, right is not finite"),
    ],
)
def test_what_is_not_finite_in_a_weighting(poisoned: str, match: str, heads: Any, known: str) -> None:
    for make in (RememberingWeighting, lambda: Weighting(weights=(1, 1)), lambda: detente.create("uniform")):
        net, method = Net(), make()
        if known != "fresh":
            _, losses = net.losses()
            if known == "used for another task":
                losses = {"left": losses["left"], "other": losses["right"]}
            detente.backward(losses, method)
            net.zero_grad()
        _, losses = net.losses(poisoned)
        assert_untouched(net, method, losses, ValueError, match, heads=heads)


def test_the_draws_after_a_failed_step_are_those_of_an_undisturbed_run() -> None:
    weights = []
    for disturbed in (False, True):
        net, method = Net(), Remembering(seed=5)
        for poisoned in ("", "behind", "") if disturbed else ("", ""):
            z, losses = net.losses(poisoned)
            if poisoned:
                with pytest.raises(ValueError, match="behind it"):
                    detente.backward(losses, method, features=z)
            else:
                weights.append(detente.backward(losses, method, features=z).weights)
    assert weights[:2] == weights[2:]


class _Around(detente.Method):
    """A method around a method: both remember."""

    declares = detente.Declaration(
        name="around", source="a test", needs=frozenset({"gramian"}), stateful=True
    )

    def __init__(self) -> None:
        super().__init__()
        self.inner = Remembering()
        self.register_buffer("calls", torch.zeros(()))

    def solve(self, gradients: Any) -> detente.Combination:
        self.calls += 1
        return self.inner.combine(gradients)


def test_a_method_inside_a_method_is_restored_too() -> None:
    net, method = Net(), _Around()
    z, losses = net.losses()
    detente.backward(losses, method, features=z)
    net.zero_grad()
    z, losses = net.losses("behind")
    assert_untouched(net, method, losses, ValueError, "behind it", features=z)
    assert method.inner.steps.tolist() == [1, 1] and method.calls == 1


class _Directions(Remembering):
    """Remember, and give a direction instead of weights."""

    declares = detente.Declaration(
        name="directions", source="a test", needs=frozenset({"gramian", "jacobian"}), stateful=True
    )

    def solve(self, gradients: Any) -> detente.Combination:
        super().solve(gradients)
        return detente.Combination(direction=gradients.jacobian.sum(dim=0))


def test_weights_that_a_method_does_not_give() -> None:
    net, method = Net(), _Directions()
    assert detente.backward(net.losses()[1], method).weights == (None, None)
    for options, match in (
        ({"heads": "weighted"}, "heads='weighted' needs one weight"),
        ({"solve_on": net.last}, "solve_on= needs one weight"),
    ):
        net.zero_grad()
        _, losses = net.losses()
        assert_untouched(net, method, losses, ValueError, match, **options)
    net.zero_grad()
    z, losses = net.losses()
    losses["left"] = losses["left"] + functional.linear(z, net.first.weight.T).sum()
    assert_untouched(net, method, losses, ValueError, "past features=.*gives no weights", features=z)


# ---- losses


def _net_losses() -> tuple[Net, torch.Tensor, dict[str, torch.Tensor]]:
    net = Net()
    return net, *net.losses()


LOSSES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], type[Exception], str]] = {
    "empty mapping": (lambda losses: {}, ValueError, "losses is empty"),
    "empty list": (lambda losses: [], ValueError, "losses is empty"),
    "one scalar": (lambda losses: losses["left"], ValueError, "losses is one tensor"),
    "stacked": (
        lambda losses: torch.stack(list(losses.values())),
        ValueError,
        "losses is one tensor.*separate scalars",
    ),
    "not a scalar": (
        lambda losses: losses | {"right": losses["right"].expand(3)},
        ValueError,
        r"the loss of task 'right' has shape \(3,\); reduce",
    ),
    "no element": (
        lambda losses: losses | {"right": losses["right"].expand(0)},
        ValueError,
        r"'right' has shape \(0,\)",
    ),
    "detached": (
        lambda losses: losses | {"left": losses["left"].detach()},
        ValueError,
        "task 'left' has no graph",
    ),
    "unnamed and detached": (
        lambda losses: [losses["left"], losses["right"].detach()],
        ValueError,
        "task '1' has no graph",
    ),
    "a number": (
        lambda losses: losses | {"right": 0.5},
        TypeError,
        "the loss of task 'right' is a float, not a tensor",
    ),
    "none": (lambda losses: losses | {"right": None}, TypeError, "task 'right' is a NoneType"),
    "complex": (
        lambda losses: losses | {"right": losses["right"] * 1j},
        ValueError,
        "task 'right' is complex",
    ),
    "two of one name": (
        lambda losses: {1: losses["left"], "1": losses["right"]},
        ValueError,
        "task '1' occurs twice",
    ),
}


@pytest.mark.parametrize("make", [Remembering, RememberingWeighting])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_none(name: str, make: Callable[[], detente.Method]) -> None:
    change, error, match = LOSSES[name]
    net, _, losses = _net_losses()
    method = make()
    given = change(losses)
    assert_untouched(net, method, given, error, match)
    with pytest.raises(error, match=match):
        detente.task_gradients(given)


def test_unnamed_losses_that_change_in_number() -> None:
    net, _, losses = _net_losses()
    method = Remembering()
    detente.backward(list(losses.values()), method)
    net.zero_grad()
    _, losses = net.losses()
    assert_untouched(net, method, [losses["left"]], ValueError, "2 unnamed losses became 1")


# ---- options


OPTIONS: dict[str, tuple[Callable[[Net, torch.Tensor], dict[str, Any]], type[Exception], str]] = {
    "heads": (lambda net, z: {"heads": "both"}, ValueError, "option heads is 'both'.*'own', 'weighted'"),
    "scale": (lambda net, z: {"scale": "max"}, ValueError, "option scale is 'max'"),
    "memory": (lambda net, z: {"memory": "slow"}, ValueError, "option memory is 'slow'"),
    "two places": (
        lambda net, z: {"features": z, "solve_on": net.last},
        ValueError,
        "features= or solve_on=, not both",
    ),
    "no features": (lambda net, z: {"features": []}, ValueError, "features= is empty"),
    "no layer": (lambda net, z: {"solve_on": []}, ValueError, "solve_on= is empty"),
    "features by name": (lambda net, z: {"features": "z"}, TypeError, "features= takes .* got str"),
    "shared by name": (
        lambda net, z: {"shared": "trunk"},
        TypeError,
        "shared= takes parameters or modules, got str",
    ),
    "own by name": (lambda net, z: {"task_specific": {"left": "head"}}, TypeError, "task_specific= takes"),
    "layer by name": (lambda net, z: {"solve_on": ["last"]}, TypeError, "solve_on= takes"),
    "features without graph": (
        lambda net, z: {"features": [z, z.detach()]},
        ValueError,
        r"features\[1\] carries no graph",
    ),
    "features of another batch": (
        lambda net, z: {"features": net.losses()[0]},
        ValueError,
        "the loss of task 'left' does not depend on features=",
    ),
    "features that one loss does not see": (
        lambda net, z: {"features": net.left.weight},
        ValueError,
        "the loss of task 'right' does not depend on features=",
    ),
    "layer that is own": (
        lambda net, z: {"solve_on": [net.last.weight, net.left.weight]},
        ValueError,
        r"parameter 1 of solve_on= \(shape \(2, 4\)\) is not shared",
    ),
    "shared of another model": (
        lambda net, z: {"shared": Net().first},
        ValueError,
        r"no loss reaches any of the 2 parameters named in shared= \(the first has shape \(4, 3\)\)",
    ),
    "shared of another model, with features": (
        lambda net, z: {"shared": Net().first, "features": z},
        ValueError,
        "no loss reaches any of the 2 parameters named in shared=",
    ),
    "shared of another model, both named": (
        lambda net, z: {"shared": Net().first, "task_specific": [net.left, net.right]},
        ValueError,
        "no loss reaches any of the 2",
    ),
    "own parameters behind the features": (
        lambda net, z: {"features": z, "task_specific": [net.first, net.left, net.right]},
        ValueError,
        r"2 parameters behind features= \(the first has shape \(4, 3\)\) would be a task's own",
    ),
    "an encoder not wholly shared": (
        lambda net, z: {"features": z, "shared": net.last},
        ValueError,
        "2 parameters behind features=.*Name them in shared=",
    ),
}


@pytest.mark.parametrize("make", [Remembering, RememberingWeighting, lambda: detente.create("uniform")])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, make: Callable[[], detente.Method]) -> None:
    options, error, match = OPTIONS[name]
    net, z, losses = _net_losses()
    method = make()
    given = options(net, z)
    assert_untouched(net, method, losses, error, match, **given)


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("mgda", r"method is a str.*detente.create\('mgda'\)"),
        (None, "method is a NoneType"),
        (Spy, "method is a ABCMeta"),
    ],
)
def test_methods_that_are_none(method: Any, match: str) -> None:
    net, _, losses = _net_losses()
    assert_untouched(net, method, losses, TypeError, match)


class _Exact(Remembering):
    """Nothing but the parameters themselves."""

    declares = detente.Declaration(
        name="exact-only",
        source="a test",
        needs=frozenset({"gramian"}),
        spaces=frozenset({"exact"}),
        stateful=True,
    )


@pytest.mark.parametrize("space", ["features", "layer"])
def test_spaces_a_method_cannot_be_solved_in(space: str) -> None:
    net, z, losses = _net_losses()
    method = _Exact()
    assert_untouched(
        net,
        method,
        losses,
        ValueError,
        f"exact-only cannot be solved in the space '{space}'; it runs on exact",
        **options_for(space, net, z),
    )


class _Failing(Remembering):
    """Remember first, fail afterwards."""

    def solve(self, gradients: Any) -> detente.Combination:
        super().solve(gradients)
        raise ValueError("no solution")


@pytest.mark.parametrize("space", ["features", "layer"])
def test_a_method_that_fails_late_is_restored_where_a_copy_is_kept(space: str) -> None:
    net, z, losses = _net_losses()
    method = _Failing()
    options = options_for(space, net, z)
    assert_untouched(net, method, losses, ValueError, "no solution", **options)


def test_a_graph_walked_before_is_torchs_error_and_changes_nothing() -> None:
    for make in (Remembering, RememberingWeighting):
        net, _, losses = _net_losses()
        method = make()
        sum(losses.values()).backward()
        net.zero_grad()
        assert_untouched(net, method, losses, RuntimeError, "second time")


# ---- the mathematics alone


@pytest.mark.parametrize(
    ("jacobian", "losses", "match"),
    [
        (torch.ones(3), None, r"jacobian has shape \(3,\)"),
        (torch.ones(0, 3), None, r"jacobian has shape \(0, 3\)"),
        (torch.ones(2, 3, dtype=torch.int64), None, "dtype torch.int64"),
        (torch.tensor([[1.0], [torch.nan]]), None, "the shared gradient of task '1'"),
        (torch.ones(2, 3), [1.0], "1 losses for 2 rows"),
        (torch.ones(2, 3), {"a": 1.0, "b": torch.inf}, "the loss of task 'b' is not finite"),
        (torch.ones(2, 3), [1.0, torch.ones(2)], r"task '1' has shape \(2,\)"),
    ],
)
def test_combine(jacobian: torch.Tensor, losses: Any, match: str) -> None:
    method = RememberingWeighting()
    known = remembered(method)
    with pytest.raises(ValueError, match=match):
        detente.combine(method, jacobian, losses)
    assert remembered(method) == known
    with pytest.raises(ValueError, match="needs the losses"):
        detente.combine(method, torch.eye(2))


def test_an_accumulated_gradient_is_kept_when_a_later_loss_fails() -> None:
    """Gradient accumulation: the second half of a batch is bad, the first half's gradients stay."""
    net, z, losses = _net_losses()
    method = detente.create("mgda")
    detente.backward(losses, method, features=z)
    before = copy.deepcopy([p.grad for p in net.parameters()])
    z, losses = net.losses("behind")
    with pytest.raises(ValueError, match="behind it"):
        detente.backward(losses, method, features=z)
    assert all(torch.equal(p.grad, was) for p, was in zip(net.parameters(), before, strict=True))
