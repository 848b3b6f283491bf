"""The guard that estimates the error of the tasks' gradients from the gradients it has seen."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from detente.methods.base import Method
from detente.methods.checks import Array, sized
from detente.methods.guard import Guard, Refuse
from detente.methods.noise import follow
from detente.methods.options import number, one_of
from detente.methods.wrapping import register_wrapper
from detente.values import TaskGradients


@register_wrapper
class Adaptive(Guard):
    """Adaptive: take a step only if it helps every task, with error bounds estimated from the gradients themselves.

    The test is that of ``inexact``, <q, g_i> >= ‖q‖ ε_i for every task present. The bound is ε_i = λ ε̂_i, and ε̂_i² is
    the mean squared distance of the gradients g_i^p of single batches p from their mean over the epoch before,
    mean_p ‖g_i^p‖² - ‖mean_p g_i^p‖² (Aygar 2019, equations 2.13 to 2.16). The first epoch is not guarded: every step
    is accepted, whatever its direction, and a task that comes later is not tested until the end of its first epoch.
    One gradient says nothing of the noise: an epoch in which a task came once leaves it the estimate it had, or none.
    The gradients of refused steps count, as in the thesis.

    The thesis computes the difference of the two means, which cancels where the noise is small beside the gradient;
    here the distances are accumulated (Welford 1962), in float64, with a running mean in the dtype of the gradients
    (float32 for shorter ones). Text and algorithm of the thesis differ in what λ scales: ε̂ in the text of section 2.3,
    ε̂² in the algorithm's box and in the conclusions. The default is the text's, because the experiments agree with it:
    ε̂ was ten times the best constant ε on MultiMNIST, and λ = 0.1 the best scale, hence its default here.

    ``statistics="running"`` is the running average that the thesis leaves to future work, in a form of ours: mean and
    squared distance are weighted by decay^(n-k) for the k-th of n gradients, so that the bound follows from step to
    step and no epochs are needed. A task is guarded from its third gradient on. So few gradients count that their mean
    follows them: with the weights w_k, which add up to 1, the mean squared distance is small by the factor 1 - Σ w_k²
    (half after two gradients, 2 decay / (1 + decay) in the end), and is divided by it. The estimate of an epoch is
    left as in the thesis, small by 1 - 1/N after N gradients.

    An epoch ends with ``end_epoch()`` or after ``epoch_steps`` calls. If neither happens, nothing is ever refused but
    with running statistics. The notes of every combination say which form ran: that there is no estimate yet, or the
    bounds in force. ``estimates`` holds ε̂_i², ``refused_share`` and ``last_refused_share`` the shares of refused steps
    in this and in the last epoch.

    A task that is absent from a step, or from an epoch, keeps its statistics. Gradients must be comparable from batch
    to batch: they are with respect to parameters, in the exact space or on one layer, and the shared parameters must
    stay the same. Where a task that comes later reaches parameters that were another task's own until then, name the
    shared ones with ``shared=`` from the start. On ``features=`` the rows are
    gradients with respect to the representation of one batch; the next batch has another one, and a mean over both
    has no meaning.

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
        needs = given.needs | self.looks_at
        by_option: dict[str, Any] = {"needs": needs} if statistics == "running" else {}
        if refuse == "shared" and given.stationary is not None:
            by_option["stationary"] = None
        self._declare({"needs": needs | {"epoch"}, "spaces": spaces, "stateful": True}, by_option)

    def allocate(self, tasks: int) -> None:
        """Means sized by the first gradients, squared distances from them, gradients counted; the last estimates."""
        self.register_buffer("mean", None)
        self.register_buffer("variance", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("samples", torch.zeros(tasks, dtype=torch.int64))
        self.register_buffer("estimate", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("epochs", torch.zeros(tasks, dtype=torch.int64))

    @property
    def estimates(self) -> dict[str, float]:
        """Task to ε̂_i², not scaled, in the unit of a squared gradient; tasks without an estimate are not named."""
        if self.tasks is None:
            return {}
        squared, known = self._estimated(np.arange(len(self.tasks)))
        return {
            task: float(value) for task, value, there in zip(self.tasks, squared, known, strict=True) if there
        }

    def epoch_record(self) -> dict[str, Any]:
        """Also the estimates ε̂²."""
        return {**super().epoch_record(), "epsilon_squared": self.estimates}

    def bounds(self, gradients: TaskGradients) -> tuple[Array, tuple[str, ...]]:
        """λ ε̂ of the tasks with an estimate."""
        if self.mean is not None:
            sized(self, self.mean, self._like(gradients))
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
        """The gradients join their means."""
        jacobian = gradients.jacobian
        assert jacobian is not None and self.tasks is not None
        at = self.positions(gradients.names)
        everyone = gradients.names == self.tasks
        mean, variance = sized(self, self.mean, self._like(gradients)), self.variance.to(jacobian.device)
        samples = self.samples.numpy()[at] + 1
        share = (1 - self.decay) / (1 - self.decay**samples) if self.statistics == "running" else 1 / samples
        host, place = torch.from_numpy(at), torch.from_numpy(at).to(jacobian.device)
        if everyone:
            self.mean, self.variance = follow(mean, variance, jacobian, share)
        else:
            moved, distances = follow(mean[place], variance[place], jacobian, share)
            self.mean = mean.index_copy(0, place, moved)
            self.variance = variance.index_copy(0, place, distances)
        self.samples = self.samples.index_copy(0, host, torch.from_numpy(samples))

    def epoch_ended(self) -> None:
        """The squared distances become the estimates; the next gradient of each task starts anew."""
        if self.statistics == "running" or self.tasks is None:
            return
        spread = self.samples >= 2
        self.estimate = torch.where(spread, self.variance.to(self.estimate.device), self.estimate)
        self.epochs = self.epochs + spread
        self.samples = torch.zeros_like(self.samples)

    def _estimated(self, at: np.ndarray) -> tuple[Array, np.ndarray]:
        """ε̂² of the tasks in these places, and which of them have one."""
        if self.statistics == "running":
            variance, samples = self.variance.cpu().numpy()[at], self.samples.numpy()[at]
            faded = self.decay ** np.maximum(samples, 2)
            # 1 - Σ w_k² for the weights w_k = (1 - β) β^(n-k) / (1 - β^n)
            free = 2 * (self.decay - faded) / ((1 + self.decay) * (1 - faded))
            return variance / free, samples >= 2
        return self.estimate.numpy()[at], self.epochs.numpy()[at] > 0

    def _like(self, gradients: TaskGradients) -> torch.Tensor:
        """Empty, with the columns, the device and the dtype of the means: bfloat16 would lose the late gradients."""
        jacobian = gradients.jacobian
        assert jacobian is not None
        return jacobian.new_empty(
            (0, jacobian.shape[1]), dtype=torch.promote_types(jacobian.dtype, torch.float32)
        )
