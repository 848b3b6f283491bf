"""A guard that estimates the error of the tasks' gradients from the gradients it has seen."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from detente.methods.base import Method
from detente.methods.checks import Array, layout_of, sized
from detente.methods.options import number, one_of
from detente.methods.wrappers.base import register_wrapper
from detente.methods.wrappers.guard import Guard, Refuse
from detente.values import TaskGradients

# Columns are converted to float64 in chunks of about this many entries, so that no copy of the rows is made.
_CHUNK_ENTRIES = 1 << 17
_CHUNK_ENTRIES_ON_DEVICE = 1 << 25


def follow(
    mean: torch.Tensor, variance: torch.Tensor, rows: torch.Tensor, share: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add one more gradient of each task to the mean and the variance of those before it.

    With δ = g - mean and the share a of the new gradient: mean ← mean + a δ and variance ← (1 - a)(variance + a ‖δ‖²).
    With a = 1/n in the n-th step these are the plain mean and the mean squared distance from it (Welford 1962); with
    a = (1 - β) / (1 - β^n) they are the same with the weight β^(n-k) on the k-th gradient (West 1979). The two means of
    the textbook formula, mean ‖g‖² - ‖mean g‖², cancel where the noise is small beside the gradient; here only
    differences are squared, and they are taken in float64.

    Args:
        mean: [T, P] the means so far; any finite numbers where the share is 1.
        variance: [T] float64 on the device of ``mean``, the mean squared distances so far.
        rows: [T, P] the new gradients.
        share: [T] in (0, 1]; 1 starts anew.

    Returns:
        The new mean [T, P] and variance [T]; what was handed in stays as it is.

    Example:
        >>> mean, variance = torch.zeros(1, 2), torch.zeros(1, dtype=torch.float64)
        >>> for number, gradient in enumerate(([1.0, 0.0], [3.0, 0.0], [2.0, 3.0]), start=1):
        ...     mean, variance = follow(mean, variance, torch.tensor([gradient]), np.array([1 / number]))
        >>> mean, variance  # the distances are √2, √2 and 2
        (tensor([[2., 1.]]), tensor([2.6667], dtype=torch.float64))
    """
    tasks, columns = rows.shape
    entries = _CHUNK_ENTRIES if rows.device.type == "cpu" else _CHUNK_ENTRIES_ON_DEVICE
    width = max(1, entries // tasks)
    weight = torch.from_numpy(share).to(device=rows.device, dtype=torch.float64)
    moved, squares = torch.empty_like(mean), torch.zeros_like(variance)
    for start in range(0, columns, width):
        part = slice(start, start + width)
        old, new = mean[:, part].to(torch.float64), rows[:, part].to(torch.float64)
        moved[:, part] = torch.lerp(old, new, weight[:, None])
        squares += (new - old).square_().sum(dim=1)
    return moved, (1 - weight) * (variance + weight * squares)


@register_wrapper
class Adaptive(Guard):
    """Adaptive: take a step only if it helps every task, with error bounds estimated from the gradients themselves.

    The test is that of ``inexact``, <q, g_i> >= ‖q‖ ε_i for every task present, with ε_i = λ ε̂_i. ε̂_i² is the mean
    squared distance of the gradients of single batches from their mean over the epoch before (Aygar 2019, equations
    2.13 to 2.16); with ``statistics="running"`` over all steps before, the recent ones counting more. The page on
    guards says how both are accumulated, and where the text and the algorithm of the thesis differ.

    The first epoch is not guarded: every step is accepted, whatever its direction, and a task that comes later is not
    tested until the end of its first epoch; with running statistics a task is guarded from its third gradient on. An
    epoch in which a task came once leaves it the estimate it had. An epoch ends with ``end_epoch()`` or after
    ``epoch_steps`` calls. The notes of every combination say that there is no estimate yet, or the bounds in force.
    ``estimates`` holds ε̂_i², ``refused_share`` and ``last_refused_share`` the shares of refused steps.

    Gradients must be comparable from batch to batch: with respect to the same parameters, not to the representation.
    Where a task that comes later makes more parameters shared, name them with ``shared=`` from the start.

    When to use it: gradients noisy enough to matter, and no idea of the size of the noise. Cost: T x P numbers of state
    in the memory of the parameters (two times that while a step is made, since a step that fails is undone, and three
    times where a task is absent), and one pass over them in a step; with ``running`` T numbers more go to the host.

    Args:
        method: any method that gives weights, for tasks or for blocks of parameters.
        scale: >= 0, λ; 0 leaves the test <q, g_i> >= 0.
        applies_to: ``epsilon``: ε = λ ε̂; ``squared``: ε² = λ ε̂².
        statistics: ``epoch``: of the last epoch; ``running``: of all steps before, the recent ones counting more.
        decay: in (0, 1), how much an earlier gradient counts after one more step, with ``running``.
        refuse: ``all``: a refused step leaves every ``.grad`` as it was found; ``shared``: only the shared part stays
            where it is, see ``inexact``.
        epoch_steps: steps after which the guard itself ends an epoch; ``end_epoch()`` then goes to the wrapped method
            alone. None waits for ``end_epoch()``.

    Raises:
        ValueError: an option is out of range; the method gives only a direction, or cannot be solved on parameters;
            the number of shared parameters changed.

    Example:
        >>> import detente
        >>> guard = detente.wrappers.Adaptive(detente.create("mgda"), scale=1.0)
        >>> for noise in (0.5, -0.5):  # g = 1 ± ½ for both tasks
        ...     _ = detente.combine(guard, torch.tensor([[1.0 + noise], [1.0 + noise]]))
        >>> guard.end_epoch()
        >>> guard.estimates
        {'0': 0.25, '1': 0.25}
        >>> [detente.combine(guard, torch.full((2, 1), length)).status for length in (0.6, 0.4)]
        ['ok', 'refused']
    """

    name = "adaptive"
    source = (
        "Aygar 2019, section 2.3, equations 2.13 to 2.16, algorithm Adaptive-ε-MGDA; section 4.2 (running)"
    )
    search = {"scale": (0.01, 0.05, 0.1, 0.5, 1.0)}  # noqa: RUF012
    looks_at = frozenset({"gramian", "jacobian"})
    advice = "Lower scale"

    mean: torch.Tensor | None
    variance: torch.Tensor
    samples: torch.Tensor
    estimate: torch.Tensor
    epochs: torch.Tensor

    def __init__(
        self,
        method: Method,
        *,
        scale: float = 0.1,
        applies_to: Literal["epsilon", "squared"] = "epsilon",
        statistics: Literal["epoch", "running"] = "epoch",
        decay: float = 0.99,
        refuse: Refuse = "all",
        epoch_steps: int | None = None,
    ) -> None:
        super().__init__(method, refuse=refuse, epoch_steps=epoch_steps)
        self.scale = number("scale", scale, least=0)
        self.applies_to = one_of("applies_to", applies_to, ("epsilon", "squared"))
        self.statistics = one_of("statistics", statistics, ("epoch", "running"))
        self.decay = number("decay", decay, above=0, below=1)
        given = self.inner_info()
        spaces = given.spaces & {"exact", "layer"}
        if not spaces:
            raise ValueError(
                f"{self.name} compares gradients of parameters from step to step, and {given.name} can only be solved "
                f"on {', '.join(sorted(given.spaces))}."
            )
        epoch = {"epoch"} if statistics == "epoch" else set()
        self.derive(
            needs=given.needs | self.looks_at | epoch,
            spaces=spaces,
            stateful=True,
            stationary=None if refuse == "shared" else given.stationary,
        )

    def allocate(self, tasks: int) -> None:
        """Register means sized by the first gradients, squared distances from them, counts, and the last estimates."""
        self.register_buffer("mean", None)
        self.register_buffer("variance", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("samples", torch.zeros(tasks, dtype=torch.int64))
        self.register_buffer("estimate", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("epochs", torch.zeros(tasks, dtype=torch.int64))

    @property
    def estimates(self) -> dict[str, float]:
        """Return ε̂_i² by task, not scaled, in the unit of a squared gradient; only of tasks with an estimate."""
        if self.tasks is None:
            return {}
        squared, known = self._estimated(np.arange(len(self.tasks)))
        return {
            task: float(value) for task, value, there in zip(self.tasks, squared, known, strict=True) if there
        }

    def epoch_record(self) -> dict[str, Any]:
        """Return what every guard does, and the estimates ε̂²."""
        return {**super().epoch_record(), "epsilon_squared": self.estimates}

    def bounds(self, gradients: TaskGradients) -> tuple[Array, tuple[str, ...]]:
        """Return λ ε̂ of the tasks with an estimate."""
        if self.mean is not None:
            sized(self, self.mean, self._like(gradients), gradients)
        squared, known = self._estimated(self.positions(gradients.names))
        name = self.declares.name
        if not known.any():
            waiting = "no epoch with two gradients of a task has ended (end_epoch() or epoch_steps= ends one)"
            if self.statistics == "running":
                waiting = "fewer than two gradients of a task were seen"
            return np.full(gradients.tasks, np.nan), (f"{name}: {waiting}: every step is accepted",)
        on_epsilon = self.applies_to == "epsilon"
        epsilon = self.scale * np.sqrt(squared) if on_epsilon else np.sqrt(self.scale * squared)
        bounds = np.where(known, epsilon, np.nan)
        listed = ", ".join(
            f"{task} {bound:.6g}" if there else f"{task} none yet"
            for task, bound, there in zip(gradients.names, bounds, known, strict=True)
        )
        origin = "from the last epoch" if self.statistics == "epoch" else "running"
        return bounds, (f"{name}: epsilon {origin}: {listed}",)

    def learn(self, gradients: TaskGradients) -> None:
        """Add the gradients to their means."""
        jacobian = gradients.jacobian
        assert jacobian is not None and self.tasks is not None
        at = self.positions(gradients.names)
        everyone = gradients.names == self.tasks
        mean, variance = (
            sized(self, self.mean, self._like(gradients), gradients),
            self.variance.to(jacobian.device),
        )
        samples = self.samples.numpy()[at] + 1
        share = (1 - self.decay) / (1 - self.decay**samples) if self.statistics == "running" else 1 / samples
        host, place = torch.from_numpy(at), torch.from_numpy(at).to(jacobian.device)
        if everyone:
            self.mean, self.variance = follow(mean, variance, jacobian, share)
        else:
            moved, distances = follow(mean[place], variance[place], jacobian, share)
            self.mean = mean.index_copy(0, place, moved)
            self.variance = variance.index_copy(0, place, distances)
        self.column_layout = layout_of(gradients)
        self.samples = self.samples.index_copy(0, host, torch.from_numpy(samples))

    def epoch_ended(self) -> None:
        """Make the squared distances the estimates; the next gradient of each task starts anew."""
        if self.statistics == "running" or self.tasks is None:
            return
        spread = self.samples >= 2
        self.estimate = torch.where(spread, self.variance.to(self.estimate.device), self.estimate)
        self.epochs = self.epochs + spread
        self.samples = torch.zeros_like(self.samples)

    def _estimated(self, at: np.ndarray) -> tuple[Array, np.ndarray]:
        """Return ε̂² of the tasks in these places, and which of them have one."""
        if self.statistics == "running":
            variance, samples = self.variance.cpu().numpy()[at], self.samples.numpy()[at]
            faded = self.decay ** np.maximum(samples, 2)
            # 1 - Σ w_k² for the weights w_k = (1 - β) β^(n-k) / (1 - β^n)
            free = 2 * (self.decay - faded) / ((1 + self.decay) * (1 - faded))
            return variance / free, samples >= 2
        return self.estimate.numpy()[at], self.epochs.numpy()[at] > 0

    def _like(self, gradients: TaskGradients) -> torch.Tensor:
        """Make an empty tensor like the means, of at least float32: bfloat16 would lose the late gradients."""
        jacobian = gradients.jacobian
        assert jacobian is not None
        return jacobian.new_empty(
            (0, jacobian.shape[1]), dtype=torch.promote_types(jacobian.dtype, torch.float32)
        )
