"""What runs inside the processes: an embedding of which every rank looks up other rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import detente


class Told(detente.Method):
    """Weight two tasks as told."""

    declares = detente.Declaration(name="told", source="a test", needs=frozenset({"gramian"}))

    def solve(self, gradients: detente.TaskGradients) -> detente.Combination:
        return detente.Combination(weights=torch.tensor([0.3, 2.0], dtype=torch.float64))


def looked_up() -> dict[str, float]:
    """The largest difference of any ``.grad`` from one process's step on the whole batch, by mode."""
    rank, found = dist.get_rank(), {}
    for mode in ("exact", "low", "features", "accumulate"):
        ends = []
        for alone in (False, True):
            torch.manual_seed(0)
            table, heads = (
                nn.Embedding(12, 3, sparse=True),
                nn.ModuleList([nn.Linear(3, 1) for _ in range(2)]),
            )
            rows = torch.tensor([1, 2, 2, 5, 7, 7, 8, 11])
            mine = rows if alone else rows[4 * rank : 4 * rank + 4]
            method, options = Told(), {"process_group": False} if alone else {}
            z = table(mine).tanh()
            losses = [(head(z) - task).square().mean() for task, head in enumerate(heads)]
            more = {"low": {"memory": "low"}, "features": {"features": z}}.get(mode, {})
            if mode == "accumulate":  # two micro-batches that are the same
                with detente.accumulate(method, 2):
                    for _ in range(2):
                        detente.backward(losses, method, retain_graph=True, **options)
            else:
                detente.backward(losses, method, **more, **options)
            ends.append(
                [p.grad.to_dense() for p in (table.weight, *heads.parameters()) if p.grad is not None]
            )
        found[mode] = max(float((one - other).abs().max()) for one, other in zip(*ends, strict=True))
    return found
