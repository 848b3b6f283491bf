"""Tasks that reach nothing that is shared, and gradients that are zero now and then; values by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from twins.small import DOUBLE, FORMS, PICKED, ByName, ByNumber, Two, grad, number

import detente

# ---- tasks that reach no shared parameter


class Detached(nn.Module):
    """z = w = (2, 1); a (4, 1)·z = 9 a and b (2, -3)·z = b, and three tasks that see z without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = number([2.0, 1.0]), number(1.0), number(1.0)
        self.book, self.probe, self.temperature = number([1.0, 1.0]), number(3.0), number(0.5)

    def losses(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        far = z.detach()
        return {
            "codebook": (self.book - far).square().sum(),  # (-2, 0)
            "a": self.a * (torch.tensor([4.0, 1.0], dtype=DOUBLE) * z).sum(),
            "probe": (self.probe * far).square().sum(),  # 2 · 3 · 5
            "b": self.b * (torch.tensor([2.0, -3.0], dtype=DOUBLE) * z).sum(),
            "temperature": self.temperature * far.sum(),  # 3
        }


ROWS = torch.tensor([[4.0, 1.0], [2.0, -3.0]], dtype=DOUBLE)
SPACES = ("exact", "low", "batched", "features", "layer")


def _step(
    name: str, space: str, form: str = "apart"
) -> tuple[Detached, detente.StepRecord, detente.Combination]:
    net, method = Detached(), detente.create(name)
    z = net.w * 1.0
    options: dict[str, Any] = {
        "features": {"features": z},
        "layer": {"solve_on": [net.w]},
        "low": {"memory": "low"},
        "batched": {"memory": "batched"},
    }.get(space, {})
    made = net.losses(z)
    losses = dict(zip(made, FORMS[form](list(made.values())), strict=True))
    record = detente.backward(losses, method, **options)
    return net, record, detente.combine(detente.create(name), ROWS, {"a": 9.0, "b": 1.0})


def _fits(name: str, space: str) -> bool:
    info = detente.methods()[name]
    named = {"low": "exact", "batched": "exact"}.get(space, space)
    return info.heads == "own" and named in info.spaces and not (space == "low" and "jacobian" in info.needs)


@pytest.mark.parametrize(
    "name, space",
    [(name, space) for name in detente.methods() for space in SPACES if _fits(name, space)],
)
def test_a_task_that_reaches_nothing_shared_is_left_out(name: str, space: str) -> None:
    net, record, right = _step(name, space)
    _assert_left_out(net, record)
    if "activations" not in detente.methods()[name].needs or space != "features":
        assert right.direction is not None and grad(net.w) == pytest.approx(right.direction.tolist())
    if right.weights is None:
        assert list(record.weights) == [None] * 5
    else:
        a, b = right.weights.tolist()
        got = list(record.weights)
        assert got == [None, pytest.approx(a, rel=1e-9), None, pytest.approx(b, rel=1e-9), None]


@pytest.mark.parametrize("form", PICKED)
@pytest.mark.parametrize("name", ["mgda", "nash-mtl", "upgrad", "cagrad", "imtl-g", "db-mtl"])
def test_it_is_left_out_behind_a_packing_node_too(name: str, form: str) -> None:
    net, record, right = _step(name, "exact", form)
    _assert_left_out(net, record)
    assert right.direction is not None and grad(net.w) == pytest.approx(right.direction.tolist())


def _assert_left_out(net: Detached, record: detente.StepRecord) -> None:
    assert grad(net.book) == [-2.0, 0.0] and grad(net.probe) == 30.0 and grad(net.temperature) == 3.0
    assert grad(net.a) == 9.0 and grad(net.b) == 1.0
    assert set(record.dropped) >= {"codebook", "probe", "temperature"} and record.accepted
    for name in ("codebook", "probe", "temperature"):
        assert any(name in note for note in record.notes), f"{name}: {record.notes}"
    assert record.names == ("codebook", "a", "probe", "b", "temperature") and len(record.losses) == 5


@pytest.mark.parametrize("space", ["exact", "features", "layer"])
@pytest.mark.parametrize("name", ["uniform", "static", "rlw", "uncertainty", "dwa", "famo", "gls", "imtl-l"])
def test_weightings_weight_it_still(name: str, space: str) -> None:
    if space not in detente.methods()[name].spaces:
        return
    net, record, _ = _step(name, space)
    weights = list(record.weights)
    assert all(isinstance(weight, float) for weight in weights)
    right = detente.combine(
        detente.create(name), torch.eye(5, dtype=DOUBLE), dict(zip(record.names, record.losses, strict=True))
    )
    assert right.weights is not None and weights == pytest.approx(right.weights.tolist())
    assert grad(net.book) == pytest.approx([-2 * weights[0], 0.0])
    assert grad(net.probe) == pytest.approx(30 * weights[2])
    assert grad(net.w) == pytest.approx((weights[1] * ROWS[0] + weights[3] * ROWS[1]).tolist())


def test_a_vector_quantiser_trains_its_encoder() -> None:
    for name in ("mgda", "edm", "imtl-g", "nash-mtl", "fairgrad", "inexact-mgda"):
        encoder, decoder, book = number(1.0), number(1.0), number(0.5)
        z = encoder * 2.0  # quantised to 0.5, passed straight through: 0.5 · 1 against 2
        losses = {
            "reconstruction": (decoder * (z + (book - z).detach()) - 2).square(),
            "codebook": (book - z.detach()).square(),
            "commitment": (z - book.detach()).square(),
        }
        record = detente.backward(losses, detente.create(name))
        # d/dz: 2 (0.5 - 2) = -3 and 2 (2 - 0.5) = 3; by the encoder -6 and 6: they cancel, and nothing else does.
        assert "codebook" in record.dropped and list(record.weights)[1] is None
        if record.accepted:
            assert grad(book) == -3.0 and grad(decoder) == -1.5
            assert grad(encoder) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("name", ["db-mtl", "graddrop", "moco"])
def test_weights_can_always_be_logged(name: str) -> None:
    _, record, _ = _step(name, "exact")
    assert [w for w in record.weights] == [None] * 5  # noqa: C416 - as people write it
    net = Two(c=0.0)
    method = detente.create(name)
    for names in ("ab", "b", "ab"):
        net.zero_grad()
        made = dict(zip("ab", net.losses(), strict=True))
        record = detente.backward({name: made[name] for name in names}, method)
        assert len([w for w in record.weights]) == len(names)  # noqa: C416
        assert record.to_dict()["weights"] == list(record.weights)
    with detente.accumulate(method, 2):
        for _ in range(2):
            record = detente.backward(dict(zip("ab", net.losses(), strict=True)), method)
            assert len([w for w in record.weights]) == 2  # noqa: C416


def test_a_task_alone_on_the_trunk_leaves_nothing_shared() -> None:
    net = Detached()
    losses = {name: loss for name, loss in net.losses(net.w * 1.0).items() if name in ("a", "probe")}
    record = detente.backward(losses, detente.create("mgda"))
    assert grad(net.w) == [4.0, 1.0] and grad(net.a) == 9.0 and grad(net.probe) == 30.0
    assert record.space == "none" and any("no shared parameters" in note for note in record.notes)


# ---- gradients that are zero, now and then


class Gated(nn.Module):
    """m (1 + 1) w for a; (gate m + 1) w b for b; m w c for c: m is shared, and dead for b at gate 0. All are 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.m, self.a, self.b, self.c = (number(1.0) for _ in range(5))

    def losses(self, gate: float, names: str) -> dict[str, torch.Tensor]:
        made = {
            "a": (self.m + 1) * self.w * self.a,  # w: 2, m: 1, a: 2
            "b": (gate * self.m + 1) * self.w * self.b,  # w: gate + 1, m: gate, b: gate + 1
            "c": self.m * self.w * self.c,  # 1, 1, 1
        }
        return {name: made[name] for name in names}


@pytest.mark.parametrize("names", ["ab", "abc"])
@pytest.mark.parametrize("form", ["apart", "stack", "list", "masked", "function", "vector"])
@pytest.mark.parametrize("gates", [(0, 1, 0, 0), (1, 0, 1), (1, 0, 0), (1, 1, 0), (0, 0, 1, 0)])
def test_what_was_shared_once_stays_shared_when_a_gradient_vanishes(
    gates: tuple[int, ...], form: str, names: str
) -> None:
    net, method, seen = Gated(), ByName(), form == "apart" or "c" in names
    for gate in gates:
        net.zero_grad()
        made = net.losses(gate, names)
        record = detente.backward(dict(zip(made, FORMS[form](list(made.values())), strict=True)), method)
        seen = seen or gate == 1
        c = 5 if "c" in names else 0
        assert grad(net.w) == 2 * 2 + 3 * (gate + 1) + c
        assert [grad(net.a), grad(net.b)] == [2.0, gate + 1.0]
        weighted = 2 * 1 + 3 * gate + c
        # Until b is seen to move m, nothing tells m from a head of a.
        assert grad(net.m) in ([weighted] if seen else [weighted, 1.0])
        assert list(record.weights) == [{"a": 2.0, "b": 3.0, "c": 5.0}[name] for name in names]


@pytest.mark.parametrize("form", ["stack", "list", "vector"])
def test_heads_of_absent_tasks_stay_heads(form: str) -> None:
    """All heads lie behind the packing node in every step, also those of losses that are not passed on."""
    net, method = Gated(), ByName()
    for present in ("ab", "abc", "c", "bc", "abc"):
        net.zero_grad()
        made = net.losses(1.0, "abc")
        picked = dict(zip(made, FORMS[form](list(made.values())), strict=True))
        detente.backward({name: picked[name] for name in present}, method)
        for name, own in (("a", 2.0), ("b", 2.0), ("c", 1.0)):
            assert (grad(getattr(net, name)) or 0.0) == (own if name in present else 0.0)
        weights = {"a": 2, "b": 3, "c": 5}
        assert grad(net.m) == sum(weights[name] for name in present)


@pytest.mark.parametrize("form", ["apart", "stack", "list"])
def test_a_task_without_a_gradient_stays_in_and_the_record_says_so(form: str) -> None:
    """Two steps: b is alive, then its gradient is zero on everything that is shared."""
    net, method = Two(c=2.0), detente.create("mgda")
    for c in (2.0, 1.0):  # at c = 1 the second loss is at its minimum
        net.zero_grad()
        net.c = c
        record = detente.backward(dict(zip("ab", FORMS[form](net.losses()), strict=True)), method)
    assert record.status == "stationary" and list(record.weights) == pytest.approx([0.0, 1.0])
    assert grad(net.w) == 0.0 and grad(net.a) == 2.0 and record.dropped == ()
    assert any("b" in note and "stationary" in note for note in record.notes)


def test_a_zero_gradient_makes_no_head_where_nothing_is_packed() -> None:
    net = Gated()
    record = detente.backward(net.losses(0.0, "ab"), ByName())
    assert grad(net.m) == 2.0 and list(record.weights) == [2.0, 3.0] and record.dropped == ()


def test_gradients_that_are_not_finite_are_no_evidence() -> None:
    """√0 has an infinite slope, and 0 · ∞ under the other loss is no number: the head stays a head."""
    net, method = Two(c=0.0), ByNumber()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for a in (0.0, 4.0):
        net.zero_grad()
        with torch.no_grad():
            net.a.fill_(a)
        z = net.w * 1.0
        losses = list(torch.stack([net.a * z, net.b * z]).sqrt())
        if a == 0.0:
            record = detente.backward(losses, method, scaler=scaler)
            assert not all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
        else:
            record = detente.backward(losses, method)
    # d√(a z): by z a / (2 √a) = 1, by a 1/4; d√(b z): 1/2 each.
    assert list(record.weights) == [2.0, 3.0]
    assert [grad(net.w), grad(net.a), grad(net.b)] == pytest.approx([2 * 1 + 3 * 0.5, 0.25, 0.5])


def test_an_error_leaves_the_owners_as_they_were() -> None:
    net, method = Two(c=0.0), ByNumber()
    with torch.no_grad():
        net.a.zero_()
    z = net.w * 1.0
    with pytest.raises(ValueError, match="task '0'"):
        detente.backward(list(torch.stack([net.a * z, net.b * z]).sqrt()), method)
    assert all(parameter.grad is None for parameter in net.parameters())
    with torch.no_grad():
        net.a.fill_(2.0)
    detente.backward(FORMS["stack"](net.losses()), method)
    assert [grad(net.w), grad(net.a), grad(net.b)] == [14.0, 2.0, 2.0]
