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

    def forward(
        self, x: torch.Tensor, branched: bool = False
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        z = self.trunk(x)
        if branched:
            read = detente.branch(z, TASKS)
            return read, {task: head(read[task]) for task, head in self.heads.items()}
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
    network: nn.Module,
    part: slice,
    x: torch.Tensor,
    targets: dict[str, torch.Tensor],
    tasks: Any = TASKS,
    branched: bool = False,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Representation and mean losses of a part of the batch."""
    z, outputs = network(x[part], branched)
    return z, {task: (outputs[task] - targets[task][part]).square().mean() for task in tasks}


def parts_of(size: int, even: bool) -> list[slice]:
    """Consecutive parts of a batch of 12."""
    rest = 12 // size if even else 2
    first = 12 - rest * (size - 1)
    ends = [first + rest * number for number in range(size)]
    return [slice(end - (first if not number else rest), end) for number, end in enumerate(ends)]


def options(network: nn.Module, space: str, z: torch.Tensor, whole: nn.Module) -> dict[str, Any]:
    if space in ("features", "branches"):
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
        z, losses = losses_of(network, part, *batches[0], branched=space == "branches")
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
        further = info.batches - 1
        spaces = sorted(info.spaces) if info.takes_gradients else ["none", "features"]
        spaces += ["branches"] if "features" in spaces else []
        for space in spaces:
            extra = 0 if space in ("features", "branches") else further
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


def descend(network: nn.Module, records: list[Any], record: Any) -> None:
    """One plain step on the whole network, if it was accepted."""
    records.append(record)
    with torch.no_grad():
        for parameter in network.parameters():
            if record.accepted and parameter.grad is not None:
                parameter -= RATE * parameter.grad
            parameter.grad = None


def absent_tasks(name: str, space: str) -> list[str]:
    """Rank 0 lacks task b in the second step, rank 1 task a, and every rank task c in the third; uneven parts."""
    size, rank = dist.get_world_size(), dist.get_rank()
    part = parts_of(size, even=False)[rank]
    lacking = [{}, {0: {"b"}, 1: {"a"}}, {0: {"c"}, 1: {"c"}}, {}]
    results = []
    for alone in (False, True):
        network, method, records = Network(), detente.create(name, tasks=TASKS), []
        for step, absent in enumerate(lacking):
            x, targets = batch_of(step, 0, 12)
            if alone:  # the mean over the examples of those ranks that have the task
                z, outputs = network(x)
                losses = {}
                for task in TASKS:
                    error = (outputs[task] - targets[task]).square().mean(dim=1)
                    has = [
                        p for r, p in enumerate(parts_of(size, even=False)) if task not in absent.get(r, ())
                    ]
                    if has:
                        losses[task] = torch.cat([error[p] for p in has]).mean()
                more: dict[str, Any] = {"process_group": False}
            else:
                here = [task for task in TASKS if task not in absent.get(rank, ())]
                z, losses = losses_of(network, part, x, targets, here)
                more = {"samples": part.stop - part.start}
            record = detente.backward(losses, method, **options(network, space, z, network), **more)
            descend(network, records, record)
        results.append((records, torch.cat([p.detach().reshape(-1) for p in network.parameters()])))
    (here_, ours), (there, theirs) = results
    difference = float((ours - theirs).norm() / (theirs - start()).norm())
    problems = [] if difference <= 1e-9 else [f"{name} ({space}): differs by {difference:.2g}"]
    for one, other in zip(here_, there, strict=True):
        if one.names != other.names or not torch.allclose(
            torch.tensor(one.losses), torch.tensor(other.losses)
        ):
            problems.append(f"{one.names} {one.losses} / {other.names} {other.losses}")
    return problems


def named_from_the_first_step() -> list[float]:
    """Each rank has tasks of its own from the first step on; shared and own parameters are named."""
    size, rank = dist.get_world_size(), dist.get_rank()
    part = parts_of(size, even=True)[rank]
    network, alone = Network(), Network()
    x, targets = batch_of(0, 0, 12)
    mine = ("a", "b") if rank == 0 else ("b", "c")
    _, losses = losses_of(network, part, x, targets, mine)
    method = detente.create("mgda")
    detente.backward(losses, method, shared=network.trunk, task_specific=network.heads)
    first, second = parts_of(size, even=True)
    _, outputs = alone(x)
    errors = {task: (outputs[task] - targets[task]).square().mean(dim=1) for task in TASKS}
    whole = {"a": errors["a"][first].mean(), "b": errors["b"].mean(), "c": errors["c"][second].mean()}
    detente.backward(whole, detente.create("mgda"), process_group=False)
    return [
        float((one.grad - other.grad).abs().max())
        for one, other in zip(network.parameters(), alone.parameters(), strict=True)
    ]


def wrong_in_one_place(what: str) -> str:
    """Something is wrong on rank 1 alone; what each rank is told, and that nothing was changed."""
    rank = dist.get_rank()
    network = Network()
    part = parts_of(2, even=True)[rank]
    x, targets = batch_of(0, 0, 12)
    _, losses = losses_of(network, part, x, targets)
    method, more = detente.create("mgda"), {}
    if rank == 1:
        if what == "nan":
            losses["b"] = losses["b"] * float("nan")
        elif what == "own nan":
            losses["b"] = losses["b"] + (network.heads["b"].weight.sum() * 0.0).sqrt()
        elif what == "detached":
            losses["b"] = losses["b"].detach()
        elif what == "new task":
            pass
        elif what == "samples":
            more = {"samples": -1}
        elif what == "other model":
            network.heads["b"] = nn.Linear(5, 7).double()
            _, outputs = network(x[part])
            losses["b"] = outputs["b"].square().mean()
    if what == "new task":
        detente.backward(losses, method)
        _, losses = losses_of(network, part, x, targets)
        for parameter in network.parameters():
            parameter.grad = None
        if rank == 1:
            losses["z"] = losses["a"] * 2
    state = str(method.state_dict())
    try:
        detente.backward(losses, method, **more)
    except Exception as error:
        assert all(parameter.grad is None for parameter in network.parameters()), "a .grad was written"
        assert str(method.state_dict()) == state, "the method's state moved"
        return f"{type(error).__name__}: {error}"
    return "no error"


def optimizers(kind: str) -> float:
    """MAO or MTAdam on parts of a batch, beside one process; rank 0 lacks a task in one step."""
    from detente import optim

    size, rank = dist.get_world_size(), dist.get_rank()
    part = parts_of(size, even=False)[rank]
    networks = []
    for alone in (False, True):
        network = Network()
        transform = {"transform": detente.create("pcgrad")} if kind == "mao after pcgrad" else {}
        make = optim.MTAdam if kind == "mtadam" else optim.MAO
        optimizer = make(network.trunk, network.heads, tasks=TASKS, lr=0.01, weight_decay=0.1, **transform)
        for step in range(4):
            x, targets = batch_of(step, 0, 12)
            if alone:
                _, outputs = network(x)
                losses = {}
                for task in TASKS:
                    error = (outputs[task] - targets[task]).square().mean(dim=1)
                    keep = slice(12 - 2 * (size - 1), None) if step == 2 and task == "b" else slice(None)
                    losses[task] = error[keep].mean()
                optimizer.step(losses, process_group=False)
            else:
                here = [task for task in TASKS if not (step == 2 and rank == 0 and task == "b")]
                _, losses = losses_of(network, part, x, targets, here)
                optimizer.step(losses, samples=part.stop - part.start)
        networks.append(torch.cat([p.detach().reshape(-1) for p in network.parameters()]))
        if not alone:
            detente.check_ranks(network=network, optimizer=optimizer)
    return float((networks[0] - networks[1]).norm() / (networks[1] - start()).norm())


def a_hundred_steps() -> list[str]:
    """The parameters after a hundred steps, in float32, as check_ranks sees them; and that it sees a difference."""
    rank = dist.get_rank()
    network = DistributedDataParallel(Network().float())
    method = detente.create("aligned-mtl")
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for step in range(100):
        x, targets = batch_of(step, 0, 12)
        part = parts_of(dist.get_world_size(), even=True)[rank]
        z, losses = losses_of(
            network, part, x.float(), {task: target.float() for task, target in targets.items()}
        )
        detente.backward(losses, method, features=z if step % 2 else None)
        optimizer.step()
        optimizer.zero_grad()
    detente.check_ranks(network=network, method=method, optimizer=optimizer)
    if rank == 1:
        with torch.no_grad():
            network.module.heads["b"].bias += 1e-7
    try:
        detente.check_ranks(optimizer=optimizer, network=network)
    except RuntimeError as error:
        return [str(error)]
    return []


def traffic(space: str, size_of_batch: int) -> dict[str, tuple[int, int]]:
    """Collectives and bytes of the second step, for a method of weights and one of gradients."""
    rank, found = dist.get_rank(), {}
    for name in ("mgda", "graddrop", "uniform"):
        network, method = Network(), detente.create(name)
        part = parts_of(dist.get_world_size(), even=True)[rank]
        before = (0, 0)
        for step in range(2):
            x, targets = batch_of(step, 0, size_of_batch)
            z, losses = losses_of(network, part, x, targets)
            ranks = getattr(method.__dict__.get("workspace"), "ranks", None)
            before = (ranks.calls, ranks.bytes) if ranks else (0, 0)
            detente.backward(losses, method, **options(network, space, z, network))
        ranks = method.__dict__["workspace"].ranks
        found[name] = (ranks.calls - before[0], ranks.bytes - before[1])
    return found


def wait_for_a_dead_rank(kill_rank: int) -> str:
    """One rank dies between two steps; what the others get."""
    import os
    import signal

    network, method = Network(), detente.create("mgda")
    part = parts_of(dist.get_world_size(), even=True)[dist.get_rank()]
    for step in range(3):
        if step == 2 and dist.get_rank() == kill_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        x, targets = batch_of(step, 0, 12)
        _, losses = losses_of(network, part, x, targets)
        detente.backward(losses, method)
    return "went on"


def accumulated(name: str) -> float:
    """Two micro-batches on every rank, of uneven sizes, beside one process with all of it."""
    size, rank = dist.get_world_size(), dist.get_rank()
    network, alone = Network(), Network()
    x, targets = batch_of(0, 0, 12)
    part = parts_of(size, even=False)[rank]
    method = detente.create(name, tasks=TASKS)
    cut = part.start + 1
    with detente.accumulate(method, 2):
        for piece in (slice(part.start, cut), slice(cut, part.stop)):
            _, losses = losses_of(network, piece, x, targets)
            record = detente.backward(losses, method, samples=piece.stop - piece.start)
    _, losses = losses_of(alone, slice(None), x, targets)
    other = detente.backward(losses, detente.create(name, tasks=TASKS), process_group=False)
    assert torch.allclose(torch.tensor(record.losses), torch.tensor(other.losses), rtol=1e-12)
    ours, theirs = (
        torch.cat([parameter.grad.reshape(-1) for parameter in one.parameters()]) for one in (network, alone)
    )
    return float((ours - theirs).norm() / theirs.norm())
