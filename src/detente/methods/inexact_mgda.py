"""MGDA with a guard whose bounds are given."""

from __future__ import annotations

from typing import Literal

from detente.methods.mgda import MGDA
from detente.methods.registry import register
from detente.methods.wrappers.guard import Bounds, Inexact, Refuse


@register
def inexact_mgda(
    *,
    epsilon: Bounds = 0.0,
    refuse: Refuse = "all",
    epoch_steps: int | None = None,
    solver: Literal["exact", "frank-wolfe"] = "exact",
    normalize: Literal["none", "l2", "loss", "loss+"] = "none",
) -> Inexact:
    """Inexact MGDA: take MGDA's step only if it helps every task whatever the error of the gradients.

    MGDA's direction q = Σ α_i g_i is accepted if <q, g_i> >= ‖q‖ ε_i for every task present, where ε_i bounds the error
    of g_i; otherwise the step is refused (Aygar 2019, section 2.2, a simple form of the algorithm of Peitz & Dellnitz
    2018). It is the wrapper ``inexact`` around ``mgda``. With one ε for all tasks the test reads ‖q‖ >= ε, and how
    large ε may be depends on the units of the losses. With the default ε = 0 it is MGDA.

    When to use it: small batches, with a bound on the noise at hand or to be searched. Cost: MGDA's, and the test on
    the Gramian, which with few tasks takes about as long again as MGDA's own problem; neither grows with the network.

    Args:
        epsilon: >= 0, bounds on the error, in the unit of a gradient's length: one number for all tasks, or one for
            each, by name or by position.
        refuse: ``all``: a refused step leaves every ``.grad`` as it was found; ``shared``: the shared part stays
            where it is and the heads move; the status is then ``stationary``, with a note.
        epoch_steps: steps after which the method itself ends an epoch of its counts; None waits for ``end_epoch()``.
        solver: as of ``mgda``.
        normalize: as of ``mgda``; the test is made on the gradients as they are.

    Raises:
        ValueError: a bound is negative or not finite (the task is named), or does not fit the tasks; bounds by position
            meet a saved state with the tasks in another order; another option is out of range; a loss is not positive
            while ``normalize`` divides by it.
        TypeError: ``epsilon`` is no number, mapping or sequence, or holds something that is no number.

    Example:
        >>> import torch
        >>> import detente
        >>> method = detente.create("inexact-mgda", epsilon=0.9)
        >>> conflict = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # ‖q‖ = 0.894
        >>> detente.combine(method, conflict).accepted, detente.combine(method, 2 * conflict).accepted
        (False, True)
        >>> method.refused_share
        0.5
    """
    mgda = MGDA(solver=solver, normalize=normalize)
    return Inexact(mgda, epsilon=epsilon, refuse=refuse, epoch_steps=epoch_steps).named("inexact-mgda")
