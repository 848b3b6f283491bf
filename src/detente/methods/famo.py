"""Fast adaptive multitask optimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from detente.geometry.adam import adam_step
from detente.geometry.softmax import softmax
from detente.methods.base import Declaration, Method
from detente.methods.checks import losses_of
from detente.methods.options import number
from detente.methods.registry import register
from detente.values import Combination, TaskGradients

STAND_IN = (
    "after_step() was not called: this batch's losses stood in for those of the last batch after its step"
)


@register
class FAMO(Method):
    """FAMO: let all losses fall at the same relative rate, looking at losses alone.

    With z = softmax(ξ) and D_t = L_t - lower_t, a step descends along Σ z_t ∇ log D_t, divided by Σ z_t / D_t: the
    weights (z_t / D_t) / Σ_j (z_j / D_j) sum to one. After the step, the losses L' of the same batch show how far
    each task got, δ_t = log D_t - log D'_t, and ξ takes a step of Adam along the softmax's transposed Jacobian of δ:
    tasks that got less far gain weight (Liu et al. 2023, Algorithm 1).

    Codes add 1e-8 inside the logarithms; here D has to be positive. Paper and one code decay ξ by 1e-3, the official
    code by 1e-5.

    The training loop calls ``after_step(losses)`` with the losses of the same batch after the optimizer's step (a
    second forward pass). If it did not, the losses of the next step stand in for them, which adds the difference
    between batches to δ, and the notes of the combination say so.

    When to use it: many tasks, where task gradients cost too much. Cost: no task gradients; one more forward pass
    where ``after_step`` is used.

    Args:
        lr: step length of Adam on ξ, > 0.
        decay: >= 0, pulls ξ to 0, that is the weights z to equality.
        lower: a lower bound that each loss stays above, one number for all tasks.

    Raises:
        ValueError: an option is out of range; a loss is not above ``lower`` (the task is named); ``after_step()``
            without a step before it, or for other tasks than that step's.

    Example:
        >>> import detente
        >>> method = detente.create("famo")
        >>> detente.combine(method, torch.eye(2), losses=[1.0, 3.0]).weights
        tensor([0.7500, 0.2500], dtype=torch.float64)
        >>> method.after_step([1.0, 1.5])  # the second task got further: the first gains weight
        >>> bool(detente.combine(method, torch.eye(2), losses=[1.0, 3.0]).weights[0] > 0.75)
        True
    """

    declares = Declaration(
        name="famo",
        source="Liu et al. 2023 (FAMO), Algorithm 1",
        needs=frozenset({"losses", "after_step"}),
        stateful=True,
        native_scale="simplex",
        homogeneity=1,
        simplex=True,
        permutation="exact",
        search={"lr": (0.001, 0.005, 0.025, 0.1), "decay": (1e-5, 1e-3, 1e-2)},
    )

    logits: torch.Tensor
    moments: torch.Tensor
    log_losses: torch.Tensor
    steps: torch.Tensor
    open_steps: torch.Tensor

    def __init__(self, *, lr: float = 0.025, decay: float = 1e-3, lower: float = 0.0) -> None:
        super().__init__()
        self.lr = number("lr", lr, above=0)
        self.decay = number("decay", decay, least=0)
        self.lower = number("lower", lower)

    def allocate(self, tasks: int) -> None:
        """ξ; each task's log D in the last step it took part in, and that step's number (0: its new losses came)."""
        self.register_buffer("logits", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("moments", torch.zeros(tasks, 3, dtype=torch.float64))
        self.register_buffer("log_losses", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("open_steps", torch.zeros(tasks, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The weights of this step; before it, ξ moves if nobody reported on the last step."""
        assert gradients.losses is not None
        logs = self._logs(gradients.names, gradients.losses)
        at = self.positions(gradients.names)
        open_steps = self.open_steps.numpy()
        again = open_steps[at] > 0
        if again.any():
            self._learn(at[again], logs[again])
        shares = softmax(self.logits.numpy()[at] - logs)  # z / D over its sum, with nothing to overflow
        self.log_losses.numpy()[at] = logs
        self.steps.add_(1)
        open_steps[at] = int(self.steps)
        return Combination(
            weights=torch.from_numpy(shares), notes=(f"famo: {STAND_IN}",) if again.any() else ()
        )

    def after_step(self, losses: Mapping[str, Any] | Sequence[Any]) -> None:
        """Learn from the losses of the same batch after the optimizer's step.

        Args:
            losses: numbers or scalar tensors of the last step's tasks, by name or in the method's order of tasks.

        Raises:
            ValueError: no step waits for them, a task is missing or unknown, or a loss is not above ``lower``.
        """
        last = 0 if self.tasks is None else int(self.steps)
        at = np.flatnonzero(self.open_steps.numpy() == last) if last else np.zeros(0, dtype=np.int64)
        if len(at) == 0:
            raise ValueError(
                "famo: after_step() belongs after a step: call backward() (or combine()) first, once for each call."
            )
        assert self.tasks is not None
        names = [self.tasks[place] for place in at]
        self._learn(at, self._logs(names, losses_of(self, losses, names)))
        self.open_steps.numpy()[at] = 0

    def _logs(self, names: Sequence[str], losses: np.ndarray) -> np.ndarray:
        above = losses - self.lower
        if not above.min() > 0:
            place = int(np.argmin(above > 0))
            raise ValueError(
                f"famo takes logarithms of the losses above lower={self.lower:g}, and the loss of task "
                f"{names[place]!r} is {losses[place]}; it needs a larger loss. Set lower= below every loss."
            )
        logs: np.ndarray = np.log(above)
        return logs

    def _learn(self, at: np.ndarray, logs: np.ndarray) -> None:
        """One step of ξ at the positions ``at``, whose new log D are ``logs``."""
        logits, moments = self.logits.numpy(), self.moments.numpy()
        shares = softmax(logits[at])
        got = self.log_losses.numpy()[at] - logs
        slope = shares * (got - shares @ got)
        logits[at], moments[at] = adam_step(
            logits[at], moments[at], slope, lr=self.lr, weight_decay=self.decay
        )
