"""What an optimizer that takes the losses promises: groups, saving, layouts, memory, errors that change nothing."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from twin_adams import Model, Twin, numbers, same

import detente
from detente.optim import MAO, MTAdam, TaskBalance, kernels, streams

BOTH = pytest.mark.parametrize("kind", [MAO, MTAdam])


def saved(state: Any) -> Any:
    """Through a file, as torch.save and torch.load (weights only) make it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


# ---- a real optimizer


@BOTH
def test_groups_have_learning_rates_of_their_own_and_schedulers_turn_them(kind: Callable[..., Any]) -> None:
    model = Model("a")
    optimizer = kind([{"params": model.trunk}, {"params": model.detour, "lr": 0.02}], model.heads, lr=0.01)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02, 0.01]
    assert [group["role"] for group in optimizer.param_groups] == ["shared", "shared", "task-specific"]
    other = Model("a")
    groups = [
        {"params": list(other.trunk.parameters())},
        {"params": list(other.detour.parameters()), "lr": 0.02},
    ]
    reference = torch.optim.Adam([*groups, {"params": list(other.heads.parameters())}], lr=0.01)
    schedules = [CosineAnnealingLR(one, T_max=15) for one in (optimizer, reference)]
    for step in range(20):
        optimizer.step(model.losses(step))
        reference.zero_grad()
        other.losses(step)["a"].backward()
        reference.step()
        for schedule in schedules:
            schedule.step()
    torch.testing.assert_close(numbers(model), numbers(other), rtol=0, atol=1e-13)
    assert optimizer.param_groups[1]["lr"] == reference.param_groups[1]["lr"] != 0.02


@BOTH
@pytest.mark.parametrize("transform", [None, "pcgrad"])
def test_a_saved_state_goes_on_bit_for_bit(kind: Callable[..., Any], transform: str | None) -> None:
    def new(model: Model) -> tuple[Any, LambdaLR]:
        options = {"transform": detente.create(transform, seed=3)} if transform and kind is MAO else {}
        optimizer = kind(model.shared, model.heads, lr=0.01, weight_decay=0.1, **options)
        return optimizer, LambdaLR(optimizer, lambda step: 0.9**step)

    def train(model: Model, optimizer: Any, schedule: LambdaLR, steps: range) -> None:
        for step in steps:
            optimizer.step(model.losses(step, ["abc", "ab", "bc"][step % 3]))
            schedule.step()

    whole = Model()
    uninterrupted = new(whole)
    train(whole, *uninterrupted, range(20))
    first = Model()
    optimizer, schedule = new(first)
    train(first, optimizer, schedule, range(11))
    file = saved(
        {"model": first.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    )
    second = Model(seed=5)
    resumed, again = new(second)
    second.load_state_dict(file["model"])
    resumed.load_state_dict(file["optimizer"])
    again.load_state_dict(file["schedule"])
    assert resumed.tasks == ("a", "b", "c")
    train(second, resumed, again, range(11, 20))
    assert same(numbers(second), numbers(whole)) and not same(numbers(first), numbers(whole))
    # The optimizer that was saved was not touched by the other's steps, even without a file in between.
    third, direct = Model(), None
    third.load_state_dict(first.state_dict())
    direct, again = new(third)
    direct.load_state_dict(optimizer.state_dict())
    again.load_state_dict(file["schedule"])
    train(third, direct, again, range(11, 20))
    train(first, optimizer, schedule, range(11, 20))
    assert same(numbers(third), numbers(whole)) and same(numbers(first), numbers(whole))


@BOTH
def test_moments_may_be_saved_in_another_layout(kind: Callable[..., Any]) -> None:
    """The kernels walk through the memory of all of them side by side."""
    model = Model()
    optimizer = kind(model.shared, model.heads)
    optimizer.step(model.losses(0))
    state = copy.deepcopy(optimizer.state_dict())
    turned = [state["state"][0]["a"], state["state"][8]]  # a weight of the trunk, one of a head
    for moments in turned:
        moments["exp_avg"] = moments["exp_avg"].t().contiguous().t()
        assert moments["exp_avg"].stride() != moments["exp_avg_sq"].stride()
    other = copy.deepcopy(model)
    resumed = kind(other.shared, other.heads)
    resumed.load_state_dict(state)
    for step in (1, 2):
        optimizer.step(model.losses(step))
        resumed.step(other.losses(step))
    assert same(numbers(model), numbers(other))


@BOTH
@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_go_on_alike(kind: Callable[..., Any], how: Callable[[Any], Any]) -> None:
    model = Model()
    optimizer = kind(model.shared, model.heads, lr=0.01)
    for step in range(3):
        optimizer.step(model.losses(step))
    other, copied = how((model, optimizer))
    for step in range(3, 6):
        optimizer.step(model.losses(step))
        copied.step(other.losses(step), measure=True)
    assert same(numbers(model), numbers(other))
    assert copied.balance.layers == ("0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias", "1.weight", "1.bias")


def test_a_group_may_be_added_while_training() -> None:
    """From then on it moves; its counters start at one, those of the others go on."""
    model, other = Model(), Model()
    optimizer = MAO(model.trunk, model.heads, lr=0.01)
    twin = Twin([*other.trunk.parameters()], [*other.heads.parameters()], lr=0.01)
    for step in range(10):
        if step == 5:
            assert torch.equal(model.detour.weight, Model().detour.weight)
            optimizer.add_param_group({"params": model.detour})
            added = [*other.detour.parameters()]
            # The twin counts places, and the heads come after all the shared ones.
            twin.memory = {
                (key + len(added) if isinstance(key, int) else key): kept for key, kept in twin.memory.items()
            }
            twin.shared += added
        optimizer.step(model.losses(step, detour="ab"), measure=True)
        twin.step(other.losses(step, detour="ab"))
    torch.testing.assert_close(numbers(model), numbers(other), rtol=0, atol=1e-13)
    assert optimizer.balance.layers[-2:] == ("weight", "bias")


def test_hooks_around_a_step_run() -> None:
    model, seen = Model(), []
    optimizer = MAO(model.shared, model.heads)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step(model.losses(0))
    assert seen == ["before", "after"]


@BOTH
def test_grad_is_neither_read_nor_written(kind: Callable[..., Any]) -> None:
    model, other = Model(), Model()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    one, two = kind(model.shared, model.heads), kind(other.shared, other.heads)
    for step in range(3):
        one.step(model.losses(step))
        two.step(other.losses(step))
        two.zero_grad()
    assert same(numbers(model), numbers(other))
    assert all(bool((p.grad == 7.0).all()) for p in model.parameters())
    assert all(p.grad is None for p in other.parameters())
    one.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_the_room_is_imported_when_it_is_named() -> None:
    script = (
        "import sys, detente; before = 'detente.optim' in sys.modules; "
        "print(before, detente.optim.MAO.__name__, hasattr(detente, 'nothing'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["False", "MAO", "False"]


def test_the_record_of_a_step() -> None:
    model = Model()
    optimizer = MAO(model.shared, model.heads)
    losses = model.losses(0)
    record = optimizer.step(losses)
    assert record.names == ("a", "b", "c") and not any(record.weights) and record.space == "exact"
    assert record.losses == tuple(loss.item() for loss in losses.values())
    assert record.status == "ok" and record.accepted and record.raw is None and record.seconds > 0
    assert record.to_dict()["names"] == ["a", "b", "c"]
    record = optimizer.step({"a": model.losses(0)["a"], "far": model.heads["b"].bias.sum()})
    assert record.notes == ("task 'far' reaches no shared parameter",)
    assert MAO((), model).step(list(model.losses(0).values())).space == "none"


# ---- who moves


@BOTH
def test_what_no_loss_reaches_is_left_alone(kind: Callable[..., Any]) -> None:
    """No update and no weight decay, as torch does for a gradient of None."""
    model = Model()
    optimizer = kind(model.shared, model.heads, lr=0.01, weight_decay=0.5)
    optimizer.step(model.losses(0))
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.step(model.losses(1, "bc", detour=""))
    after, names = model.state_dict(), [name for name, _ in model.named_parameters()]
    still = {name for name in names if torch.equal(before[name], after[name])}
    assert still == {"detour.weight", "detour.bias", "heads.a.weight", "heads.a.bias"}
    # The absent task's moments and counters wait.
    kept = optimizer.state[model.trunk[0].weight]
    assert (kept["a"]["step"], kept["b"]["step"]) == (1, 2)
    assert torch.equal(kept["a"]["exp_avg"], state[0]["a"]["exp_avg"])
    assert not torch.equal(kept["b"]["exp_avg"], state[0]["b"]["exp_avg"])


def test_frozen_parameters_may_be_named() -> None:
    model = Model()
    model.trunk[0].requires_grad_(False)
    MAO(model.shared, model.heads, weight_decay=0.1).step(model.losses(0))
    assert torch.equal(model.trunk[0].weight, Model().trunk[0].weight)
    assert not torch.equal(model.trunk[2].weight, Model().trunk[2].weight)


@pytest.mark.parametrize("role", ["shared", "own"])
@pytest.mark.parametrize("path", ["fused", "foreach"])
@pytest.mark.parametrize(
    "leaf",
    [
        lambda: torch.randn(3, 5),
        lambda: torch.randn(5, 3).t(),
        lambda: torch.randn(3, 10)[:, ::2],
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(()),
        lambda: torch.randn(0, 3),
        lambda: torch.randn(3, dtype=torch.complex64),
        lambda: torch.randn(6, 3)[::2],
    ],
    ids=["plain", "transposed", "strided", "channels-last", "scalar", "empty", "complex", "rows"],
)
def test_any_layout_of_parameter_and_gradient(
    leaf: Callable[[], torch.Tensor], path: str, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients that are expanded, transposed or dense; torch's plain Adam on a dense copy says what is right."""
    if path == "foreach":
        monkeypatch.setattr(kernels, "can_fuse", lambda tensor: False)
    torch.manual_seed(0)
    parameter = nn.Parameter(leaf())
    start = parameter.detach().clone()
    reference = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
    optimizer = MAO([parameter], lr=0.1) if role == "shared" else MAO((), [parameter], lr=0.1)
    adam = torch.optim.Adam([reference], lr=0.1, foreach=False, fused=False)
    other_way = torch.randn(start.shape[::-1], dtype=start.dtype).permute(list(reversed(range(start.dim()))))
    of_step: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda p: p.real.sum(),  # one number, expanded
        lambda p: (p * other_way).real.sum(),  # as other_way lies in memory
        lambda p: (p * p.conj()).real.sum(),  # as p does
        lambda p: p.abs().sum(),
    ]
    for loss in of_step:
        optimizer.step([loss(parameter)])
        adam.zero_grad()
        loss(reference).backward()
        adam.step()
    assert parameter.stride() == leaf().stride()
    torch.testing.assert_close(parameter.detach(), reference.detach(), rtol=1e-5, atol=1e-6)
    assert parameter.numel() == 0 or float((parameter.detach() - start).abs().max()) > 0.1


def test_sparse_gradients_are_written_out() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    dense = nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False)
    for embedding in (table, dense):
        optimizer = MAO(embedding, lr=0.1)
        for index in ([0, 1], [1, 1], [3, 0]):
            optimizer.step(
                [embedding(torch.tensor(index)).square().sum(), embedding(torch.tensor([2])).sum()]
            )
    assert torch.equal(table.weight, dense.weight)


def test_groups_of_two_dtypes_and_half_precision() -> None:
    double, half = nn.Linear(3, 4).double(), nn.Linear(4, 2).bfloat16()
    optimizer = MAO([double, half], lr=0.01)
    for _ in range(3):
        z = half(double(torch.ones(2, 3, dtype=torch.float64)).bfloat16())
        optimizer.step([z.square().sum(), z.float().sum().double()])
    assert optimizer.state[half.weight]["0"]["exp_avg"].dtype == torch.bfloat16


def test_checkpointed_trunks_work() -> None:
    from torch.utils.checkpoint import checkpoint

    model, other = Model("ab"), Model("ab")
    one, two = MAO(model.trunk, model.heads), MAO(other.trunk, other.heads)
    x = torch.randn(4, 4, dtype=torch.float64)
    z = checkpoint(model.trunk, x, use_reentrant=False)
    one.step([head(z).square().mean() for head in model.heads.values()])
    z = other.trunk(x)
    two.step([head(z).square().mean() for head in other.heads.values()])
    assert same(numbers(model), numbers(other))


@BOTH
def test_one_gradient_of_the_shared_parameters_lives_at_a_time(
    kind: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside it and the state there is one update; the state has two tensors for each task and parameter."""
    model = Model()
    optimizer = kind(model.shared, model.heads)
    real, alive, earlier = streams.gradients_of, [], []

    def watched(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        shared = [p for module in model.shared for p in module.parameters()]
        alive.append(sum(reference() is not None for reference in earlier))
        found = real(outputs, inputs, *args, **kwargs)
        earlier.extend(weakref.ref(g) for g in found[: len(shared)] if g is not None)
        return found

    monkeypatch.setattr(streams, "gradients_of", watched)
    optimizer.step(model.losses(0))
    optimizer.step(model.losses(1))
    assert alive == [0] * 6 and len(earlier) > 20
    if kind is MAO:
        assert {p: u.shape for p, u in optimizer._updates.items()} == {
            p: p.shape for module in model.shared for p in module.parameters()
        }


@pytest.mark.parametrize(
    "form", [{"bias_correction": "paper"}, {"bias_correction": "none"}, {"variant": "sgd"}]
)
@pytest.mark.parametrize("measure", [False, True])
def test_the_denominators_of_one_group_of_tensors_live_at_a_time(
    form: dict[str, str], measure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, alive, earlier = Model(), [], []
    optimizer = MAO(model.shared, model.heads, **form)
    monkeypatch.setattr(kernels, "_GROUP", 1)

    def watch(name: str) -> None:
        real = getattr(torch, name)

        def watched(*args: Any) -> Any:
            alive.append(sum(reference() is not None for reference in earlier))
            found = real(*args)
            earlier.extend(map(weakref.ref, found))
            return found

        monkeypatch.setattr(torch, name, watched)

    for name in ("_foreach_add", "_foreach_sqrt", "_foreach_div"):
        watch(name)
    optimizer.step(model.losses(0), measure=measure)
    assert len(alive) >= 14 * (1 + measure) and not any(alive)


@BOTH
@pytest.mark.parametrize("transform", [None, "pcgrad"])
def test_the_shared_graph_is_freed_with_the_last_backward(
    kind: Callable[..., Any], transform: str | None
) -> None:
    model = Model()
    options = {"transform": detente.create(transform)} if transform and kind is MAO else {}
    optimizer = kind(model.shared, model.heads, lr=0.0, **options)
    held: list[weakref.ref[Any]] = []

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            held.append(weakref.ref(self))

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda one: one.tensor):
        z = model.trunk(torch.ones(3, 4, dtype=torch.float64))
    losses = {name: head(z).square().mean() for name, head in model.heads.items()}
    assert sum(reference() is not None for reference in held) >= 4
    optimizer.step(losses)
    assert losses and not any(reference() is not None for reference in held)


def test_a_graph_from_before_the_step_is_not_walked_in_silence() -> None:
    model = Model("ab")
    for optimizer in (MAO(model.shared, model.heads), MAO((), model), MAO(model)):
        losses = model.losses(0)
        late = model.heads["a"](model.trunk(torch.ones(1, 4, dtype=torch.float64))).sum()
        optimizer.step(losses)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()


# ---- one copy, before any backward


def test_the_losses_are_read_once_before_any_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, events = Model(), []
    for module, name in ((streams, "to_host"), (streams, "gradients_of"), (kernels, "to_host")):
        function = getattr(module, name)

        def noted(
            *args: Any,
            _f: Any = function,
            _n: str = f"{module.__name__.rpartition('.')[2]}.{name}",
            **kwargs: Any,
        ) -> Any:
            events.append(_n)
            return _f(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)
    optimizer = MAO(model.shared, model.heads)
    optimizer.step(model.losses(0))
    # At last the lengths of the own gradients, and whether the step is finite.
    assert events == [
        "streams.to_host",
        *["streams.gradients_of", "kernels.to_host"] * 3,
        "kernels.to_host",
        "kernels.to_host",
    ]
    events.clear()
    losses = model.losses(0)
    with pytest.raises(ValueError, match=r"the loss of task 'c' is not finite.*Nothing was changed"):
        optimizer.step({**losses, "c": losses["c"] * float("nan")})
    assert events == ["streams.to_host"]


# ---- names of layers


def test_layers_are_called_as_in_their_module() -> None:
    model = Model("ab")

    def layers(shared: Any) -> tuple[str, ...]:
        optimizer = MAO(shared, model.heads, lr=0.0)
        optimizer.step(model.losses(0), measure=True)
        assert isinstance(optimizer.balance, TaskBalance)
        return optimizer.balance.layers

    assert layers(model.trunk) == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert layers({"trunk": model.trunk, "detour": model.detour})[-2:] == ("detour.weight", "detour.bias")
    assert layers(model.detour.named_parameters()) == ("weight", "bias")
    assert layers(list(model.detour.parameters())) == ("0 [5, 5]", "1 [5]")
    assert layers(model.detour.bias) == ("0 [5]",)
    assert layers([{"params": model.trunk}, {"params": model.detour}])[-1] == "1.bias"
