"""Gradients of all tasks in one vectorised backward."""

from __future__ import annotations

import torch

from detente.autograd.jacobian import Rows, Walked, one_by_one
from detente.autograd.layout import present
from detente.autograd.step import Step


def batched(step: Step, rows: Rows) -> Walked:
    """Take all tasks' gradients in one backward; every task then walks all heads, and operations must support vmap."""
    roles, losses = step.roles, step.scaled
    mine = [tensor for tensors in roles.own for tensor in tensors]
    shared = [tensor for tensor, mask in zip(roles.shared, roles.reached, strict=True) if mask]
    stacked = torch.stack([loss.reshape(()) for loss in losses])
    seeds = torch.eye(len(losses), dtype=stacked.dtype, device=stacked.device)
    by_tensor: dict[torch.Tensor, torch.Tensor] = {}
    if stacked.requires_grad:  # else all tasks are absent on this rank
        try:
            found = torch.autograd.grad(
                stacked,
                [*shared, *mine],
                seeds,
                retain_graph=step.request.retain_graph,
                allow_unused=True,
                is_grads_batched=True,
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "memory='batched' takes the gradients of all tasks in one vectorised backward, and some operation of "
                "this graph does not support that (a compiled part, or an autograd function without vmap). Use "
                "memory='fast'."
            ) from error
        by_tensor = dict(present([*shared, *mine], found))
    for row, task in enumerate(step.inside):
        pieces = [None if (g := by_tensor.get(tensor)) is None else g[task] for tensor in roles.shared]
        rows.layout.write(rows.row(row), pieces)
        rows.filled(row)
    own = tuple(
        [(tensor, by_tensor[tensor][task]) for tensor in tensors if tensor in by_tensor]
        for task, tensors in enumerate(roles.own)
    )
    return own, by_tensor.keys() & set(shared), {}


TAKE = {"fast": one_by_one, "batched": batched, "low": one_by_one}
"""How rows are taken, by the mode of a step."""
