"""A wrapper that brings the tasks' gradients to comparable size."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from detente.methods.base import Method
from detente.methods.checks import positive_losses
from detente.methods.options import one_of
from detente.methods.wrappers.base import Wrapper, register_wrapper
from detente.values import Combination, TaskGradients


@register_wrapper
class Normalize(Wrapper):
    """Normalize: bring the tasks' gradients to comparable size before the wrapped method sees them.

    The gradient of task i is divided by n_i: its length (``l2``), its loss (``loss``, the gradient of log L), or both
    (``loss+``), and the n_i by their mean, so that the gradients keep their common scale. The wrapped method combines
    the normalised gradients, and so does the direction: g_i counts w_i / n_i. With ``apply="raw"`` the weights found
    for the normalised gradients are applied to the gradients as they are, as ``mgda(normalize=…)`` does; public codes
    do the one or the other.

    A gradient that vanishes stays as it is. Lengths are those in the space where the problem is solved.

    When to use it: losses of different units, around a method that follows the longest gradient.

    Args:
        method: any method; one that gives weights for ``apply="raw"``.
        by: ``l2``, ``loss`` or ``loss+``.
        apply: ``normalized``: combine the normalised gradients; ``raw``: apply the weights to the given ones.

    Raises:
        ValueError: an option is out of range; a loss that divides is not positive (the task is named).

    Example:
        >>> import detente
        >>> method = detente.wrappers.Normalize(detente.create("uniform"))
        >>> detente.combine(method, torch.tensor([[1.0, 0.0], [0.0, 3.0]])).direction
        tensor([2., 2.])
    """

    name = "normalize"
    source = "Sener & Koltun 2018, section 4 (normalisation in the published code)"
    search = {"by": ("l2", "loss", "loss+")}  # noqa: RUF012

    def __init__(
        self,
        method: Method,
        *,
        by: Literal["l2", "loss", "loss+"] = "l2",
        apply: Literal["normalized", "raw"] = "normalized",
    ) -> None:
        super().__init__(method)
        self.by = one_of("by", by, ("l2", "loss", "loss+"))
        self.onto = one_of("apply", apply, ("normalized", "raw"))
        given = self.inner_info()
        if apply == "raw" and given.gives == "direction":
            raise ValueError(
                f"normalize(apply='raw') applies weights, and {given.name} gives only a direction; use 'normalized'."
            )
        self.looks_at = frozenset({"l2": {"gramian"}, "loss": {"losses"}, "loss+": {"gramian", "losses"}}[by])
        self.derive(
            native_scale="own",
            simplex=given.simplex and apply == "raw",
            nonconflict=given.nonconflict and apply == "normalized",
            stationary=None if given.stationary == "affine" else given.stationary,
        )

    def solve(self, gradients: TaskGradients) -> Combination:
        """Combine the normalised gradients, and carry the result back to the given ones."""
        size = self._size(gradients)
        result = self.method.combine(self._scaled(gradients, size))
        if self.onto == "raw":
            return replace(result, transform=None)
        divisor = torch.from_numpy(size)
        return replace(
            result,
            weights=None if result.weights is None else result.weights / divisor,
            block_weights=None if result.block_weights is None else result.block_weights / divisor,
            transform=None if result.transform is None else result.transform / divisor,
        )

    def _size(self, gradients: TaskGradients) -> np.ndarray:
        """Return [T] positive numbers of mean one that divide the gradients."""
        size = np.ones(gradients.tasks)
        if self.by != "loss":
            assert gradients.gramian is not None
            norms = np.sqrt(np.diagonal(gradients.gramian))
            size = norms / (norms.max() or 1.0)
        if self.by != "l2":
            losses = positive_losses(self, gradients, "divides by the losses")
            size = size * (losses / losses.max())
        alive = size > 0
        return np.where(alive, size / (size[alive].mean() if alive.any() else 1.0), 1.0)

    def _scaled(self, gradients: TaskGradients, size: np.ndarray) -> TaskGradients:
        products = size[:, None] * size
        gramian, blocks, jacobian = gradients.gramian, gradients.block_gramians, gradients.jacobian
        looked_at = jacobian is not None and "jacobian" in self.method.declares.needs
        return replace(
            gradients,
            gramian=None if gramian is None else gramian / products,
            block_gramians=None if blocks is None else blocks / products,
            jacobian=jacobian / torch.from_numpy(size).to(jacobian)[:, None]
            if jacobian is not None and looked_at
            else None,
            extra=tuple(self._scaled(further, self._size(further)) for further in gradients.extra),
        )
