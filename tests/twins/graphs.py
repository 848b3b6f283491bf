"""Random graphs of modules with random sharing: a plan, drawn by hypothesis or by a number, and its modules."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

WIDTH = 3
OPERATIONS = ("linear", "tanh", "add", "multiply", "join", "parameter", "detach")


@dataclass(frozen=True)
class Plan:
    """A graph: each node is an operation on earlier nodes (node 0 is the input) with a module out of a pool."""

    nodes: tuple[tuple[str, int, int, int], ...]
    losses: tuple[tuple[int, int | None], ...]  # the node each loss looks at, and a head out of the pool
    features: tuple[int, ...]
    seed: int


def plan_of(number: int) -> Plan:
    """A plan that every process draws alike."""
    draw = random.Random(number)
    nodes = [("linear", 0, 0, draw.randrange(3))]
    for count in range(2, draw.randint(2, 8) + 1):
        nodes.append(
            (draw.choice(OPERATIONS), draw.randrange(count), draw.randrange(count), draw.randrange(3))
        )
    losses = [(draw.randint(1, len(nodes)), draw.choice((None, 0, 1, 2))) for _ in range(draw.randint(1, 4))]
    features = draw.sample(range(1, len(nodes) + 1), draw.randint(1, min(2, len(nodes))))
    return Plan(tuple(nodes), tuple(losses), tuple(features), number)


def whole_of(parts: Sequence[Mapping[str, torch.Tensor]], examples: Sequence[int]) -> dict[str, torch.Tensor]:
    """The losses of a batch in parts, each the mean over the examples of the parts that have the task."""
    found = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        held = [(part[name], count) for part, count in zip(parts, examples, strict=True) if name in part]
        total = sum(count for _, count in held)
        found[name] = sum((loss * (count / total) for loss, count in held), torch.zeros(()))
    return found


class Pool:
    """The modules of a plan, and the plan carried out on them."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        self.plan = plan
        double = {"dtype": torch.float64}
        self.linear = nn.ModuleList(nn.Linear(WIDTH, WIDTH, **double) for _ in range(3))
        self.join = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH, **double) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2, **double) for _ in range(3))
        self.bare = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, **double)) for _ in range(3))
        self.input = torch.randn(3, WIDTH, **double)
        self.parameters = [
            *self.linear.parameters(),
            *self.join.parameters(),
            *self.heads.parameters(),
            *self.bare,
        ]

    def run(
        self, cut: Sequence[int] = (), rows: slice = slice(None)
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Losses and features of some examples.

        Nodes in ``cut`` are replaced by copies of themselves that remember nothing.
        """
        values = [self.input[rows]]
        for number, (operation, i, j, module) in enumerate(self.plan.nodes, start=1):
            x, y = values[i], values[j]
            value = {
                "linear": lambda x=x, m=module: self.linear[m](x),
                "tanh": lambda x=x: x.tanh(),
                "add": lambda x=x, y=y: x + y,
                "multiply": lambda x=x, y=y: x * y,
                "join": lambda x=x, y=y, m=module: self.join[m](torch.cat([x, y], dim=1)),
                "parameter": lambda x=x, m=module: x * self.bare[m],
                "detach": lambda x=x, y=y: x.detach() + y,
            }[operation]()
            values.append(value.detach().requires_grad_() if number in cut else value)
        losses = {}
        for task, (node, head) in enumerate(self.plan.losses):
            seen = values[node] if head is None else self.heads[head](values[node])
            losses[f"task {task}"] = (seen + 0.1 * task).square().mean() + seen.sin().sum()
        return losses, [values[node] for node in self.plan.features]
