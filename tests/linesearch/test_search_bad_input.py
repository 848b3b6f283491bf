"""Every wrong option, closure and network is named, before anything moves."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

import detente
from detente.linesearch import Backtracking, ClosureChanged, FastBacktracking, SearchOptions

KINDS = [Backtracking, FastBacktracking]
FIELDS = {field.name for field in fields(SearchOptions)}
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"lr_ub": value}, "option lr_ub is") for value in (0, -1.0, NAN, INF, "0.1", True)],
        *[({"gamma": value}, "option gamma is .*> 1") for value in (1.0, 0.5, -2, NAN, INF)],
        *[({"c": value}, "option c is") for value in (0.0, 1.0, -0.1, 2, NAN)],
        *[
            ({"max_trials": value}, "option max_trials is .*whole number >= 1")
            for value in (0, -1, 2.5, True)
        ],
        ({"on_cap": "stop"}, "option on_cap is 'stop'; choose one of 'skip', 'error'"),
        ({"on_no_descent": "ignore"}, "option on_no_descent is 'ignore'"),
        ({"on_no_descent": "small-step"}, "small_step= belong together"),
        ({"small_step": 0.1}, "small_step= belong together"),
        ({"on_no_descent": "small-step", "small_step": 0.0}, "option small_step is 0.0"),
        ({"lower_ub": "always"}, "option lower_ub is 'always'"),
        ({"lower_ub": "cap", "on_cap": "error"}, "lower_ub='cap' counts searches"),
        ({"patience": 0}, "option patience is 0"),
        ({"check_steps": -1}, "option check_steps is -1"),
        ({"rounding": -1.0}, "option rounding is -1.0; give a finite number >= 0"),
        *[({"check_true": value}, "option check_true is") for value in (-1, 1.5, 0)],
        ({"precondition": "sgd"}, "option precondition is 'sgd'"),
        ({"shared": []}, "shared= is empty"),
    ],
)
def test_options(kind: Any, options: dict[str, Any], message: str, net: Any) -> None:
    given = {"shared": net.encoder, "task_specific": net.heads, "lr_ub": 0.1}
    plain = {name: value for name, value in options.items() if name not in FIELDS}
    further = {name: value for name, value in options.items() if name in FIELDS}
    with pytest.raises(ValueError, match=message):
        kind(detente.create("mgda"), **given | plain, options=SearchOptions(**further))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FastBacktracking, {"precondition": "adam"}, "no option precondition, here 'adam'.*Use Backtracking"),
        (Backtracking, {"check_true": 3}, "no option check_true, here 3.*on the network itself"),
    ],
)
def test_options_that_a_search_lacks(kind: Any, options: dict[str, Any], message: str, net: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} has {message}"):
        kind(detente.create("mgda"), net.encoder, net.heads, 0.1, options=SearchOptions(**options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", sorted(FIELDS))
def test_former_keywords_name_their_new_place(kind: Any, option: str, net: Any) -> None:
    with pytest.raises(TypeError, match=rf"{kind.__name__} .*: options=SearchOptions\({option}=None\)"):
        kind(detente.create("mgda"), net.encoder, net.heads, 0.1, **{option: None})


@pytest.mark.parametrize("kind", KINDS)
def test_other_keywords_and_options_of_another_kind(kind: Any, net: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'lenght'"):
        kind(detente.create("mgda"), net.encoder, net.heads, 0.1, lenght=3)
    with pytest.raises(TypeError, match="options= takes SearchOptions, got dict"):
        kind(detente.create("mgda"), net.encoder, net.heads, 0.1, options={"patience": 3})


def test_constructors_show_the_pinned_signature() -> None:
    names = ["method", "shared", "task_specific", "lr_ub", "gamma", "c", "max_trials", "options"]
    for kind in KINDS:
        parameters = inspect.signature(kind).parameters
        assert list(parameters) == names
        assert [parameters[name].default for name in names[4:]] == [2.0, 1e-4, 20, SearchOptions()]


@pytest.mark.parametrize("kind", KINDS)
def test_methods_and_roles(kind: Any, net: Any) -> None:
    with pytest.raises(TypeError, match=r"method is a str.*detente.create\('mgda'\)"):
        kind("mgda", net.encoder, net.heads, 0.1)
    with pytest.raises(TypeError, match="shared= takes parameters or modules, got int"):
        kind(detente.create("mgda"), 3, net.heads, 0.1)
    with pytest.raises(TypeError, match="task_specific= takes parameters or modules, got NoneType"):
        kind(detente.create("mgda"), net.encoder, None, 0.1)
    with pytest.raises(TypeError, match="modules= takes modules, got Tensor"):
        kind(
            detente.create("mgda"),
            net.encoder,
            net.heads,
            0.1,
            options=SearchOptions(modules=[torch.ones(1)]),
        )
    with pytest.raises(
        ValueError, match=r"2 parameters \(the first has shape \(16, 6\)\) are named in shared= and"
    ):
        kind(detente.create("mgda"), net.encoder, {"a": net.encoder[0]}, 0.1)


def test_a_method_that_does_not_run_in_this_space(net: Any) -> None:
    spaces = {name: info.spaces for name, info in detente.methods().items()}
    name = next(name for name, where in spaces.items() if "features" not in where)
    with pytest.raises(ValueError, match=f"{name} cannot be solved in the space 'features'"):
        FastBacktracking(detente.create(name), net.encoder, net.heads, 0.1)


def test_lr_ub_set_by_a_schedule_is_checked(net: Any) -> None:
    search = Backtracking(detente.create("mgda"), net.encoder, net.heads, 0.1)
    search.lr_ub = 0.05
    with pytest.raises(ValueError, match="option lr_ub is 0"):
        search.lr_ub = 0
    assert search.lr_ub == 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_closures(kind: Any, net: Any, batch: Any) -> None:
    x = batch(0)
    z = net.encoder(x)
    losses = net.losses(z, x)
    for wrong, error, message in (
        (lambda features=None: losses, TypeError, r"pair \(features, losses\), got dict"),
        (lambda features=None: (z, {"a": losses["a"].detach()}), ValueError, "task 'a' has no graph"),
        (lambda features=None: (z, {}), ValueError, "losses is empty"),
        (lambda features=None: (z, {"a": z[:, 0]}), ValueError, "task 'a' has shape"),
        (
            lambda features=None: (z, {"a": losses["a"] * NAN}),
            ValueError,
            "the loss of task 'a' is not finite",
        ),
    ):
        search = kind(detente.create("mgda"), net.encoder, net.heads, 0.1)
        with pytest.raises(error, match=message):
            search.step(wrong)
        assert search.steps == 0


@pytest.mark.parametrize("kind", KINDS)
def test_other_tasks_in_a_later_pass(kind: Any, net: Any, batch: Any) -> None:
    for later in ({"a": "a", "c": "b"}, {"a": "a"}, None):
        inner, passes = net.closure(batch(0)), []

        def closure(
            features: Any = None, inner: Any = inner, passes: Any = passes, later: Any = later
        ) -> Any:
            z, losses = inner(features)
            passes.append(features)
            if len(passes) <= (1 if kind is Backtracking else 2):
                return z, losses
            return z, [losses["a"]] if later is None else {new: losses[old] for new, old in later.items()}

        with pytest.raises(ClosureChanged, match="gave losses of tasks a, b at first and then of"):
            kind(detente.create("mgda"), net.encoder, net.heads, 0.1).step(closure)


def test_losses_in_another_order_are_the_same_losses(net: Any, batch: Any) -> None:
    inner, passes = net.closure(batch(0)), []

    def closure(features: Any = None) -> Any:
        z, losses = inner(features)
        passes.append(features)
        return z, dict(reversed(losses.items())) if len(passes) > 1 else losses

    found = Backtracking(detente.create("mgda"), net.encoder, net.heads, 0.1).step(closure)
    assert found.names == ("a", "b") and found.accepted


@pytest.mark.parametrize("features", [None, [], "z", [1.0], torch.ones(1, dtype=torch.complex64)])
def test_no_representation(features: Any, net: Any, batch: Any) -> None:
    losses = net.losses(net.encoder(batch(0)), batch(0))
    search = FastBacktracking(detente.create("mgda"), net.encoder, net.heads, 0.1)
    with pytest.raises(TypeError, match=r"\(features, losses\) with features a real tensor"):
        search.step(lambda given=None: (features, losses))


def test_a_closure_that_ignores_the_features_it_is_given(net: Any, batch: Any) -> None:
    inner = net.closure(batch(0))
    search = FastBacktracking(detente.create("mgda"), net.encoder, net.heads, 0.1)
    with pytest.raises(ValueError, match="another representation than it was given"):
        search.step(lambda features=None: inner())


def test_shared_parameters_reached_past_the_representation() -> None:
    torch.manual_seed(0)
    encoder, shared_head = nn.Linear(3, 4), nn.Linear(4, 2)
    x = torch.randn(5, 3)

    def closure(features: Any = None) -> Any:
        z = encoder(x) if features is None else features
        y = shared_head(z)
        return z, [y[:, 0].square().mean(), (y[:, 1] - 1).square().mean()]

    search = FastBacktracking(detente.create("mgda"), [encoder, shared_head], [], 0.1)
    with pytest.raises(ValueError, match=r"reached past the representation.*Backtracking"):
        search.step(closure)
    assert Backtracking(detente.create("mgda"), [encoder, shared_head], [], 0.1).step(closure).accepted


def test_nothing_to_search_along(net: Any, batch: Any) -> None:
    net.encoder.requires_grad_(False)
    search = Backtracking(detente.create("mgda"), net.encoder, net.heads, 0.1)
    with pytest.raises(ValueError, match="no parameter named in shared= requires a gradient"):
        search.step(net.closure(batch(0)))


def test_generators_of_parameters_serve_every_step(net: Any, batch: Any) -> None:
    search = Backtracking(
        detente.create("mgda"),
        (p for p in net.encoder.parameters()),
        {"a": net.heads["a"].parameters(), "b": (p for p in net.heads["b"].parameters())},
        0.1,
    )
    for step in range(3):
        before = [parameter.clone() for parameter in net.parameters()]
        search.step(net.closure(batch(step)))
        # A bias before batch norm has no gradient to speak of; everything else moves.
        moved = sum(not a.equal(b) for a, b in zip(before, net.parameters(), strict=True))
        assert moved >= 10


def linear() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(3, 1), torch.randn(5, 3)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (lambda losses: [loss.item() for loss in losses], "task '0' .* and then as a value of type float"),
        (lambda losses: [loss.expand(3) for loss in losses], r"task '0' .* as a tensor of shape \(3,\)"),
        (lambda losses: [losses[0], None], "task '1' .* and then as None"),
        (lambda losses: None, "tasks 0, 1 at first and then a NoneType"),
        (torch.stack, "tasks 0, 1 at first and then a Tensor for all"),
    ],
)
def test_losses_of_another_kind_in_a_later_pass(later: Any, message: str) -> None:
    layer, x = linear()
    passes: list[Any] = []

    def closure(features: Any = None) -> Any:
        passes.append(features)
        losses = [layer(x).square().mean(), (layer(x) - 1).square().mean()]
        return None, losses if len(passes) == 1 else later(losses)

    before = layer.weight.detach().clone()
    with pytest.raises(ClosureChanged, match=message):
        Backtracking(detente.create("mgda"), layer, [], 0.1).step(closure)
    assert before.equal(layer.weight)


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        (torch.ones(8, 1), ValueError, r"features\[1\] \(shape \(8, 1\), torch.float32\) carries no graph"),
        (
            torch.arange(8),
            ValueError,
            r"features\[1\] \(shape \(8,\), torch.int64\).*masks, indices and sizes",
        ),
        ([torch.ones(1)], TypeError, r"flat sequence or mapping.*a value of type list for features\[1\]"),
        (None, TypeError, r"got None for features\[1\]"),
    ],
)
def test_what_is_no_representation_is_named(
    extra: Any, error: Any, message: str, net: Any, batch: Any
) -> None:
    def closure(features: Any = None) -> Any:
        z, other = (net.encoder(batch(0)), extra) if features is None else features
        return (z, other), net.losses(z, batch(0))

    with pytest.raises(error, match=message):
        FastBacktracking(detente.create("mgda"), net.encoder, net.heads, 0.1).step(closure)


def test_a_detached_representation_is_named(net: Any, batch: Any) -> None:
    def closure(features: Any = None) -> Any:
        z = net.encoder(batch(0)) if features is None else features
        return {"z": z.detach()}, net.losses(z, batch(0))

    with pytest.raises(
        ValueError, match=r"features\['z'\] .*not detached.*frozen or ran under torch.no_grad"
    ):
        FastBacktracking(detente.create("mgda"), net.encoder, net.heads, 0.1).step(closure)


def test_a_closure_that_takes_features_by_name_only(net: Any, batch: Any) -> None:
    inner = net.closure(batch(0))

    def closure(*, features: Any = None) -> Any:
        return inner(features)

    with pytest.raises(TypeError, match=r"write def closure\(features=None\)"):
        FastBacktracking(detente.create("mgda"), net.encoder, net.heads, 0.1).step(closure)
    assert Backtracking(detente.create("mgda"), net.encoder, net.heads, 0.1).step(closure).accepted

    def wrong(features: Any = None) -> Any:
        return inner() if features is None else inner(features, "too many")

    with pytest.raises(TypeError, match="takes from 0 to 1 positional arguments but 2"):
        FastBacktracking(detente.create("mgda"), net.encoder, net.heads, 0.1).step(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_that_differentiates_inside_is_told_how(kind: Any) -> None:
    """A network whose loss holds a derivative of its output, as for differential equations."""
    torch.manual_seed(0)
    trunk, heads = (
        nn.Sequential(nn.Linear(1, 8), nn.Tanh()),
        nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)]),
    )
    times = torch.linspace(0, 1, 9)[:, None]

    def losses(z: torch.Tensor) -> list[torch.Tensor]:
        y = heads[0](z)
        (slope,) = torch.autograd.grad(y.sum(), z, create_graph=True)
        return [(slope.sum(1, keepdim=True) + y).square().mean(), (heads[1](z) - 1).square().mean()]

    def closure(features: Any = None) -> Any:
        z = trunk(times) if features is None else features
        return z, losses(z)

    def heeding(features: Any = None) -> Any:
        with torch.enable_grad():
            z = trunk(times) if features is None else features.requires_grad_()
            return z, losses(z)

    before = [parameter.detach().clone() for parameter in trunk.parameters()]
    with pytest.raises(
        RuntimeError, match=r"does not require grad.*differentiates inside.*torch.enable_grad\(\)"
    ):
        kind(detente.create("mgda"), trunk, heads, 0.1).step(closure)
    assert all(map(torch.equal, before, trunk.parameters()))
    assert kind(detente.create("mgda"), trunk, heads, 0.1).step(heeding).accepted

    def other(features: Any = None) -> Any:
        if not torch.is_grad_enabled():
            raise RuntimeError("something else")
        return closure(features)

    with pytest.raises(RuntimeError, match=r"^something else$"):
        kind(detente.create("mgda"), trunk, heads, 0.1).step(other)


def test_tied_modules_are_told_how() -> None:
    embedding, output = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
    output.weight = embedding.weight
    with pytest.raises(ValueError, match=r"a parameter of shape \(4, 4\) is named in .*tied weights"):
        Backtracking(detente.create("mgda"), embedding, {"a": output}, 0.1)
    Backtracking(detente.create("mgda"), embedding, {"a": [output.bias]}, 0.1)
