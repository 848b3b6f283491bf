"""What runs inside the processes: loaded states, contexts left by an error, options that differ."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from parity import TASKS, Network, batch_of, losses_of, parts_of

import detente


def told(work: Any) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def untouched(network: Network) -> bool:
    return all(parameter.grad is None for parameter in network.parameters())


def after_loading() -> dict[str, Any]:
    """A method goes on from a saved state, and rank 0 lacks task b in its first batch."""
    rank = dist.get_rank()
    part = parts_of(2, even=True)[rank]
    ours, theirs = Network(), Network()
    methods = [detente.create("moco", tasks=TASKS) for _ in range(2)]
    x, targets = batch_of(0, 0, 12)
    detente.backward(losses_of(ours, part, x, targets)[1], methods[0])
    detente.backward(losses_of(theirs, slice(None), x, targets)[1], methods[1], process_group=False)
    loaded = detente.create("moco", tasks=TASKS)
    loaded.load_state_dict(methods[0].state_dict())
    for network in (ours, theirs):
        network.zero_grad()
    x, targets = batch_of(1, 0, 12)
    here = ("a", "c") if rank == 0 else TASKS
    losses = losses_of(ours, part, x, targets, here)[1]
    found: dict[str, Any] = {"told": told(lambda: detente.backward(losses, loaded, retain_graph=True))}
    found["untouched"] = untouched(ours)
    detente.check_ranks(method=loaded)
    roles = {"shared": ours.trunk, "task_specific": ours.heads}
    detente.backward(losses, loaded, **roles)
    _, outputs = theirs(x)
    errors = {task: (outputs[task] - targets[task]).square().mean(dim=1) for task in TASKS}
    second = parts_of(2, even=True)[1]
    whole = {task: error[second if task == "b" else slice(None)].mean() for task, error in errors.items()}
    detente.backward(whole, methods[1], process_group=False)
    found["difference"] = max(
        float((one.grad - other.grad).norm() / other.grad.norm())
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
    # Once a batch has had all tasks, a rank may lack one without naming anything.
    again = detente.create("moco", tasks=TASKS)
    again.load_state_dict(loaded.state_dict())
    ours.zero_grad()
    for tasks in (TASKS, here):
        detente.backward(losses_of(ours, part, x, targets, tasks)[1], again)
    return found


def left_by_an_error() -> dict[str, Any]:
    """Rank 1 leaves the accumulation after its first part and goes on to the next step; rank 0 does not know."""
    rank, network = dist.get_rank(), Network()
    part = parts_of(2, even=True)[rank]
    method = detente.create("mgda", tasks=TASKS)

    def step(fails: bool) -> None:
        with detente.accumulate(method, 2):
            for number in range(2):
                if fails and number == 1:
                    raise OSError("an image cannot be read")
                x, targets = batch_of(number, 0, 12)
                detente.backward(losses_of(network, part, x, targets)[1], method)

    found = {}
    if rank == 1:
        found["own"] = told(lambda: step(True))
    found["next"] = told(lambda: step(False))
    found["untouched"] = untouched(network)
    found["afterwards"] = told(lambda: step(False))
    detente.check_ranks(gradients=[parameter.grad for parameter in network.parameters()])
    return found


def different_options() -> dict[str, str]:
    """Something is asked for on rank 1 alone."""
    rank, found = dist.get_rank(), {}
    part = parts_of(2, even=True)[rank]
    cases: dict[str, dict[str, Any]] = {
        "memory": {"memory": "low"},
        "scale": {"scale": "unit"},
        "measure": {"measure": True},
        "method": {},
    }
    for case, options in cases.items():
        network = Network()
        losses = losses_of(network, part, *batch_of(0, 0, 12))[1]
        method = detente.create("cagrad" if case == "method" and rank else "mgda")
        more = options if rank else {}
        found[case] = told(lambda: detente.backward(losses, method, **more))  # noqa: B023, called at once
        found[case] += "" if untouched(network) else " a .grad was written"
    return found


def beside_what_is_shared() -> dict[str, Any]:
    """In one step the only task of rank 1 reaches nothing that is shared; in another no task of any rank does."""
    rank, ours, theirs = dist.get_rank(), Network(), Network()
    x, targets = batch_of(0, 0, 12)
    parts = parts_of(2, even=True)

    def losses(network: Network, part: slice, tasks: Any) -> dict[str, Any]:
        z, apart = network.trunk(x[part]), network.heads["c"].bias.square().sum() * len(x[part])
        found = {task: (network.heads[task](z) - targets[task][part]).square().mean() for task in "ab"}
        return {task: loss for task, loss in (found | {"c": apart}).items() if task in tasks}

    method = detente.create("mgda", tasks=TASKS)
    roles = {"shared": ours.trunk, "task_specific": ours.heads}
    detente.backward(losses(ours, parts[rank], "abc" if rank == 0 else "c"), method, **roles)
    whole = {**losses(theirs, parts[0], "ab"), **losses(theirs, parts[0], "c")}
    detente.backward(whole, detente.create("mgda", tasks=TASKS), process_group=False)
    difference = max(
        float((one.grad - other.grad).abs().max())
        for one, other in zip(ours.trunk.parameters(), theirs.trunk.parameters(), strict=True)
    )
    ours.zero_grad()
    nowhere = told(lambda: detente.backward(losses(ours, parts[rank], "c"), method, **roles))
    return {"difference": difference, "nowhere": nowhere, "untouched": untouched(ours)}


def everything() -> dict[str, Any]:
    """All of it in one pair of processes."""
    return {
        "loading": after_loading(),
        "left": left_by_an_error(),
        "options": different_options(),
        "beside": beside_what_is_shared(),
    }


def ended_by_an_error(folder: str) -> None:
    """Rank 1 leaves the accumulation by an error and its process ends; what rank 0 is told, and when."""
    rank, network = dist.get_rank(), Network()
    part = parts_of(2, even=True)[rank]
    method = detente.create("mgda", tasks=TASKS)
    started = time.monotonic()

    def step() -> None:
        with detente.accumulate(method, 2):
            for number in range(2):
                if rank == 1 and number == 1:
                    raise OSError("an image cannot be read")
                x, targets = batch_of(number, 0, 12)
                detente.backward(losses_of(network, part, x, targets)[1], method)

    found = told(step)
    here = (found, time.monotonic() - started, untouched(network), "accumulation" in method.__dict__)
    Path(folder, f"end-{rank}").write_bytes(pickle.dumps(here))
    os._exit(0)  # as a process ends whose error nobody catches: without a word to the others
