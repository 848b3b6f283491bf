"""Robust weighting by excess risk."""

from __future__ import annotations

import numpy as np
import torch

from detente.geometry.softmax import softmax
from detente.methods.base import Declaration, Method
from detente.methods.checks import check_range, layout_of, sized
from detente.methods.options import number
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class ExcessMTL(Method):
    """ExcessMTL: give more weight to the tasks that are still far from the best they can reach.

    A task's excess risk, its loss above its own optimum, is estimated from its gradient with the diagonal curvature
    that AdaGrad uses: with r_t the root of the sum of its squared gradients so far (entry by entry),
    e_t = g_tᵀ (g_t / r_t), measured in units of its first value. Then w_t ← w_t exp(lr e_t), rescaled to the sum T
    (He et al. 2024, equations 6, 7 and 9). A loss that is merely noisy has a large loss and a small excess.

    Codes add 1e-7 to the squared gradients before the root, which makes the result depend on the scale of the
    gradients; here an entry that was always zero counts zero, and no scale enters. Codes start from w = 1 (as here)
    or 1/T, and one lets the first step use e_t not yet divided by itself. The weights apply to the heads too, as in
    the official code.

    When to use it: tasks with noisy labels, which other weightings would favour for their large losses. Cost: the
    task gradients, and T x P numbers of state in the memory of the parameters; T numbers more go to the host.

    Args:
        lr: > 0, of the exponentiated step.

    Raises:
        ValueError: ``lr`` is out of range; the number of shared parameters changed, or the size of a gradient leaves
            the range of its dtype.

    Example:
        >>> import detente
        >>> method = detente.create("excess-mtl", lr=1.0)
        >>> first = detente.combine(method, torch.eye(2)).weights
        >>> second = detente.combine(method, torch.tensor([[1.0, 0], [0, 0.1]])).weights
        >>> [round(float(weight), 2) for weight in second]  # the second task is nearly done
        [1.34, 0.66]
    """

    declares = Declaration(
        name="excess-mtl",
        source="He et al. 2024 (excess risks), equations 6, 7 and 9",
        needs=frozenset({"jacobian"}),
        spaces=frozenset({"exact", "layer"}),
        stateful=True,
        native_scale="sum",
        homogeneity=1,
        permutation="exact",
        heads="weighted",
        search={"lr": (0.001, 0.01, 0.1, 1.0)},
    )

    roots: torch.Tensor | None
    log_weights: torch.Tensor
    first: torch.Tensor

    def __init__(self, *, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = number("lr", lr, above=0)

    def allocate(self, tasks: int) -> None:
        """Logarithms of the weights, first excesses (0 until known), and roots sized by the first gradients."""
        self.register_buffer("roots", None)
        self.register_buffer("log_weights", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("first", torch.zeros(tasks, dtype=torch.float64))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The weights after this step's excesses."""
        jacobian = gradients.jacobian
        assert jacobian is not None and self.tasks is not None
        at = self.positions(gradients.names)
        known = sized(self, self.roots, jacobian, gradients)
        rows = None if gradients.names == self.tasks else torch.from_numpy(at).to(jacobian.device)
        # hypot: the squares of gradients leave the range of float32 long before the gradients do.
        roots = torch.hypot(known if rows is None else known[rows], jacobian)
        relative = jacobian / roots.clamp_min(torch.finfo(roots.dtype).tiny)  # 0 where all gradients were 0
        excess = torch.linalg.vecdot(jacobian, relative).to(device="cpu", dtype=torch.float64).numpy()
        check_range(self, gradients, excess)
        first, log_weights = self.first.numpy(), self.log_weights.numpy()
        start = np.where(first[at] > 0, first[at], excess)
        log_weights[at] += self.lr * np.divide(excess, start, out=np.zeros(len(at)), where=start > 0)
        first[at] = start
        self.roots = roots if rows is None else known.index_copy(0, rows, roots)
        self.column_layout = layout_of(gradients)
        return Combination(weights=torch.from_numpy(gradients.tasks * softmax(log_weights[at])))
