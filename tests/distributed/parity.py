"""What runs inside the processes: a batch split over ranks, beside one process with the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import detente

TASKS = ("a", "b", "c")
WIDTH, STEPS, RATE = 6, 3, 0.05


class Network(nn.Module):
    """A trunk, three heads of different sizes, smooth, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(5, place + 1) for place, task in enumerate(TASKS)})
        self.double()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        z = self.trunk(x)
        return z, {task: head(z) for task, head in self.heads.items()}


def batch_of(step: int, number: int, size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The whole batch of a step: inputs and targets."""
    draw = torch.Generator().manual_seed(100 * step + number)
    x = torch.randn(size, WIDTH, generator=draw, dtype=torch.float64)
    targets = {
        task: torch.randn(size, place + 1, generator=draw, dtype=torch.float64) * 3.0**place + place
        for place, task in enumerate(TASKS)
    }
    return x, targets


def losses_of(
    network: nn.Module, part: slice, x: torch.Tensor, targets: dict[str, torch.Tensor], tasks: Any = TASKS
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Representation and mean losses of a part of the batch."""
    z, outputs = network(x[part])
    return z, {task: (outputs[task] - targets[task][part]).square().mean() for task in tasks}


def parts_of(size: int, even: bool) -> list[slice]:
    """Consecutive parts of a batch of 12."""
    rest = 12 // size if even else 2
    first = 12 - rest * (size - 1)
    ends = [first + rest * number for number in range(size)]
    return [slice(end - (first if not number else rest), end) for number, end in enumerate(ends)]


def options(network: nn.Module, space: str, z: torch.Tensor, whole: nn.Module) -> dict[str, Any]:
    if space == "features":
        return {"features": z}
    if space == "layer":
        return {"solve_on": list(whole.trunk[2].parameters())}
    return {}


def train(
    method: detente.methods.Method | Any,
    network: nn.Module,
    inner: nn.Module,
    space: str,
    part: slice,
    further: int,
    **more: Any,
) -> list[Any]:
    """Some steps of plain descent; the records."""
    records = []
    hooks = detente.methods()[method.declares.name].needs
    for step in range(STEPS):
        batches = [batch_of(step, number, 12) for number in range(1 + further)]
        z, losses = losses_of(network, part, *batches[0])
        extra = [losses_of(network, part, *batch)[1] for batch in batches[1:]]
        record = detente.backward(losses, method, extra=extra, **options(network, space, z, inner), **more)
        records.append(record)
        if record.accepted:
            with torch.no_grad():
                for parameter in inner.parameters():
                    if parameter.grad is not None:
                        parameter -= RATE * parameter.grad
                        parameter.grad = None
        if "after_step" in hooks:
            # The whole batch's losses, which this test can compute on every rank.
            with torch.no_grad():
                method.after_step(losses_of(inner, slice(None), *batches[0])[1])
        if "epoch" in hooks and step == 0:
            method.end_epoch()
    return records


def compare_all(wrapped: bool, even: bool) -> list[str]:
    """Every registered method in every space it declares; what differs, in words."""
    size, rank = dist.get_world_size(), dist.get_rank()
    mine = parts_of(size, even)[rank]
    problems = []
    for name, info in detente.methods().items():
        further = max(
            (int(n.partition(":")[2]) - 1 for n in info.needs if n.startswith("batches:")), default=0
        )
        spaces = sorted(info.spaces) if info.takes_gradients else ["none", "features"]
        for space in spaces:
            extra = 0 if space == "features" else further
            results = []
            for alone in (False, True):
                inner = Network()
                network = DistributedDataParallel(inner) if wrapped and not alone else inner
                method = detente.create(name, tasks=TASKS)
                more = {"process_group": False} if alone else {"samples": mine.stop - mine.start}
                part = slice(None) if alone else mine
                records = train(method, network, inner, space, part, extra, **more)
                results.append((records, torch.cat([p.detach().reshape(-1) for p in inner.parameters()])))
            (here, ours), (there, theirs) = results
            difference = float((ours - theirs).norm() / (theirs - start()).norm())
            if not difference <= 1e-9:
                problems.append(f"{name} ({space}): parameters differ by {difference:.2g}")
            for one, other in zip(here, there, strict=True):
                if one.status != other.status or not torch.allclose(
                    torch.tensor(one.losses), torch.tensor(other.losses), rtol=1e-12
                ):
                    problems.append(
                        f"{name} ({space}): {one.losses} {one.status} / {other.losses} {other.status}"
                    )
            every = [torch.empty_like(ours) for _ in range(size)]
            dist.all_gather(every, ours)
            if not all(torch.equal(every[0], other) for other in every):
                problems.append(f"{name} ({space}): the ranks differ")
    return problems


def start() -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in Network().parameters()])
