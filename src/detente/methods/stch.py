"""Smooth Tchebycheff scalarisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from detente.geometry.softmax import softmax
from detente.methods.base import Declaration, Method, Preference
from detente.methods.checks import positive_losses
from detente.methods.options import by_task, number, one_of, weight_by_name, whole, whole_or_none
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class STCH(Method):
    """Smooth Tchebycheff: minimise a smooth maximum of the losses, so that the worst task leads.

    ``log``, the default, compares logarithms: with f_t = log(L_t / nadir_t) it minimises
    T μ log Σ exp(p_t f_t / μ), so w_t = T p_t softmax(p f / μ)_t / L_t. The nadir is found in a warm-up: for
    ``warmup_epochs`` epochs Σ p_t log L_t is minimised (w_t = p_t / L_t), and the mean losses of the last of them are
    the nadir. ``plain`` is the definition: minimise μ log Σ exp(p_t (L_t - z_t) / μ) for an ideal point z, so
    w_t = p_t softmax(p (L - z) / μ)_t (Lin et al. 2024, smooth Tchebycheff scalarisation).

    ``plain`` is the paper's formula; ``log`` is what the authors' code and a public library run on neural networks,
    and it is the default because it does not depend on the units of the losses. That library averages the nadir over
    a fifth epoch after four of warm-up. Large μ turns ``log`` into the sum of log losses, small μ into the largest.

    An epoch ends when the training loop calls ``end_epoch()``, or after ``epoch_steps`` calls. If neither happens
    the warm-up never ends, and the notes of the combination say that it still runs. A task first seen after the
    warm-up takes its first loss as its nadir. ``plain`` has no warm-up and no state.

    When to use it: when the worst task counts, or to reach any chosen point of a front that is not convex. Cost:
    nothing beyond the step itself, no task gradients are taken.

    Args:
        form: ``log`` or ``plain``.
        mu: > 0, how smooth the maximum is; relative to the logarithms' differences in ``log``, in the unit of the
            losses in ``plain``.
        warmup_epochs: >= 0, for ``log``; 0 sets every nadir to 1.
        epoch_steps: steps after which the method itself ends an epoch; ``end_epoch()`` is then ignored.
        preference: p, by task name or position. In ``log`` it is brought to mean 1, in ``plain`` used as given; None
            is 1 for each task in ``log`` and 1/T in ``plain``.
        ideal: z, by task name or position, for ``plain``; None is 0.

    Raises:
        ValueError: an option is out of range, or belongs to the other form; in ``log`` a loss that is not positive
            (the task is named).

    Example:
        >>> import detente
        >>> method = detente.create("stch", warmup_epochs=1, epoch_steps=1)
        >>> detente.combine(method, torch.eye(2), losses=[1.0, 2.0]).weights
        tensor([1.0000, 0.5000], dtype=torch.float64)
        >>> detente.combine(method, torch.eye(2), losses=[1.0, 1.0]).weights
        tensor([1.3333, 0.6667], dtype=torch.float64)
    """

    declares = Declaration(
        name="stch",
        source="Lin et al. 2024 (smooth Tchebycheff scalarisation) and its authors' code",
        needs=frozenset({"losses", "epoch"}),
        stateful=True,
        native_scale="own",
        homogeneity=1,
        permutation="exact",
        search={"mu": (0.1, 0.5, 1.0, 2.0)},
    )

    sums: torch.Tensor
    counts: torch.Tensor
    nadir: torch.Tensor
    epochs: torch.Tensor
    steps: torch.Tensor

    def __init__(
        self,
        *,
        form: Literal["log", "plain"] = "log",
        mu: float = 1.0,
        warmup_epochs: int = 4,
        epoch_steps: int | None = None,
        preference: Preference = None,
        ideal: Mapping[str, float] | Sequence[float] | None = None,
    ) -> None:
        super().__init__(preference=preference)
        self.form = one_of("form", form, ("log", "plain"))
        self.mu = number("mu", mu, above=0)
        self.warmup_epochs = whole("warmup_epochs", warmup_epochs, least=0)
        self.epoch_steps = whole_or_none("epoch_steps", epoch_steps, least=1)
        if form == "log" and ideal is not None:
            raise ValueError(
                "option ideal belongs to form='plain'; form='log' finds its nadir in the warm-up."
            )
        self.ideal = None if ideal is None else by_task("ideal", ideal)

    def allocate(self, tasks: int) -> None:
        """This epoch's sum and count per task, the nadir (0 until it is known), epochs and steps so far."""
        if self.form == "plain":
            return
        start = 1.0 if self.warmup_epochs == 0 else 0.0
        self.register_buffer("sums", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(tasks, dtype=torch.int64))
        self.register_buffer("nadir", torch.full((tasks,), start, dtype=torch.float64))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The gradient of the scalarisation with respect to each loss."""
        preference = self.preference(gradients.names)
        if self.form == "plain":
            return self._plain(gradients, preference)
        losses = positive_losses(self, gradients)
        lean = np.ones(gradients.tasks) if preference is None else preference / preference.mean()
        at = self.positions(gradients.names)
        if int(self.epochs) < self.warmup_epochs:
            note = (
                f"stch: epoch {int(self.epochs) + 1} of {self.warmup_epochs} of the warm-up on the sum of log losses; "
                "end_epoch() or epoch_steps= ends an epoch"
            )
            self._record(at, losses)
            return Combination(weights=torch.from_numpy(lean / losses), notes=(note,))
        nadir = self.nadir.numpy()
        worst = np.where(nadir[at] > 0, nadir[at], losses)
        shares = softmax(lean * (np.log(losses) - np.log(worst)) / self.mu)
        nadir[at] = worst
        return Combination(weights=torch.from_numpy(gradients.tasks * lean * shares / losses))

    def end_epoch(self) -> None:
        """Close an epoch of the warm-up. Does nothing after it, or where ``epoch_steps`` is given."""
        if self.tasks is not None and self.form == "log" and self.epoch_steps is None:
            self._roll()

    def _plain(self, gradients: TaskGradients, preference: np.ndarray | None) -> Combination:
        assert gradients.losses is not None and self.tasks is not None
        lean = np.full(gradients.tasks, 1 / gradients.tasks) if preference is None else preference
        excess = gradients.losses
        if isinstance(self.ideal, dict):
            known = {name: value for name, value in self.ideal.items() if name in gradients.names}
            excess = excess - weight_by_name(known, gradients.names, "ideal")
        elif self.ideal is not None:
            ideal = weight_by_name(self.ideal, self.tasks, "ideal")
            assert ideal is not None
            excess = excess - ideal[self.positions(gradients.names)]
        return Combination(weights=torch.from_numpy(lean * softmax(lean * excess / self.mu)))

    def _record(self, at: np.ndarray, losses: np.ndarray) -> None:
        self.sums.numpy()[at] += losses
        self.counts.numpy()[at] += 1
        if self.epoch_steps is not None:
            self.steps.add_(1)
            if self.steps >= self.epoch_steps:
                self._roll()

    def _roll(self) -> None:
        if int(self.epochs) >= self.warmup_epochs:
            return
        seen = self.counts.numpy() > 0
        self.nadir.numpy()[seen] = self.sums.numpy()[seen] / self.counts.numpy()[seen]
        self.epochs.add_(1)
        self.sums.zero_()
        self.counts.zero_()
        self.steps.zero_()
