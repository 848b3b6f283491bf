"""Networks built to a plan that tells which parameter belongs to which task, and their losses packed in many ways.

A world knows from its construction what each task reaches. It computes its losses twice: each alone, by a forward of
its own, and all of them packed as the plan says; autograd's graph is never asked who owns what.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

ROWS, INPUTS, WIDTH = 6, 3, 4

TRUNKS = (
    *("plain", "deep", "tied", "norm", "residual", "checkpoint", "checkpoint norm"),
    *("function", "frozen first", "frozen"),
)
PICKED = ("columns", "vector", "stack", "list")  # losses picked from one tensor: never refused in exact mode
PACKINGS = (
    *PICKED,
    *("split", "unbind", "select", "gather", "masked", "filled", "nested", "partial", "batched"),
    *("function", "sink"),
)
HEADS = ("head", "probe", "partly", "dead")  # a module of their own (or tied) on the trunk's result
DETACHED = ("probe", "codebook", "temperature")
POTENTIALS = ("physics", "force")  # derivatives with respect to the input
ELEMENTWISE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "square": lambda c, y: (c - y).square(),
    "logits": lambda c, y: functional.softplus(c) - y * c,
    "wave": lambda c, y: (c - y).square() + (c * y).sin(),
}


@dataclass(frozen=True)
class Task:
    """One task: its kind, and the numbers of its head and of a module before it (equal numbers are tied)."""

    kind: str
    head: int = 0
    middle: int | None = None


@dataclass(frozen=True)
class Plan:
    """A world in words. ``piece`` is what is compiled or scripted; ``steps`` are the tasks present in each step."""

    number: int
    mode: str
    piece: str
    trunk: str
    packing: str
    tasks: tuple[Task, ...]
    elementwise: str
    leaf: bool  # the input requires a gradient
    steps: tuple[tuple[int, ...], ...]

    @property
    def packed(self) -> bool:
        """Some node packs several tasks."""
        picked = self.trunk == "function" and any(task.kind == "row" for task in self.tasks)
        return self.packing != "apart" or picked or self.piece.endswith(("whole", "heads"))


# Out of a hundred plans: who asks what of the engine (the rest is "exact"), and what is one piece.
_MODES = (
    *(["low", "features", "layer"]),  # these three are packed, and all others of their mode are not
    *(["low"] * 5 + ["features"] * 6 + ["layer"] * 4 + ["batched"] * 8),
    *(["shared"] * 8 + ["shared low"] * 3 + ["shared batched"] * 3),
)
_PIECES = {
    **{50: "compiled whole", 51: "compiled heads", 52: "compiled trunk", 53: "scripted whole"},
    **{54: "scripted whole", 55: "scripted heads", 56: "scripted heads", 57: "scripted trunk"},
}


def plan_of(number: int) -> Plan:
    """The plan of a number: always the same one."""
    draw, slot = random.Random(number), number % 100
    piece = _PIECES.get(slot, "eager")
    mode = _MODES[slot] if slot < len(_MODES) else "exact"
    if piece.endswith("trunk"):
        mode = draw.choice(("exact", "exact", "features", "low"))
    elif piece != "eager":
        mode = draw.choice(("exact", "exact", "shared"))
    solved = mode in ("features", "layer")
    apart = (mode in ("low", "features", "layer") and slot > 2) or piece.endswith("trunk")
    packing = "apart" if apart or (slot > 2 and draw.random() < 0.15) else draw.choice(PACKINGS)
    packed = packing != "apart" or piece.endswith(("whole", "heads"))
    trunk = draw.choice(TRUNKS) if piece == "eager" else draw.choice(("plain", "deep", "norm"))
    if (solved or packing == "batched") and trunk == "frozen":
        trunk = "deep"
    tasks = _tasks(draw, packed=packed, solved=solved, eager=piece == "eager", packing=packing)
    if "norm" in trunk and any(task.kind == "physics" for task in tasks):
        trunk = "residual"  # torch has no third derivative of a batch's statistics
    if trunk == "function" and {"row", "dead"} <= {task.kind for task in tasks}:
        trunk = "deep"  # else it hides behind a function that may pack what the row picks
    if trunk == "frozen" and packed and any(task.kind == "partly" for task in tasks):
        trunk = "plain"  # else the task is zero on all that is shared, and cannot be told from a probe
    leaf = trunk == "frozen" or any(task.kind in POTENTIALS for task in tasks)
    leaf = leaf or (mode != "features" and draw.random() < 0.1)
    every = tuple(range(len(tasks)))
    steps: tuple[tuple[int, ...], ...] = (every,)
    zero = any(task.kind in ("partly", "dead") for task in tasks)
    if not (solved or zero or trunk == "frozen") and draw.random() < 0.25:
        present = tuple(sorted({0, *draw.sample(every, draw.randint(1, len(tasks) - 1))}))
        steps = draw.choice(((every, present), (present, every), (every, present, every)))
        if piece.startswith("compiled"):  # what is compiled for one backward cannot be walked more often
            steps = (every, present)
    elementwise = draw.choice(tuple(ELEMENTWISE))
    return Plan(number, mode, piece, trunk, packing, tasks, elementwise, leaf, steps)


def _tasks(draw: random.Random, *, packed: bool, solved: bool, eager: bool, packing: str) -> tuple[Task, ...]:
    kinds = ["head"] * 6 + [
        "probe",
        "probe",
        "codebook",
        "commitment",
        "temperature",
        "row",
        "partly",
        "partly",
    ]
    if eager and not solved:
        kinds += ["physics", "force", "physics", "force"]
    if not packed:
        kinds += ["dead"]  # behind a packing node it cannot be told from a probe
    first = draw.choice(("head", "head", "head", "row", "commitment"))
    chosen = ["head", first, *(draw.choice(kinds) for _ in range(draw.choice((0, 1, 1, 2, 3))))]
    if packing == "batched":
        chosen[1] = "head"
    common, tied = draw.random() < 0.35 or "partly" in chosen, draw.random() < 0.2
    tasks = []
    for number, kind in enumerate(chosen):
        both = kind == "head" or (kind == "probe" and not solved)
        head = draw.randrange(number) if number and both and tied and draw.random() < 0.5 else number
        if chosen[head] not in HEADS:
            head = number
        between = 0 if common and both and (number < 2 or draw.random() < 0.6) else None
        tasks.append(Task(kind, tasks[head].head if head < number else number, between))
    alive = sum(task.middle is not None for task in tasks)
    for number, task in enumerate(tasks):
        if task.kind == "partly":  # zero on the module between, which others keep alive
            tasks[number] = Task("partly", number, 0) if alive >= 2 else Task("head", number)
    return tuple(tasks)


class Several(torch.autograd.Function):
    """A function with several outputs, one for each input."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.clone() for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients


class Sink(torch.autograd.Function):
    """What data-parallel wrappers put behind a model's outputs: no zeros are made for those that are not used."""

    @staticmethod
    def forward(ctx: Any, mark: None, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return (None, *gradients)


class Products(torch.autograd.Function):
    """Two results of two inputs: the product and the sum."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(a, b)
        return a * b, a + b

    @staticmethod
    def backward(ctx: Any, p: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = ctx.saved_tensors
        return p * b + s, p * a + s


class FunctionStage(nn.Module):
    """A layer that ends in a function with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.cat(Products.apply(*self.linear(z).tanh().chunk(2, 1)), 1)


class Residual(nn.Module):
    """A layer added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + self.linear(z).tanh()


class Dead(nn.Module):
    """Nothing comes through: zero, with a gradient of exactly zero."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.relu(z - 1000.0)


class Partly(nn.Module):
    """A head on the trunk, beside a common module whose gradient is exactly zero here."""

    def __init__(self, middle: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.middle, self.head, self.dead = middle, head, Dead()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.head(z + self.dead(self.middle(z)))


class Heads(nn.Module):
    """All heads: one column of results each."""

    def __init__(self, heads: Sequence[nn.Module], detached: list[bool]) -> None:
        super().__init__()
        self.heads, self.detached = nn.ModuleList(heads), detached

    def forward(self, z: torch.Tensor) -> list[torch.Tensor]:
        columns = []
        for number, head in enumerate(self.heads):
            columns.append(head(z.detach() if self.detached[number] else z)[:, 0])
        return columns


class Whole(nn.Module):
    """Trunk and heads as one model."""

    def __init__(self, trunk: nn.Module, heads: nn.Module) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, heads

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        z = self.trunk(x)
        return z, self.heads(z)


def _linear(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh())


def _trunk(form: str) -> nn.Sequential:
    first, second = _linear(INPUTS, WIDTH), _linear(WIDTH, WIDTH)
    norm = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())
    stages = {
        "deep": [first, second, _linear(WIDTH, WIDTH)],
        "tied": [first, second, second, _linear(WIDTH, WIDTH)],
        "norm": [first, norm],
        "residual": [first, Residual(), Residual()],
        "checkpoint norm": [first, norm],
        "function": [first, FunctionStage()],
    }.get(form, [first, second])
    if form == "tied":
        stages[3][0].weight = second[0].weight
    trunk = nn.Sequential(*stages)
    if form == "frozen":
        trunk.requires_grad_(False)
    elif form == "frozen first":
        first.requires_grad_(False)
    return trunk


@dataclass
class Run:
    """One forward: the trunk's result and the losses by name."""

    z: torch.Tensor
    losses: dict[str, torch.Tensor] = field(default_factory=dict)


class World(nn.Module):
    """The modules of a plan, in float64."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        torch.manual_seed(plan.number)
        self.plan = plan
        self.names = tuple(f"{task.kind} {number}" for number, task in enumerate(plan.tasks))
        self.trunk = _trunk(plan.trunk)
        self.middle = _linear(WIDTH, WIDTH)
        self.linears = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in plan.tasks)
        self.potentials = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)) for _ in plan.tasks
        )
        self.block = nn.Parameter(torch.randn(len(plan.tasks), WIDTH))
        self.book = nn.Parameter(torch.randn(5, WIDTH))
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.heads = Heads(
            [self._head(task) for task in plan.tasks if task.kind in HEADS],
            [task.kind == "probe" for task in plan.tasks if task.kind in HEADS],
        )
        self.double()
        self.x = torch.randn(ROWS, INPUTS, dtype=torch.float64, requires_grad=plan.leaf)
        self.y = torch.rand(ROWS, len(plan.tasks), dtype=torch.float64).round()
        self.scales = torch.logspace(-0.7, 0.7, len(plan.tasks), dtype=torch.float64)
        self._pieces = self._compiled_or_scripted()

    def _head(self, task: Task) -> nn.Module:
        linear = self.linears[task.head]
        if task.kind == "partly":
            return Partly(self.middle, linear)
        if task.kind == "dead":
            return nn.Sequential(Dead(), linear)
        return linear if task.middle is None else nn.Sequential(self.middle, linear)

    def _compiled_or_scripted(self) -> dict[str, Callable[..., Any]]:
        how, _, what = self.plan.piece.partition(" ")
        if how == "eager":
            return {}
        module = {"whole": Whole(self.trunk, self.heads), "heads": self.heads, "trunk": self.trunk}[what]
        if how == "compiled":
            torch.compiler.reset()
            return {what: torch.compile(module, backend="aot_eager")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            scripted = torch.jit.script(module)
        z = self.trunk(self.x)
        for _ in range(3):  # after two runs the model is one node
            scripted(z.detach().requires_grad_() if what == "heads" else self.x)
        return {what: scripted}

    # ---- what is known from the construction

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that may receive a gradient, by name; the input is ``x``."""
        found: dict[str, torch.Tensor] = {n: p for n, p in self.named_parameters() if p.requires_grad}
        return {**found, "x": self.x} if self.plan.leaf else found

    def reached(self, number: int) -> set[str]:
        """What a task's loss depends on, by name."""
        task, tensors = self.plan.tasks[number], self.tensors()

        def of(*prefixes: str) -> set[str]:
            return {name for name in tensors if name.startswith(prefixes)}

        found = set() if task.kind in DETACHED else of("trunk.") | ({"x"} & set(tensors))
        if task.kind in HEADS:
            found |= of(f"linears.{task.head}.")
            found |= of("middle.") if task.middle is not None else set()
        elif task.kind in POTENTIALS:
            found |= of(f"potentials.{number}.")
            if task.kind == "force":  # a constant exerts no force
                found.discard(f"potentials.{number}.2.bias")
        else:
            found |= of({"row": "block", "codebook": "book"}.get(task.kind, "?"))
            found |= of("temperature") if task.kind == "temperature" else set()
        return found

    def shared(self, present: Sequence[int]) -> set[str]:
        """What two of some tasks reach: parameters, or leaves where no parameter is shared."""
        twice = {name for name in self.tensors() if sum(name in self.reached(task) for task in present) > 1}
        return twice - {"x"} or twice

    @property
    def layer(self) -> torch.Tensor:
        """The weight of the trunk's last layer."""
        return [p for p in self.trunk.parameters() if p.requires_grad and p.dim() > 1][-1]

    # ---- the losses, each by itself

    def alone(self, number: int, z: torch.Tensor | None = None) -> torch.Tensor:
        """One task's loss by a forward of its own; ``z`` takes the place of the trunk's result."""
        z = self.trunk(self.x) if z is None else z
        return self._loss(number, self._column(number, z, self.heads.heads))

    def _loss(self, number: int, column: torch.Tensor) -> torch.Tensor:
        f = ELEMENTWISE[self.plan.elementwise]
        return f(column, self.y[:, number]).mean() * self.scales[number]

    def _column(self, number: int, z: torch.Tensor, heads: nn.ModuleList) -> torch.Tensor:
        kind = self.plan.tasks[number].kind
        if kind in HEADS:
            return heads[self._at(number)](z.detach() if kind == "probe" else z)[:, 0]
        if kind == "row":
            return z @ self.block[number]
        if kind == "temperature":
            return self.temperature.exp() * z.detach().mean(1)
        if kind in ("codebook", "commitment"):
            code = self.book[torch.cdist(z.detach(), self.book.detach()).argmin(1)]
            return (code - z.detach() if kind == "codebook" else z - code.detach()).square().sum(1)
        u = self.potentials[number](z)[:, 0]
        first = torch.autograd.grad(u.sum(), self.x, create_graph=True)[0]
        if kind == "force":
            return -first.sum(1)
        second = torch.autograd.grad(first[:, 0].sum(), self.x, create_graph=True)[0]
        return second[:, 0] - u + first[:, 1]

    def _at(self, number: int) -> int:
        return sum(task.kind in HEADS for task in self.plan.tasks[:number])

    # ---- the losses, packed

    def run(self) -> Run:
        """All losses as the plan packs them."""
        if "whole" in self._pieces:
            z, made = self._pieces["whole"](self.x)
        else:
            z = self._encode()
            made = self._pieces["heads"](z) if "heads" in self._pieces else None
        columns = []
        for number, task in enumerate(self.plan.tasks):
            inside = made is not None and task.kind in HEADS
            columns.append(made[self._at(number)] if inside else self._column(number, z, self.heads.heads))
        if self.plan.packing == "batched":
            columns = self._batched(z, columns)
        losses = self._apart(columns) if self.plan.packing == "apart" else self._packed(columns)
        return Run(z, dict(zip(self.names, losses, strict=True)))

    def _encode(self) -> torch.Tensor:
        if "trunk" in self._pieces:
            return self._pieces["trunk"](self.x)
        if not self.plan.trunk.startswith("checkpoint"):
            return self.trunk(self.x)
        z = self.x
        for stage in self.trunk:
            z = checkpoint(stage, z, use_reentrant=False)
        return z

    def _batched(self, z: torch.Tensor, columns: list[torch.Tensor]) -> list[torch.Tensor]:
        """Heads that are single layers on the trunk, carried out as one product of stacked weights."""
        simple = [n for n, t in enumerate(self.plan.tasks) if t.kind == "head" and t.middle is None]
        if not simple:
            return columns
        used = [self.linears[self.plan.tasks[number].head] for number in simple]
        weights, biases = torch.stack([m.weight for m in used]), torch.stack([m.bias for m in used])
        results = torch.baddbmm(biases[:, None], z.expand(len(used), -1, -1), weights.transpose(1, 2))
        for at, number in enumerate(simple):
            columns[number] = results[at, :, 0]
        return columns

    def _apart(self, columns: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [self._loss(number, column) for number, column in enumerate(columns)]

    def _packed(self, columns: list[torch.Tensor]) -> list[torch.Tensor]:
        form, count = self.plan.packing, len(columns)
        if form in ("columns", "split", "unbind", "function"):
            table = torch.cat([column[:, None] for column in columns], 1)
            return self._apart(
                {
                    "columns": lambda: [table[:, number] for number in range(count)],
                    "split": lambda: [part.squeeze(1) for part in table.split(1, 1)],
                    "unbind": lambda: torch.stack(columns).unbind(),
                    "function": lambda: Several.apply(*columns),
                }[form]()
            )
        if form in ("vector", "select", "gather"):
            values = ELEMENTWISE[self.plan.elementwise](torch.stack(columns, 1), self.y)
            vector = values.mean(0) * self.scales
            at = torch.arange(count)
            return {
                "vector": lambda: list(vector),
                "select": lambda: [vector.index_select(0, at[n : n + 1])[0] for n in range(count)],
                "gather": lambda: [vector.gather(0, at[n : n + 1]).sum() for n in range(count)],
            }[form]()
        losses = self._apart(columns)
        if form == "stack":
            return list(torch.stack(losses).unbind())
        if form == "masked":
            return [(torch.stack(losses) * row).sum() for row in torch.eye(count, dtype=torch.float64)]
        if form == "filled":
            table = torch.zeros(count, dtype=torch.float64)
            for number, loss in enumerate(losses):
                table[number] = loss
            return [table[number] for number in range(count)]
        if form == "sink":
            return list(Sink.apply(None, *losses))
        if form == "nested":
            pairs = [torch.stack(losses[at : at + 2]) for at in range(0, count, 2)]
            return list(torch.cat(pairs).unbind())
        if form == "partial":
            return [*torch.stack(losses[:2]).unbind(), *losses[2:]]
        return list(torch.stack(losses))
