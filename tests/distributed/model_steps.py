"""What runs inside the processes of test_cost_model: the collectives of one step, beside the model's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import detente
from benchmarks._cost_model import NUMBERS, Mode, Sizes, Space, messages
from benchmarks._processes import recorded
from detente.methods.base import Method
from detente.methods.registry import describe

TASKS = ("a", "b", "c")
EXAMPLES, WIDTH = 4, 5


class Network(nn.Module):
    """A trunk with two outputs and a head for each task, in float64; P is no multiple of 2 or 3."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.last = nn.Linear(WIDTH, 6), nn.Linear(6, 4, bias=False)
        self.branch = nn.Linear(6, 1)
        self.heads = nn.ModuleDict({task: nn.Linear(5, place + 1) for place, task in enumerate(TASKS)})
        self.double()

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        hidden = self.first(x).tanh()
        features = [self.last(hidden).tanh(), self.branch(hidden).tanh()]
        z = torch.cat(features, dim=1)
        return features, {task: head(z) for task, head in self.heads.items()}

    def sizes(self, ranks: int) -> Sizes:
        shared = [*self.first.parameters(), *self.last.parameters(), *self.branch.parameters()]
        own = list(self.heads.parameters())
        return Sizes(
            tasks=len(TASKS),
            shared=sum(parameter.numel() for parameter in shared),
            own=sum(parameter.numel() for parameter in own),
            ranks=ranks,
            tensors=len(shared) + len(own),
            shared_tensors=len(shared),
            features=(EXAMPLES * 4, EXAMPLES),
            layer=self.last.weight.numel(),
            # Met in this order: branch (1 + 6), last (24), first (6 and 30); at most 30 together.
            buckets=(7, 30, 30),
            number=8,
        )


def losses_of(network: Network) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    features, outputs = network(torch.randn(EXAMPLES, WIDTH, dtype=torch.float64))
    return features, {
        task: (out - place).square().mean() for place, (task, out) in enumerate(outputs.items())
    }


def second_step(
    method: Method,
    space: Space,
    *,
    memory: Mode = "fast",
    further: int = 0,
    micro_batches: int = 1,
    measure: bool = False,
) -> tuple[list[tuple[str, int]], frozenset[str]]:
    """Kinds and bytes of the collectives of a step once everything is known, and what the method needed then."""
    network, needs, before = Network(), frozenset(), (0, 0)
    for _ in range(2):
        needs = method.needs_now()
        if (workspace := method.__dict__.get("workspace")) is not None:
            before = workspace.ranks.calls, workspace.ranks.bytes
        with recorded(together=False) as sent:
            if micro_batches > 1:
                with detente.accumulate(method, micro_batches):
                    for _ in range(micro_batches):
                        record = detente.backward(losses_of(network)[1], method)
            else:
                features, losses = losses_of(network)
                where: dict[str, Any] = {}
                if space == "features":
                    where = {"features": features}
                if space == "layer":
                    where = {"solve_on": network.last}
                extra = [losses_of(network)[1] for _ in range(further)]
                record = detente.backward(
                    losses, method, extra=extra, memory=memory, measure=measure, **where
                )
        assert record.accepted
    counts = method.__dict__["workspace"].ranks
    # The engine's own count of the step.
    assert counts.calls - before[0] == len(sent)
    assert counts.bytes - before[1] == sum(one.bytes for one in sent)
    return [(one.kind, one.bytes) for one in sent], needs


def cases() -> dict[str, tuple[Method, Space, dict[str, Any]]]:
    """Every registered method in every space it declares, and what goes beyond one batch and one block."""
    found: dict[str, tuple[Method, Space, dict[str, Any]]] = {}
    for name, info in detente.methods().items():
        for space in sorted(info.spaces):
            found[f"{name}, {space}"] = (detente.create(name), space, {})
        found[f"{name}, two micro-batches"] = (detente.create(name), "exact", {"micro_batches": 2})
        if not info.takes_gradients:
            found[f"{name}, none"] = (detente.create(name), "none", {})
            found[f"{name}, measured"] = (detente.create(name), "exact", {"measure": True})
        if not info.takes_gradients or info.needs <= NUMBERS:
            found[f"{name}, low"] = (detente.create(name), "exact", {"memory": "low"})
        more = info.batches - 1
        for space in sorted(info.spaces) if more else ():
            found[f"{name}, further, {space}"] = (detente.create(name), space, {"further": more})
    found["a problem for each block"] = (
        detente.wrappers.PerBlock(detente.create("mgda")),
        "exact",
        {},
    )
    found["a step without a look"] = (detente.wrappers.Every(detente.create("mgda"), k=2), "exact", {})
    return found


def compared() -> dict[str, tuple[list[tuple[str, int]], list[tuple[str, int]]]]:
    """For each case the kinds and bytes that were counted, and those of the model."""
    sizes, told = Network().sizes(dist.get_world_size()), {}
    for case, (method, space, options) in cases().items():
        counted, needs = second_step(method, space, **options)
        info = replace(describe(method), needs=needs)
        told[case] = (counted, [(one.kind, one.bytes) for one in messages(info, space, sizes, **options)])
    return told
