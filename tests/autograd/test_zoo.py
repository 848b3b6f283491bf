"""Every mode of the engine over a zoo of odd models, against one ``autograd.grad`` per loss and parameter."""

from __future__ import annotations

import pytest
import torch
from twins.engine import TOLERANCE, Spy, Weighting, assert_grads, expected, gradient, row
from twins.zoo import NO_VMAP, ZOO, Specimen

import detente

MODES = ("exact", "batched", "features", "layer", "weighting", "weighting on features")


def _weights(tasks: int) -> list[float]:
    return [0.3 + 0.9 * ((7 * task) % 5) for task in range(tasks)]


def _step(name: str, mode: str) -> tuple[Specimen, dict[str, torch.Tensor], list[torch.Tensor], dict]:
    torch.manual_seed(3)
    specimen = ZOO[name]()
    features = specimen.encode()
    options = {
        "exact": {},
        "batched": {"memory": "batched"},
        "features": {"features": features},
        "layer": {"solve_on": specimen.layer},
        "weighting": {},
        "weighting on features": {"features": features},
    }[mode]
    return specimen, specimen.heads(features), features, options


def _shared(losses: dict[str, torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t for t in tensors if sum(gradient(loss, t) is not None for loss in losses.values()) > 1]


def _behind(features: list[torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """What lies behind the features; a feature that is a parameter lies behind itself."""
    return [t for t in tensors if any(f is t or gradient(f.abs().sum(), t) is not None for f in features)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ZOO)
def test_given_weights_give_the_weighted_gradient_in_every_mode(name: str, mode: str) -> None:
    specimen, losses, features, options = _step(name, mode)
    weights = _weights(len(losses))
    known = _behind(features, specimen.parameters) if "features" in mode else []
    heads = "weighted" if "weighting" in mode else "own"
    want = expected(losses, specimen.parameters, weights, heads=heads, shared=known)
    if mode == "batched" and name in NO_VMAP:
        with pytest.raises(RuntimeError, match="Use memory='fast'"):
            detente.backward(losses, Spy(weights=weights), **options)
        assert all(parameter.grad is None for parameter in specimen.parameters)
        return
    method = Weighting(weights=weights) if "weighting" in mode else Spy(weights=weights)
    record = detente.backward(losses, method, **options)
    close = {"rtol": 1e-5, "atol": 1e-6} if name == "mixed_dtypes" else TOLERANCE
    assert_grads(specimen.parameters, want, **close)
    assert record.accepted and record.names == tuple(losses) and record.weights == tuple(weights)
    assert record.losses == pytest.approx([loss.item() for loss in losses.values()], rel=1e-14)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name in ZOO
        for mode in ("exact", "batched", "features", "layer")
        if mode != "batched" or name not in NO_VMAP
    ],
)
def test_the_method_sees_the_gradients_of_every_task(name: str, mode: str) -> None:
    specimen, losses, features, options = _step(name, mode)
    if mode == "features":
        # The heads alone, from copies of the features: the others are then held fixed, nested or not.
        torch.manual_seed(3)
        again = ZOO[name]()
        copies = [feature.detach().clone().requires_grad_() for feature in again.encode()]
        want = torch.stack([row(loss, copies) for loss in again.heads(copies).values()])
        if name == "tied_to_encoder":
            assert torch.equal(
                torch.cat([f.reshape(-1) for f in copies]), torch.cat([f.reshape(-1) for f in features])
            )
    else:
        tensors = specimen.layer if mode == "layer" else _shared(losses, specimen.parameters)
        want = torch.stack([row(loss, tensors) for loss in losses.values()])
    spy = Spy()
    record = detente.backward(losses, spy, **options)
    assert spy.seen is not None and spy.seen.jacobian is not None and spy.seen.gramian is not None
    got = spy.seen.jacobian.double()
    close = {"rtol": 1e-5, "atol": 1e-6} if name == "mixed_dtypes" else TOLERANCE
    if mode in ("exact", "batched"):  # the order of the columns is the engine's affair
        got, want = (matrix[:, (matrix != 0).any(dim=0)] for matrix in (got, want))
        assert got.shape == want.shape
        assert torch.allclose(got.sort(dim=1).values, want.sort(dim=1).values, **close)
    else:
        assert torch.allclose(got, want, **close)
    assert torch.allclose(torch.from_numpy(spy.seen.gramian), want @ want.T, **close)
    assert record.space == spy.seen.space == ("exact" if mode == "batched" else mode)
    if mode == "features":
        flat = torch.cat(
            [(torch.view_as_real(f) if f.is_complex() else f).detach().reshape(-1).double() for f in features]
        )
        assert spy.seen.activations is not None and torch.equal(spy.seen.activations.double(), flat)
    else:
        assert spy.seen.activations is None


@pytest.mark.parametrize("mode", ["exact", "features", "layer", "weighting"])
@pytest.mark.parametrize(
    "name", ["plain", "nested_features", "tied_to_encoder", "checkpointed", "lstm", "in_place"]
)
def test_retain_graph_keeps_everything(name: str, mode: str) -> None:
    specimen, losses, _, options = _step(name, mode)
    method = Weighting(weights=[1, 1]) if mode == "weighting" else Spy()
    for _ in range(2):
        detente.backward(losses, method, retain_graph=True, **options)
    twice = [None if p.grad is None else p.grad.clone() for p in specimen.parameters]
    for parameter in specimen.parameters:
        parameter.grad = None
    sum(losses.values()).backward()
    assert_grads(specimen.parameters, twice, rtol=1, atol=0)  # same parameters
    for parameter, double in zip(specimen.parameters, twice, strict=True):
        if parameter.grad is not None:
            assert double is not None
            assert torch.allclose(2 * parameter.grad, double, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["exact", "features"])
def test_gradients_agree_with_finite_differences(mode: str) -> None:
    for name in ("plain", "nested_features", "tied_to_encoder", "batch_norm", "gru"):
        specimen, losses, _, options = _step(name, mode)
        spy = Spy(weights=(0.7, -1.9))
        detente.backward(losses, spy, **options)
        for parameter in specimen.parameters:
            reached = _reaching(specimen, parameter)
            weights = (0.7, -1.9) if len(reached) > 1 else (1.0, 1.0)
            assert parameter.grad is not None
            got, values = parameter.grad.reshape(-1), parameter.detach().reshape(-1)
            for entry in range(0, len(values), max(1, len(values) // 4)):
                numbers = []
                for step in (1e-5, -1e-5):
                    with torch.no_grad():
                        values[entry] += step
                        after = list(specimen.heads(specimen.encode()).values())
                        values[entry] -= step
                    numbers.append(sum(w * loss.item() for w, loss in zip(weights, after, strict=True)))
                assert got[entry].item() == pytest.approx(
                    (numbers[0] - numbers[1]) / 2e-5, rel=1e-6, abs=1e-8
                ), name


def _reaching(specimen: Specimen, parameter: torch.Tensor) -> list[str]:
    losses = specimen.heads(specimen.encode())
    return [name for name, loss in losses.items() if gradient(loss, parameter) is not None]


def test_reentrant_checkpointing_is_refused_by_name() -> None:
    from torch.utils.checkpoint import checkpoint

    trunk, left, right = (torch.nn.Linear(3, 3) for _ in range(3))
    inputs = torch.ones(2, 3, requires_grad=True)
    for options in ({}, {"shared": trunk, "task_specific": [left, right]}, {"features": True}):
        z = checkpoint(lambda x: trunk(x).tanh(), inputs, use_reentrant=True)
        if "features" in options:
            options = {"features": z}
        losses = [left(z).sum(), right(z).square().sum()]
        with pytest.raises(ValueError, match="use_reentrant=False"):
            detente.backward(losses, detente.create("mgda"), **options)
        assert trunk.weight.grad is None and left.weight.grad is None
