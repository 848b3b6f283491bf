"""What runs inside the processes: the Gramian segment by segment on parts of a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from parity import TASKS, Network, batch_of, losses_of, parts_of
from torch import nn

import detente

WIDTH, LAYERS = 5, 6
FITTING = [
    name
    for name, info in sorted(detente.methods().items())
    if ("exact" in info.spaces or not info.takes_gradients)
    and not info.needs & {"jacobian", "blocks", "activations"}
    and info.batches == 1
]


class Crossing(nn.Module):
    """Layers that every example may pass in another order, one of them twice; tasks that skip some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, place + 1) for place, task in enumerate(TASKS)})
        self.double()

    def error(self, task: str, x: torch.Tensor, order: Any) -> torch.Tensor:
        for number in (*order, order[0]):
            x = self.layers[number](x).tanh() + x
        return (self.heads[task](x) - 1).square().mean(dim=1)


# Which tasks a rank has, and by which layers its examples go for each of them.
ORDERS: dict[str, list[dict[str, tuple[int, ...]]]] = {
    "the same graph": [dict.fromkeys(TASKS, (0, 1, 2, 3, 4, 5))] * 2,
    "tasks of their own": [
        {"a": (0, 1, 2, 3, 4, 5), "b": (0, 2, 4)},
        {"b": (5, 3, 1), "c": (5, 4, 3, 2, 1, 0)},
    ],
    "another order": [dict.fromkeys(TASKS, (0, 1, 2, 3, 4, 5)), dict.fromkeys(TASKS, (4, 2, 0, 1, 3, 5))],
    "layers of their own": [dict.fromkeys(TASKS, (0, 1, 2)), dict.fromkeys(TASKS, (3, 2, 4, 5))],
    "nothing here": [dict.fromkeys(TASKS, (0, 1, 2, 3, 4, 5)), {}],
}


def gradients(network: nn.Module) -> list[torch.Tensor | None]:
    return [parameter.grad for parameter in network.parameters()]


def differences(ours: nn.Module, theirs: nn.Module, factor: float = 1.0) -> list[str]:
    found = []
    for name, one, other in zip(
        dict(ours.named_parameters()), gradients(ours), gradients(theirs), strict=True
    ):
        if (one is None) != (other is None):
            found.append(f"{name}: {one} / {other}")
        elif one is not None and other is not None:
            off = float((one - factor * other).norm() / (factor * other).norm().clamp_min(1e-30))
            if not off <= 1e-9:
                found.append(f"{name} is off by {off:.2g}")
    return found


def crossing(case: str, scaled: bool) -> list[str]:
    """A step on graphs that differ, beside one process with all examples."""
    rank, examples = dist.get_rank(), (5, 2)
    parts = [slice(0, 5), slice(5, 7)]
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = Crossing(), Crossing()
    losses = {
        task: ours.error(task, x[parts[rank]], order).mean() for task, order in ORDERS[case][rank].items()
    }
    whole = {}
    for task in TASKS:
        errors = [
            theirs.error(task, x[part], orders[task])
            for part, orders in zip(parts, ORDERS[case], strict=True)
            if task in orders
        ]
        whole[task] = torch.cat(errors).mean()
    more: dict[str, Any] = {"scaler": torch.amp.GradScaler("cpu", init_scale=256.0)} if scaled else {}
    roles = {"shared": ours.layers, "task_specific": ours.heads}
    method = detente.create("mgda", tasks=TASKS)
    one = detente.backward(losses, method, memory="low", samples=examples[rank], **roles, **more)
    other = detente.backward(
        whole,
        detente.create("mgda", tasks=TASKS),
        process_group=False,
        shared=theirs.layers,
        task_specific=theirs.heads,
    )
    detente.check_ranks(gradients=gradients(ours), note=one.notes)
    found = differences(ours, theirs, 256.0 if scaled else 1.0)
    if not torch.allclose(torch.tensor(one.weights), torch.tensor(other.weights), rtol=1e-9):
        found.append(f"weights {one.weights} / {other.weights}")
    if one.raw is None or other.raw is None or one.raw.norms != other.raw.norms:
        same = torch.allclose(torch.tensor(one.raw.norms), torch.tensor(other.raw.norms), rtol=1e-9)
        found += [] if same else [f"norms {one.raw.norms} / {other.raw.norms}"]
    return found


def every_method(scale: str) -> list[str]:
    """Two steps of every method that gives weights, uneven parts."""
    rank, found = dist.get_rank(), []
    part = parts_of(2, even=False)[rank]
    for name in FITTING:
        ours, theirs = Network(), Network()
        methods = [detente.create(name, tasks=TASKS) for _ in range(2)]
        for step in range(2):
            x, targets = batch_of(step, 0, 12)
            _, losses = losses_of(ours, part, x, targets)
            low = detente.backward(
                losses,
                methods[0],
                memory="low",
                samples=part.stop - part.start,
                measure=True,
                scale=scale,
            )
            _, losses = losses_of(theirs, slice(None), x, targets)
            fast = detente.backward(losses, methods[1], process_group=False, measure=True, scale=scale)
            found += [f"{name}: {told}" for told in differences(ours, theirs)]
            if low.status != fast.status or "were not kept" not in low.notes[-1].replace(
                "and not", "were not"
            ):
                found.append(f"{name}: {low.status} {low.notes} / {fast.status}")
            for parameter in (*ours.parameters(), *theirs.parameters()):
                parameter.grad = None
    return found


def cost() -> tuple[int, int, int, int]:
    """Collectives and bytes of a step, the numbers of the rows' buffer, and in how many pieces they were sent."""
    trunk = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
    heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in TASKS})
    method = detente.create("mgda")
    for _ in range(2):
        z = trunk(torch.ones(2, 16))
        before = method.__dict__["workspace"].ranks if "workspace" in method.__dict__ else None
        calls, sent = (before.calls, before.bytes) if before else (0, 0)
        record = detente.backward(
            {task: head(z).square().mean() for task, head in heads.items()}, method, memory="low"
        )
    workspace = method.__dict__["workspace"]
    pieces = int(record.notes[-1].split(" in ")[1].split()[0])
    return (
        workspace.ranks.calls - calls,
        workspace.ranks.bytes - sent,
        workspace._buffer.numel(),
        pieces,
    )


def everything() -> dict[str, Any]:
    """All of it in one pair of processes."""
    return {
        "crossing": {(case, scaled): crossing(case, scaled) for case in ORDERS for scaled in (False, True)},
        "methods": {scale: every_method(scale) for scale in ("native", "sum")},
        "cost": cost(),
    }
