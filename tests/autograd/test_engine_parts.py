"""The small parts of the engine, each against the plainest way to say the same."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import nn
from twins.engine import Spy, Weighting

import detente
from detente.autograd.gramian import gramian
from detente.autograd.graph import gradient_edge, walk
from detente.autograd.host import to_host
from detente.autograd.layout import Layout, accumulate, finite, probes
from detente.autograd.roles import Memory, as_tensors


@pytest.mark.parametrize("columns", [1, 7, (1 << 17) // 3 - 1, (1 << 17) // 3 + 1])
def test_gramian_is_a_product_in_float64(columns: int) -> None:
    matrix = torch.randn(3, columns) * torch.tensor([[1e-12], [1.0], [1e12]])
    want = matrix.double() @ matrix.double().T
    assert torch.allclose(gramian(matrix), want, rtol=1e-12, atol=0)
    assert gramian(matrix).dtype == torch.float64


def test_gramian_of_large_float32_rows_does_not_overflow() -> None:
    assert gramian(torch.full((2, 4), 1e30)).tolist() == pytest.approx(np.full((2, 2), 4e60), rel=1e-6)
    assert gramian(torch.full((1, 4), 300.0, dtype=torch.float16)).item() == 360000
    assert gramian(torch.zeros(2, 0)).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("tasks", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("columns", [1, 1023, 50_000, 131_072, 140_001])
def test_gramian_in_chunks_and_pieces_is_the_plain_product(tasks: int, columns: int) -> None:
    rows = torch.randn(tasks, columns, generator=torch.Generator().manual_seed(columns))
    rows *= torch.logspace(-12, 12, tasks)[:, None]
    expected = rows.double().numpy() @ rows.double().numpy().T
    sizes = np.sqrt(np.outer(np.diagonal(expected), np.diagonal(expected)))
    assert np.abs((gramian(rows).numpy() - expected) / sizes).max() < 1e-13


def test_a_sum_that_overflows_is_no_gradient_that_is_not_finite() -> None:
    huge = torch.full((4,), 3e38)
    gradients = [
        huge,
        -huge,
        torch.tensor([1.0, torch.inf]),
        torch.tensor([torch.inf, -torch.inf]),
        torch.ones(0),
    ]
    gradients += [torch.tensor([6e4, 6e4], dtype=torch.float16), torch.tensor([1 + 2j, complex("nan")])]
    (probed,) = to_host([probes(gradients)])
    assert not np.isfinite(probed[:2]).any()
    assert finite(gradients, probed).tolist() == [True, True, False, False, True, True, False]


def test_the_weighted_sum_group_by_group_is_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = (torch.zeros(2, 3), torch.zeros(()), torch.zeros(3, dtype=torch.complex64), torch.zeros(5))
    layout = Layout(tensors)
    jacobian = torch.randn(3, layout.columns, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.5, -1.0, 2.0])
    whole = layout.split(weights @ jacobian)
    for size in (1, 7, 100):
        monkeypatch.setattr("detente.autograd.layout._GROUP", size)
        pieces = layout.weighted(weights, jacobian)
        assert [piece.shape for piece in pieces] == [tensor.shape for tensor in tensors]
        assert all(torch.allclose(a, b) for a, b in zip(pieces, whole, strict=True))


def test_to_host_takes_sequences_of_scalars_as_vectors() -> None:
    scalars = [torch.tensor(1.5), torch.tensor([2]), torch.tensor(1 / 3, dtype=torch.float64)]
    vector, matrix, empty = to_host([scalars, torch.eye(2), []])
    assert (
        vector.tolist() == [1.5, 2.0, 1 / 3] and matrix.tolist() == [[1, 0], [0, 1]] and empty.shape == (0,)
    )
    alone = torch.ones(2, 2, dtype=torch.float64)
    (copied,) = to_host([alone])
    alone.zero_()
    assert copied.tolist() == [[1, 1], [1, 1]], "a method may keep what it was given"


def test_to_host_keeps_shapes_and_every_digit() -> None:
    third = torch.tensor(1 / 3, dtype=torch.float64)
    given = [
        torch.tensor(1.5),
        third,
        torch.tensor([[2, 2**53]]),
        torch.ones(2, 2, dtype=torch.bfloat16),
        torch.ones(0),
    ]
    got = to_host(given)
    assert [array.shape for array in got] == [(), (), (1, 2), (2, 2), (0,)]
    assert all(array.dtype == np.float64 for array in got)
    assert got[1].item() == 1 / 3 and got[2].tolist() == [[2, 2**53]]
    assert to_host([torch.tensor(0.1), third])[1].item() == 1 / 3
    assert to_host([]) == []


def test_layout_writes_and_cuts_tensors_of_every_kind() -> None:
    tensors = (
        torch.randn(2, 3, dtype=torch.float64),
        torch.randn(()),
        torch.randn(0, 4),
        torch.randn(3, dtype=torch.complex64),
        torch.randn(2, 2).T,
    )
    layout = Layout(tensors)
    assert layout.columns == 6 + 1 + 0 + 6 + 4
    line = torch.full((layout.columns,), torch.nan, dtype=layout.like.dtype)
    assert layout.like.dtype == torch.float64
    layout.write(line, tensors)
    for piece, tensor in zip(layout.split(line), tensors, strict=True):
        assert piece.dtype == tensor.dtype and torch.equal(piece, tensor)
    layout.write(line, [None] * len(tensors))
    assert not line.any()
    sparse = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    layout.write(line, [sparse.to_sparse(), None, None, tensors[3].conj(), None])
    assert torch.equal(layout.split(line)[0], sparse) and torch.equal(
        layout.split(line)[3], tensors[3].conj()
    )


ALIASED = {
    "expanded": lambda a, b: (a.sum(), b.sum()),
    "one gradient for two": lambda a, b: ((a + b).sum(), a.sum()),
    "one gradient for two, squared": lambda a, b: ((a + b).square().sum(), (a + b).square().sum()),
    "broadcast": lambda a, b: ((a * torch.ones(4, 1)).sum(), (b.expand(2, 3)).sum()),
    "views of one gradient": lambda a, b: (torch.cat([a, b]).square().sum(), torch.stack([a, b]).sin().sum()),
    "transposed": lambda a, b: ((a.view(3, 1).T * 2).sum(), b.flip(0).square().sum()),
}


@pytest.mark.parametrize("mode", ["exact", "weighting", "own"])
@pytest.mark.parametrize("name", ALIASED)
def test_gradients_have_memory_of_their_own(name: str, mode: str) -> None:
    a, b = (nn.Parameter(torch.randn(3)) for _ in range(2))
    losses = dict(zip("xy", ALIASED[name](a, b), strict=True))
    want = torch.autograd.grad(list(losses.values()), [a, b], retain_graph=True)
    method = Weighting(weights=(1, 1)) if mode == "weighting" else Spy()
    detente.backward(losses, method, **({"shared": []} if mode == "own" else {}))
    for parameter, gradient in zip((a, b), want, strict=True):
        assert torch.allclose(parameter.grad, gradient)
        assert torch._debug_has_internal_overlap(parameter.grad) == 0
    a.grad.mul_(3)
    assert torch.allclose(b.grad, want[1]) and torch.allclose(a.grad, 3 * want[0])
    norm = torch.nn.utils.clip_grad_norm_([a, b], 0.1)
    assert norm > 0.1 and torch.cat([a.grad, b.grad]).norm().item() == pytest.approx(0.1, rel=1e-3)
    torch.optim.SGD([a, b], lr=1).zero_grad(set_to_none=False)
    assert not a.grad.any() and not b.grad.any()


def test_a_scalar_gradient_shared_by_two_is_copied() -> None:
    a, b = (nn.Parameter(torch.tensor(2.0)) for _ in range(2))
    detente.backward([a + b], Spy(), shared=[])
    a.grad.zero_()
    assert b.grad.item() == 1


def test_accumulate_adds_to_every_kind_of_gradient() -> None:
    dense, sparse = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0]).to_sparse()
    for held, added in ((dense, dense), (dense, sparse), (sparse, sparse), (sparse, dense)):
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = held.clone()
        accumulate([(parameter, added), (parameter, added)])
        assert torch.equal(parameter.grad.to_dense(), held.to_dense() + 2 * added.to_dense())
        assert torch.equal(dense, torch.tensor([1.0, 2.0])) and torch.equal(
            sparse.to_dense(), torch.tensor([0.0, 5.0])
        )


def test_what_is_remembered_does_not_keep_a_model_alive() -> None:
    memory = Memory()
    keep, drop = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    memory.remember([keep, drop, keep])
    assert memory.shared() == [keep, drop]
    del drop
    gc.collect()
    assert memory.shared() == [keep]


def test_parameters_are_taken_from_anything_that_holds_them() -> None:
    linear, bare = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    nested = {"trunk": [linear, (linear.weight, bare)], "generator": (p for p in [bare])}
    assert as_tensors(nested, "shared") == (linear.weight, linear.bias, bare)
    for wrong in ("trunk", 3, ["trunk"], {"a": 1}, None):
        with pytest.raises(TypeError, match="shared= takes parameters or modules"):
            as_tensors(wrong, "shared")


def test_a_long_chain_is_walked_without_recursion() -> None:
    parameter = nn.Parameter(torch.ones(1))
    x = parameter * 1
    for _ in range(20_000):
        x = x + 1
    found = walk([x, x.square(), (parameter * 2).sum()])
    assert found.leaves == {parameter: 0b111} and found.overlap


def test_a_diamond_hands_down_every_loss() -> None:
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    x = a * b
    found = walk([x + b, x * 2, c * 1, b])
    assert found.leaves == {a: 0b0011, b: 0b1011, c: 0b0100}


def test_leaves_come_in_the_order_of_their_first_use() -> None:
    a, b, c, d = (nn.Parameter(torch.full((1,), float(number))) for number in range(4))
    first = a * b
    second = first * c + a  # a again
    losses = [(second * b).sum(), (second + first).sum() * d, d]
    assert list(walk(losses).leaves) == [a, b, c, d]
    assert list(walk(losses[::-1]).leaves) == [a, b, c, d]
    early, between = a * 1, b * 1
    for roots in ([early, between * a], [between * a, early]):
        assert list(walk(roots).leaves) == [a, b]


def test_a_walk_ends_where_it_is_told_to() -> None:
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    z = a * b
    stop = gradient_edge(z)
    one = walk([(z * c).sum()], [stop])
    assert one.leaves == {c: 1} and one.stops == {stop: 1} and not one.overlap
    two = walk([z * c, z * a, z], [stop])
    assert two.leaves == {c: 0b001, a: 0b010} and two.stops == {stop: 0b111} and not two.overlap
    assert walk([z * c]).leaves == {a: 1, b: 1, c: 1}
    twice = z * c
    assert walk([twice, twice]).overlap and walk([twice, twice]).leaves == {a: 3, b: 3, c: 3}


def test_a_step_inside_no_grad_is_a_step() -> None:
    trunk, head = nn.Linear(2, 2), nn.Parameter(torch.tensor(1.0))
    losses = [trunk(torch.ones(1, 2)).sum() * head, head]
    with torch.no_grad():
        detente.backward(losses, Spy())
    assert trunk.weight.grad is not None and head.grad is not None
    assert not head.grad.requires_grad and not trunk.weight.grad.requires_grad
