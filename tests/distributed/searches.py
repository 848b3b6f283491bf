"""What runs inside the processes: line searches on parts of a batch, beside one process with the whole of it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from parity import TASKS, Network, batch_of, parts_of, start
from torch.nn.parallel import DistributedDataParallel

import detente
from detente.linesearch import Backtracking, FastBacktracking, SearchOptions, SearchRecord

KINDS = {"classical": Backtracking, "fast": FastBacktracking}
STEPS = 4
# Which task each rank lacks in which step.
LACKING = {1: {0: ("b",), 1: ("a",)}, 2: {0: ("c",), 1: ("c",)}}


def whole(network: Network, x: torch.Tensor, targets: dict[str, torch.Tensor], absent: dict[int, Any]) -> Any:
    """The closure of one process: each loss is the mean over the examples of the ranks that have the task."""
    parts = parts_of(dist.get_world_size(), even=False)

    def closure(features: Any = None) -> Any:
        z = network.trunk(x) if features is None else features
        losses = {}
        for task in TASKS:
            error = (network.heads[task](z) - targets[task]).square().mean(dim=1)
            has = [part for rank, part in enumerate(parts) if task not in absent.get(rank, ())]
            if has:
                losses[task] = torch.cat([error[part] for part in has]).mean()
        return z, losses

    return closure


def partly(
    network: Any, inner: Network, x: torch.Tensor, targets: dict[str, torch.Tensor], absent: dict[int, Any]
) -> tuple[Any, int]:
    """The closure of this rank, and its number of examples; the network may be wrapped."""
    rank = dist.get_rank()
    part = parts_of(dist.get_world_size(), even=False)[rank]
    here = [task for task in TASKS if task not in absent.get(rank, ())]

    def closure(features: Any = None) -> Any:
        if features is None:
            z, outputs = network(x[part])
        else:
            z, outputs = features, {task: inner.heads[task](features) for task in here}
        return z, {task: (outputs[task] - targets[task][part]).square().mean() for task in here}

    return closure, part.stop - part.start


def plain(found: SearchRecord) -> dict[str, Any]:
    """What must not depend on the number of processes."""
    told = found.to_dict()
    for name in ("seconds", "notes"):
        del told[name]
    return told


def searched(make: Any, method: Any, network: Network, options: dict[str, Any]) -> Any:
    """A search with options by name, whether they are the constructor's or fields of SearchOptions."""
    names = {field.name for field in fields(SearchOptions)}
    further = SearchOptions(**{name: value for name, value in options.items() if name in names})
    plain = {name: value for name, value in options.items() if name not in names}
    return make(method, network.trunk, network.heads, options=further, **plain)


def compare(kind: str, method: str, options: dict[str, Any], absent: bool, wrapped: bool) -> list[str]:
    """Some steps on this rank's part beside the same steps on the whole batch; what differs, in words."""
    problems, ends, records = [], [], []
    for alone in (False, True):
        inner = Network()
        network = DistributedDataParallel(inner) if wrapped and not alone else inner
        make = KINDS[kind]
        search = searched(make, detente.create(method, tasks=TASKS), inner, options)
        found = []
        for step in range(STEPS):
            x, targets = batch_of(step, 0, 12)
            lacking = LACKING.get(step, {}) if absent else {}
            if alone:
                found.append(search.step(whole(inner, x, targets, lacking), process_group=False))
            else:
                closure, examples = partly(network, inner, x, targets, lacking)
                found.append(search.step(closure, samples=examples))
        if not alone:
            detente.check_ranks(network=inner, search=search, records=[plain(record) for record in found])
        assert all(parameter.grad is None for parameter in inner.parameters())
        records.append(found)
        ends.append(torch.cat([parameter.detach().reshape(-1) for parameter in inner.parameters()]))
    difference, moved = float((ends[0] - ends[1]).norm()), float((ends[1] - start()).norm())
    if not difference <= 1e-9 * moved:
        problems.append(f"parameters differ by {difference:.2g} after a move of {moved:.2g}")
    for one, other in zip(*(map(plain, found) for found in records), strict=True):
        for name in one:
            same = one[name] == other[name]
            if isinstance(one[name], list) and all(isinstance(entry, float) for entry in one[name]):
                ours, theirs = (torch.tensor(told[name], dtype=torch.float64) for told in (one, other))
                same = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
            if not same:
                problems.append(f"{name}: {one[name]} beside {other[name]}")
    trials = [record.trials for record in records[0]]
    return [*problems, f"trials {trials}, {[record.status for record in records[0]]}"]


def counted(kind: str) -> list[tuple[int, int, int]]:
    """Collectives and bytes of some steps, each with its number of trials."""
    network = Network()
    search = KINDS[kind](
        detente.create("mgda", tasks=TASKS),
        network.trunk,
        network.heads,
        8.0,
        options=SearchOptions(check_steps=0),
    )
    found, before = [], (0, 0)
    for step in range(3):
        x, targets = batch_of(step, 0, 12)
        closure, examples = partly(network, network, x, targets, {})
        trials = search.step(closure, samples=examples).trials
        ranks = search._engine.memory.ranks
        assert ranks is not None
        found.append((trials, ranks.calls - before[0], ranks.bytes - before[1]))
        before = (ranks.calls, ranks.bytes)
    return found


def fails(kind: str, where: str) -> str:
    """Something goes wrong on rank 1 alone; what each rank is told, and that nothing was changed."""
    rank, network = dist.get_rank(), Network()
    options: dict[str, Any] = {"check_true": True} if kind == "fast" else {}
    method = detente.create("gradnorm", tasks=TASKS)
    search = KINDS[kind](
        method,
        network.trunk,
        network.heads,
        0.5,
        options=SearchOptions(on_no_descent="small-step", small_step=1e-3, **options),
    )
    x, targets = batch_of(0, 0, 12)
    closure, _ = partly(network, network, x, targets, {})
    search.step(closure)
    passes = 0

    def failing(features: Any = None) -> Any:
        nonlocal passes
        passes += 1
        if rank == 1 and where == f"pass {passes}":
            raise LookupError("an image cannot be read")
        z, losses = closure(features)
        if rank == 1 and where == "other losses" and passes > 1:
            losses = {task: loss * 1.5 for task, loss in losses.items()}
        if rank == 1 and where == "one task less" and passes > 1:
            del losses["b"]
        if rank == 1 and where == "nan" and 1 < passes < 4:  # both trials
            losses["b"] = losses["b"] * float("nan")
        return z, losses

    search.options = replace(search.options, check_steps=2 if where == "other losses" else 0)
    if rank == 1 and where == "lr_ub":
        search.lr_ub = 0.25
    if where == "nan":
        search.max_trials = 2
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state, steps = str(method.state_dict()), search.steps
    random = torch.get_rng_state()
    try:
        search.step(failing)
    except Exception as error:
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert str(method.state_dict()) == state and search.steps == steps
        assert torch.equal(torch.get_rng_state(), random)
        return f"{type(error).__name__}: {error}"
    return "no error"


def local() -> bool:
    """process_group=False looks at this rank's losses alone."""
    network = Network()
    x, targets = batch_of(0, 0, 12)
    search = Backtracking(detente.create("mgda"), network.trunk, network.heads, 0.1)
    closure, _ = partly(network, network, x, targets, {})
    mine = tuple(loss.item() for loss in closure()[1].values())
    found = search.step(closure, process_group=False)
    every = dist.get_world_size() * [None]
    dist.all_gather_object(every, found.losses_before)
    return found.losses_before == mine and every[0] != every[1]


def everything(cases: list[tuple[Any, ...]], failing: list[tuple[str, str]]) -> dict[str, Any]:
    """All of it in one pair of processes: starting them takes longer than what they do."""
    return {
        "parity": [compare(*case) for case in cases],
        "counted": {kind: counted(kind) for kind in KINDS},
        "failures": [fails(*case) for case in failing],
        "local": local(),
    }
