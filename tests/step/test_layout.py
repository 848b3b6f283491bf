"""What ``.grad`` looks like: the strides of torch's own backward, sparse where torch's is, whole or untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from twins.engine import Spy

import detente

WEIGHTS = (0.4, 1.7, 0.9)


class Told(Spy):
    """Weights as told, from inner products alone, so that every mode serves it."""

    declares = detente.Declaration(name="told", source="a test", needs=frozenset({"gramian"}))


# ---- strides

LEAVES: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": lambda: torch.randn(3, 4),
    "transposed": lambda: torch.randn(4, 3).t(),
    "every second column": lambda: torch.randn(4, 6)[:, ::2],
    "expanded": lambda: torch.randn(1, 4).expand(3, 4),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
    "one channel": lambda: torch.randn(2, 1, 4, 5).to(memory_format=torch.channels_last),
    "one of everything": lambda: torch.randn(5, 1, 1, 1).to(memory_format=torch.channels_last),
    "complex": lambda: torch.randn(3, 4, dtype=torch.complex64),
    "complex, transposed": lambda: torch.randn(3, 4, dtype=torch.complex64).t(),
    "a scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
}
PATHS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "squares": lambda w: w.abs().square().sum(),
    "sum": lambda w: (w.real if w.is_complex() else w).sum(),
    "transposed": lambda w: (w.t() if w.dim() == 2 else w).reshape(-1).abs().square().sum(),
}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["mgda", "pcgrad", "uniform"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", LEAVES)
def test_strides_are_those_of_a_plain_backward(kind: str, path: str, name: str, shared: bool) -> None:
    """Along axes with more than one entry: the strides of the others mean nothing, and torch leaves them so."""
    torch.manual_seed(0)
    base = LEAVES[kind]()
    strides, values = [], []
    for ours in (False, True):
        leaf = base.detach().requires_grad_()
        other = nn.Parameter(torch.ones(2))
        losses = [PATHS[path](leaf) + other.sum(), other.square().sum()]
        if shared:
            losses[1] = losses[1] + PATHS[path](leaf)
        if ours:
            detente.backward(losses, detente.create(name), shared=[leaf, other] if shared else [other])
        else:
            sum(losses).backward()  # type: ignore[union-attr]
        assert leaf.grad is not None
        strides.append([step for step, size in zip(leaf.grad.stride(), leaf.shape, strict=True) if size != 1])
        values.append(leaf.grad)
    assert strides[0] == strides[1]
    if name == "uniform" or not shared:
        torch.testing.assert_close(values[1], values[0])


def _network(kind: str) -> nn.ModuleDict:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    network = nn.ModuleDict(
        {"trunk": trunk, "a": nn.Conv2d(8, 2, 3), "b": nn.Conv2d(8, 1, 3), "c": nn.Linear(8, 8)}
    )
    if kind == "channels_last":
        return network.to(memory_format=torch.channels_last)
    network["c"].weight = nn.Parameter(network["c"].weight.detach().t())
    return network


@pytest.mark.parametrize("kind", ["channels_last", "transposed"])
@pytest.mark.parametrize("name", ["mgda", "pcgrad", "uniform"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_optimizers_take_the_plain_ones_steps(optimizer: str, name: str, kind: str) -> None:
    x = torch.randn(4, 3, 12, 12).to(memory_format=torch.channels_last)
    ends = []
    for fused in (False, True):
        network, method = _network(kind), detente.create(name)
        start = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
        options: dict[str, Any] = {"momentum": 0.9} if optimizer == "SGD" else {}
        stepper = getattr(torch.optim, optimizer)(network.parameters(), lr=0.01, fused=fused, **options)
        for _ in range(4):
            z = network["trunk"](x)
            z = z + network["c"](z.mean(dim=(2, 3)))[:, :, None, None]
            losses = {"a": network["a"](z).square().mean(), "b": (network["b"](z) - 1).square().mean()}
            detente.backward(losses, method)
            stepper.step()
            stepper.zero_grad()
        ends.append(torch.cat([p.detach().reshape(-1) for p in network.parameters()]) - start)
    assert ends[0].abs().max() > 1e-3
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-5)


# ---- sparse

MODES = ("exact", "low", "features", "branches", "layer", "accumulate", "weighting", "direction")


class Towers(nn.Module):
    """An embedding that all tasks share, a trunk, three heads, and an embedding of the first task's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words, self.own = nn.Embedding(20, 3, sparse=True), nn.Embedding(9, 4, sparse=True)
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(3)])
        self.double()
        self.rows = [torch.randint(0, 20, (6,)) for _ in range(3)]

    def losses(self, kind: str, mode: str) -> tuple[list[torch.Tensor], Any]:
        zs: Any = [self.trunk(self.words(rows)).tanh() for rows in self.rows]
        if kind == "apart":  # every task has examples of its own
            z: Any = {str(task): one for task, one in enumerate(zs)}
        else:
            z = zs[0] + (zs[1] if kind == "read twice" else 0.0)
            zs = [z] * 3
        if mode == "branches":
            z = detente.branch(z, 3)
            zs = [z[str(task)] for task in range(3)]
        losses = [(head(zs[task]) - task).square().mean() for task, head in enumerate(self.heads)]
        if kind == "own":
            losses[0] = losses[0] + self.own(self.rows[0] % 9).square().sum()
        if kind == "one dense":
            losses[1] = losses[1] + self.words.weight[:3].square().sum()
        return losses, z


@pytest.mark.parametrize("found", [None, "sparse", "dense"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["one", "apart", "read twice", "own", "one dense"])
def test_sparse_gradients_have_torchs_entries(kind: str, mode: str, scaled: bool, found: str | None) -> None:
    """Beside a plain backward of the weighted losses; ``found`` is what lay in ``.grad`` before."""
    if kind == "apart" and mode == "branches":
        kind = "one"  # branches are of one representation
    network = Towers()
    weights = (1.0, 1.0, 1.0) if mode == "weighting" else WEIGHTS
    want: dict[str, torch.Tensor] = {}
    for own in (False, True):
        twin = copy.deepcopy(network)
        losses, _ = twin.losses(kind, "exact")
        sum(1.0 * loss if own else w * loss for w, loss in zip(weights, losses, strict=True)).backward()
        for name, parameter in twin.named_parameters():
            if parameter.grad is not None and own == name.startswith(("own", "heads")):
                want[name] = parameter.grad
    before = torch.zeros(20, 3, dtype=torch.float64)
    if found is not None:
        before[[1, 19]] = 1.0
        network.words.weight.grad = before.to_sparse(1).coalesce() if found == "sparse" else before.clone()
    losses, z = network.losses(kind, mode)
    method: detente.Method = Told(weights=WEIGHTS)
    if mode == "weighting":
        method = detente.create("uniform")
    if mode == "direction":
        method = Spy(direction=lambda jacobian: torch.tensor(WEIGHTS, dtype=jacobian.dtype) @ jacobian)
    more: dict[str, Any] = {
        "low": {"memory": "low"},
        "features": {"features": z},
        "branches": {"features": z},
        "layer": {"solve_on": network.trunk},
    }.get(mode, {})
    if scaled:
        more["scaler"] = torch.amp.GradScaler("cpu", init_scale=64.0)
    if mode == "accumulate":
        with detente.accumulate(method, 2):
            detente.backward(losses, method, **more)
            detente.backward(network.losses(kind, mode)[0], method, **more)
    else:
        detente.backward(losses, method, **more)
    for name, parameter in network.named_parameters():
        got = parameter.grad
        if name not in want:
            assert got is None
            continue
        assert got is not None
        values = want[name].to_dense() * (64.0 if scaled else 1.0)
        values = values + before if name == "words.weight" else values
        torch.testing.assert_close(got.to_dense(), values, rtol=1e-10, atol=1e-11)
        layout = torch.strided if found == "dense" and name == "words.weight" else want[name].layout
        assert got.layout == layout, name
        if layout == torch.sparse_coo:
            there = set(want[name].coalesce().indices()[0].tolist())
            there |= {1, 19} if found == "sparse" and name == "words.weight" else set()
            assert set(got.coalesce().indices()[0].tolist()) == there


def test_batched_refuses_sparse_gradients_by_name() -> None:
    network = Towers()
    losses, _ = network.losses("one", "exact")
    with pytest.raises(RuntimeError, match="memory='batched'"):
        detente.backward(losses, Told(weights=WEIGHTS), memory="batched")
    assert all(parameter.grad is None for parameter in network.parameters())


def test_sparse_adam_by_hand() -> None:
    """Two steps of lazy Adam, from its formulas: rows without entries rest, their moments too."""
    network, lr = Towers(), 0.1
    optimizer = torch.optim.SparseAdam([network.words.weight], lr=lr)
    table = network.words.weight.detach().clone()
    first, second = torch.zeros_like(table), torch.zeros_like(table)
    for step in (1, 2):
        network.rows = [torch.tensor([1, 2, 2, 5]) if step == 1 else torch.tensor([5, 7])] * 3
        losses, _ = network.losses("one", "exact")
        gradient = sum(
            w * torch.autograd.grad(loss, network.words.weight, retain_graph=True)[0].to_dense()
            for w, loss in zip(WEIGHTS, losses, strict=True)
        )
        detente.backward(losses, Told(weights=WEIGHTS))
        optimizer.step()
        optimizer.zero_grad()
        for row in network.rows[0].unique().tolist():
            first[row] = 0.9 * first[row] + 0.1 * gradient[row]
            second[row] = 0.999 * second[row] + 0.001 * gradient[row] ** 2
            size = lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
            table[row] -= size * first[row] / (second[row].sqrt() + 1e-8)
        torch.testing.assert_close(network.words.weight.detach(), table, rtol=1e-9, atol=1e-12)


# ---- a failure while .grad is written


class Fragile(torch.Tensor):
    """A tensor that fails when it is added to, after one entry has changed."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.add_:
            plain(args[0]).view(-1)[:1].add_(7.0)
            raise RuntimeError("fragile")
        return super().__torch_function__(func, types, args, kwargs or {})


class Sound(torch.Tensor):
    """A subclass that does as a tensor does."""


def plain(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def _inference(parameter: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(parameter.shape)


SPOILED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], type[Exception]]] = {
    "a subclass that fails in the middle": (lambda p: torch.ones(p.shape).as_subclass(Fragile), RuntimeError),
    "expanded": (lambda p: torch.zeros(1).expand(p.shape), ValueError),
    "made in inference mode": (_inference, ValueError),
}


@pytest.mark.parametrize("name", ["mgda", "uniform"])
@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_failure_while_grad_is_written_leaves_nothing_half_added(
    spoiled: str, place: int, name: str
) -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    heads = nn.ModuleList([nn.Linear(4, 2) for _ in range(2)])
    parameters = [*trunk.parameters(), *heads.parameters()]
    for position, parameter in enumerate(parameters):
        if position % 3:  # some have none
            parameter.grad = torch.rand_like(parameter)
        if position == 7:
            parameter.grad = torch.rand(parameter.shape).as_subclass(Sound)
    spoil, error = SPOILED[spoiled]
    parameters[place].grad = spoil(parameters[place])
    before = [None if p.grad is None else plain(p.grad).clone() for p in parameters]
    z = trunk(torch.randn(5, 3))
    losses = [(head(z) - task).square().mean() for task, head in enumerate(heads)]
    with pytest.raises(error):
        detente.backward(losses, detente.create(name))
    for parameter, held in zip(parameters, before, strict=True):
        assert (parameter.grad is None) == (held is None)
        if parameter.grad is not None and held is not None:
            assert torch.equal(plain(parameter.grad), held)


def test_a_grad_of_another_dtype_takes_the_gradient_or_none_does() -> None:
    """A parameter whose data were replaced keeps the .grad it had."""
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    one.grad, other.grad = torch.ones(2), torch.ones(2)
    other.data = other.data.double()
    losses = [one.sum() + other.sum(), (one * 2).sum() + other.sum()]
    detente.backward(losses, detente.create("uniform"))
    assert other.grad is not None and other.grad.dtype == torch.float32
    assert other.grad.tolist() == [3.0, 3.0] and one.grad.tolist() == [4.0, 4.0]
    wave = nn.Parameter(torch.ones(2))
    wave.grad = torch.ones(2)
    wave.data = wave.data.to(torch.complex64)
    losses = [one.sum() + wave.abs().sum(), (one * 2).sum() + wave.abs().square().sum()]
    for name in ("uniform", "mgda"):
        with pytest.raises(ValueError, match="cannot be added"):
            detente.backward(losses, detente.create(name), retain_graph=True)
        assert one.grad.tolist() == [4.0, 4.0] and wave.grad.tolist() == [1.0, 1.0]
