"""Who owns what on a representation: the encoder behind it, and what the heads reach past it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import or_

import torch
from torch import nn

from detente.autograd.branches import Branches, is_branch
from detente.autograd.evidence import left_open
from detente.autograd.graph import Edge, Walk, gradient_edge, walk
from detente.autograd.roles import (
    Memory,
    Named,
    Roles,
    check_no_branch,
    check_reached,
    hand_out,
    trainable,
)


def roles_on_features(
    names: Sequence[str], losses: Sequence[torch.Tensor], named: Named, memory: Memory, *, part: bool
) -> Roles:
    """Find the encoder behind the features and what the heads reach past it.

    Parameters behind the features are shared, and so are parameters that two or more losses reach past them; the
    others are own. Named parameters restrict both. A parameter behind the features cannot be a task's own: the one
    backward through the encoder does not tell tasks apart.
    """
    assert named.features is not None
    if named.shared is None and named.task_specific is None:
        memory.check_awaited(names, losses)
    features, tasks = named.features, len(losses)
    for position, feature in enumerate(features):
        if not feature.requires_grad:
            raise ValueError(
                f"features[{position}] carries no graph: the encoder is frozen, or ran under torch.no_grad(). "
                "Without features= the shared parameters are found from the losses."
            )
    edges = [gradient_edge(feature) for feature in features]
    read = edges if named.branches is None else named.branches.edges()
    heads = walk(losses, read)
    check_no_branch(heads.leaves)
    behind = [
        walk([feature], [other for other in edges if other != edge])
        for feature, edge in zip(features, edges, strict=True)
    ]
    encoder = list(dict.fromkeys(leaf for found in behind for leaf in found.leaves))
    if any(is_branch(leaf) for leaf in encoder):
        raise ValueError(
            "features= was computed from detente.branch(), and gradients end at the branches. Branch a representation "
            "once, where the heads read it."
        )
    inside = set(encoder)
    past, left_out = heads.leaves, []
    met = [leaf for leaf, mask in past.items() if mask & (mask - 1)]
    if named.shared is not None:
        chosen = set(trainable(named.shared))
        if chosen and past and not chosen & (inside | set(past)):
            check_reached(list(chosen))
    elif named.task_specific is not None:
        chosen = (inside | set(past)) - set(named.task_specific)
    else:
        known = {id(leaf) for leaf in memory.shared()}
        open_ones = [
            leaf for leaf in met if leaf in heads.unsure and leaf not in inside and id(leaf) not in known
        ]
        if open_ones:
            raise ValueError(
                left_open(open_ones, "with features= the heads' parameters take no task gradients")
            )
        found = list(dict.fromkeys([*encoder, *met]))
        if any(isinstance(leaf, nn.Parameter) for leaf in found):
            left_out = [leaf for leaf in found if not isinstance(leaf, nn.Parameter)]
            found = [leaf for leaf in found if isinstance(leaf, nn.Parameter)]
        chosen = set(memory.remember(found))
    depending = _union(heads.stops.values())
    _check_reads(names, losses, heads.leaves, depending, chosen, named)
    if not part and not heads.stops:
        raise ValueError(
            f"no loss (of tasks {', '.join(names)}) depends on features=. Compute the losses from the tensors you "
            "pass, or leave features= out."
        )
    candidates = inside | set(past) if named.task_specific is None else set(named.task_specific)
    apart = candidates - chosen - set(left_out)
    misplaced = [leaf for leaf in encoder if leaf in apart]
    if misplaced:
        raise ValueError(
            f"{len(misplaced)} parameters behind features= (the first has shape {tuple(misplaced[0].shape)}) would be "
            "a task's own, but one backward through the encoder serves all tasks. Name them in shared=, leave "
            "features= out, or name both shared= and task_specific= without them to leave them untouched."
        )
    everyone = (1 << tasks) - 1
    masks = {leaf: depending or everyone for leaf in encoder if leaf in chosen}
    for leaf, mask in past.items():
        if leaf in chosen:
            masks[leaf] = masks.get(leaf, 0) | mask
    lists: list[list[torch.Tensor]] = [[] for _ in losses]
    spared = set(left_out)
    for leaf, mask in past.items():
        if leaf in apart or leaf in spared:
            hand_out(lists, leaf, mask)
    return Roles(
        "features",
        _union(masks.values()),
        tuple(masks),
        tuple(masks.values()),
        tuple(map(tuple, lists)),
        on=features,
        certain=heads.certain if heads.unsure else -1,
        left_out=tuple(left_out),
        encoder=tuple(leaf for leaf in encoder if leaf in chosen),
        past=tuple((leaf, mask) for leaf, mask in past.items() if leaf in chosen),
        stopped=any(found.stops for found in behind)
        or (named.branches is None and any(leaf in inside for leaf in past if leaf in chosen)),
        entwined=heads.overlap if named.branches is None else _cross(heads, named.branches, names),
        apart=named.branches is None and tasks > 1 and _each_its_own(heads.stops),
    )


def _cross(heads: Walk, branches: Branches, names: Sequence[str]) -> bool:
    """Return whether the heads behind branches have anything in common, or read another task's branch."""
    if heads.overlap or any(mask & (mask - 1) for mask in heads.leaves.values()):
        return True
    mine = {
        gradient_edge(part): 1 << task
        for task, name in enumerate(names)
        for part in branches.parts(name)
        if part.requires_grad
    }
    return any(mask != mine.get(edge) for edge, mask in heads.stops.items())


def _union(masks: Iterable[int]) -> int:
    """Return the tasks that are in any of the bit masks: of stops, those whose losses reach a feature or a branch."""
    return reduce(or_, masks, 0)


def _each_its_own(stops: Mapping[Edge, int]) -> bool:
    """Return whether no feature serves two tasks."""
    return bool(stops) and all(not mask & (mask - 1) for mask in stops.values())


def _check_reads(
    names: Sequence[str],
    losses: Sequence[torch.Tensor],
    leaves: Mapping[torch.Tensor, int],
    depending: int,
    shared: set[torch.Tensor],
    named: Named,
) -> None:
    """Check that a loss that reaches shared parameters depends on the features.

    Raises:
        ValueError: one does not; the task is named.
    """
    told = "its branch" if named.branches is not None else "features="
    for task, name in enumerate(names):
        if not losses[task].requires_grad or depending >> task & 1:
            continue
        if any(mask >> task & 1 and leaf in shared for leaf, mask in leaves.items()):
            raise ValueError(
                f"the loss of task {name!r} does not depend on {told}, but reaches shared parameters past it. Compute "
                "it from the tensor you pass (not from a recomputed copy), or leave the task out of this step."
            )
