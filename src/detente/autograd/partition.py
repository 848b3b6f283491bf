"""Which parameters the tasks share, read off the autograd graph.

A leaf that two or more losses reach is shared; one that a single loss reaches is that task's own. One walk over
the graph settles it for all tasks: every node carries a bit mask of the losses that reach it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.autograd.graph import Node, get_gradient_edge

from detente.autograd.ranks import Ranks

Parameters: TypeAlias = torch.Tensor | nn.Module | Iterable["torch.Tensor | nn.Module"]
Edge: TypeAlias = tuple[Node, int]

_ACCUMULATE: Any = torch._C._functions.AccumulateGrad  # the class of the nodes of leaves


@dataclass(frozen=True)
class Walk:
    """What a walk from T roots found.

    Attributes:
        leaves: leaf tensors that require a gradient, in the order in which the forward pass first used them, each
            with the bit mask of the roots that reach it.
        stops: the edges where the walk stopped, each with the bit mask of the roots that reach it.
        overlap: True if two roots reach a common node before any stop, so that their graphs must be freed together.
    """

    leaves: dict[torch.Tensor, int]
    stops: dict[Edge, int]
    overlap: bool


@dataclass(frozen=True)
class Partition:
    """Leaves by their role, for T losses.

    Attributes:
        shared: the shared parameters, in a stable order.
        reached: for each shared parameter the bit mask of the losses that reach it (0: none does in this step).
        own: for each task the parameters that take the plain gradient of its loss.
    """

    shared: tuple[torch.Tensor, ...]
    reached: tuple[int, ...]
    own: tuple[tuple[torch.Tensor, ...], ...]

    @property
    def shared_reached(self) -> bool:
        """Whether some loss reaches a shared parameter."""
        return any(self.reached)

    def of_tasks(self, tasks: Sequence[int]) -> Partition:
        """The same for some of the losses, by their positions."""
        if list(tasks) == list(range(len(self.own))):
            return self
        reached = tuple(
            sum((mask >> task & 1) << place for place, task in enumerate(tasks)) for mask in self.reached
        )
        return Partition(self.shared, reached, tuple(self.own[task] for task in tasks))


def gradient_edge(tensor: torch.Tensor) -> Edge:
    """The node and output number of the graph that produced ``tensor``."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def walk(roots: Sequence[torch.Tensor], stops: Sequence[Edge] = (), *, named: bool = False) -> Walk:
    """Follow the graph from ``roots`` to its leaves, not beyond ``stops``.

    Args:
        roots: tensors; one without a graph reaches nothing (its task is absent here).
        stops: edges to stop at.
        named: True if the caller names shared or own parameters, so that a compiled model hides nothing that is needed.

    Raises:
        ValueError: the graph holds reentrant activation checkpointing.
        CompiledModel: a model compiled as one piece hides which parameters are shared, and ``named`` is False.
    """
    barrier = frozenset(stops)
    masks: dict[Node, int] = {}
    stopped: dict[Edge, int] = {}
    entered: dict[Edge, int] = {}  # by which output each compiled node is entered
    for bit, root in enumerate(roots):
        if not root.requires_grad:
            continue
        edge = gradient_edge(root)
        if edge in barrier:
            stopped[edge] = stopped.get(edge, 0) | 1 << bit
            continue
        masks[edge[0]] = masks.get(edge[0], 0) | 1 << bit
        entered[edge] = entered.get(edge, 0) | 1 << bit

    # First pass: every inner node once, and the order in which they were left, children before parents. It runs in
    # every step over thousands of nodes: one look at each edge, and at each class of nodes.
    edges_of: dict[Node, tuple[Any, ...]] = {}
    left: dict[Node, None] = {}
    leaves: dict[Node, torch.Tensor] = {}
    used: dict[Node, tuple[int, int]] = {}  # when the forward pass first used each leaf
    known: set[type] = set()
    compiled: set[type] = set()
    todo = []
    for node in masks:
        if type(node) is _ACCUMULATE:
            leaves[node] = _variable(node)
        else:
            todo.append(node)
    while todo:
        node = todo[-1]
        if node in edges_of:
            left[todo.pop()] = None
            continue
        if (kind := type(node)) not in known:
            known.add(kind)
            if _is_compiled(kind):
                compiled.add(kind)
        edges: tuple[Any, ...] = node.next_functions
        edges_of[node] = edges
        for edge in edges:
            child = edge[0]
            if child is None or child in edges_of or (barrier and edge in barrier):
                continue
            if type(child) is _ACCUMULATE:
                use = (node._sequence_nr(), edges.index(edge))
                if child not in leaves:
                    leaves[child] = _variable(child)
                if use < used.get(child, (use[0] + 1, 0)):
                    used[child] = use
            else:
                todo.append(child)

    # Second pass, parents before children: hand the masks down. A lone root has nothing to tell apart.
    overlap = any(masks[node] & (masks[node] - 1) for node in masks if node in edges_of)
    if len(masks) == 1 and not barrier:
        masks = dict.fromkeys(leaves, *masks.values())
    else:
        for node in reversed(left):
            mask = masks[node]
            overlap = overlap or mask & (mask - 1) != 0
            for edge in edges_of[node]:
                child = edge[0]
                if child is None:
                    continue
                if barrier and edge in barrier:
                    stopped[edge] = stopped.get(edge, 0) | mask
                    continue
                masks[child] = masks.get(child, 0) | mask
                if type(child) in compiled:
                    entered[edge] = entered.get(edge, 0) | mask
        if not named and any(
            type(node) in compiled and mask != masks[node] for (node, _), mask in entered.items()
        ):
            raise CompiledModel(
                "the model was compiled as one piece, so its graph does not tell shared from task-specific parameters. "
                "Name the shared ones with shared=, or compile the trunk and the heads separately."
            )
    in_order = sorted(leaves, key=lambda node: used.get(node, (0, 0)))
    return Walk({leaves[node]: masks[node] for node in in_order}, stopped, overlap)


def _variable(node: Any) -> torch.Tensor:
    """The leaf behind an accumulating node."""
    variable: torch.Tensor = node.variable
    return variable


def _is_compiled(kind: type) -> bool:
    """Whether nodes of this class hold a compiled part of the model.

    Raises:
        ValueError: they hold reentrant activation checkpointing.
    """
    name = kind.__name__  # node.name() may be hidden by what a function keeps in its context
    if name.startswith("CheckpointFunction"):
        raise ValueError(
            "the graph holds reentrant activation checkpointing, which task gradients cannot pass; "
            "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
    return name.startswith("CompiledFunction")


class CompiledModel(ValueError):
    """A compiled model hides which parameters are shared; name them with ``shared=``."""


def as_tensors(parameters: Parameters | Mapping[str, Any], option: str) -> tuple[torch.Tensor, ...]:
    """Tensors, modules, or nested iterables and mappings of them as a flat tuple without repetition.

    Raises:
        TypeError: an entry is neither a tensor nor a module; the option is named.
    """
    if isinstance(parameters, torch.Tensor):
        return (parameters,)
    if isinstance(parameters, nn.Module):
        return tuple(parameters.parameters())
    if isinstance(parameters, Mapping):
        parameters = parameters.values()
    if isinstance(parameters, (str, bytes)) or not isinstance(parameters, Iterable):
        raise TypeError(f"{option}= takes parameters or modules, got {type(parameters).__name__}.")
    found: dict[int, torch.Tensor] = {}
    for entry in parameters:
        for tensor in as_tensors(entry, option):
            found.setdefault(id(tensor), tensor)
    return tuple(found.values())


class Memory:
    """What the engine remembers from one step of a method to the next: shared parameters and one buffer.

    On several processes also own parameters and the names of all tasks: a rank needs them when it lacks a task.

    A parameter that was shared once stays shared, so that a batch in which some task is absent does not turn it
    into the own parameter of another task. References are weak; the memory is never saved or copied: a method that was
    loaded (or copied) begins with a batch of all its tasks, ``awaited``, where shared parameters are discovered.
    """

    def __init__(self) -> None:
        self._shared: list[weakref.ref[torch.Tensor]] = []
        self._own: list[weakref.ref[torch.Tensor]] = []
        self._buffer: torch.Tensor | None = None
        self.tasks: tuple[str, ...] | None = None
        self.ranks: Ranks | None = None
        self.awaited: tuple[str, ...] | None = None

    @classmethod
    def of(cls, method: Any) -> Memory:
        """The memory that goes with a method from step to step; made on the first call."""
        memory: Memory | None = method.__dict__.get("workspace")
        awaited, method.awaited = method.awaited, None
        if memory is None:
            memory = method.__dict__["workspace"] = cls()
            memory.awaited = awaited
        elif memory._shared:  # a state was loaded in between, perhaps with another model
            memory.awaited = awaited or memory.awaited
        return memory

    def check_awaited(self, names: Sequence[str], losses: Sequence[torch.Tensor]) -> None:
        """Before shared parameters are discovered: see that what was forgotten in saving can be found again.

        Raises:
            ValueError: nothing is remembered, and a task of the loaded state has no loss here; it is named.
        """
        if self.awaited is None:
            return
        if not self.shared():
            present = {name for name, loss in zip(names, losses, strict=True) if loss.requires_grad}
            absent = [name for name in self.awaited if name not in present]
            if absent:
                raise ValueError(
                    f"this method goes on from a saved state, and task {absent[0]!r} is absent from its first batch, "
                    "so which parameters are shared cannot be told. Name them with shared=, or begin with a batch of "
                    "all tasks."
                )
        self.awaited = None

    def shared(self) -> list[torch.Tensor]:
        """The parameters shared so far that still exist, in the order they were found."""
        return _alive(self._shared)

    def remember(self, tensors: Iterable[torch.Tensor]) -> None:
        """Add parameters that were found to be shared."""
        _add(self._shared, tensors)

    def own(self) -> list[torch.Tensor]:
        """The same for parameters of single tasks."""
        return _alive(self._own)

    def remember_own(self, tensors: Iterable[torch.Tensor]) -> None:
        """Add parameters that were found to be a task's own."""
        _add(self._own, tensors)

    def buffer(self, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        """A [rows, columns] tensor of the dtype and device of ``like``, the same memory as last time if it fits."""
        held = self._buffer
        fits = held is not None and held.dtype == like.dtype and held.device == like.device
        if held is None or not fits or held.numel() < rows * columns:
            self._buffer = None  # let go of the old memory before asking for the new
            held = self._buffer = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
        return held[: rows * columns].view(rows, columns)


def _alive(references: list[weakref.ref[torch.Tensor]]) -> list[torch.Tensor]:
    """The tensors that still exist; the others are forgotten."""
    alive = [(reference, reference()) for reference in references]
    references[:] = [reference for reference, tensor in alive if tensor is not None]
    return [tensor for _, tensor in alive if tensor is not None]


def _add(references: list[weakref.ref[torch.Tensor]], tensors: Iterable[torch.Tensor]) -> None:
    known = {id(tensor) for tensor in _alive(references)}
    new = {id(tensor): tensor for tensor in tensors if id(tensor) not in known}
    references += [weakref.ref(tensor) for tensor in new.values()]


def partition(
    losses: Sequence[torch.Tensor],
    memory: Memory,
    *,
    shared: Sequence[torch.Tensor] | None,
    task_specific: Sequence[torch.Tensor] | None,
    part: bool = False,
) -> Partition:
    """Sort the leaves that T losses reach into shared and own parameters.

    Named parameters take precedence over discovery: with only ``shared`` named everything else a loss reaches is
    its own, with only ``task_specific`` named everything else is shared, with both named nothing else is touched.

    Args:
        losses: T scalars.
        memory: what was shared in earlier steps.
        shared, task_specific: parameters by their role, as far as they are named.
        part: these are one process's losses of several: the others may reach what these do not.

    Raises:
        ValueError: no loss reaches any of the named shared parameters, unless these losses are a part.
    """
    leaves = walk(losses, named=shared is not None or task_specific is not None).leaves
    if shared is not None:
        chosen = trainable(shared)
        if not part and leaves and not any(leaf in leaves for leaf in chosen):
            check_reached(chosen)
    elif task_specific is not None:
        apart = set(task_specific)
        chosen = [leaf for leaf in leaves if leaf not in apart]
    else:
        memory.remember(leaf for leaf, mask in leaves.items() if mask & (mask - 1))
        chosen = memory.shared()
    taken = set(chosen)
    candidates = leaves if task_specific is None else [leaf for leaf in task_specific if leaf in leaves]
    rest = [leaf for leaf in candidates if leaf not in taken]
    own = by_task({leaf: leaves[leaf] for leaf in rest}, len(losses))
    return Partition(tuple(chosen), tuple(leaves.get(leaf, 0) for leaf in chosen), own)


def check_reached(chosen: Sequence[torch.Tensor]) -> None:
    """Refuse named shared parameters, none of which any loss reaches.

    Raises:
        ValueError: there are such parameters.
    """
    if chosen:
        raise ValueError(
            f"no loss reaches any of the {len(chosen)} parameters named in shared= (the first has shape "
            f"{tuple(chosen[0].shape)}). Are they of another model, or was the graph detached?"
        )


def by_task(masks: Mapping[torch.Tensor, int], tasks: int) -> tuple[tuple[torch.Tensor, ...], ...]:
    """For each task the tensors whose bit mask names it."""
    lists: list[list[torch.Tensor]] = [[] for _ in range(tasks)]
    for tensor, mask in masks.items():
        while mask:
            lowest = mask & -mask
            lists[lowest.bit_length() - 1].append(tensor)
            mask ^= lowest
    return tuple(map(tuple, lists))


def trainable(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Those that require a gradient: frozen parameters may be named and are left alone."""
    return [parameter for parameter in parameters if parameter.requires_grad]
