"""MGDA with a guard that estimates the error of the gradients."""

from __future__ import annotations

from typing import Literal

from detente.methods.mgda import MGDA
from detente.methods.registry import register
from detente.methods.wrappers.adaptive import Adaptive
from detente.methods.wrappers.guard import Refuse


@register
def adaptive_mgda(
    *,
    scale: float = 0.1,
    applies_to: Literal["epsilon", "squared"] = "epsilon",
    statistics: Literal["epoch", "running"] = "epoch",
    decay: float = 0.99,
    refuse: Refuse = "all",
    epoch_steps: int | None = None,
    solver: Literal["exact", "frank-wolfe"] = "exact",
    normalize: Literal["none", "l2", "loss", "loss+"] = "none",
) -> Adaptive:
    """Adaptive MGDA: take MGDA's step only if it stands out from the noise that the last epoch's gradients had.

    MGDA's direction q is accepted if <q, g_i> >= ‖q‖ ε_i for every task present, with ε_i = λ ε̂_i and ε̂_i² the mean
    squared distance of the gradients of the last epoch's batches from their mean (Aygar 2019, section 2.3). It is the
    wrapper ``adaptive`` around ``mgda``. The first epoch is not guarded. An epoch ends with ``end_epoch()`` or after
    ``epoch_steps`` calls; if neither happens, every step is accepted, this is MGDA, and the notes say so.

    It cannot run on ``features=``: gradients with respect to the representations of different batches have no mean.
    Where a task that comes later makes more parameters shared, name them with ``shared=`` from the start.

    When to use it: small batches, and no idea of the size of the noise. Cost: MGDA's and the test's, see
    ``inexact-mgda``; T x P numbers of state in the memory of the parameters (two times that while a step is made, three
    times where a task is absent), and one pass over them in a step, which takes longer than MGDA itself on all but
    small networks; with ``running`` T numbers more go to the host.

    Args:
        scale: >= 0, λ; 0 is MGDA.
        applies_to: ``epsilon``: ε = λ ε̂, as in the thesis's text; ``squared``: ε² = λ ε̂², as in its algorithm.
        statistics: ``epoch``: of the last epoch; ``running``: of all steps before, the recent ones counting more.
        decay: in (0, 1), how much an earlier gradient counts after one more step, with ``running``.
        refuse: ``all``: a refused step leaves every ``.grad`` as it was found; ``shared``: the shared part stays
            where it is and the heads move; the status is then ``stationary``, with a note.
        epoch_steps: steps after which the method itself ends an epoch; None waits for ``end_epoch()``.
        solver: as of ``mgda``.
        normalize: as of ``mgda``; the test is made on the gradients as they are.

    Raises:
        ValueError: an option is out of range; the number of shared parameters changed; a loss is not positive while
            ``normalize`` divides by it.

    Example:
        >>> import torch
        >>> import detente
        >>> method = detente.create("adaptive-mgda", scale=1.0, epoch_steps=2)
        >>> gradients = [torch.tensor([[x], [x]]) for x in (2.0, 4.0, 1.5, 0.5)]  # the first two: 3 ± 1
        >>> [detente.combine(method, gradient).accepted for gradient in gradients]
        [True, True, True, False]
    """
    guard = Adaptive(
        MGDA(solver=solver, normalize=normalize),
        scale=scale,
        applies_to=applies_to,
        statistics=statistics,
        decay=decay,
        refuse=refuse,
        epoch_steps=epoch_steps,
    )
    return guard.named("adaptive-mgda")
