"""Branches of a representation: what ``features=z`` gives, in one call of autograd for all heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from twins.engine import Spy, Weighting

import detente

TASKS = ("a", "b", "c")
WEIGHTS = {"a": 0.5, "b": 2.0, "c": 3.0}
ON_FEATURES = [name for name, info in sorted(detente.methods().items()) if "features" in info.spaces]


class Network(nn.Module):
    """An encoder of two stages, a part that heads may share, and three heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.common = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.heads = nn.ModuleDict({task: nn.Linear(5, 2) for task in TASKS})
        self.double()
        self.x = torch.randn(6, 4, dtype=torch.float64)

    def encoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.first(self.x).tanh()
        return hidden, self.last(hidden).sin()

    def losses(self, read: Any, tasks: tuple[str, ...] = TASKS) -> dict[str, torch.Tensor]:
        return {
            task: (self.heads[task](read[task]) - place).square().mean() for place, task in enumerate(tasks)
        }


class FromInnerProducts(Spy):
    """Decide as told, from inner products alone."""

    declares = detente.Declaration(name="from-inner-products", source="a test", needs=frozenset({"gramian"}))


def grads(network: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


def assert_same(found: list[torch.Tensor | None], wanted: list[torch.Tensor | None]) -> None:
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def both(take: Callable[[Network, bool], Any]) -> tuple[tuple[Network, Any], tuple[Network, Any]]:
    """The same step on z and on its branches."""
    plain, branched = Network(), Network()
    return (plain, take(plain, False)), (branched, take(branched, True))


# ---- equal to features=z


@pytest.mark.parametrize("heads", [None, "own", "weighted"])
@pytest.mark.parametrize("present", [TASKS, ("a", "c")])
@pytest.mark.parametrize("form", ["one tensor", "two scales", "one behind the other"])
@pytest.mark.parametrize("name", ON_FEATURES)
def test_branches_equal_features_for_every_method(name: str, form: str, present: Any, heads: Any) -> None:
    def take(network: Network, branched: bool) -> Any:
        method, found = detente.create(name), []
        for _ in range(2):  # what a method remembers is the same too
            network.zero_grad()
            hidden, z = network.encoded()
            scales: Any = {
                "one tensor": z,
                "two scales": (z.cos(), 2 * z),
                "one behind the other": (hidden, z),
            }[form]
            features = detente.branch(scales, TASKS) if branched else scales
            read = features if branched else dict.fromkeys(TASKS, scales)
            parts = {
                task: read[task] if form == "one tensor" else 2 * read[task][0] + read[task][1]
                for task in TASKS
            }
            try:
                record = detente.backward(
                    network.losses(parts, present), method, features=features, heads=heads
                )
            except ValueError as error:  # heads="weighted" and no weights
                return str(error)
            found.append(
                (grads(network), record.weights, record.status, record.dropped, record.notes, record.space)
            )
        return found

    (_, plain), (_, branched) = both(take)
    if isinstance(plain, str):
        assert plain == branched and heads == "weighted"
        return
    for one, other in zip(plain, branched, strict=True):
        assert_same(other[0], one[0])
        assert other[2:5] == one[2:5]
        assert other[5] == "features"
        assert [w is None for w in other[1]] == [w is None for w in one[1]]
        known = [[w for w in weights if w is not None] for weights in (one[1], other[1])]
        assert known[1] == pytest.approx(known[0], rel=1e-9, abs=1e-12)


HEADS = (
    "plain",
    "tied",
    "tied by two",
    "reads another's branch too",
    "reads only another's branch",
    "past the representation, one",
    "past the representation, all",
    "ignores its branch",
    "checkpointed",
    "losses that meet",
)


def _headed(network: Network, kind: str, read: Any) -> dict[str, torch.Tensor]:
    found = {}
    for place, task in enumerate(TASKS):
        z = read[task]
        if kind == "tied" or (kind == "tied by two" and task != "c"):
            z = network.common(z).sin()
        if kind == "reads another's branch too" and task == "a":
            z = z + read["b"]
        if kind == "reads only another's branch" and task == "a":
            z = read["c"]
        if kind == "ignores its branch" and task == "c":
            z = torch.ones(2, 5, dtype=torch.float64)
        head = network.heads[task]
        output = checkpoint(head, z, use_reentrant=False) if kind == "checkpointed" else head(z)
        found[task] = (output - place).square().mean()
        if kind == "past the representation, all" or (kind == "past the representation, one" and task == "a"):
            found[task] = found[task] + network.first.weight.square().sum()
    if kind == "losses that meet":
        found["b"] = found["b"] + 0.5 * found["a"]
    return found


@pytest.mark.parametrize("factor", [None, 256.0])
@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_every_kind(kind: str, heads: Any, factor: float | None) -> None:
    def take(network: Network, branched: bool) -> Any:
        _, z = network.encoded()
        features = detente.branch(z, TASKS) if branched else z
        read = features if branched else dict.fromkeys(TASKS, z)
        method = Spy(weights=WEIGHTS)
        scaler = None if factor is None else torch.amp.GradScaler("cpu", init_scale=factor)
        losses = _headed(network, kind, read)
        record = detente.backward(losses, method, features=features, heads=heads, scaler=scaler)
        assert method.seen is not None
        return record.weights, record.dropped, record.notes, method.seen.jacobian

    (plain, one), (branched, other) = both(take)
    assert_same(grads(branched), grads(plain))
    assert one[:3] == other[:3]
    torch.testing.assert_close(other[3], one[3])
    assert one[1] == (("c",) if kind == "ignores its branch" else ())


def test_a_count_instead_of_names() -> None:
    network, branched = Network(), Network()
    _, z = network.encoded()
    detente.backward([network.heads[task](z).square().mean() for task in TASKS], Spy(), features=z)
    z = detente.branch(branched.encoded()[1], 3)
    assert list(z) == ["0", "1", "2"] and len(z) == 3
    losses = [branched.heads[task](z[str(place)]).square().mean() for place, task in enumerate(TASKS)]
    record = detente.backward(losses, Spy(), features=z)
    assert record.names == ("0", "1", "2")
    assert_same(grads(branched), grads(network))


# ---- cost


def _calls(kind: str) -> int:
    network = Network()
    z = detente.branch(network.encoded()[1], TASKS)
    losses, count, real = _headed(network, kind, z), 0, torch.autograd.grad

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return real(*arguments, **options)

    with mock.patch("torch.autograd.grad", counted):
        detente.backward(losses, Spy(), features=z)
    return count


@pytest.mark.parametrize(
    "kind", ["plain", "past the representation, one", "ignores its branch", "checkpointed"]
)
def test_autograd_is_called_once_for_all_heads(kind: str) -> None:
    assert _calls(kind) == 2  # the heads, the encoder


@pytest.mark.parametrize("kind", ["tied", "reads another's branch too", "losses that meet"])
def test_heads_with_something_in_common_are_walked_one_by_one(kind: str) -> None:
    assert _calls(kind) == 1 + len(TASKS)


def test_branches_share_the_memory_of_the_representation() -> None:
    z = Network().encoded()[1]
    for tensors in detente.branch((z, z + 1), TASKS).values():
        assert isinstance(tensors, tuple) and tensors[0].data_ptr() == z.data_ptr()


def test_hooks_of_leaves_run_as_often_as_on_the_representation() -> None:
    def take(network: Network, branched: bool) -> list[int]:
        counts = []
        for place, parameter in enumerate(network.parameters()):
            counts.append(0)

            def count(_: torch.Tensor, place: int = place) -> None:
                counts[place] += 1

            parameter.register_hook(count)
        z: Any = network.encoded()[1]
        z = detente.branch(z, TASKS) if branched else z
        detente.backward(network.losses(z if branched else dict.fromkeys(TASKS, z)), Spy(), features=z)
        return counts

    (_, plain), (_, branched) = both(take)
    assert all(one <= other for one, other in zip(branched, plain, strict=True)) and sum(branched) > 0


# ---- what a step leaves


def test_a_refused_step_leaves_every_grad() -> None:
    network = Network()
    network.first.weight.grad = torch.ones(5, 4, dtype=torch.float64)
    before = grads(network)
    z = detente.branch(network.encoded()[1], TASKS)
    record = detente.backward(network.losses(z), Spy(status="refused"), features=z)
    assert not record.accepted
    for got, want in zip(grads(network), before, strict=True):
        assert (got is None and want is None) or torch.equal(got, want)  # type: ignore[arg-type]


def test_a_retained_graph_serves_twice() -> None:
    network = Network()
    z = detente.branch(network.encoded()[1], TASKS)
    losses, found = network.losses(z), []
    for retain in (True, True, False):
        network.zero_grad()
        detente.backward(losses, Spy(weights=WEIGHTS), features=z, retain_graph=retain)
        found.append(grads(network))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_a_graph_a_branch_is_the_representation(context: Any) -> None:
    network = Network().eval()
    with context():
        z = network.encoded()[1]
        branches = detente.branch(z, TASKS)
        for part in branches.values():
            assert (
                isinstance(part, torch.Tensor) and part.data_ptr() == z.data_ptr() and not part.requires_grad
            )
        assert all(torch.equal(network.heads[t](branches[t]), network.heads[t](z)) for t in TASKS)


def test_changing_a_branch_in_place_is_refused_by_torch() -> None:
    z = detente.branch(Network().encoded()[1], TASKS)
    with pytest.raises(RuntimeError, match="in-place"):
        torch.relu_(z["a"])  # type: ignore[arg-type]


def test_changing_the_representation_in_place_before_the_heads_read_it() -> None:
    def take(network: Network, branched: bool) -> None:
        z: Any = network.encoded()[1]
        features = detente.branch(z, TASKS) if branched else z
        z.relu_()
        detente.backward(
            network.losses(features if branched else dict.fromkeys(TASKS, z)),
            Spy(weights=WEIGHTS),
            features=features,
        )

    (plain, _), (branched, _) = both(take)
    assert_same(grads(branched), grads(plain))


def test_the_encoder_is_where_a_plain_backward_ends() -> None:
    network = Network()
    sum(network.losses(detente.branch(network.encoded()[1], TASKS)).values()).backward()  # type: ignore[union-attr]
    assert network.first.weight.grad is None and network.heads["a"].weight.grad is not None


# ---- refused


@pytest.mark.parametrize(
    "options",
    [
        lambda network, z: {},
        lambda network, z: {"memory": "low"},
        lambda network, z: {"memory": "batched"},
        lambda network, z: {"shared": network.first},
        lambda network, z: {"shared": [network.first, network.last], "task_specific": network.heads},
        lambda network, z: {"solve_on": network.last},
        lambda network, z: {"features": z},
        lambda network, z: {"features": detente.branch(network.encoded()[1], TASKS)},
    ],
    ids=["none", "low", "batched", "shared", "both named", "layer", "the representation", "other branches"],
)
@pytest.mark.parametrize(
    "method", [FromInnerProducts(), Weighting(weights=(1, 1, 1))], ids=["spy", "weighting"]
)
def test_branches_that_are_not_passed_are_refused_by_name(options: Any, method: detente.Method) -> None:
    network = Network()
    z = network.encoded()[1]
    losses = network.losses(detente.branch(z, TASKS))
    with pytest.raises(ValueError, match=r"computed from detente\.branch\(\)"):
        detente.backward(losses, method, **options(network, z))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_micro_batches_refuse_branches() -> None:
    network, method = Network(), detente.create("mgda")
    with pytest.raises(ValueError, match=r"detente\.branch\(\)"), detente.accumulate(method, 2):
        detente.backward(network.losses(detente.branch(network.encoded()[1], TASKS)), method)


def test_branches_of_branches_are_refused() -> None:
    network = Network()
    hidden, _ = network.encoded()
    inner = network.last(detente.branch(hidden, 2)["0"])
    z = detente.branch(inner, TASKS)
    for features, read in ((z, z), (inner, dict.fromkeys(TASKS, inner))):
        with pytest.raises(ValueError, match="Branch a representation once"):
            detente.backward(network.losses(read), Spy(), features=features)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_losses_that_depend_on_no_feature_are_refused() -> None:
    network = Network()
    z = network.encoded()[1]
    read = dict.fromkeys(TASKS, network.encoded()[1].detach())
    for method in (Spy(), Weighting(weights=(1, 1, 1))):
        for features in (z, detente.branch(z, TASKS)):
            with pytest.raises(ValueError, match=r"no loss .* depends on features="):
                detente.backward(network.losses(read), method, features=features)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_head_that_reaches_the_encoder_but_not_its_branch_is_refused() -> None:
    network = Network()
    z = detente.branch(network.encoded()[1], TASKS)
    losses = network.losses(z)
    losses["c"] = network.first.weight.sum()
    with pytest.raises(ValueError, match="task 'c' does not depend on its branch"):
        detente.backward(losses, Spy(), features=z)


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        ([], ValueError),
        (["a", "a"], ValueError),
        ("ab", TypeError),
        (None, TypeError),
        (2.5, TypeError),
        (True, TypeError),
    ],
)
def test_names_that_make_no_sense(names: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="names"):
        detente.branch(torch.ones(2, requires_grad=True), names)


def test_representations_that_make_no_sense() -> None:
    z = Network().encoded()[1]
    for wrong in ({"a": z}, "z", 3.0, [z, 1.0]):
        with pytest.raises(TypeError, match="branch takes a tensor"):
            detente.branch(wrong, TASKS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="twice"):
        detente.branch((z, z), TASKS)
    with pytest.raises(ValueError, match="no tensors"):
        detente.branch([], TASKS)


def test_a_task_without_a_branch_is_named_beside_those_that_have_one() -> None:
    branches = detente.branch(torch.ones(2, requires_grad=True), ["left", "right"])
    with pytest.raises(KeyError, match="'middle'; there are branches for left, right"):
        branches["middle"]


def test_a_frozen_representation_has_no_gradient_to_branch() -> None:
    z = Network().encoded()[1]
    frozen = detente.branch((z.detach(), z), TASKS)
    losses = Network().losses({task: parts[0] + parts[1] for task, parts in frozen.items()})
    with pytest.raises(ValueError, match=r"features\[0\] carries no graph"):
        detente.backward(losses, Spy(), features=frozen)


# ---- a plain mapping


def test_a_mapping_of_different_representations_says_that_no_conflict_can_be_seen() -> None:
    network = Network()
    hidden, _ = network.encoded()
    z = {task: network.last(hidden * (place + 1)) for place, task in enumerate(TASKS)}
    record = detente.backward(network.losses(z), detente.create("mgda"), features=z)
    assert any("no conflict can be seen" in note for note in record.notes)
    common = dict.fromkeys(TASKS, network.encoded()[1])
    record = detente.backward(network.losses(common), detente.create("mgda"), features=common)
    assert not any("no conflict" in note for note in record.notes)
