"""What a search must leave as it was: random numbers, statistics, and everything after a failure."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import detente
from detente.linesearch import Backtracking, ClosureChanged, FastBacktracking, SearchFailed, SearchOptions
from detente.linesearch.passes import random_state, same_random_state
from detente.methods import Method
from detente.values import Combination

KINDS = [Backtracking, FastBacktracking]


def snapshot(net: nn.Module, method: Method) -> dict[str, Any]:
    state = {f"net.{name}": tensor.clone() for name, tensor in net.state_dict().items()}
    state |= {f"method.{n}": deepcopy(v) for n, v in method.state_dict().items()}
    return state | {"random": torch.get_rng_state()}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = value.equal(after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_starts_from_the_same_random_state_and_statistics(kind: Any, net: Any, batch: Any) -> None:
    inner = net.closure(batch(0))
    seen: dict[str, list[tuple[Any, torch.Tensor, torch.Tensor]]] = {"whole": [], "heads": []}
    norm, head_norm = net.encoder[1], net.heads["a"][1]

    def closure(features: Any = None) -> Any:
        what = "whole" if features is None else "heads"
        seen[what].append((random_state(), norm.running_mean.clone(), head_norm.running_mean.clone()))
        return inner(features)

    start = random_state()
    found = kind(detente.create("mgda"), net.encoder.parameters(), net.heads.parameters(), 10.0).step(closure)
    assert found.trials > 2
    for what, passes in seen.items():
        for state, mean, head_mean in passes:
            assert same_random_state(state, passes[0][0]), what
            assert mean.equal(torch.zeros(16)) and head_mean.equal(torch.zeros(8))
    assert same_random_state(seen["whole"][0][0], start)
    assert (len(seen["whole"]), len(seen["heads"]) + len(seen["whole"])) == (
        found.trunk_forwards,
        found.head_forwards,
    )
    if kind is FastBacktracking:
        # The heads' masks are no second use of the numbers the trunk drew.
        assert not same_random_state(seen["heads"][0][0], start)
        assert (found.trunk_forwards, found.head_forwards) == (1, found.trials + 3)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_and_random_state_as_after_one_pass(kind: Any, net: Any, batch: Any) -> None:
    once = deepcopy(net)
    torch.manual_seed(5)
    once.closure(batch(0))()
    after_one = torch.get_rng_state()
    torch.manual_seed(5)
    found = kind(detente.create("mgda"), net.encoder.parameters(), net.heads.parameters(), 10.0).step(
        net.closure(batch(0))
    )
    assert found.trials > 1
    for (name, mine), other in zip(net.named_buffers(), once.buffers(), strict=True):
        assert mine.equal(other), name
    if kind is Backtracking:
        assert torch.get_rng_state().equal(after_one)


def test_dropout_masks_are_those_of_the_first_pass(batch: Any) -> None:
    """With a step of length zero in effect (lr_ub tiny) every pass must give the very same loss."""
    torch.manual_seed(0)
    encoder, head = nn.Linear(6, 50), nn.Linear(50, 1)
    x, given = batch(0).float(), []

    def closure(features: Any = None) -> Any:
        z = F.dropout(encoder(x), 0.5) if features is None else features
        losses = [F.dropout(head(z), 0.5).square().mean(), z.square().mean()]
        given.append((features is None, [float(loss.detach()) for loss in losses]))
        return z, losses

    for kind in KINDS:
        given.clear()
        kind(detente.create("mgda"), encoder, head, 1e-30).step(closure)
        for whole in (True, False):
            losses = [loss for which, loss in given if which == whole]
            assert all(loss == losses[0] for loss in losses)


@pytest.mark.parametrize("named", [False, True])
def test_modules_named_or_found(named: bool) -> None:
    """Statistics outside shared and task_specific, of a module that is only called as a function."""
    torch.manual_seed(0)
    encoder, norm = nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)
    x = torch.randn(8, 4)

    def closure(features: Any = None) -> Any:
        # Not norm(z): a hook on modules does not see this; naming the module does.
        z = encoder(x)
        norm.num_batches_tracked.add_(1)
        normed = F.batch_norm(z, norm.running_mean, norm.running_var, training=True)
        return z, [normed[:, 0].square().mean() + z.square().mean(), (normed - 1).square().mean()]

    modules = norm if named else None
    found = Backtracking(
        detente.create("mgda"), encoder.parameters(), [], 5.0, options=SearchOptions(modules=modules)
    ).step(closure)
    passes = int(norm.num_batches_tracked)
    assert passes == (1 if named else found.trunk_forwards)
    assert found.trunk_forwards > 2


def test_a_buffer_that_is_replaced_comes_back() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            self.calls = self.calls + 1
            return z * self.calls

    counter, theta = Counter(), nn.Parameter(torch.tensor([3.0]))

    def closure(features: Any = None) -> Any:
        return None, [counter(theta).square().sum()]

    found = Backtracking(detente.create("uniform"), [theta], [], 2.0).step(closure)
    assert found.trials > 1
    assert counter.calls.item() == 1


class Refusing(Method):
    """Refuses every step, and counts."""

    declares = detente.Declaration(
        name="refusing", source="this test", needs=frozenset({"gramian"}), stateful=True
    )

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self._constructed = frozenset(self._buffers)

    def solve(self, gradients: Any) -> Combination:
        self.calls = self.calls + 1
        return Combination(weights=torch.ones(gradients.tasks, dtype=torch.float64), status="refused")


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_step_moves_nothing(kind: Any, net: Any, batch: Any) -> None:
    before = [parameter.clone() for parameter in net.parameters()]
    search = kind(Refusing(), net.encoder, net.heads, 1.0)
    found = search.step(net.closure(batch(0)))
    assert (found.status, found.accepted, found.eta, found.trials) == ("refused", False, 0.0, 0)
    assert found.record.status == "refused"
    assert found.losses_after is None and found.slopes is None
    assert all(map(torch.equal, before, net.parameters()))
    assert int(net.encoder[1].num_batches_tracked) == 1
    assert search.method.calls == 1


class Stateful(Refusing):
    """Counts its calls; the sum of the gradients."""

    def solve(self, gradients: Any) -> Combination:
        self.calls = self.calls + 1
        return Combination(weights=torch.ones(gradients.tasks, dtype=torch.float64))


def spoiled(net: Any, x: torch.Tensor, after: int, value: float) -> Any:
    """The losses of task b become ``value`` from pass number ``after`` on (while parameters are away from home)."""
    inner, home = net.closure(x), next(net.heads.parameters()).detach().clone()
    passes = count()

    def closure(features: Any = None) -> Any:
        features, losses = inner(features)
        away = not torch.equal(next(net.heads.parameters()), home)
        if next(passes) >= after and away:
            losses["b"] = losses["b"] * value
        return features, losses

    return closure


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_at_the_cap_raises_and_restores(kind: Any, bad: float, net: Any, batch: Any) -> None:
    search = kind(Stateful(), net.encoder, net.heads, 1e-6, max_trials=3)
    before = snapshot(net, search.method)
    with pytest.raises(SearchFailed, match=r"task 'b' is not finite.*last trial.*lr_ub"):
        search.step(spoiled(net, batch(0), 0, bad))
    assert_same(before, snapshot(net, search.method))
    assert search.steps == 0
    assert search.step(net.closure(batch(0))).accepted


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_a_trial_is_a_rejection(kind: Any, net: Any, batch: Any) -> None:
    """NaN while the step is longer than 1e-5, fine below."""
    inner, home = net.closure(batch(0)), net.heads["a"][3].bias.detach().clone()

    def closure(features: Any = None) -> Any:
        features, losses = inner(features)
        far = (net.heads["a"][3].bias - home).abs().max() > 1e-5
        return features, {name: loss * (float("nan") if far else 1) for name, loss in losses.items()}

    found = kind(detente.create("mgda"), net.encoder, net.heads, 1e-2, max_trials=30).step(closure)
    assert found.status == "accepted"
    assert found.trials > 5
    assert found.losses_after is not None and np.isfinite(found.losses_after).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_cap_skips_or_raises(kind: Any, net: Any, batch: Any) -> None:
    method = Stateful()
    search = kind(method, net.encoder, net.heads, 1e-6, max_trials=4)
    before = snapshot(net, method)
    found = search.step(spoiled(net, batch(0), 0, 1.01))
    assert (found.status, found.trials, found.eta, found.accepted) == ("capped", 4, 0.0, False)
    assert found.losses_after is None
    assert (search.capped, search.steps) == (1, 1)
    after = snapshot(net, method)
    for name in before:
        moves_on = "running" in name or "tracked" in name or name in ("random", "method.calls")
        if not moves_on and isinstance(before[name], torch.Tensor):
            assert before[name].equal(after[name]), name
    assert int(net.encoder[1].num_batches_tracked) == 1  # as with any step that was not taken
    assert not after["random"].equal(before["random"])  # or the next step would draw the same masks
    strict = kind(method, net.encoder, net.heads, 1e-6, max_trials=4, options=SearchOptions(on_cap="error"))
    before = snapshot(net, method)
    with pytest.raises(SearchFailed, match=r"task 'b' does not fall enough.*on_cap='skip'"):
        strict.step(spoiled(net, batch(0), 0, 1.01))
    assert_same(before, snapshot(net, method))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", range(6))
def test_an_exception_anywhere_leaves_everything_as_it_was(kind: Any, at: int, net: Any, batch: Any) -> None:
    """The closure fails at its first, second, … pass: while the parameters are at home, and while they are away."""
    inner, passes = net.closure(batch(0)), count()

    class Interrupted(Exception):
        pass

    def closure(features: Any = None) -> Any:
        found = inner(features)
        if next(passes) == at:
            raise Interrupted
        return found

    search = kind(Stateful(), net.encoder, net.heads, 10.0)
    before = snapshot(net, search.method)
    with pytest.raises(Interrupted):
        search.step(closure)
    assert_same(before, snapshot(net, search.method))


def test_an_exception_after_the_fast_step_takes_the_encoder_back(net: Any, batch: Any) -> None:
    inner, passes = net.closure(batch(0)), count()

    def closure(features: Any = None) -> Any:
        if features is None and next(passes) == 1:
            raise RuntimeError("in the look at the network itself")
        return inner(features)

    search = FastBacktracking(
        Stateful(), net.encoder, net.heads, 1e-3, options=SearchOptions(check_true=True)
    )
    before = snapshot(net, search.method)
    with pytest.raises(RuntimeError, match="itself"):
        search.step(closure)
    assert_same(before, snapshot(net, search.method))


def batches(batch: Any) -> Iterator[torch.Tensor]:
    return (batch(step) for step in count())


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_that_fetches_its_batch_is_found_out_at_once(kind: Any, net: Any, batch: Any) -> None:
    fetched = batches(batch)

    def closure(features: Any = None) -> Any:
        return net.closure(next(fetched))(features)

    search = kind(Stateful(), net.encoder, net.heads, 1e-3)
    before = snapshot(net, search.method)
    with pytest.raises(ClosureChanged, match=r"task 'a' the loss .* called again .* Fetch the batch outside"):
        search.step(closure)
    assert_same(before, snapshot(net, search.method))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_changes_later_is_found_out_at_the_cap(kind: Any, net: Any, batch: Any) -> None:
    search = kind(detente.create("mgda"), net.encoder, net.heads, 1e-3, max_trials=2)
    search.step(net.closure(batch(0)))
    passes = count()

    def closure(features: Any = None) -> Any:
        features, losses = net.closure(batch(0))(features)
        return features, {name: loss * 1.1 ** next(passes) for name, loss in losses.items()}

    before = snapshot(net, search.method)
    with pytest.raises(ClosureChanged, match="Fetch the batch outside"):
        search.step(closure)
    assert_same(before, snapshot(net, search.method))


def test_other_random_numbers_are_found_out(net: Any, batch: Any) -> None:
    generator = np.random.default_rng(0)

    def closure(features: Any = None) -> Any:
        return net.closure(batch(0) + generator.normal())(features)

    with pytest.raises(ClosureChanged, match="torch's global generator only"):
        Backtracking(detente.create("mgda"), net.encoder, net.heads, 1e-3).step(closure)


def test_small_step_into_nan_is_not_taken() -> None:
    theta = nn.Parameter(torch.tensor(1.0))
    search = Backtracking(
        detente.create("uniform"),
        [theta],
        [],
        1.0,
        options=SearchOptions(on_no_descent="small-step", small_step=1.0),
    )
    # Slopes -2 · 1 and 3 · 1 for d = -2 + 3; the small step leads to θ = 0, where the logarithm is infinite.
    with pytest.raises(SearchFailed, match="not finite"):
        search.step(lambda features=None: (None, [-2 * theta, 3 * theta.log()]))
    assert theta.item() == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_trunk_is_named(kind: Any, net: Any, batch: Any) -> None:
    """A compiled model warns of hooks on all modules (here an error); named, it needs none. The step is the same."""
    torch.compiler.reset()
    plain = deepcopy(net)
    torch.manual_seed(1)
    expected = kind(detente.create("mgda"), plain.encoder, plain.heads, 1.0).step(plain.closure(batch(0)))
    compiled = torch.compile(net.encoder, backend="aot_eager")
    torch.manual_seed(1)

    def closure(features: Any = None) -> Any:
        z = compiled(batch(0)) if features is None else features
        return z, net.losses(z, batch(0))

    # The classical search walks one compiled graph once per task.
    with torch._functorch.config.patch("donated_buffer", False):
        found = kind(
            detente.create("mgda"), net.encoder, net.heads, 1.0, options=SearchOptions(modules=net)
        ).step(closure)
    assert (found.eta, found.trials) == (expected.eta, expected.trials)
    for (name, mine), other in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, msg=name)
    torch.compiler.reset()
