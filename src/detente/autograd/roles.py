"""Who owns what in one step, and where the problem is solved.

A leaf that two or more losses reach is shared; one that a single loss reaches is that task's own. What the graph leaves
open (parameters behind a node that packs several tasks) the gradients decide, once they are there: see :func:`settle`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from detente.autograd.branches import Branches, is_branch
from detente.autograd.evidence import left_open
from detente.autograd.graph import Walk, beside, walk
from detente.autograd.ranks import Ranks
from detente.values import MethodInfo, Space

Parameters: TypeAlias = torch.Tensor | nn.Module | Iterable["torch.Tensor | nn.Module"]
Tensors: TypeAlias = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Named:
    """Hold what a caller names, as flat tuples of tensors; None where it was left open.

    Attributes:
        features: the representation, where the problem is solved on it.
        shared, task_specific: parameters by their role.
        solve_on: shared parameters to solve on.
        branches: the branches of the representation that the heads read, if they read branches.
    """

    features: Tensors | None = None
    shared: Tensors | None = None
    task_specific: Tensors | None = None
    solve_on: Tensors | None = None
    branches: Branches | None = None

    @classmethod
    def read(
        cls, features: Any = None, shared: Any = None, task_specific: Any = None, solve_on: Any = None
    ) -> Named:
        """Read every iterable exactly once: some are generators.

        Raises:
            ValueError: features and solve_on are both given, or one of them is empty.
            TypeError: an entry is neither a tensor nor a module; the option is named.
        """
        if features is not None and solve_on is not None:
            raise ValueError("give features= or solve_on=, not both: each names where the problem is solved.")
        branches = features if isinstance(features, Branches) else None
        found = [
            None if value is None else as_tensors(value, name)
            for name, value in (
                ("features", features if branches is None else branches.features),
                ("shared", shared),
                ("task_specific", task_specific),
                ("solve_on", solve_on),
            )
        ]
        for name, value in (("features", found[0]), ("solve_on", found[3])):
            if value == ():
                raise ValueError(f"{name}= is empty; name at least one tensor, or leave it out.")
        return cls(found[0], found[1], found[2], found[3], branches)


@dataclass(frozen=True)
class Roles:
    """Hold who owns what for T losses, and where their problem is solved.

    Attributes:
        space: ``exact`` (on all shared parameters), ``layer`` or ``features``.
        tasks: bit mask of the losses that reach a shared parameter.
        shared: the shared parameters, in a stable order; those that the gradients are to decide about come last.
        reached: for each shared parameter the bit mask of the losses that reach it (0: none does in this step).
        own: for each task the parameters that take the plain gradient of its loss.
        on: what the problem is solved on, where that is not ``shared``: the features or the layer.
        unsure: how many of the last shared parameters the gradients are to decide about; see :func:`settle`.
        inputs: how many of the first ones are leaves that are no parameters, and shared only if no parameter turns out
            to be.
        certain: mask of the losses that reach a shared parameter (on features: the representation) for certain, without
            passing a node that packs several tasks.
        left_out: leaves that are no parameters and that several losses reach: they take the gradient of the plain sum.
        encoder: on features, the shared parameters behind them.
        past: on features, the shared parameters that losses (also) reach past them, each with the mask of those.
        stopped: on features, True if gradients must be stopped there by hand: one feature is computed from another, or
            a loss also reaches past them what lies behind them. Autograd would carry the rest of the way on, and the
            encoder's part would count twice.
        entwined: on features, True if the graphs of two heads have nodes in common.
        apart: on features, True if every task has a representation of its own, so that no conflict can be seen there.
    """

    space: Space
    tasks: int
    shared: Tensors
    reached: tuple[int, ...]
    own: tuple[Tensors, ...]
    on: Tensors = ()
    unsure: int = 0
    inputs: int = 0
    certain: int = -1
    left_out: Tensors = ()
    encoder: Tensors = ()
    past: tuple[tuple[torch.Tensor, int], ...] = ()
    stopped: bool = False
    entwined: bool = False
    apart: bool = False

    def of_tasks(self, tasks: Sequence[int]) -> Roles:
        """Return the roles for some of the losses, by their positions."""
        if list(tasks) == list(range(len(self.own))):
            return self
        reached = tuple(_picked(mask, tasks) for mask in self.reached)
        certain = -1 if self.certain < 0 else _picked(self.certain, tasks)
        past = tuple((leaf, _picked(mask, tasks)) for leaf, mask in self.past)
        own = tuple(self.own[task] for task in tasks)
        reaching = _picked(self.tasks, tasks)
        return replace(self, tasks=reaching, reached=reached, own=own, past=past, certain=certain)


def _picked(mask: int, tasks: Sequence[int]) -> int:
    """Return the bits of some tasks, by their positions, side by side."""
    return sum((mask >> task & 1) << place for place, task in enumerate(tasks))


class Memory:
    """Keep what the engine remembers from one step of a method to the next: roles seen so far, and one buffer.

    A parameter that was shared once stays shared, so that a batch in which some task is absent does not turn it
    into the own parameter of another task. References are weak; the memory is never saved or copied: a method that was
    loaded (or copied) begins with a batch of all its tasks, ``awaited``, where shared parameters are discovered.

    Attributes:
        tasks, ranks: on several processes the names of all tasks, and the processes.
        awaited: the tasks of a loaded state, until parameters are shared again.
        evidence: for parameters that the graph leaves open, the tasks under which their gradient was seen not to be
            zero, and those whose gradient could have told.
        moved: tasks whose gradient of what is shared was seen not to be zero, where the graph leaves that open.
        info: what the method declares.
        witness: an optimizer of a single number, for gradient scalers.
        filled: tensors whose ``.grad`` was filled with NaN for a gradient scaler by a refused step.
    """

    def __init__(self) -> None:
        self._shared: dict[int, weakref.ref[torch.Tensor]] = {}
        self._own: dict[int, weakref.ref[torch.Tensor]] = {}
        self._keys: Any = WeakIdKeyDictionary()
        self._buffer: torch.Tensor | None = None
        self.tasks: tuple[str, ...] | None = None
        self.ranks: Ranks | None = None
        self.awaited: tuple[str, ...] | None = None
        self.evidence: Any = WeakIdKeyDictionary()
        self.moved: set[str] = set()
        self.info: MethodInfo | None = None
        self.witness: torch.optim.Optimizer | None = None
        self.filled: list[weakref.ref[torch.Tensor]] = []

    @classmethod
    def of(cls, method: Any) -> Memory:
        """Return the memory that goes with a method from step to step; made on the first call."""
        memory: Memory | None = method.__dict__.get("workspace")
        awaited, method.awaited = method.awaited, None
        if memory is None:
            memory = method.__dict__["workspace"] = cls()
            memory.awaited = awaited
        elif memory._shared:  # a state was loaded in between, perhaps with another model
            memory.awaited = awaited or memory.awaited
        return memory

    def check_awaited(self, names: Sequence[str], losses: Sequence[torch.Tensor]) -> None:
        """Check, before shared parameters are discovered, that what was forgotten in saving can be found again.

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
        """Return the parameters shared so far that still exist, in the order they were found."""
        return self.remember(())

    def remember(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Add parameters that were found to be shared; return all that still exist, in the order they were found."""
        held, found, gone = self._shared, [], []
        for tensor in tensors:
            known = held.get(id(tensor))
            if known is None or known() is not tensor:
                held.pop(id(tensor), None)
                held[id(tensor)] = weakref.ref(tensor)
        for number, reference in held.items():
            shared = reference()
            if shared is None:
                gone.append(number)
            else:
                found.append(shared)
        for number in gone:
            del held[number]
        return found

    def own(self) -> list[torch.Tensor]:
        """Return the parameters of single tasks so far that still exist, in the order they were found."""
        return _alive(self._own)

    def remember_own(self, tensors: Iterable[torch.Tensor]) -> None:
        """Add parameters that were found to be a task's own."""
        _add(self._own, tensors)

    def keys(self, tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """Return a number for each tensor that stays its own from step to step, in the order of first use."""
        return tuple(self._keys.setdefault(tensor, len(self._keys)) for tensor in tensors)

    def buffer(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return an empty [rows, columns] tensor, in the memory of last time if it fits."""
        held = self._buffer
        fits = held is not None and held.dtype == dtype and held.device == device
        if held is None or not fits or held.numel() < rows * columns:
            self._buffer = None  # let go of the old memory before asking for the new
            held = self._buffer = torch.empty(rows * columns, dtype=dtype, device=device)
        return held[: rows * columns].view(rows, columns)


def find_roles(
    names: Sequence[str],
    losses: Sequence[torch.Tensor],
    named: Named,
    memory: Memory,
    *,
    mode: str = "fast",
    part: bool = False,
) -> Roles:
    """Find out who owns what, where the problem is solved on parameters.

    On a representation see :func:`~detente.autograd.feature_roles.roles_on_features`.

    Named parameters take precedence over discovery: with only ``shared`` named everything else a loss reaches is
    its own, with only ``task_specific`` named everything else is shared, with both named nothing else is touched.

    Args:
        names, losses: of the T tasks.
        named: what the caller named.
        memory: of the method.
        mode: ``low`` takes no task gradients that could decide what the graph leaves open.
        part: these are one process's losses of several: the others may reach what these do not.

    Raises:
        ValueError: no loss reaches any of the named shared parameters, a parameter to solve on is not shared, the
            graph leaves open what is shared where no gradients can tell, or a method that was loaded lacks a task where
            shared parameters are discovered.
    """
    discovering = named.shared is None and named.task_specific is None
    if discovering and memory.awaited is not None:
        memory.check_awaited(names, losses)
    seen = walk(losses)
    leaves = seen.leaves
    chosen: Sequence[torch.Tensor]
    open_ones: Sequence[torch.Tensor] = ()
    left_out: Sequence[torch.Tensor] = ()
    if discovering:
        chosen, open_ones, left_out = _discover(losses, seen, memory)
        if open_ones and (mode == "low" or named.solve_on is not None):
            option = "solve_on=" if named.solve_on is not None else "memory='low'"
            raise ValueError(left_open(open_ones, f"{option} takes no gradients that could"))
    else:
        check_no_branch(leaves)
        chosen = _chosen(named, leaves)
        if named.shared is not None and not part and leaves and not any(leaf in leaves for leaf in chosen):
            check_reached(chosen)
        if named.task_specific is None:
            known = set(chosen)
            others = [leaf for leaf in leaves if not isinstance(leaf, nn.Parameter) and leaf not in known]
            left_out = [leaf for leaf in others if leaves[leaf] & (leaves[leaf] - 1)]
    inputs: Sequence[torch.Tensor] = ()
    if open_ones and not chosen:  # whether any parameter is shared the gradients will tell
        inputs, left_out = left_out, ()
    columns = (*inputs, *chosen, *open_ones)
    taken = {*columns, *left_out}
    # One look at each leaf: whose it is.
    lists: list[list[torch.Tensor]] = [[] for _ in losses]
    candidates = leaves if named.task_specific is None else named.task_specific
    for leaf in candidates:
        if leaf not in taken and leaf in leaves:
            hand_out(lists, leaf, leaves[leaf])
    for leaf in left_out:
        hand_out(lists, leaf, leaves[leaf])
    reached, tasks, certain = [], 0, 0
    for leaf in columns:
        mask = leaves.get(leaf, 0)
        reached.append(mask)
        tasks |= mask
        certain |= seen.unsure.get(leaf, mask)
    roles = Roles(
        "exact",
        tasks,
        columns,
        tuple(reached),
        tuple(map(tuple, lists)),
        unsure=len(open_ones),
        inputs=len(inputs),
        certain=certain if seen.unsure else -1,
        left_out=tuple(left_out),
    )
    if named.solve_on is not None:
        if tasks:
            _check_layer(named.solve_on, columns)
        roles = replace(roles, space="layer", on=named.solve_on)
    return roles


def _chosen(named: Named, leaves: Mapping[torch.Tensor, int]) -> list[torch.Tensor]:
    """Return the shared parameters where some are named by their role."""
    if named.shared is not None:
        return trainable(named.shared)
    apart = set(named.task_specific or ())
    return [leaf for leaf in leaves if leaf not in apart]


def hand_out(lists: list[list[torch.Tensor]], leaf: torch.Tensor, mask: int) -> None:
    """Add a leaf to the list of every task in a bit mask."""
    while mask:
        lowest = mask & -mask
        lists[lowest.bit_length() - 1].append(leaf)
        mask ^= lowest


def _discover(
    losses: Sequence[torch.Tensor], seen: Walk, memory: Memory
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Return the shared parameters, those left open (the likelier shared ones first), and leaves left out."""
    met: list[torch.Tensor] = []
    others: list[torch.Tensor] = []  # leaves that are no parameters
    inputs = False
    for leaf, mask in seen.leaves.items():
        parameter = isinstance(leaf, nn.Parameter)
        if not parameter:
            inputs = True
            if is_branch(leaf):
                check_no_branch(seen.leaves)
        if mask & (mask - 1):
            (met if parameter else others).append(leaf)
    differentiated = inputs and bool(met)
    if not met:
        met, others = others, []
    open_ones: list[torch.Tensor] = []
    if seen.unsure:
        known = {id(leaf) for leaf in memory.shared()}
        open_ones = [leaf for leaf in met if leaf in seen.unsure and id(leaf) not in known]
        undecided = {id(leaf) for leaf in open_ones}
        met = [leaf for leaf in met if id(leaf) not in undecided]
        open_ones.sort(key=lambda leaf: leaf in memory.evidence)
    shared = memory.remember(met)
    if differentiated and met:
        shared = memory.remember(_forgotten(losses, seen, met))
    return shared, open_ones, others


def _forgotten(
    losses: Sequence[torch.Tensor], seen: Walk, shared: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return parameters of shared layers that only one loss reaches because the others differentiate.

    A derivative with respect to an input forgets what was only added: the bias of an output layer is reached by the
    loss of the values alone (a data or boundary loss), and belongs to the network all the same. It is known by the
    shared weight beside it.
    """
    known = {id(leaf) for leaf in shared}
    found = {}
    for together in beside(losses):
        if any(id(leaf) in known for leaf in together):
            for leaf in together:
                mask = seen.leaves.get(leaf, 0)
                alone = mask and not mask & (mask - 1)
                if id(leaf) not in known and isinstance(leaf, nn.Parameter) and alone:
                    found[id(leaf)] = leaf
    return list(found.values())


def check_no_branch(leaves: Iterable[torch.Tensor]) -> None:
    """Check that no loss ends at a branch other than those it was passed with: its gradient would end there.

    Raises:
        ValueError: one does.
    """
    if any(is_branch(leaf) for leaf in leaves):
        raise ValueError(
            "the losses were computed from detente.branch(), whose gradients end at the branches. Pass the branches "
            "that the heads read: backward(losses, method, features=branches)."
        )


def _check_layer(layer: Sequence[torch.Tensor], shared: Sequence[torch.Tensor]) -> None:
    """Check that every parameter to solve on is shared.

    Raises:
        ValueError: one is not.
    """
    known = set(shared)
    for position, tensor in enumerate(layer):
        if tensor not in known:
            raise ValueError(
                f"parameter {position} of solve_on= (shape {tuple(tensor.shape)}) is not shared by the tasks; "
                "name parameters that two or more losses reach, such as the last shared layer."
            )


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


def trainable(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return those that require a gradient: frozen parameters may be named and are left alone."""
    return [parameter for parameter in parameters if parameter.requires_grad]


def as_tensors(parameters: Parameters | Mapping[str, Any], option: str) -> Tensors:
    """Return tensors, modules, or nested iterables and mappings of them as a flat tuple without repetition.

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


def _alive(references: dict[int, weakref.ref[torch.Tensor]]) -> list[torch.Tensor]:
    """Return the tensors that still exist; the others are forgotten."""
    alive = []
    for number, reference in list(references.items()):
        tensor = reference()
        if tensor is None:
            del references[number]
        else:
            alive.append(tensor)
    return alive


def _add(references: dict[int, weakref.ref[torch.Tensor]], tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        held = references.get(id(tensor))
        if held is None or held() is not tensor:
            references.pop(id(tensor), None)
            references[id(tensor)] = weakref.ref(tensor)
