"""The autograd graph between losses and leaves: which losses reach a leaf, and how surely.

One walk settles it for all tasks: every node carries a bit mask of the losses that reach it. What a node does with a
gradient is not part of the graph, so that behind a node that packs several tasks into one tensor (a concatenation, a
stack, a compiled model) every loss seems to reach every head. Such leaves are told apart from those that are reached
for certain; `roles` decides what becomes of them.

A backward through the graph may run modules again (activation checkpointing): :class:`Recomputation` watches over that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import checkpoint

from detente.autograd.buffers import Buffers, read_buffers, write_buffers

Edge: TypeAlias = tuple[Node, int]

_ACCUMULATE: Any = torch._C._functions.AccumulateGrad  # the class of the nodes of leaves

# What a class of nodes may do to tasks that share a tensor.
_SELECTS = 1  # takes some entries of its input: losses that meet behind it may use different ones
_PACKS = 2  # sends parts of a gradient different ways
_ROUTES = 4  # may send the gradients of its outputs different ways
_STACKS = 8  # packs whole tensors
_SCALES = 16  # multiplies entries by numbers, some of which may be zero

_SELECTING = (
    "Select", "Slice", "Index", "Narrow", "Gather", "Take", "MaskedSelect", "AsStrided", "Diagonal", "Unfold",
    "AliasBackward", "NestedSelect", "ValuesBackward",
)  # fmt: skip
_SPLITTING = ("Unbind", "Split", "Chunk", "UnsafeSplit", "TensorSplit", "UnsafeChunk")
_PACKING = (
    "CopySlices", "IndexPut", "IndexCopy", "IndexAdd", "IndexFill", "Where", "Scatter", "SelectScatter", "SliceScatter",
    "DiagonalScatter", "MaskedScatter", "ConstantPad", "Put", "BlockDiag", "NestedTensor",
)  # fmt: skip
_STACKING = ("Cat", "Stack")
_SCALING = ("Mul", "Dot", "Mv", "Mm", "Addmv")


@dataclass(frozen=True)
class Walk:
    """Hold what a walk from T roots found.

    Attributes:
        leaves: leaf tensors that require a gradient, in the order in which the forward pass first used them, each
            with the bit mask of the roots that reach it.
        stops: the edges where the walk stopped, each with the bit mask of the roots that reach it.
        overlap: True if two roots reach a common node before any stop, so that their graphs must be freed together.
        unsure: leaves that two or more roots seem to reach, and not two for certain, each with the bit mask of those
            that do for certain: they lie behind a node that packs several tasks.
        certain: the roots that reach a stop for certain, as a bit mask; -1 where nothing is packed.
    """

    leaves: dict[torch.Tensor, int]
    stops: dict[Edge, int]
    overlap: bool
    unsure: dict[torch.Tensor, int] = field(default_factory=dict)
    certain: int = -1


def gradient_edge(tensor: torch.Tensor) -> Edge:
    """Return the node and output number of the graph that produced ``tensor``."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def walk(roots: Sequence[torch.Tensor], stops: Sequence[Edge] = ()) -> Walk:
    """Follow the graph from ``roots`` to its leaves, not beyond ``stops``.

    Args:
        roots: tensors; one without a graph reaches nothing (its task is absent here).
        stops: edges to stop at.

    Raises:
        ValueError: the graph holds reentrant activation checkpointing.
    """
    barrier = frozenset(stops)
    masks: dict[Node, int] = {}
    stopped: dict[Edge, int] = {}
    entered: dict[Edge, int] = {}
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
    kinds: dict[type, int] = {}
    flagged: list[Node] = []  # nodes that may keep tasks apart
    routing: set[type] = set()
    todo = []
    for node in masks:
        if type(node) is _ACCUMULATE:
            leaves[node] = node.variable  # type: ignore[attr-defined]
        else:
            todo.append(node)
    while todo:
        node = todo[-1]
        if node in edges_of:
            left[todo.pop()] = None
            continue
        if (flags := kinds.get(kind := type(node))) is None:
            kinds[kind] = flags = _flags(kind)
            if flags & _ROUTES:
                routing.add(kind)
        if flags:
            flagged.append(node)
        edges: tuple[Any, ...] = node.next_functions
        edges_of[node] = edges
        for edge in edges:
            child = edge[0]
            if child is None or child in edges_of or (barrier and edge in barrier):
                continue
            if type(child) is _ACCUMULATE:
                use = (node._sequence_nr(), edges.index(edge))
                if child not in leaves:
                    leaves[child] = child.variable
                if use < used.get(child, (use[0] + 1, 0)):
                    used[child] = use
            else:
                todo.append(child)

    # Second pass, parents before children: hand the masks down.
    overlap = False
    outputs: dict[Node, dict[int, int]] = {}  # of a node that routes: by which output which roots enter it
    for (node, number), mask in entered.items():
        outputs.setdefault(node, {})[number] = mask
    for node in reversed(left):
        mask = masks[node]
        overlap = overlap or mask & (mask - 1) != 0
        for edge in edges_of[node]:
            child = edge[0]
            if child is None:
                continue
            if barrier and edge in barrier:
                stopped[edge] = stopped.get(edge, 0) | mask
            else:
                masks[child] = masks.get(child, 0) | mask
                if routing and type(child) in routing:
                    into = outputs.setdefault(child, {})
                    into[edge[1]] = into.get(edge[1], 0) | mask
    unsure: dict[torch.Tensor, int] = {}
    certain = -1
    if overlap and flagged:
        graph = _Graph([*reversed(left)], edges_of, masks, kinds, outputs, barrier)
        if graph.keeps_apart(flagged):
            found_unsure, certain = graph.unsure(leaves, entered)
            unsure = {leaves[node]: mask for node, mask in found_unsure.items()}
    found: dict[torch.Tensor, int] = {}
    first_used = [(*used.get(node, (0, 0)), place) for place, node in enumerate(leaves)]
    nodes = list(leaves)
    for _, _, place in sorted(first_used):
        found[leaves[nodes[place]]] = masks[nodes[place]]
    return Walk(found, stopped, overlap, unsure, certain)


def beside(roots: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return, for each operation that uses several leaves, those leaves: a layer's weight and bias.

    A weight is also found behind a transposition. Operations that cannot be looked into (compiled ones) are left out.
    """
    todo = [gradient_edge(root)[0] for root in roots if root.requires_grad]
    seen = set(todo)
    found = []
    while todo:
        together: list[torch.Tensor] = []
        node = todo.pop()
        opaque = bool(_flags(type(node)) & _ROUTES)
        for child, _ in node.next_functions:
            if child is None:
                continue
            if type(child) is not _ACCUMULATE and child not in seen:
                seen.add(child)
                todo.append(child)
            below: Any = child
            if type(child).__name__ in ("TBackward0", "TransposeBackward0", "PermuteBackward0"):
                below = child.next_functions[0][0]
            if type(below) is _ACCUMULATE:
                together.append(below.variable)
        if len(together) > 1 and not opaque:
            found.append(together)
    return found


@dataclass(frozen=True)
class _Graph:
    """Hold the nodes of a walk, parents first, with their edges, the masks of the roots, and what their classes do."""

    order: list[Node]
    edges_of: dict[Node, tuple[Any, ...]]
    masks: dict[Node, int]
    kinds: dict[type, int]
    outputs: dict[Node, dict[int, int]]
    barrier: frozenset[Edge]

    def keeps_apart(self, flagged: Sequence[Node]) -> bool:
        """Return whether some node may keep roots apart: a quick look that clears most graphs."""
        masks, kinds = self.masks, self.kinds
        private = set()
        for node in flagged:
            kind, mask = kinds[type(node)], masks[node]
            if not kind & (_SELECTS | _SCALES):
                continue
            for child, _ in self.edges_of[node]:
                if child is not None and (kind & _SELECTS or kinds.get(type(child), 0) & _STACKS):
                    if masks.get(child, mask) != mask:
                        return True
                    private.add(mask)
        for node in flagged:
            kind, mask = kinds[type(node)], masks[node]
            several = mask & (mask - 1)
            if kind & _ROUTES and several and any(part != mask for part in self.outputs[node].values()):
                return True
            if kind & (_PACKS | _STACKS) and mask in private and not several:
                return True
            if kind & _STACKS and several and _of_scalars(node):
                return True
        return False

    def unsure(
        self, leaves: dict[Node, torch.Tensor], entered: dict[Edge, int]
    ) -> tuple[dict[Node, int], int]:
        """Return the leaves that two roots reach, but no two without passing a node that may keep them apart.

        Each comes with the roots that reach it for certain; beside them the roots that reach a stop for certain.

        Roots are kept apart where they use different entries (or outputs) of one tensor and a node at or behind it
        sends those entries different ways.
        """
        masks, kinds = self.masks, self.kinds
        certain: dict[Node, int] = {}
        for (node, _), mask in entered.items():
            certain[node] = certain.get(node, 0) | mask
        parted: set[Node] = set()
        private: set[Node] = set()  # behind a selection of one root's own, where no other root reaches yet
        stops = 0
        for node in self.order:
            mask, kind = masks[node], kinds[type(node)]
            several = mask & (mask - 1) != 0
            apart = node in parted
            if several and kind & _ROUTES and not apart:
                apart = any(part != mask for part in self.outputs[node].values())
            packed = ((apart or node in private) and kind & (_PACKS | _STACKS)) or (
                several and kind & _STACKS and _of_scalars(node)
            )
            for edge in self.edges_of[node]:
                child, sure = edge[0], 0 if packed else certain.get(node, 0)
                if child is None:
                    continue
                if edge in self.barrier:
                    stops |= sure
                    continue
                certain[child] = certain.get(child, 0) | sure
                below = kinds.get(type(child), 0)
                # Where all roots use the same entries nothing is kept apart; a vector times constants is a selection.
                selects = kind & _SELECTS or (kind & _SCALES and below & _STACKS)
                if apart or (selects and masks[child] != mask):
                    parted.add(child)
                elif not several and masks[child] == mask and (selects or node in private):
                    private.add(child)
        found = {}
        for node in leaves:
            mask, sure = masks[node], certain.get(node, 0)
            if mask & (mask - 1) and not sure & (sure - 1):
                found[node] = sure
        return found, stops


def _of_scalars(node: Any) -> bool:
    """Return whether a stack or concatenation makes a vector: most likely one entry for each task."""
    return all(len(entry.shape) <= 1 for entry in node._input_metadata)


@cache
def _flags(kind: type) -> int:
    """Return what nodes of this class may do.

    Raises:
        ValueError: they hold reentrant activation checkpointing.
    """
    name = kind.__name__  # node.name() may be hidden by what a function keeps in its context
    if name.startswith("CheckpointFunction"):
        raise ValueError(
            "the graph holds reentrant activation checkpointing, which task gradients cannot pass; "
            "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
    flags = 0
    if issubclass(kind, BackwardCFunction) or not name.endswith(tuple("0123456789")):
        # Compiled, scripted, or written by hand: what it does inside cannot be seen. (CopySlices is one of these.)
        flags = _PACKS | _ROUTES
    elif name.startswith(_STACKING):
        flags = _STACKS
    elif name.startswith(_PACKING):
        flags = _PACKS
    elif name.startswith(_SPLITTING):
        flags = _ROUTES
    elif name.startswith(_SELECTING):
        flags = _SELECTS
    elif name.startswith(_SCALING):
        flags = _SCALES
    return flags


@dataclass(eq=False)
class Recomputation:
    """Keep buffers still where several backwards run the same modules again (activation checkpointing).

    A plain backward runs each checkpointed region of the network once more, and so do ours, once per task. Statistics
    such as those of batch normalisation move with the first run of a region, as they would in a plain backward. Further
    runs begin with the buffers that the first one began with (a spectral norm reads them), and what the buffers held is
    put back afterwards. Where regions share a module, they move it in the order in which they are first run.
    """

    # Of each region the modules it runs, with their buffers before its first run.
    _origins: WeakKeyDictionary[Any, dict[nn.Module, Buffers]] = field(default_factory=WeakKeyDictionary)
    _first: set[tuple[int, nn.Module]] = field(default_factory=set)  # in the current backward
    _replaced: dict[nn.Module, tuple[Any, Buffers]] = field(default_factory=dict)
    _handle: Any = None

    def __enter__(self) -> Self:
        self._handle = register_module_forward_pre_hook(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self.next()

    def next(self) -> None:
        """End one backward; what ran in it stands still in those that follow."""
        if self._replaced:
            write_buffers([held for _, held in self._replaced.values()])
            self._replaced = {}
        self._first.clear()

    def _see(self, module: nn.Module, _: Any) -> None:
        if not module._buffers:
            return
        region = _region() or self
        if module in self._replaced:
            known, held = self._replaced[module]
            if known is region:
                return
            write_buffers([held])
            del self._replaced[module]
        origins = self._origins.setdefault(region, {})
        if module not in origins:
            origins[module] = read_buffers(module)
            self._first.add((id(region), module))
        elif (id(region), module) not in self._first:
            self._replaced[module] = region, read_buffers(module)
            write_buffers([origins[module]])


def _region() -> Any:
    """Return what stands for the checkpointed region that is being run again; None if none is.

    torch tells it nowhere but in the closure of the function that runs the region.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "unpack_hook" and frame.f_code.co_filename == checkpoint.__file__:
            return frame.f_locals.get("frame")
        frame = frame.f_back  # type: ignore[assignment]
    return None
