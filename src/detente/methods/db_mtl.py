"""Dual-balancing multi-task learning."""

from __future__ import annotations

import numpy as np
import torch

from detente.methods.base import Declaration, Method
from detente.methods.checks import check_range, layout_of, positive_losses, sized
from detente.methods.options import number
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class DBMTL(Method):
    """DB-MTL: sum the smoothed gradients of the log losses, all brought to the length of the longest.

    The logarithm balances the losses, the common length the gradients. In the k-th step of task t,
    m_t ← β_k m_t + (1 - β_k) g_t / L_t with β_k = β / k^σ and m_t = 0 before the first; the direction is
    Σ_t (max_j ‖m_j‖ / ‖m_t‖) m_t over the tasks present (Lin et al. 2023, section 3, Algorithm 1).

    The mean starts at zero and is not corrected for it, as published: with the default β = 0.9 the first steps are
    short, a tenth of the length at the first. Codes add 1e-8 inside the logarithm and to the norms; here losses
    have to be positive and a vanishing m_t adds nothing. Paper and codes give the heads the gradient of log L_t; here
    they take the plain gradient of L_t, since the direction remembers other batches and is no weighted sum of this
    one's gradients.

    When to use it: gradients too noisy for their lengths to be trusted from one batch. Cost: the task gradients, and
    T x P numbers of state in the memory of the parameters; T numbers more go to the host.

    Args:
        beta: in [0, 1), how much of the running mean stays; 0 takes each batch for itself.
        sigma: >= 0, how fast that share falls with the number of steps.

    Raises:
        ValueError: an option is out of range; a loss is not positive (the task is named); the number of shared
            parameters changed, or the size of a gradient leaves the range of its dtype.

    Example:
        >>> import detente
        >>> method = detente.create("db-mtl", beta=0.0)
        >>> detente.combine(method, torch.tensor([[3.0, 0.0], [0.0, 4.0]]), losses=[1.0, 2.0]).direction
        tensor([3., 3.])
    """

    declares = Declaration(
        name="db-mtl",
        source="Lin et al. 2023 (dual-balancing), section 3, Algorithm 1",
        needs=frozenset({"losses", "jacobian"}),
        spaces=frozenset({"exact"}),
        stateful=True,
        native_scale="own",
        homogeneity=1,
        permutation="exact",
        gives="direction",
        search={"beta": (0.0, 0.5, 0.9), "sigma": (0.0, 0.5)},
    )

    means: torch.Tensor | None
    steps: torch.Tensor

    def __init__(self, *, beta: float = 0.9, sigma: float = 0.0) -> None:
        super().__init__()
        self.beta = number("beta", beta, least=0, below=1)
        self.sigma = number("sigma", sigma, least=0)

    def allocate(self, tasks: int) -> None:
        """Steps of each task, and running means sized by the first gradients."""
        self.register_buffer("means", None)
        self.register_buffer("steps", torch.zeros(tasks, dtype=torch.int64))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The balanced sum of the running means after this step's gradients joined them."""
        jacobian = gradients.jacobian
        assert jacobian is not None and self.tasks is not None
        losses = positive_losses(self, gradients)
        at = self.positions(gradients.names)
        known = sized(self, self.means, jacobian, gradients)
        rows = None if gradients.names == self.tasks else torch.from_numpy(at).to(jacobian.device)
        steps = self.steps.numpy()
        keep = self.beta / (steps[at] + 1.0) ** self.sigma
        old, new = torch.from_numpy(np.stack((keep, (1 - keep) / losses))).to(jacobian)[:, :, None]
        means = (known if rows is None else known[rows]) * old + jacobian * new
        norms = torch.linalg.vector_norm(means, dim=1, dtype=torch.float64).cpu().numpy()
        check_range(self, gradients, norms)
        factors = np.divide(norms.max(), norms, out=np.zeros(len(norms)), where=norms > 0)
        self.means = means if rows is None else known.index_copy(0, rows, means)
        self.column_layout = layout_of(gradients)
        steps[at] += 1
        if not norms.any():
            return Combination(direction=jacobian.new_zeros(jacobian.shape[1]), status="stationary")
        return Combination(direction=torch.from_numpy(factors).to(jacobian) @ means)
