"""What runs inside the processes: random graphs of modules on parts of a batch, beside the slow, obvious twin."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from twins.engine import Spy, Weighting, assert_grads, expected, gradient
from twins.graphs import Pool, plan_of, whole_of

import detente

PARTS, EXAMPLES = (slice(0, 2), slice(2, 3)), (2, 1)
MODES = ("exact", "rows", "batched", "low", "weighting", "features", "accumulate")


def one(number: int, mode: str) -> str:
    """A plan in a mode: what was done with it."""
    rank, pool, draw = dist.get_rank(), Pool(plan_of(number)), random.Random(number)
    parts = [pool.run(rows=part)[0] for part in PARTS]
    if not all(loss.requires_grad for part in parts for loss in part.values()):
        return "a task without parameters"
    everything = whole_of(parts, EXAMPLES)
    shared = [p for p in pool.parameters if _reaching(everything, p) > 1]
    own = [p for p in pool.parameters if _reaching(everything, p) == 1]
    options: dict[str, Any] = {"samples": EXAMPLES[rank]}
    absent = mode != "features" and bool(shared) and draw.random() < 0.5
    if absent:  # each rank has some of the tasks, perhaps none; roles are then named
        parts = [{name: loss for name, loss in part.items() if draw.random() < 0.6} for part in parts]
        options |= {"shared": shared, "task_specific": own}
    whole = whole_of(parts, EXAMPLES)
    if not whole:
        return "nothing present"
    weights = {name: 0.4 + 1.3 * task for task, name in enumerate(everything)}
    names = [name for name in everything if name in whole]
    whole = {name: whole[name] for name in names}
    told = [weights[name] for name in names]
    behind: list[torch.Tensor] = shared if absent else []
    if mode == "features":
        features = [pool.run(rows=part)[1] for part in PARTS]
        if not all(feature.requires_grad for found in features for feature in found):
            return "a feature without parameters"
        mine, found = pool.run(rows=PARTS[rank])
        parts = [mine, mine]
        options["features"] = found
        behind = [p for p in pool.parameters if any(gradient(f.sum(), p) is not None for f in found)]
    method: Any = Weighting(weights=told) if mode == "weighting" else Spy(weights=told)
    method.tasks = tuple(everything)
    if mode not in ("rows", "weighting"):
        method.declares = replace(method.declares, needs=frozenset({"gramian"}))
    if mode in ("batched", "low"):
        options["memory"] = mode
    want = expected(
        whole, pool.parameters, told, heads="weighted" if mode == "weighting" else "own", shared=behind
    )
    rows = torch.stack(
        [torch.cat([_dense(loss, p).reshape(-1) for p in (*shared, *own)]) for loss in whole.values()]
    )
    rows = rows[:, : sum(p.numel() for p in shared)]
    if mode != "weighting" and shared:
        inside = [any(gradient(loss, p) is not None for p in shared) for loss in whole.values()]
        rows = rows[torch.tensor(inside)]
    try:
        if mode == "accumulate":
            if not shared:
                return "nothing shared"
            with detente.accumulate(method, 2):
                for _ in range(2):
                    record = detente.backward(parts[rank], method, retain_graph=True, **options)
        else:
            record = detente.backward(parts[rank], method, **options)
    except ValueError as error:
        if mode == "features" and "does not depend on features=" in str(error):
            return "a task past the features"
        raise
    assert_grads(pool.parameters, want, rtol=1e-9, atol=1e-11)
    assert record.names == tuple(names), (record.names, names)
    if isinstance(method, Spy) and shared and mode != "features":
        assert method.seen is not None and method.seen.gramian is not None
        assert torch.allclose(torch.from_numpy(method.seen.gramian), rows @ rows.T, rtol=1e-9, atol=1e-11)
    return "absent tasks" if absent else "all tasks"


def _reaching(losses: Any, parameter: torch.Tensor) -> int:
    return sum(gradient(loss, parameter) is not None for loss in losses.values())


def _dense(loss: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    found = gradient(loss, parameter)
    return torch.zeros_like(parameter) if found is None else found


def many(count: int) -> dict[str, Counter[str]]:
    """Many plans in every mode, in one pair of processes; how often what was done."""
    found = {mode: Counter[str]() for mode in MODES}
    for number in range(count):
        for mode in MODES:
            try:
                found[mode][one(number, mode)] += 1
            except Exception as error:
                raise AssertionError(f"plan {number} in mode {mode}: {error}") from error
    return found
