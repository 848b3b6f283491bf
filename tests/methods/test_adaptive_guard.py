"""The guard that learns its bounds, against every gradient kept; both guards saved in the middle of an epoch."""

from __future__ import annotations

import copy
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from twins.guards import Model, drawn, ended, named, statuses

import detente
from detente.methods.registry import info_of
from detente.methods.wrappers import Adaptive, EarlyTerminationWarning, Inexact
from detente.methods.wrappers.adaptive import follow


def spread(rows: Sequence[torch.Tensor]) -> np.ndarray:
    """[T] mean squared distance of the gradients [T, P] of some steps from their mean, in one go."""
    values = torch.stack(list(rows)).to(torch.float64).numpy()
    return np.asarray(((values - values.mean(axis=0)) ** 2).sum(axis=2).mean(axis=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_estimate_is_the_mean_squared_distance_of_the_epoch(dtype: torch.dtype) -> None:
    method = detente.create("adaptive-mgda")
    for first in (0, 40):
        epoch = [drawn(seed, 3, 6).to(dtype) for seed in range(first, first + 40)]
        for rows in epoch:
            detente.combine(method, rows)
        assert method.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        method.end_epoch()
        actual = list(method.estimates.values())
        assert actual == pytest.approx(spread(epoch), rel=1e-12 if dtype == torch.float64 else 1e-5)
    assert method.epoch_record() == {
        "refused_share": method.last_refused_share,
        "epsilon_squared": method.estimates,
    }


def test_small_noise_beside_a_large_gradient_does_not_cancel() -> None:
    generator = torch.Generator().manual_seed(1)
    offset = 1000 * torch.randn(2, 50, generator=generator)
    steps = [offset + 1e-2 * torch.randn(2, 50, generator=generator) for _ in range(64)]
    method = detente.create("adaptive-mgda")
    for rows in steps:
        detente.combine(method, rows)
    method.end_epoch()
    expected = spread(steps)
    assert list(method.estimates.values()) == pytest.approx(expected, rel=1e-3)
    stacked = torch.stack(steps)
    textbook = stacked.square().sum(2).mean(0) - stacked.mean(0).square().sum(1)
    assert not np.allclose(textbook.numpy(), expected, rtol=0.5)


def test_long_rows_are_followed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, variance = torch.zeros(2, 11), torch.zeros(2, dtype=torch.float64)
    share, rows = np.array([1.0, 0.25]), drawn(3, 2, 11).float()
    whole = follow(mean, variance, rows, share)
    monkeypatch.setattr(sys.modules[follow.__module__], "_CHUNK_ENTRIES", 8)
    for one, other in zip(whole, follow(mean, variance, rows, share), strict=True):
        assert torch.allclose(one, other, rtol=1e-14, atol=0)
    assert not mean.any() and torch.equal(whole[0][0], rows[0]) and whole[1][0] == 0


def slow_adaptive(
    matrices: Sequence[torch.Tensor], epoch: int, scale: float, squared: bool, decay: float | None
) -> list[bool]:
    """Every gradient kept, every mean taken anew, the test in the space of the parameters."""
    accepted = []
    for number, matrix in enumerate(matrices):
        if decay is None:
            start = number // epoch * epoch
            past = matrices[start - epoch : start] if start else []
            weights = np.full(len(past), 1.0)
        else:
            past = matrices[:number] if number >= 2 else []
            weights = decay ** np.arange(len(past))[::-1]
        bounds = None
        if len(past):
            values = torch.stack(list(past)).numpy()
            weights = (weights / weights.sum())[:, None]
            distances = values - (weights[:, :, None] * values).sum(axis=0)
            noise = (weights * (distances**2).sum(axis=2)).sum(axis=0)
            noise = noise if decay is None else noise / (1 - (weights**2).sum())
            bounds = np.sqrt(scale * noise) if squared else scale * np.sqrt(noise)
        q = detente.combine("mgda", matrix).direction
        assert q is not None
        tests = (
            (matrix @ q).numpy() >= 0 if bounds is None else (matrix @ q).numpy() >= float(q.norm()) * bounds
        )
        accepted.append(bounds is None or bool(tests.all()))
    return accepted


@pytest.mark.parametrize("decay", [None, 0.5, 0.95])
@pytest.mark.parametrize(("scale", "applies_to"), [(0.1, "epsilon"), (0.05, "squared"), (0.5, "epsilon")])
def test_a_hundred_steps_are_those_of_the_slow_twin(
    scale: float, applies_to: str, decay: float | None
) -> None:
    matrices = [drawn(seed, 2, 6) + 0.5 for seed in range(100)]
    how: dict[str, Any] = {"epoch_steps": 20} if decay is None else {"statistics": "running", "decay": decay}
    method = detente.create("adaptive-mgda", scale=scale, applies_to=applies_to, **how)
    actual = [status == "ok" for status in statuses(method, matrices)]
    expected = slow_adaptive(matrices, 20, scale, applies_to == "squared", decay)
    assert actual == expected
    assert 0 < sum(expected) < 100


def test_lambda_scales_epsilon_or_its_square() -> None:
    for applies_to, bound in (("epsilon", 0.25), ("squared", 0.5)):
        method = detente.create("adaptive-mgda", scale=0.25, applies_to=applies_to)
        statuses(method, [torch.tensor([[2.0]]), torch.tensor([[4.0]])])  # ε̂ = 1
        method.end_epoch()
        assert statuses(method, [torch.tensor([[1.001 * bound]]), torch.tensor([[0.999 * bound]])]) == [
            "ok",
            "refused",
        ]
        notes = detente.combine(method, torch.tensor([[1.0]])).notes
        assert notes == (f"adaptive-mgda: epsilon from the last epoch: 0 {bound:g}",)


def test_the_first_epoch_accepts_everything() -> None:
    conflict = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    guard = Adaptive(detente.create("uniform"), scale=0.0)
    first = detente.combine(guard, conflict)
    assert first.status == "ok" and guard.estimates == {}
    assert first.notes == (
        "adaptive(uniform): no epoch with two gradients of a task has ended (end_epoch() or epoch_steps= ends one): "
        "every step is accepted",
    )
    guard.end_epoch()
    assert guard.estimates == {}  # one gradient says nothing of the noise
    assert statuses(guard, [conflict, conflict]) == ["ok", "ok"]
    guard.end_epoch()
    assert guard.estimates == {"0": 0.0, "1": 0.0}
    assert detente.combine(guard, conflict).status == "refused"


def test_without_ends_of_epochs_nothing_is_refused() -> None:
    method = detente.create("adaptive-mgda", scale=1e6)
    for seed in range(30):
        outcome = detente.combine(method, drawn(seed))
        assert outcome.accepted and "no epoch with two gradients of a task has ended" in outcome.notes[0]


def test_running_statistics_need_no_epochs() -> None:
    method = detente.create("adaptive-mgda", statistics="running", scale=1e6)
    assert statuses(method, [drawn(seed) for seed in range(4)]) == ["ok", "ok", "refused", "refused"]
    assert info_of(method).needs == {"gramian", "jacobian"}
    assert "epoch" in detente.methods()["adaptive-mgda"].needs
    before = method.estimates
    assert ended(method) == [] and method.estimates == before and method.last_refused_share == 0.5
    assert "running" in detente.combine(method, drawn(9)).notes[0]
    guard = Adaptive(detente.create("uniform"), statistics="running")
    conflict = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    # One gradient says nothing of the noise; it does not say that there is none.
    assert statuses(guard, [conflict] * 3) == ["ok", "ok", "refused"]


def test_absent_tasks_keep_their_statistics_and_new_ones_wait_an_epoch() -> None:
    method = detente.create("adaptive-mgda", tasks=["left", "right"], scale=1.0)
    for left, right in ((1.0, 10.0), (3.0, 30.0)):
        named(method, {"left": (left,), "right": (right,)})
    method.end_epoch()
    assert method.estimates == {"left": 1.0, "right": 100.0}
    for left in (5.0, 6.0):
        named(method, {"left": (left,)})
    named(method, {"left": (7.0,), "middle": (1e-3,)})
    method.end_epoch()
    assert method.estimates == pytest.approx({"left": 2 / 3, "right": 100.0})
    # One gradient of the new task says nothing of its noise; right still has the old bound.
    outcome = named(method, {"left": (9.0,), "middle": (9.0,)})
    assert outcome.accepted and outcome.notes[0].endswith("middle none yet")
    assert not named(method, {"left": (9.0,), "right": (9.0,)}).accepted
    named(method, {"left": (9.0,), "middle": (12.0,)})
    method.end_epoch()
    assert method.estimates == pytest.approx({"left": 0.0, "right": 100.0, "middle": 2.25})


def test_a_single_gradient_in_an_epoch_leaves_the_estimate() -> None:
    method = detente.create("adaptive-mgda", scale=1.0)
    for left, right in ((1.0, 10.0), (3.0, 30.0)):
        named(method, {"left": (left,), "right": (right,)})
    method.end_epoch()
    for rows in ({"left": (1.0,)}, {"left": (3.0,)}, {"left": (2.0,), "right": (5.0,)}):
        named(method, rows)
    method.end_epoch()
    assert method.estimates == pytest.approx({"left": 2 / 3, "right": 100.0})
    for right in (6.0, 8.0):  # the next epoch starts anew all the same
        named(method, {"right": (right,)})
    ended(method)
    assert method.estimates == pytest.approx({"left": 2 / 3, "right": 1.0})


def test_a_task_named_beforehand_and_absent_all_epoch_has_no_estimate() -> None:
    method = detente.create("adaptive-mgda", tasks=["left", "right"], scale=1.0)
    for left in (1.0, 3.0):
        named(method, {"left": (left,)})
    method.end_epoch()
    assert method.estimates == {"left": 1.0}
    outcome = named(method, {"left": (9.0,), "right": (9.0,)})
    assert outcome.accepted and outcome.notes[0].endswith("left 1, right none yet")


def test_the_running_estimate_is_that_of_independent_gradients() -> None:
    """By hand, with β = ½: weights 1/3 and 2/3, mean 2, mean squared distance 2, and 1 - Σ w² = 4/9."""
    method = detente.create("adaptive-mgda", statistics="running", decay=0.5)
    statuses(method, [torch.tensor([[0.0]], dtype=torch.float64), torch.tensor([[3.0]], dtype=torch.float64)])
    assert method.estimates["0"] == pytest.approx(4.5, rel=1e-14)  # (0 - 3)² / 2, as for two plain samples
    # Then weights 1/7, 2/7, 4/7 of 0, 3, 7: mean 34/7, Σ w g² - mean² = 214/7 - (34/7)², and 1 - Σ w² = 4/7.
    statuses(method, [torch.tensor([[7.0]], dtype=torch.float64)])
    assert method.estimates["0"] == pytest.approx((214 / 7 - (34 / 7) ** 2) / (4 / 7), rel=1e-14)
    generator = torch.Generator().manual_seed(0)
    for decay in (0.5, 0.9):
        method = detente.create("adaptive-mgda", statistics="running", decay=decay)
        found = []
        for _ in range(600):
            detente.combine(method, torch.randn(1, 100, generator=generator, dtype=torch.float64))
            found.append(method.estimates.get("0", 0.0))
        assert np.mean(found[1:3]) == pytest.approx(100, rel=0.2)
        assert np.mean(found[100:]) == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("statistics", ["epoch", "running"])
def test_a_model_in_bfloat16_takes_the_statistics_to_its_device_only(statistics: str) -> None:
    def run(cast: bool) -> list[float]:
        method = detente.create("adaptive-mgda", statistics=statistics, epoch_steps=3)
        model = torch.nn.ModuleDict({"method": method, "layer": torch.nn.Linear(2, 2)})
        for seed in range(7):
            detente.combine(method, drawn(seed, 2))
            if cast:
                model.to(torch.bfloat16)
        assert method.variance.dtype == torch.float64 and method.samples.dtype == torch.int64
        assert model["layer"].weight.dtype == (torch.bfloat16 if cast else torch.float32)  # type: ignore[union-attr]
        return list(method.estimates.values())

    assert run(True) == run(False)


def test_gradients_of_refused_steps_count() -> None:
    method = detente.create("adaptive-mgda", scale=1.0)
    steps = [torch.tensor([[x]], dtype=torch.float64) for x in (1.0, 9.0)]
    statuses(method, steps)
    method.end_epoch()
    assert statuses(method, [torch.tensor([[x]]) for x in (1.0, 2.0, 6.0)]) == ["refused", "refused", "ok"]
    assert ended(method) == []
    assert method.estimates["0"] == pytest.approx(np.var([1.0, 2.0, 6.0]), rel=1e-6)


def test_where_it_cannot_run() -> None:
    model = Model()
    z, losses = model(0)
    with pytest.raises(ValueError, match="features"):
        detente.backward(losses, detente.create("adaptive-mgda"), features=z)
    with pytest.raises(ValueError, match="adaptive cannot be wrapped around graddrop"):
        Adaptive(detente.create("graddrop"))
    with pytest.raises(ValueError, match="inexact cannot be wrapped around db-mtl"):
        Inexact(detente.create("db-mtl"))
    for options, said in (
        ({"scale": -1.0}, "scale"),
        ({"decay": 1.0}, "decay"),
        ({"decay": 0.0}, "decay"),
        ({"epoch_steps": 0}, "epoch_steps"),
        ({"applies_to": "both"}, "applies_to"),
        ({"refuse": "some"}, "refuse"),
    ):
        with pytest.raises(ValueError, match=said):
            detente.create("adaptive-mgda", **options)
    method = detente.create("adaptive-mgda")
    detente.combine(method, drawn(0, 3, 5))
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(ValueError, match="remembers gradients of 5 shared parameters and was given 6"):
        detente.combine(method, drawn(0, 3, 6))
    assert all(torch.equal(value, before[key]) for key, value in method.named_buffers())


def test_an_error_leaves_the_wrapped_method_alone_too() -> None:
    inner = detente.create("dwa")
    guard = Adaptive(inner)
    detente.combine(guard, drawn(0, 2, 5), losses=[1.0, 2.0])
    with pytest.raises(ValueError, match="shared parameters"):
        detente.combine(guard, drawn(0, 2, 6), losses=[1.0, 2.0])
    assert inner.counts.tolist() == [1, 1]


def test_no_further_number_leaves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    method, model = detente.create("adaptive-mgda"), Model()
    copies = 0
    original = torch.Tensor.cpu

    def counted(self: torch.Tensor, *args: Any, **how: Any) -> torch.Tensor:
        nonlocal copies
        copies += 1
        return original(self, *args, **how)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    for seed in range(3):
        detente.backward(model(seed)[1], method)
    assert copies == 3  # the Gramian and the losses, once a step


# ---- saving


RESUMED = [
    lambda: detente.create("inexact-mgda", epsilon=0.3, refuse="shared"),
    lambda: detente.create("inexact-mgda", epsilon={"left": 0.3, "right": 0.0, "middle": 0.2}),
    lambda: detente.create("adaptive-mgda", scale=0.3),
    lambda: detente.create("adaptive-mgda", scale=0.3, epoch_steps=5),
    lambda: detente.create("adaptive-mgda", scale=0.3, statistics="running", decay=0.8),
    lambda: Adaptive(detente.create("uniform"), scale=0.3),
]


@pytest.mark.parametrize("make", RESUMED)
def test_saved_in_the_middle_of_an_epoch_it_resumes_bit_for_bit(make: Callable[[], detente.Method]) -> None:
    def run(
        method: detente.Method, stop: int | None
    ) -> tuple[list[Any], dict[str, torch.Tensor], list[float | None]]:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        story: list[Any] = []
        shares: list[float | None] = []
        for step in range(24):
            if step == stop:
                file = io.BytesIO()
                torch.save([method.state_dict(), model.state_dict(), optimizer.state_dict()], file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                method, model = make(), Model()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
                for one, state in zip((method, model, optimizer), saved, strict=True):
                    one.load_state_dict(state)
            losses = model(step % 7)[1]
            if step % 5 == 3:
                del losses["right"]
            record = detente.backward(losses, method, shared=model.shared())
            story.append((record.status, record.weights, record.losses, record.notes))
            if record.accepted:
                optimizer.step()
            optimizer.zero_grad()
            shares.append(method.refused_share)
            if step % 6 == 5:
                method.end_epoch()
                shares.append(method.last_refused_share)
        return story, model.state_dict(), shares

    with warnings.catch_warnings(category=EarlyTerminationWarning, action="ignore"):
        story, parameters, shares = run(make(), None)
        assert {status for status, *_ in story} & {"refused", "stationary"}, "nothing was refused"
        assert "ok" in {status for status, *_ in story}
        for stop in (3, 9, 14):
            again, others, others_shares = run(make(), stop)
            assert again == story and others_shares == shares
            assert all(torch.equal(parameters[name], others[name]) for name in parameters)
