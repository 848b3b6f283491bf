"""GradVac: gradient vaccine."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from detente.geometry.surgery import raise_cosines
from detente.methods.base import Declaration, Method
from detente.methods.options import number, one_of
from detente.methods.pcgrad import visiting_order
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class GradVac(Method):
    """GradVac: turn the tasks' gradients towards each other until their cosines are as large as they used to be.

    For every ordered pair of tasks a target ρ̂_ij follows the cosine that is met: ρ̂ ← (1-β) ρ̂ + β ρ, from 0. The
    gradient of task i meets those of the other tasks in an order drawn anew for every task and step; where the
    cosine ρ of the running g_i and the given g_j is below its target, g_j is added until it is reached:
    g_i ← g_i + ‖g_i‖ (ρ̂ √(1-ρ²) - ρ √(1-ρ̂²)) / (‖g_j‖ √(1-ρ̂²)) g_j (Wang et al. 2021, equation 4, Algorithm 1).
    The direction is the sum of the altered gradients. With targets still at 0 this is PCGrad.

    The altered gradients are combinations of the given ones, so all is computed from Gramians: one of the whole
    model, or one for each layer or tensor, with targets of its own (the paper's groups).

    Codes differ: every target moves at every step (the paper, and here), or only where a correction was made, which
    differs by up to 60 % at the third step. The paper's β is 0.01, public codes use 0.5. Additive epsilons of public
    codes switch the method off for small gradients; here there are none. A target above 1 - 1e-8 counts as that, since
    a cosine of 1 would take an infinite addition; a gradient that vanishes has no cosine and moves no target.

    When to use it: many related tasks, whose gradients agree more than not. Cost: the task gradients, T - 1
    operations on T x T numbers for each group, and T x T numbers of state for each group.

    Args:
        beta: in [0, 1], how fast the targets follow.
        group: ``model``: one Gramian of everything; ``layer``, ``tensor``: one for each, with directions and targets of
            its own. Groups need the gradients of the parameters (``exact``).
        order: ``random``, or ``fixed``: each task takes the others in the order in which the losses are given.
        seed: of the method's own generator, for ``order="random"``; saved and restored with its state.

    Raises:
        ValueError: an option is out of range; the number of groups changed.

    Example:
        >>> import detente
        >>> method = detente.create("gradvac")
        >>> aligned, opposed = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> _ = detente.combine(method, aligned)
        >>> detente.combine(method, opposed).transform  # the targets are at 0.4
        tensor([[1.0000, 0.4364],
                [0.4364, 1.0000]], dtype=torch.float64)
    """

    declares = Declaration(
        name="gradvac",
        source="Wang et al. 2021 (gradient vaccine), equation 4, Algorithm 1",
        needs=frozenset({"gramian"}),
        stateful=True,
        native_scale="sum",
        homogeneity=1,
        permutation="distribution",
        search={"beta": (0.01, 0.1, 0.5), "group": ("model", "layer", "tensor")},
    )

    targets: torch.Tensor

    def __init__(
        self,
        *,
        beta: float = 0.5,
        group: Literal["model", "layer", "tensor"] = "model",
        order: Literal["random", "fixed"] = "random",
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        self.beta = number("beta", beta, least=0, most=1)
        self.group = one_of("group", group, ("model", "layer", "tensor"))
        self.order = one_of("order", order, ("random", "fixed"))
        if order == "fixed":
            self.declares = replace(self.declares, permutation=None)
        if group != "model":
            needs, spaces = frozenset({"gramian", "blocks"}), frozenset({"exact"})
            self.declares = replace(self.declares, needs=needs, spaces=spaces, gives="blocks")

    def allocate(self, tasks: int) -> None:
        """Targets [T, T, groups]; how many groups there are, the first step tells."""
        self.register_buffer("targets", torch.zeros(tasks, tasks, 0, dtype=torch.float64))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The corrections, as transforms of the task gradients, one per group."""
        gramians = self._gramians(gradients)
        groups = len(gramians)
        known = self.targets.numpy()
        if known.shape[2] == 0:
            known = np.zeros((*known.shape[:2], groups))
        if known.shape[2] != groups:
            raise ValueError(
                f"gradvac(group={self.group!r}) remembers {known.shape[2]} groups and was given {groups}. Name the "
                "shared parameters with shared=, so that they stay the same, or create a new method."
            )
        everyone = gradients.names == self.tasks
        places = () if everyone else np.ix_(*[self.positions(gradients.names)] * 2)
        order = visiting_order(self.order, gradients.tasks, self.generator)
        transforms, targets = raise_cosines(gramians, known[places].transpose(2, 0, 1), order, self.beta)
        known = np.array(known)
        known[places] = targets.transpose(1, 2, 0)
        self.targets = torch.from_numpy(known)
        status: Literal["ok", "stationary"] = "ok" if transforms.any() else "stationary"
        weights = torch.from_numpy(transforms.sum(axis=1))
        if self.group == "model":
            return Combination(weights=weights[0], transform=torch.from_numpy(transforms[0]), status=status)
        if self.group == "layer":
            weights = weights[torch.tensor(gradients.block_layers)]
        return Combination(block_weights=weights, status=status)

    def _gramians(self, gradients: TaskGradients) -> np.ndarray:
        """[groups, T, T]."""
        if self.group == "model":
            assert gradients.gramian is not None
            return gradients.gramian[None]
        assert gradients.block_gramians is not None
        if self.group == "tensor":
            return gradients.block_gramians
        summed = np.zeros((max(gradients.block_layers) + 1, *gradients.block_gramians.shape[1:]))
        np.add.at(summed, np.array(gradients.block_layers), gradients.block_gramians)
        return summed
