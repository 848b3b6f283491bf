"""GradDrop: gradient sign dropout."""

from __future__ import annotations

import torch

from detente.methods.base import Declaration, Method
from detente.methods.options import number
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class GradDrop(Method):
    """GradDrop: in every entry keep only the gradients of one sign, drawn by how much of the entry has it.

    The share of an entry that is positive is P = ½ (1 + Σ_t g_t / Σ_t |g_t|). With U uniform on [0, 1), one for each
    entry, the positive parts are kept if U < P and the negative ones otherwise (Chen et al. 2020, Algorithm 1). On
    average a pure entry passes as it is, and one on which the tasks disagree goes this way or that way instead of
    nowhere. What is not kept passes with the share ``leak``. The direction is the sum of what passed: no weights of the
    tasks express it.

    On ``features=`` the sign of a gradient is taken relative to that of the activation, g · sgn(z), as the paper does
    where samples have gradients of their own. Each entry of each sample decides for itself; the paper also names the
    variant that adds up a batch before it decides. An entry whose activation is exactly zero passes only the leak.

    Codes differ: sum or mean of the tasks; one has the leak inverted, one draws one number per task.

    When to use it: to shake a run out of points where tasks hold each other, with many tasks. Cost: the task
    gradients, two passes over them, and P random numbers.

    Args:
        leak: in [0, 1], the share that passes in any case; 1 is the plain sum.
        seed: of the method's own generator; saved and restored with its state.

    Raises:
        ValueError: ``leak`` is out of range.

    Example:
        >>> import detente
        >>> detente.combine("graddrop", torch.tensor([[1.0, 2.0, -1.0], [1.0, -0.0, -3.0]])).direction
        tensor([ 2.,  2., -4.])
    """

    declares = Declaration(
        name="graddrop",
        source="Chen et al. 2020 (sign dropout), Algorithm 1",
        needs=frozenset({"jacobian", "activations"}),
        spaces=frozenset({"exact", "features"}),
        stateful=True,
        native_scale="sum",
        homogeneity=1,
        permutation="exact",
        gives="direction",
        search={"leak": (0.0, 0.25, 0.5)},
    )

    def __init__(self, *, leak: float = 0.0, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.leak = number("leak", leak, least=0, most=1)

    def solve(self, gradients: TaskGradients) -> Combination:
        """The sum of what passed."""
        jacobian = gradients.jacobian
        assert jacobian is not None
        total = everything = jacobian.sum(dim=0)
        size = jacobian[0].abs()
        for row in jacobian[1:]:  # row by row: no copy of the [T, P] gradients
            size += row.abs()
        # The positive parts add up to ½ (total + size), the negative ones to ½ (total - size).
        purity = torch.where(size > 0, total / size, 0)
        sign = None
        if gradients.activations is not None:
            sign = torch.sign(gradients.activations).to(jacobian)
            purity = purity * sign
        drawn = torch.rand(len(total), generator=self.generator).to(jacobian)
        passed = torch.where(2 * drawn - 1 < purity, size, -size)
        if sign is not None:
            passed = passed * sign
            total = torch.where(sign == 0, 0, total)
        direction = torch.where(size > 0, 0.5 * (total + passed), 0)
        if self.leak > 0:
            direction = torch.lerp(direction, everything, self.leak)
        return Combination(direction=direction)
