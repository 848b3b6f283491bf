"""Wrappers against computations by hand, and what they hand on."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import detente
from detente.methods.registry import UnknownOption, info_of
from detente.methods.wrappers import Every, Normalize, PerBlock, Smooth, Wrapper

NAMES = ("a", "b", "c")


def matrices(count: int, tasks: int = 3, columns: int = 8) -> list[torch.Tensor]:
    random = np.random.default_rng([count, tasks])
    return [torch.from_numpy(random.normal(size=(tasks, columns))) for _ in range(count)]


def losses(*values: float, names: tuple[str, ...] = NAMES) -> dict[str, float]:
    return dict(zip(names, values, strict=False))


def weights(method: detente.Method, matrix: torch.Tensor, values: Any = None) -> list[float]:
    found = detente.combine(method, matrix, values).weights
    assert found is not None
    return found.tolist()


def model() -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh()).double()
    return trunk, [nn.Linear(5, 1).double() for _ in NAMES]


def model_losses(trunk: nn.Module, heads: list[nn.Module], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 4, dtype=torch.float64, generator=generator)
    targets = torch.randn(3, 16, 1, dtype=torch.float64, generator=generator)
    z = trunk(inputs)
    return {name: (head(z) - y).square().mean() for name, head, y in zip(NAMES, heads, targets, strict=True)}


class Counting(detente.Method):
    """Count the calls: weights of the call's number."""

    declares = detente.Declaration(
        name="counting", source="this test", needs=frozenset({"gramian"}), stateful=True
    )

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.epochs = 0
        self.heard: list[Any] = []
        self.answers: list[str] = []

    def solve(self, gradients: detente.TaskGradients) -> detente.Combination:
        """The number of the call."""
        self.calls = self.calls + 1
        status: Any = self.answers.pop(0) if self.answers else "ok"
        return detente.Combination(
            weights=torch.full((gradients.tasks,), float(self.calls)).double(), status=status
        )

    def end_epoch(self) -> None:
        """Count."""
        self.epochs += 1

    def after_step(self, losses: Any) -> None:
        """Keep."""
        self.heard.append(losses)


# ---- every


def test_every_asks_in_every_kth_step() -> None:
    inner = Counting()
    method = Every(inner, k=3)
    assert [weights(method, m)[0] for m in matrices(8)] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert weights(Every(Counting(), k=1), matrices(1)[0]) == [1, 1, 1]


def test_every_takes_no_task_gradients_in_between() -> None:
    trunk, heads = model()
    method = Every(detente.create("mgda"), k=3)
    reference = detente.create("mgda")
    kept: tuple[float, ...] | None = None
    for step in range(5):
        for parameter in trunk.parameters():
            parameter.grad = None
        record = detente.backward(model_losses(trunk, heads, step), method)
        found = [parameter.grad.clone() for parameter in trunk.parameters() if parameter.grad is not None]
        if step % 3 == 0:
            kept = detente.backward(model_losses(trunk, heads, step), copy.deepcopy(reference)).weights
            assert record.space == "exact" and record.raw is not None
        else:
            assert record.space == "none" and record.raw is None
            assert record.notes == (f"weights of {step % 3} step{'s' if step % 3 > 1 else ''} ago",)
        assert kept is not None and record.weights == pytest.approx(kept)
        given = model_losses(trunk, heads, step).values()
        total = torch.stack([weight * loss for weight, loss in zip(kept, given, strict=True)]).sum()
        expected = torch.autograd.grad(total, list(trunk.parameters()))
        assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    plain = torch.autograd.grad(model_losses(trunk, heads, 0)["b"], list(heads[1].parameters()))
    for parameter in heads[1].parameters():
        parameter.grad = None
    detente.backward(model_losses(trunk, heads, 0), method)  # in between: heads still take plain gradients
    assert all(
        torch.allclose(p.grad, g)
        for p, g in zip(heads[1].parameters(), plain, strict=True)
        if p.grad is not None
    )


def test_every_asks_again_after_a_step_that_was_no_good() -> None:
    inner = Counting()
    inner.answers = ["refused", "stationary", "ok"]
    method = Every(inner, k=2)
    outcomes = [detente.combine(method, m) for m in matrices(5)]
    assert [outcome.status for outcome in outcomes] == ["refused", "stationary", "ok", "ok", "ok"]
    assert [float(outcome.weights[0]) for outcome in outcomes if outcome.weights is not None] == [
        1,
        2,
        3,
        3,
        4,
    ]


def test_every_gives_an_unknown_task_the_mean_weight() -> None:
    method = Every(detente.create("mgda"), k=4)
    matrix = torch.diag(torch.tensor([1.0, 2.0, 1.0]))
    weights(method, matrix[:2], losses(1, 1))
    assert weights(method, matrix, losses(1, 1, 1)) == pytest.approx([0.8 / 1.5, 0.2 / 1.5, 0.5 / 1.5])
    assert weights(method, matrix[[1]], losses(1, names=("b",))) == [1.0]


def test_every_hands_on_epochs_and_the_losses_of_its_own_steps() -> None:
    inner = Counting()
    method = Smooth(Every(inner, k=2))
    for step, matrix in enumerate(matrices(4)):
        detente.combine(method, matrix)
        method.after_step([step])
        method.end_epoch()
    assert inner.heard == [[0], [2]] and inner.epochs == 4


# ---- smooth


def test_smooth_is_a_moving_mean_of_the_weights() -> None:
    method, reference = Smooth(detente.create("mgda"), beta=0.7), detente.create("mgda")
    expected = None
    for matrix in matrices(6):
        new = np.array(weights(reference, matrix))
        expected = new if expected is None else 0.7 * expected + 0.3 * new
        assert weights(method, matrix) == pytest.approx(expected.tolist())


def test_smooth_is_torchjds_cr_mogm() -> None:
    from torchjd.aggregation import CRMOGMWeighting, UPGradWeighting

    reference = CRMOGMWeighting(UPGradWeighting(), alpha=0.9)
    if "upgrad" not in detente.methods():
        pytest.skip("upgrad is not there")
    method = Smooth(detente.create("upgrad"), beta=0.9)
    for matrix in matrices(4):
        assert weights(method, matrix) == pytest.approx(reference(matrix @ matrix.T).tolist(), rel=1e-3)


def test_smooth_keeps_the_weights_of_absent_tasks() -> None:
    method = Smooth(detente.create("mgda"), beta=0.5)
    weights(method, torch.diag(torch.tensor([1.0, 2.0, 2.0])), losses(1, 1, 1))  # 2/3, 1/6, 1/6
    pair = losses(1, 1, names=("b", "c"))
    assert weights(method, torch.diag(torch.tensor([1.0, 2.0])), pair) == pytest.approx(
        [(1 / 12 + 0.4) / (1 / 6 + 0.5), (1 / 12 + 0.1) / (1 / 6 + 0.5)]
    )
    assert float(method.kept[0, 0]) == pytest.approx(2 / 3)


# ---- per block


@pytest.mark.parametrize("name", ["mgda", "pcgrad", "aligned-mtl", "gradvac", "moco", "uniform"])
@pytest.mark.parametrize("by", ["layer", "tensor"])
def test_per_block_is_the_method_on_each_block(name: str, by: str) -> None:
    options = {"order": "fixed"} if name in ("pcgrad", "gradvac") else {}
    trunk, heads = model()
    method = PerBlock(detente.create(name, **options), by=by)  # type: ignore[arg-type]
    tensors = list(trunk.parameters())
    groups = [tensors[:2], tensors[2:]] if by == "layer" else [[tensor] for tensor in tensors]
    parts = [detente.create(name, **options) for _ in groups]
    for step in range(3):
        given = model_losses(trunk, heads, step)
        for parameter in tensors:
            parameter.grad = None
        record = detente.backward(given, method)
        assert set(record.weights) == {None} and record.space == "exact"
        for group, part in zip(groups, parts, strict=True):
            rows = [
                torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, group, retain_graph=True)])
                for loss in model_losses(trunk, heads, step).values()
            ]
            expected = detente.combine(part, torch.stack(rows), model_losses(trunk, heads, step)).direction
            actual = torch.cat([tensor.grad.reshape(-1) for tensor in group if tensor.grad is not None])
            assert expected is not None and torch.allclose(actual, expected, rtol=1e-9, atol=1e-12)


def test_per_block_counts_refusals_and_moves_the_other_blocks() -> None:
    class Picky(detente.Method):
        """Refuse gradients of opposite sign."""

        declares = detente.Declaration(name="picky", source="this test", needs=frozenset({"gramian"}))

        def solve(self, gradients: detente.TaskGradients) -> detente.Combination:
            """Plain sums."""
            assert gradients.gramian is not None
            status: Any = "refused" if gradients.gramian[0, 1] < 0 else "ok"
            return detente.Combination(weights=torch.ones(2, dtype=torch.float64), status=status)

    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    record = detente.backward([a + b, a - b], PerBlock(Picky(), by="tensor"))
    assert record.accepted and record.notes == ("refused in 1 of 2 blocks",)
    assert a.grad is not None and b.grad is not None and (a.grad.item(), b.grad.item()) == (2.0, 0.0)
    a.grad = b.grad = None
    record = detente.backward([a + b, -a - b], PerBlock(Picky(), by="tensor"))
    assert not record.accepted and a.grad is None and b.grad is None


def test_layers_are_weights_with_the_small_tensors_after_them() -> None:
    seen: list[detente.TaskGradients] = []

    class Looking(detente.Method):
        """Look at the blocks."""

        declares = detente.Declaration(
            name="looking", source="this test", needs=frozenset({"gramian", "blocks"}), gives="blocks"
        )

        def solve(self, gradients: detente.TaskGradients) -> detente.Combination:
            """One weight for each block."""
            seen.append(gradients)
            return detente.Combination(block_weights=torch.ones(len(gradients.block_sizes), 2).double())

    trunk = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False), nn.Linear(2, 2))
    z = trunk(torch.ones(5, 3))
    detente.backward([z.sum(), z.square().sum()], Looking())
    gradients = seen[0]
    assert gradients.block_sizes == (12, 4, 4, 4, 8, 4, 2) and gradients.block_layers == (0, 0, 0, 0, 1, 2, 2)
    assert gradients.block_names[0] == "0 [4, 3]"
    assert (
        gradients.block_gramians is not None
        and gradients.gramian is not None
        and gradients.jacobian is not None
    )
    pieces = gradients.jacobian.double().split(gradients.block_sizes, dim=1)
    for piece, gramian in zip(pieces, gradients.block_gramians, strict=True):
        assert np.allclose((piece @ piece.T).numpy(), gramian)
    assert np.allclose(gradients.block_gramians.sum(axis=0), gradients.gramian)
    for method in (detente.create("mgda"), Every(detente.create("mgda"))):
        assert "blocks" not in method.needs_now()


# ---- normalize


def test_normalize_makes_the_lengths_equal() -> None:
    matrix = matrices(1)[0] * torch.tensor([[1.0], [50.0], [0.1]])
    units = matrix / matrix.norm(dim=1, keepdim=True)
    for name in ("uniform", "mgda", "pcgrad", "graddrop"):
        inner = detente.combine(detente.create(name), units).direction
        outer = detente.combine(Normalize(detente.create(name)), matrix).direction
        assert inner is not None and outer is not None
        assert torch.allclose(outer, inner * matrix.norm(dim=1).mean(), rtol=1e-9)


@pytest.mark.parametrize("by", ["l2", "loss", "loss+"])
def test_normalize_raw_is_what_mgda_calls_normalize(by: Any) -> None:
    values = losses(0.3, 2.0, 7.0)
    for matrix in matrices(4):
        expected = weights(detente.create("mgda", normalize=by), matrix, values)
        assert weights(
            Normalize(detente.create("mgda"), by=by, apply="raw"), matrix, values
        ) == pytest.approx(expected)


def test_normalize_by_loss_is_the_gradient_of_the_logarithm() -> None:
    matrix, values = matrices(1)[0], (0.5, 2.0, 3.5)
    method = Normalize(detente.create("uniform"), by="loss")
    assert not info_of(method).takes_gradients
    expected = sum(row / value for row, value in zip(matrix, values, strict=True)) * np.mean(values)
    actual = detente.combine(method, matrix, losses(*values)).direction
    assert actual is not None and torch.allclose(actual, expected)
    with pytest.raises(ValueError, match=r"normalize\(uniform\) divides by the losses.*'b' is -1"):
        detente.combine(method, matrix, losses(1.0, -1.0, 1.0))


def test_normalize_carries_transforms_back_to_the_given_gradients() -> None:
    matrix = matrices(1)[0] * torch.tensor([[1.0], [50.0], [0.1]])
    outcome = detente.combine(Normalize(detente.create("pcgrad", order="fixed")), matrix)
    direct = detente.combine(detente.create("pcgrad", order="fixed"), matrix)
    assert outcome.transform is not None and direct.transform is not None
    sizes = matrix.norm(dim=1) / matrix.norm(dim=1).mean()  # projections do not depend on lengths
    assert torch.allclose(outcome.transform @ matrix, direct.transform @ matrix / sizes[:, None])


# ---- all of them


def test_by_name_or_by_class() -> None:
    method = detente.wrap("every", detente.wrap("smooth", detente.create("mgda"), beta=0.5), k=7)
    assert isinstance(method, Every) and method.k == 7 and isinstance(method.method, Smooth)
    assert method.declares.name == "every(smooth(mgda))" and info_of(method).options["k"].default == 5
    known = ["adaptive", "every", "inexact", "normalize", "per-block", "smooth"]
    assert sorted(detente.wrappers.registered()) == known
    assert all(info.summary.endswith(".") and info.source for info in detente.wrappers.registered().values())


def test_what_cannot_be_wrapped_says_why() -> None:
    for name in ("every", "smooth"):
        with pytest.raises(
            ValueError, match=f"{name} cannot be wrapped around graddrop: graddrop gives only a direction"
        ):
            detente.wrap(name, detente.create("graddrop"))
    with pytest.raises(ValueError, match=r"per-block cannot be wrapped around gradvac: .* block to block"):
        PerBlock(detente.create("gradvac", group="layer"))
    with pytest.raises(ValueError, match="graddrop gives only a direction"):
        Normalize(detente.create("graddrop"), apply="raw")
    with pytest.raises(
        TypeError, match=r"every wraps a method, not a str. Create it first: detente.create\('mgda'\)"
    ):
        Every("mgda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown wrapper 'evry'"):
        detente.wrap("evry", detente.create("mgda"))
    with pytest.raises(UnknownOption, match="every has no option 'n'; it has k"):
        detente.wrap("every", detente.create("mgda"), n=3)
    for bad in ({"k": 0}, {"k": None}, {"k": 1.5}):
        with pytest.raises(ValueError, match="k"):
            detente.wrap("every", detente.create("mgda"), **bad)
    with pytest.raises(ValueError, match="beta"):
        Smooth(detente.create("mgda"), beta=1.0)


def test_a_method_that_forgot_to_declare_its_direction_is_told() -> None:
    class Forgetful(detente.Method):
        """Give a direction."""

        declares = detente.Declaration(name="forgetful", source="this test", needs=frozenset({"jacobian"}))

        def solve(self, gradients: detente.TaskGradients) -> detente.Combination:
            """The first gradient."""
            assert gradients.jacobian is not None
            return detente.Combination(direction=gradients.jacobian[0].clone())

    with pytest.raises(ValueError, match=r"smooth\(forgetful\) works on weights.*gives='direction'"):
        detente.combine(Smooth(Forgetful()), matrices(1)[0])


@pytest.mark.parametrize("name", sorted(detente.methods()))
def test_methods_give_what_they_declare(name: str) -> None:
    info = detente.methods()[name]
    outcome = detente.combine(name, matrices(1)[0], losses(0.5, 1.0, 2.0))
    assert (outcome.weights is not None) == (info.gives == "weights")


def test_a_method_made_of_a_wrapper_can_be_registered() -> None:
    class Guarded(Wrapper):
        """Refuse a direction shorter than a bound."""

        name, source = "guarded", "this test"

        def __init__(self, method: detente.Method, *, bound: float = 0.0) -> None:
            super().__init__(method)
            self.bound = bound
            self.derive()

        def solve(self, gradients: detente.TaskGradients) -> detente.Combination:
            """What the method found, or a refusal."""
            result = self.method.combine(gradients)
            assert result.weights is not None and gradients.gramian is not None
            found = result.weights.numpy()
            short = found @ gradients.gramian @ found < self.bound**2
            return detente.Combination(weights=result.weights, status="refused" if short else result.status)

    class GuardedMGDA(Guarded):
        """Guarded MGDA: refuse short steps."""

        declares = detente.Declaration(
            name="guarded-mgda", source="this test", needs=frozenset({"gramian"}), native_scale="simplex"
        )

        def __init__(self, *, bound: float = 0.0, solver: str = "exact") -> None:
            super().__init__(detente.create("mgda", solver=solver), bound=bound)

    assert info_of(Guarded(detente.create("mgda"))).name == "guarded(mgda)"
    detente.register(GuardedMGDA)
    try:
        assert set(detente.methods()["guarded-mgda"].options) == {"bound", "solver"}
        method = detente.create("guarded-mgda", bound=1.0)
        assert detente.combine(method, torch.eye(2)).status == "refused"
        assert detente.combine(method, 2 * torch.eye(2)).status == "ok"
    finally:
        detente.unregister("guarded-mgda")


def test_tasks_named_beforehand_reach_the_wrapped_method() -> None:
    inner = detente.create("aligned-mtl", preference=[3, 2, 1])
    method = Every(Smooth(inner))
    method.bind(NAMES)
    assert inner.tasks == NAMES
    detente.combine(method, matrices(1)[0][:2], losses(1, 1))  # two of three: the preference still fits
    inner = detente.create("mgda", tasks=["c", "b", "a"])
    method = Every(inner)
    detente.combine(method, matrices(1)[0], losses(1, 1, 1))
    assert inner.tasks == ("c", "b", "a") and set(method.tasks or ()) == set(NAMES)


# ---- further batches


def test_further_batches_are_refused_where_they_do_not_belong() -> None:
    trunk, heads = model()
    batch = lambda seed=0: model_losses(trunk, heads, seed)  # noqa: E731
    with pytest.raises(ValueError, match="mgda looks at one batch only"):
        detente.backward(batch(), detente.create("mgda"), extra=[batch(1)])
    modo = detente.create("modo")
    with pytest.raises(ValueError, match="modo takes 2 further batches, and extra= holds 1"):
        detente.backward(batch(), modo, extra=[batch(1)])
    with pytest.raises(TypeError, match="a list with the losses of each further batch"):
        detente.backward(batch(), modo, extra=batch(1))  # type: ignore[arg-type]
    fewer = {name: loss for name, loss in batch(2).items() if name != "c"}
    with pytest.raises(ValueError, match=r"extra\[1\]: the tasks are a, b, and those of the step a, b, c"):
        detente.backward(batch(), modo, extra=[batch(1), fewer])
    broken = batch(1)
    broken["b"] = broken["b"] * torch.nan
    with pytest.raises(ValueError, match=r"extra\[0\]: the loss of task 'b' is not finite"):
        detente.backward(batch(), modo, extra=[broken, batch(2)])
    other = model_losses(*model(), 1)
    with pytest.raises(ValueError, match=r"extra\[0\]: no loss reaches a shared parameter"):
        detente.backward(batch(), modo, extra=[other, batch(2)])
    assert modo.tasks is None and all(parameter.grad is None for parameter in trunk.parameters())


@pytest.mark.parametrize("space", ["exact", "layer"])
def test_further_batches_inform_and_nothing_else(space: str) -> None:
    trunk, heads = model()
    layer = list(trunk.parameters())[2:]
    how: dict[str, Any] = {"solve_on": layer} if space == "layer" else {}
    seen: list[detente.TaskGradients] = []

    class Looking(detente.Method):
        """Look at three batches."""

        declares = detente.Declaration(
            name="looking", source="this test", needs=frozenset({"gramian", "jacobian", "batches:3"})
        )

        def solve(self, gradients: detente.TaskGradients) -> detente.Combination:
            """Plain sums."""
            seen.append(gradients)
            return detente.Combination(weights=torch.ones(gradients.tasks, dtype=torch.float64))

    reordered = dict(reversed(model_losses(trunk, heads, 1).items()))
    extra = [reordered, model_losses(trunk, heads, 2)]
    detente.backward(model_losses(trunk, heads, 0), Looking(), extra=extra, **how)
    tensors = layer if space == "layer" else list(trunk.parameters())
    assert len(seen[0].extra) == 2
    for seed, gradients in enumerate((seen[0], *seen[0].extra)):
        assert gradients.space == space and gradients.names == NAMES and gradients.jacobian is not None
        for row, loss in zip(gradients.jacobian, model_losses(trunk, heads, seed).values(), strict=True):
            expected = torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad(loss, tensors, retain_graph=True)]
            )
            assert torch.allclose(row, expected)
    total = torch.stack(list(model_losses(trunk, heads, 0).values())).sum()
    for parameter, expected in zip(
        trunk.parameters(), torch.autograd.grad(total, list(trunk.parameters())), strict=True
    ):
        assert parameter.grad is not None and torch.allclose(parameter.grad, expected)
