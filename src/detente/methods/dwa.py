"""Dynamic weight averaging."""

from __future__ import annotations

import numpy as np
import torch

from detente.geometry.softmax import softmax
from detente.methods.base import Declaration, Method
from detente.methods.options import number, whole_or_none
from detente.methods.registry import register
from detente.values import Combination, TaskGradients

WAITING = "fewer than two epochs have ended (end_epoch() or epoch_steps= ends one): every weight is 1"


@register
class DWA(Method):
    """Dynamic weight averaging: give more weight to the tasks whose loss fell least from one epoch to the next.

    With L_t(e) the mean loss of task t over epoch e, the rate is r_t = L_t(e-1) / L_t(e-2) and the weights in
    epoch e are w_t = T softmax(r_t / temperature) over the T tasks present; during the first two epochs w = 1
    (Liu, Johns & Davison 2019, "dynamic weight average").

    Codes differ: some take the ratio of single iterations, one of them with the present loss; here, as in the paper,
    means over epochs. A task that has not yet been through two epochs, or whose earlier mean is zero, counts with
    r = 1 beside the others.

    An epoch ends when the training loop calls ``end_epoch()``, or after ``epoch_steps`` calls. If neither happens
    every weight stays 1, and the notes of the combination say so.

    When to use it: tasks that learn at different speed and a loop with clear epochs. Cost: nothing beyond the step
    itself, no task gradients are taken.

    Args:
        temperature: > 0; the larger, the closer the weights are to 1. Since r is close to 1 for all tasks, so are the
            weights at the published 2.
        epoch_steps: steps after which the method itself ends an epoch; ``end_epoch()`` is then ignored. None waits
            for ``end_epoch()``.

    Raises:
        ValueError: an option is out of range; a loss is negative (the ratio would rank progress the wrong way round;
            the task is named).

    Example:
        >>> import detente
        >>> method = detente.create("dwa", temperature=1.0, epoch_steps=1)
        >>> for losses in ([1.0, 1.0], [1.0, 0.5], [1.0, 0.4]):
        ...     weights = detente.combine(method, torch.eye(2), losses=losses).weights
        >>> weights
        tensor([1.2449, 0.7551], dtype=torch.float64)
    """

    declares = Declaration(
        name="dwa",
        source="Liu, Johns & Davison 2019 (MTAN), dynamic weight average",
        needs=frozenset({"losses", "epoch"}),
        stateful=True,
        native_scale="sum",
        homogeneity=1,
        permutation="exact",
        search={"temperature": (0.5, 1.0, 2.0, 5.0)},
    )

    sums: torch.Tensor
    counts: torch.Tensor
    means: torch.Tensor
    epochs: torch.Tensor
    steps: torch.Tensor

    def __init__(self, *, temperature: float = 2.0, epoch_steps: int | None = None) -> None:
        super().__init__()
        self.temperature = number("temperature", temperature, above=0)
        self.epoch_steps = whole_or_none("epoch_steps", epoch_steps, least=1)

    def allocate(self, tasks: int) -> None:
        """This epoch's sum and count per task, and the means of its last two epochs (the later one first)."""
        self.register_buffer("sums", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(tasks, dtype=torch.int64))
        self.register_buffer("means", torch.zeros(tasks, 2, dtype=torch.float64))
        self.register_buffer("epochs", torch.zeros(tasks, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The weights from the last two epochs; then the losses join this epoch's means."""
        losses = gradients.losses
        assert losses is not None
        if losses.min() < 0:
            place = int(np.argmin(losses))
            raise ValueError(
                f"dwa compares epochs by the ratio of losses, and the loss of task {gradients.names[place]!r} is "
                f"{losses[place]}; it needs losses >= 0. Add a constant to that loss (its gradient stays the same)."
            )
        at = self.positions(gradients.names)
        later, earlier = self.means.numpy()[at].T
        known = (self.epochs.numpy()[at] >= 2) & (earlier > 0)
        weights = np.ones(gradients.tasks)
        if known.any():
            rates = np.divide(later, earlier, out=np.ones(gradients.tasks), where=known)
            weights = gradients.tasks * softmax(rates / self.temperature)
        notes = () if self.epochs.numpy()[at].max() >= 2 else (f"dwa: {WAITING}",)
        self.sums.numpy()[at] += losses
        self.counts.numpy()[at] += 1
        if self.epoch_steps is not None:
            self.steps.add_(1)
            if self.steps >= self.epoch_steps:
                self._roll()
        return Combination(weights=torch.from_numpy(weights), notes=notes)

    def end_epoch(self) -> None:
        """Close the epoch: its mean losses become the latest. Does nothing where ``epoch_steps`` is given."""
        if self.tasks is not None and self.epoch_steps is None:
            self._roll()

    def _roll(self) -> None:
        seen = self.counts.numpy() > 0
        means = self.means.numpy()
        means[seen, 1] = means[seen, 0]
        means[seen, 0] = self.sums.numpy()[seen] / self.counts.numpy()[seen]
        self.epochs.numpy()[seen] += 1
        self.sums.zero_()
        self.counts.zero_()
        self.steps.zero_()
