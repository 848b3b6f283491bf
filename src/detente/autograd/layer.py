"""Gradients of each task with respect to a layer of the shared parameters; one weighted backward serves the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from detente.autograd.jacobian import Pass, reached_by, rows_for, weighted_shared
from detente.autograd.layout import Gradients, gradients_of, present
from detente.autograd.step import Step


@dataclass(frozen=True)
class LayerPass(Pass):
    """Hold task gradients with respect to some shared parameters; one weighted backward serves all the others."""

    def carry(self, direction: torch.Tensor | None, weights: torch.Tensor | None) -> Gradients:
        """Take the weighted backward through heads and trunk."""
        assert weights is not None, "checked before"
        return weighted_shared(self.step, weights)


def layer_pass(step: Step) -> LayerPass:
    """Take the gradients of T losses with respect to the layer [T, P] and to each task's own parameters."""
    roles, layer = step.roles, step.roles.on
    rows = rows_for(step, layer, len(step.inside))
    own, row, recomputation = [], 0, step.recomputation
    with recomputation:
        for task, loss in enumerate(step.scaled):
            mine, inside = roles.own[task], task in step.inside
            inputs = [*layer, *mine] if inside else list(mine)
            found = gradients_of([loss], inputs, None, retain_graph=True)
            if inside:
                rows.layout.write(rows.row(row), found[: len(layer)])
                rows.filled(row)
                row += 1
            own.append(present(mine, found[len(layer) if inside else 0 :]))
            recomputation.next()
    if step.factor is not None:
        rows.jacobian.mul_((1 / step.factor).to(device=rows.jacobian.device, dtype=rows.jacobian.dtype))
    return LayerPass(step, rows.jacobian, tuple(own), layer, frozenset(reached_by(roles)))
