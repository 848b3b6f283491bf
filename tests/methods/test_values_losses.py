"""Weightings of the losses against TorchJD's scalarizers, the published formulas, and slow twins with autograd."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torchjd import scalarization

import detente

STEPS = 50


def weights_of(
    method: detente.Method | str, losses: object, jacobian: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights of one step; orthonormal gradients unless others are given."""
    if jacobian is None:
        jacobian = torch.eye(len(losses), dtype=torch.float64)  # type: ignore[arg-type]
    weights = detente.combine(method, jacobian, losses).weights  # type: ignore[arg-type]
    assert weights is not None
    return weights


def slopes(scalarizer: Callable[[torch.Tensor], torch.Tensor], losses: torch.Tensor) -> torch.Tensor:
    """The derivative of a scalarization by each loss: the weights it amounts to."""
    values = losses.clone().requires_grad_()
    return torch.autograd.grad(scalarizer(values), values)[0]


def falling(seed: int, tasks: int = 4, steps: int = STEPS) -> list[torch.Tensor]:
    """Positive losses of unequal size that fall at unequal speed, with noise."""
    random = np.random.default_rng(seed)
    sizes, speeds = 10 ** random.uniform(-2, 2, tasks), random.uniform(0.0, 0.1, tasks)
    noise = np.exp(random.normal(size=(steps, tasks)) * 0.1)
    return list(torch.from_numpy(sizes * np.exp(-np.arange(steps)[:, None] * speeds) * noise))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)


# ---- without state


@pytest.mark.parametrize("seed", range(5))
def test_gls_equals_torchjd(seed: int) -> None:
    losses = falling(seed)[0]
    close(weights_of("gls", losses), slopes(scalarization.GeometricMean(), losses))


def test_gls_of_losses_whose_product_under_and_overflows() -> None:
    losses = torch.tensor([1e-200, 1e-200, 1e-200, 1e300, 1e300], dtype=torch.float64)
    assert losses[:3].prod() == 0 and losses[3:].prod() == torch.inf  # the geometric mean is 1
    close(weights_of("gls", losses), 1 / (5 * losses), 1e-11)


@pytest.mark.parametrize("mu", [0.01, 0.5, 3.0])
def test_plain_stch_equals_torchjd(mu: float) -> None:
    for seed in range(4):
        losses = falling(seed)[0]
        method = detente.create("stch", form="plain", mu=mu)
        close(weights_of(method, losses), slopes(scalarization.STCH(mu), losses))
        preference, ideal = (
            torch.tensor([0.1, 0.4, 0.3, 0.2]).double(),
            torch.tensor([0.0, -1.0, 0.2, 0.1]).double(),
        )
        expected = slopes(scalarization.STCH(mu, preference, ideal), losses)
        method = detente.create(
            "stch", form="plain", mu=mu, preference=preference.tolist(), ideal=ideal.tolist()
        )
        close(weights_of(method, losses), expected)


def test_plain_stch_takes_losses_of_any_sign_and_an_ideal_by_name() -> None:
    names = ("a", "b", "c")
    method = detente.create("stch", form="plain", mu=0.5, ideal={"c": -2.0, "a": -1.0, "b": 0.5})
    losses = torch.tensor([-0.5, 0.0, -1.5]).double()
    reference = torch.tensor([-1.0, 0.5, -2.0]).double()
    expected = slopes(scalarization.STCH(0.5, reference=reference), losses)
    close(weights_of(method, dict(zip(names, losses, strict=True))), expected)
    # An absent task drops out.
    expected = slopes(scalarization.STCH(0.5, reference=reference[1:]), losses[1:])
    close(weights_of(method, dict(zip(names[1:], losses[1:], strict=True)), torch.eye(2).double()), expected)
    with pytest.raises(ValueError, match="'d'"):
        weights_of(method, {"a": 1.0, "d": 1.0})


# ---- random


def test_normal_rlw_is_the_softmax_of_normal_numbers() -> None:
    method = detente.create("rlw", seed=3)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        drawn = torch.randn(4, generator=generator, dtype=torch.float64)
        close(weights_of(method, [1.0] * 4), (drawn.exp() / drawn.exp().sum()))


def test_dirichlet_rlw_is_uniform_on_the_simplex() -> None:
    """Mean 1/T, variance (T - 1) / (T² (T + 1)), covariance -1 / (T² (T + 1)), and P(w_1 < x) = 1 - (1 - x)^(T - 1)."""
    tasks, draws = 4, 4000
    method = detente.create("rlw", distribution="dirichlet", seed=0)
    eye, losses = torch.eye(tasks), [1.0] * tasks
    sample = torch.stack([weights_of(method, losses, eye) for _ in range(draws)]).numpy()
    np.testing.assert_allclose(sample.sum(axis=1), 1, rtol=1e-12)
    spread = 5 / np.sqrt(draws)
    variance = (tasks - 1) / (tasks**2 * (tasks + 1))
    np.testing.assert_allclose(sample.mean(axis=0), 1 / tasks, atol=spread * np.sqrt(variance))
    expected = np.where(np.eye(tasks, dtype=bool), variance, -1 / (tasks**2 * (tasks + 1)))
    np.testing.assert_allclose(np.cov(sample.T), expected, atol=spread * 2 * variance)
    for x in (0.1, 0.3, 0.6):
        assert abs((sample[:, 0] < x).mean() - (1 - (1 - x) ** (tasks - 1))) < spread / 2


# ---- learned by the method


Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

OBJECTIVES: dict[str, tuple[Objective, dict[str, object]]] = {
    "uncertainty, regression": (lambda s, x: (0.5 * torch.exp(-s) * x + 0.5 * s).sum(), {}),
    "uncertainty, classification": (
        lambda s, x: (torch.exp(-s) * x + 0.5 * s).sum(),
        {"form": "classification"},
    ),
    "uncertainty, from -0.5": (lambda s, x: (x / (2 * torch.exp(s)) + s / 2).sum(), {"init": -0.5}),
    "imtl-l": (lambda s, x: (torch.exp(s) * x - s).sum(), {}),
}


@pytest.mark.parametrize("lr", [0.025, 0.3])
@pytest.mark.parametrize("label", OBJECTIVES)
def test_learned_scales_follow_autograd_and_torch_adam(label: str, lr: float) -> None:
    objective, options = OBJECTIVES[label]
    method = detente.create(label.split(",")[0], lr=lr, **options)
    s = torch.full((4,), float(options.get("init", 0.0)), dtype=torch.float64, requires_grad=True)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([s], lr=lr)
    for losses in falling(1):
        values = losses.clone().requires_grad_()
        s.grad, expected = torch.autograd.grad(objective(s, values), (s, values))
        close(weights_of(method, losses), expected)
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "scalarizer"), [("uncertainty", scalarization.UW), ("imtl-l", scalarization.IMTLL)]
)
def test_learned_scales_equal_torchjd(name: str, scalarizer: Callable[[int], torch.nn.Module]) -> None:
    reference = scalarizer(4).double()
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.05)
    method = detente.create(name, lr=0.05)
    for losses in falling(2):
        close(weights_of(method, losses), slopes(reference, losses))
        optimizer.zero_grad()
        reference(losses).backward()
        optimizer.step()


@pytest.mark.parametrize("alpha", [0.0, 1.5, 2.0])
def test_gradnorm_follows_autograd_and_torch_adam(alpha: float) -> None:
    method = detente.create("gradnorm", alpha=alpha, lr=0.05)
    u = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([u], lr=0.05)
    random = np.random.default_rng(5)
    first = None
    for losses in falling(3):
        jacobian = torch.from_numpy(random.normal(size=(4, 6)) * [[0.1], [1.0], [3.0], [30.0]])
        weights = 4 * torch.softmax(u, dim=0)
        close(weights_of(method, losses, jacobian), weights.detach(), 1e-10)
        first = losses if first is None else first
        rate = losses / first / (losses / first).mean()
        lengths = torch.stack([(w * row).norm() for w, row in zip(weights, jacobian, strict=True)])
        mean = lengths.mean().detach()
        objective = ((lengths - mean * rate**alpha).abs() / mean).sum()
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()


def test_gradnorm_weights_stay_positive_and_sum_to_the_tasks() -> None:
    """Weights that move freely turn negative on this: one gradient is a million times longer."""
    method = detente.create("gradnorm", lr=1.0)
    jacobian = torch.diag(torch.tensor([1.0, 1e3, 1e6])).double()
    for _ in range(300):
        weights = weights_of(method, [1.0, 1.0, 1.0], jacobian)
        assert (weights > 0).all() and abs(float(weights.sum()) - 3) < 1e-12
    assert weights[0] > 100 * weights[2]


def test_gradnorm_settles_where_all_gradients_are_equally_long() -> None:
    method = detente.create("gradnorm", lr=0.01)
    jacobian = torch.diag(torch.tensor([1.0, 2.0, 4.0])).double()
    for _ in range(800):
        weights = weights_of(method, [2.0, 3.0, 5.0], jacobian)
    close(weights * torch.tensor([1.0, 2.0, 4.0]).double(), torch.full((3,), 12 / 7).double(), 0.05)


# ---- FAMO


@pytest.fixture
def famo_twin(monkeypatch: pytest.MonkeyPatch) -> scalarization.FAMO:
    monkeypatch.setattr("torchjd.scalarization._famo._EPSILON", 0.0)
    return scalarization.FAMO(4, lr=0.025, weight_decay=1e-3).double()


def test_famo_with_its_hook_equals_torchjd(famo_twin: scalarization.FAMO) -> None:
    method = detente.create("famo")
    for losses, noise in zip(falling(4), falling(5), strict=True):
        close(weights_of(method, losses), slopes(famo_twin, losses), 1e-11)
        later = losses * (0.8 + 0.2 * noise / noise.max())
        famo_twin.update(later)
        method.after_step(later)


def test_famo_without_its_hook_lets_the_next_losses_stand_in(famo_twin: scalarization.FAMO) -> None:
    method = detente.create("famo")
    for step, losses in enumerate(falling(4)):
        if step:
            famo_twin.update(losses)
        combination = detente.combine(method, torch.eye(4), losses)
        assert combination.weights is not None
        close(combination.weights, slopes(famo_twin, losses), 1e-11)
        assert ("stood in" in " ".join(combination.notes)) == (step > 0)


def test_famo_above_a_lower_bound(famo_twin: scalarization.FAMO) -> None:
    method = detente.create("famo", lower=-3.0)
    shifted = detente.create("famo")
    for losses in falling(6, steps=10):
        close(weights_of(method, losses - 3), weights_of(shifted, losses), 1e-10)


def test_famo_learns_of_a_task_that_was_absent_when_it_returns() -> None:
    here, there = detente.create("famo", tasks=["a", "b", "c"]), detente.create("famo", tasks=["a", "b", "c"])
    eye = torch.eye(3, dtype=torch.float64)
    for method in (here, there):
        weights_of(method, {"a": 1.0, "b": 2.0, "c": 3.0})
        weights_of(method, {"a": 1.0, "b": 2.0}, eye[:2])
    here.after_step({"a": 0.5, "b": 2.0})  # belongs to the last step, in which c took no part
    assert float(here.logits[2]) == 0 and int(here.open_steps[2]) == 1
    combination = detente.combine(here, eye, {"a": 0.5, "b": 2.0, "c": 3.0})
    assert "stood in" in combination.notes[0]
    assert not here.open_steps.eq(1).any()


BAD_REPORTS: list[tuple[object, str]] = [
    ({"seg": 1.0, "depth": 0.0}, "'depth' is 0.0"),
    ({"seg": 1.0}, "lacks task 'depth'"),
    ({"seg": 1.0, "depth": 1.0, "edges": 1.0}, "names task 'edges'"),
    ([1.0], "1 losses"),
    ({"seg": float("nan"), "depth": 1.0}, "'seg'"),
]


@pytest.mark.parametrize(("losses", "message"), BAD_REPORTS)
def test_famo_rejects_a_report_that_does_not_fit(losses: object, message: str) -> None:
    method = detente.create("famo")
    with pytest.raises(ValueError, match="backward"):
        method.after_step({"seg": 1.0})
    weights_of(method, {"seg": 1.0, "depth": 2.0})
    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    with pytest.raises(ValueError, match=message):
        method.after_step(losses)  # type: ignore[arg-type]
    assert all(torch.equal(buffer, before[name]) for name, buffer in method.named_buffers())
    method.after_step({"depth": 1.0, "seg": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="once"):
        method.after_step({"seg": 1.0, "depth": 2.0})


# ---- epochs


def test_dwa_equals_torchjd_over_epochs() -> None:
    for temperature in (0.5, 2.0):
        reference, method = scalarization.DWA(temperature), detente.create("dwa", temperature=temperature)
        counted = detente.create("dwa", temperature=temperature, epoch_steps=5)
        for step, losses in enumerate(falling(7), start=1):
            expected = slopes(reference, losses)
            close(weights_of(method, losses), expected)
            close(weights_of(counted, losses), expected)
            assert step > 10 or expected.eq(1).all()
            if step % 5 == 0:
                reference.step()
                method.end_epoch()
                counted.end_epoch()  # a loop that calls it anyway does no harm
        assert not expected.eq(1).any()


def test_dwa_says_that_it_waits_for_an_epoch() -> None:
    method = detente.create("dwa")
    method.end_epoch()  # before the first step there is nothing to end
    for _ in range(2):
        combination = detente.combine(method, torch.eye(2), [1.0, 2.0])
        assert "end_epoch()" in combination.notes[0] and combination.weights is not None
        assert combination.weights.eq(1).all()
        method.end_epoch()
    assert detente.combine(method, torch.eye(2), [1.0, 2.0]).notes == ()


def test_dwa_counts_a_task_without_history_as_neither_fast_nor_slow() -> None:
    method = detente.create("dwa", temperature=1.0, epoch_steps=1)
    for losses in ({"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.0}):
        weights_of(method, losses)
    weights = weights_of(method, {"a": 0.5, "b": 0.0, "new": 9.0})
    close(weights, 3 * torch.softmax(torch.tensor([0.5, 1.0, 1.0]).double(), dim=0))


def test_log_stch_warms_up_and_then_equals_its_formula() -> None:
    for mu in (0.3, 1.0):
        method = detente.create("stch", mu=mu, warmup_epochs=2)
        counted = detente.create("stch", mu=mu, warmup_epochs=2, epoch_steps=5)
        story = falling(8, steps=20)
        for step, losses in enumerate(story[:10], start=1):
            for one in (method, counted):
                combination = detente.combine(one, torch.eye(4), losses)
                assert "warm-up" in combination.notes[0] and combination.weights is not None
                close(combination.weights, slopes(lambda x: x.log().sum(), losses))
            if step % 5 == 0:
                method.end_epoch()
        nadir = torch.stack(story[5:10]).mean(dim=0)
        for losses in story[10:]:
            expected = slopes(
                lambda x, m=mu, n=nadir: 4 * m * torch.logsumexp((x / n).log() / m, dim=0), losses
            )
            close(weights_of(method, losses), expected)
            close(weights_of(counted, losses), expected)
            method.end_epoch()


def test_log_stch_with_a_preference() -> None:
    method = detente.create("stch", mu=0.5, warmup_epochs=0, preference={"a": 3.0, "b": 1.0})
    losses = torch.tensor([0.4, 3.0], dtype=torch.float64)
    lean = torch.tensor([1.5, 0.5]).double()
    expected = slopes(lambda x: 2 * 0.5 * torch.logsumexp(lean * x.log() / 0.5, dim=0), losses)
    close(weights_of(method, {"a": 0.4, "b": 3.0}), expected)


def test_log_stch_takes_the_first_loss_of_a_late_task_as_its_nadir() -> None:
    method = detente.create("stch", warmup_epochs=1, epoch_steps=1)
    weights_of(method, {"a": 2.0})
    weights_of(method, {"a": 2.0, "late": 5.0})
    weights = weights_of(method, {"a": 2.0, "late": 10.0})
    expected = slopes(
        lambda x: 2 * torch.logsumexp((x / torch.tensor([2.0, 5.0])).log(), 0), torch.tensor([2.0, 10])
    )
    close(weights, expected.double(), 1e-6)


def test_smooth_maxima_with_a_small_mu_follow_the_worst_task_alone() -> None:
    for method in (
        detente.create("stch", mu=1e-9, warmup_epochs=0),
        detente.create("stch", mu=1e-9, form="plain"),
    ):
        weights = weights_of(method, [1.0, 2.0, 1.5])
        assert weights[1] > 0 and not weights[[0, 2]].any()


# ---- bad input


LOGARITHMIC = ("gls", "stch", "famo", "db-mtl")


@pytest.mark.parametrize("name", [*LOGARITHMIC, "gradnorm"])
@pytest.mark.parametrize("bad", [0.0, -1.0])
@pytest.mark.parametrize("steps", [0, 3])
def test_losses_that_are_not_positive_are_named_and_change_nothing(name: str, bad: float, steps: int) -> None:
    method = detente.create(name)
    jacobian = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    for _ in range(steps):
        detente.combine(method, jacobian, {"seg": 1.0, "depth": 0.4})
    before, tasks = {key: buffer.clone() for key, buffer in method.named_buffers()}, method.tasks
    with pytest.raises(ValueError, match="'depth'"):
        detente.combine(method, jacobian, {"seg": 1.0, "depth": bad})
    after = dict(method.named_buffers())
    assert method.tasks == tasks and set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_dwa_names_a_negative_loss() -> None:
    with pytest.raises(ValueError, match="'1'"):
        weights_of("dwa", [1.0, -1.0])


@pytest.mark.parametrize("name", ["imtl", "imtl-l", "uncertainty"])
def test_a_scale_that_grows_without_end_is_named_before_it_overflows(name: str) -> None:
    """e^s L - s falls without end where L is zero, too, and Adam moves s by lr in every step."""
    method = detente.create(name, lr=1.0)

    def steps() -> None:
        for _ in range(400):
            assert detente.combine(method, torch.eye(2), losses=[1.0, 0.0]).weights.isfinite().all()

    with pytest.raises(ValueError, match=rf"^{name}: the learned scale of task '1' has grown to e\^8"):
        steps()


OUT_OF_RANGE: list[tuple[str, dict[str, object], str]] = [
    ("rlw", {"distribution": "uniform"}, "distribution"),
    ("dwa", {"temperature": 0.0}, "temperature"),
    ("dwa", {"epoch_steps": 0}, "epoch_steps"),
    ("dwa", {"epoch_steps": 1.5}, "epoch_steps"),
    ("uncertainty", {"form": "poisson"}, "form"),
    ("uncertainty", {"lr": 0.0}, "lr"),
    ("uncertainty", {"init": float("inf")}, "init"),
    ("imtl-l", {"lr": -1.0}, "lr"),
    ("gradnorm", {"alpha": -0.1}, "alpha"),
    ("stch", {"mu": 0.0}, "mu"),
    ("stch", {"warmup_epochs": -1}, "warmup_epochs"),
    ("stch", {"ideal": [0.0, 0.0]}, "form='plain'"),
    ("stch", {"form": "plain", "ideal": {"a": float("nan")}}, "'a'"),
    ("famo", {"decay": -1e-3}, "decay"),
    ("db-mtl", {"beta": 1.0}, "beta"),
    ("db-mtl", {"sigma": -1.0}, "sigma"),
    ("excess-mtl", {"lr": 0.0}, "lr"),
]


@pytest.mark.parametrize(("name", "options", "message"), OUT_OF_RANGE)
def test_options_out_of_range(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detente.create(name, **options)
