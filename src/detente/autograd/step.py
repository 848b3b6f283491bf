"""A step before its first backward: the tasks, their losses, and who owns what; on several processes agreed upon."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from detente.autograd.feature_roles import roles_on_features
from detente.autograd.graph import Recomputation, walk
from detente.autograd.losses import Losses, check_scalar
from detente.autograd.ranks import ProcessGroup, Ranks, ranks_of
from detente.autograd.reduction import Reduction, Samples, count_samples
from detente.autograd.roles import Memory, Named, Roles, check_reached, find_roles, trainable
from detente.autograd.sharded import check_whole

Mode = Literal["fast", "batched", "low"]


@dataclass(frozen=True)
class Request:
    """Say what is asked of a step.

    Attributes:
        named: what the caller names: parameters by their role, and where the problem is solved.
        needs: what the method needs, see :class:`detente.MethodInfo`.
        mode: in the exact space: ``fast``, ``batched`` (one vectorised backward) or ``low`` (no Jacobian is kept).
        whole: on several processes, let every rank have all of the gradients, and not a part of each.
        drops: leave a task that reaches no shared parameter out of the shared problem.
        retain_graph: keep the graph for another backward.
        samples: examples behind the losses of this rank.
        scaler: of torch.amp.
        process_group: the processes among which the batch is split.
        agreed: tells from the request what must be the same on all ranks, by the name an error gives it.
        refused: an error of this rank that is to be raised on all, before anything else.
    """

    named: Named = field(default_factory=Named)
    needs: frozenset[str] = frozenset()
    mode: Mode = "fast"
    whole: bool = False
    drops: bool = True
    retain_graph: bool = False
    samples: Samples = None
    scaler: Any = None
    process_group: ProcessGroup = None
    agreed: Callable[[Request], Mapping[str, object]] | None = None
    refused: Exception | None = None


@dataclass(frozen=True)
class Step:
    """Hold a step before its first backward.

    Attributes:
        names: T tasks; on several ranks those that some rank has a loss for.
        losses: T scalars; on several ranks this rank's share of each, without a graph where it has none.
        scaled: the losses times the factor of a gradient scaler: what backwards start from.
        roles: who owns what, and where the problem is solved.
        memory: of the method.
        inside: positions of the tasks of the shared problem; the others reach no shared parameter.
        request: what was asked.
        factor: what a scaler multiplies losses by, so that half precision holds small gradients; None without one.
        reduction: None on a single process.
        shares: this rank's part of each task's examples, T numbers that add up to 1 over the ranks.
        totals: examples behind each loss, on all ranks together.
        recomputation: keeps buffers still from the second backward on.
    """

    names: tuple[str, ...]
    losses: list[torch.Tensor]
    scaled: list[torch.Tensor]
    roles: Roles
    memory: Memory
    inside: tuple[int, ...]
    request: Request
    factor: torch.Tensor | None = None
    reduction: Reduction | None = None
    shares: tuple[float, ...] = ()
    totals: tuple[float, ...] = ()
    recomputation: Recomputation = field(default_factory=Recomputation)

    @property
    def anything(self) -> bool:
        """Whether some loss, on some rank, reaches a shared parameter."""
        return bool(self.roles.tasks) if self.reduction is None else self.reduction.anywhere


def prepare(losses: Losses, request: Request, memory: Memory, known: Sequence[str] | None = None) -> Step:
    """Read the losses and find out who owns what; on several ranks, see that they agree.

    Args:
        losses: of this rank; a task may be absent here.
        request: what is asked.
        memory: of the method.
        known: all tasks, where the method knows them.

    Raises:
        TypeError: ``process_group`` is none.
        ValueError: as :func:`named_losses` and
            :func:`~detente.autograd.roles.find_roles`, or the samples fit the losses badly, a parameter is sharded, or
            the ranks disagree on parameters, tasks or what is asked.
        RankFailed: another rank raised one of these.
    """
    several = dist.is_available() and dist.is_initialized()
    if several or request.process_group not in (None, False):
        ranks = ranks_of(request.process_group)
        if ranks is not None:
            return _of_all(losses, request, memory, ranks, known)
    if request.refused is not None:
        raise request.refused
    names, scalars = named_losses(losses)
    totals: tuple[float, ...] = ()
    if request.samples is not None:
        examples = count_samples(request.samples, names)
        here = [place for place, name in enumerate(names) if examples[name] > 0]
        if not here:
            raise ValueError("samples= is 0 for every task; leave such a batch out.")
        names, scalars = tuple(names[place] for place in here), [scalars[place] for place in here]
        totals = tuple(examples[name] for name in names)
    if several:  # something may be sharded
        roles = _whole_roles(request, names, scalars, memory, part=False)
    elif request.named.features is not None:
        roles = roles_on_features(names, scalars, request.named, memory, part=False)
    else:
        roles = find_roles(names, scalars, request.named, memory, mode=request.mode)
    inside = tuple(range(len(names)))
    if request.drops and roles.tasks and roles.tasks != (1 << len(names)) - 1:
        inside = tuple(task for task in inside if roles.tasks >> task & 1)
    factor, scaled = None, scalars
    if request.scaler is not None and (factor := factor_of(request.scaler, scalars)) is not None:
        scaled = multiplied(scalars, factor)
    return Step(names, scalars, scaled, roles, memory, inside, request, factor, totals=totals)


def _of_all(
    losses: Losses, request: Request, memory: Memory, ranks: Ranks, known: Sequence[str] | None
) -> Step:
    """Prepare a step on several ranks; whatever fails on one is raised on all."""
    if memory.ranks is not None and memory.ranks.handle is ranks.handle:
        ranks = memory.ranks  # its counts go on
    memory.ranks = ranks
    named, known_before, tasks = request.named, memory.tasks, memory.tasks
    if tasks is None:
        tasks = memory.tasks = tuple(known) if known is not None else _everyones_names(ranks, losses)
    error: Exception | None = None
    counts, reaching = [0.0] * len(tasks), 0
    mark = 0
    scalars: list[torch.Tensor] = []
    reduction = Reduction(ranks, (), ())
    roles: Roles | None = None
    try:
        if request.refused is not None:
            raise request.refused
        scalars, counts = _aligned(losses, request.samples, tasks)
        roles = _whole_roles(request, tasks, scalars, memory, part=True)
        reduction = Reduction(ranks, *_in_common_order(named, roles, memory))
        mark, reaching = _fingerprint(reduction, request), roles.tasks
    except Exception as caught:
        error = caught
    device = scalars[0].device if scalars else torch.device("cpu")
    # The sign of a count tells whether the loss reaches a shared parameter here.
    told = [count if reaching >> task & 1 else -count for task, count in enumerate(counts)]
    table = ranks.numbers([float(error is not None), float(mark), float(reaching > 0), *told], device)
    if table[:, 0].any():
        memory.tasks = known_before  # a rank that failed may have told fewer
        ranks.agree(error)
    if (table[:, 1] != table[0, 1]).any():
        raise ValueError(_disagreement(ranks, reduction, request))
    assert roles is not None
    reached_anywhere = np.asarray((table[:, 3:] > 0).any(axis=0))
    everyones = np.abs(table[:, 3:])
    reduction = replace(reduction, anywhere=bool(table[:, 2].any()))
    sums = everyones.sum(axis=0)
    present = [place for place, total in enumerate(sums) if total > 0]
    if not present:
        raise ValueError("losses is empty on every rank; give at least one loss.")
    if named.shared is not None and not reduction.anywhere:
        check_reached(reduction.shared)
    shares = everyones[ranks.rank] / np.where(sums > 0, sums, 1.0)
    with torch.enable_grad():  # a share of a loss keeps its graph, whatever surrounds the step
        parted = [s * float(shares[k]) if counts[k] else s for k, s in enumerate(scalars)]
    parted = [parted[place] for place in present]
    inside = tuple(range(len(present)))
    if request.drops and reduction.anywhere:
        inside = tuple(task for task in inside if reached_anywhere[present[task]])
    factor = factor_of(request.scaler, parted)
    return Step(
        tuple(tasks[place] for place in present),
        parted,
        parted if factor is None else multiplied(parted, factor),
        roles.of_tasks(present),
        memory,
        inside,
        request,
        factor,
        reduction,
        tuple(float(shares[place]) for place in present),
        tuple(float(sums[place]) for place in present),
    )


def named_losses(losses: Losses) -> tuple[tuple[str, ...], list[torch.Tensor]]:
    """Return names and scalars of the tasks of a step; unnamed losses are called by their position.

    Raises:
        ValueError: no losses, one tensor instead of several, two tasks of one name, a loss that is not a scalar or has
            no graph.
        TypeError: a loss is not a tensor.

    Example:
        >>> named_losses([torch.ones(1, requires_grad=True).sum()])[0]
        ('0',)
    """
    if isinstance(losses, torch.Tensor):
        raise ValueError(
            "losses is one tensor; give the separate scalars, as a mapping from task name to loss or a list. "
            "(A backward through a stacked tensor walks the heads of all tasks.)"
        )
    mapped = isinstance(losses, Mapping)
    values = list(losses.values()) if isinstance(losses, Mapping) else list(losses)
    if not values:
        raise ValueError("losses is empty; give at least one loss.")
    names = tuple(map(str, losses if mapped else range(len(values))))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"task {twice!r} occurs twice; task names must differ.")
    for name, loss in zip(names, values, strict=True):
        if not isinstance(loss, torch.Tensor):
            raise TypeError(f"the loss of task {name!r} is a {type(loss).__name__}, not a tensor.")
        if loss.numel() != 1 or loss.is_complex():
            check_scalar(name, loss)
        if not loss.requires_grad:
            raise ValueError(
                f"the loss of task {name!r} has no graph; it was detached, computed under torch.no_grad(), or "
                "depends on no parameter that requires a gradient. Leave the task out of this step, or multiply "
                "its prediction by zero to keep the connection."
            )
    return names, values


def factor_of(scaler: Any, losses: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return what a scaler multiplies losses by, a scalar on their device; None without one, or where it is disabled.

    Raises:
        TypeError: it is no gradient scaler.
    """
    if scaler is None:
        return None
    if not (hasattr(scaler, "scale") and hasattr(scaler, "is_enabled")):
        raise TypeError(f"scaler is a {type(scaler).__name__}; give a torch.amp.GradScaler, or leave it out.")
    if not scaler.is_enabled():
        return None
    one = torch.ones((), dtype=torch.float32, device=losses[0].device)
    scaled: torch.Tensor = scaler.scale(one)  # on the device: the factor is never waited for
    return scaled


def multiplied(losses: Sequence[torch.Tensor], factor: torch.Tensor) -> list[torch.Tensor]:
    """Return losses times a scaler's factor; one that is absent stays so."""
    with torch.enable_grad():
        return [loss * factor.to(loss.device) if loss.requires_grad else loss for loss in losses]


def _whole_roles(
    request: Request,
    names: Sequence[str],
    losses: Sequence[torch.Tensor],
    memory: Memory,
    *,
    part: bool,
) -> Roles:
    """Find out who owns what, of parameters that are whole."""
    named = request.named
    for given in (named.shared, named.task_specific, named.solve_on):
        check_whole(given or ())
    roles: Roles | None = None
    try:
        if named.features is not None:
            roles = roles_on_features(names, losses, named, memory, part=part)
        else:
            roles = find_roles(names, losses, named, memory, mode=request.mode, part=part)
    finally:
        if roles is None or not roles.tasks:  # shards may be why: what is named is then not in the graph
            check_whole(walk(losses).leaves)
    check_whole([*roles.shared, *(tensor for task in roles.own for tensor in task)])
    return roles


def _everyones_names(ranks: Ranks, losses: Losses) -> tuple[str, ...]:
    """Return the tasks of all ranks, in the order of the first rank that has them."""
    count = len(losses) if isinstance(losses, (Mapping, Sequence)) else 0
    mine = [str(name) for name in (losses if isinstance(losses, Mapping) else range(count))]
    return tuple(dict.fromkeys(name for theirs in ranks.objects(mine) for name in theirs))


def _aligned(
    losses: Losses, samples: Samples, tasks: Sequence[str]
) -> tuple[list[torch.Tensor], list[float]]:
    """Return the losses in the order of all tasks, without a graph where one is absent, and the examples of each."""
    names, scalars = named_losses(losses) if len(losses) else ((), [])
    strangers = [name for name in names if name not in tasks]
    if strangers:
        raise ValueError(
            f"task {strangers[0]!r} is new in this step, and on several processes all tasks must be known from the "
            f"first step on (they are {', '.join(tasks)}). Pass tasks= to detente.create()."
        )
    found = dict(zip(names, scalars, strict=True))
    counted = count_samples(samples, names)
    for name in [name for name in names if counted[name] == 0]:
        del found[name]
    like = scalars[0] if scalars else torch.zeros(())
    absent = torch.zeros((), dtype=like.dtype, device=like.device)
    return [found.get(name, absent) for name in tasks], [counted.get(name, 0.0) for name in tasks]


def _in_common_order(
    named: Named, roles: Roles, memory: Memory
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return shared and own parameters in an order that does not depend on which tasks this rank has in this step."""
    shared = roles.shared if named.shared is None else tuple(trainable(named.shared))
    known = {*shared, *roles.left_out}  # inputs that require a gradient are every rank's own
    if named.task_specific is not None:
        own = trainable(named.task_specific)
    else:
        memory.remember_own(tensor for task in roles.own for tensor in task if tensor not in known)
        own = memory.own()
    return shared, tuple(tensor for tensor in own if tensor not in known)


def _fingerprint(reduction: Reduction, request: Request) -> int:
    """Return a number that differs, almost surely, where two ranks hold other parameters or ask for other things."""
    spaces = (request.named.features is None, request.named.solve_on is None)
    told = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in (*reduction.shared, *reduction.own)]
    return zlib.crc32(repr((spaces, len(reduction.shared), told, _agreed(request))).encode())


def _agreed(request: Request) -> dict[str, object]:
    return {} if request.agreed is None else dict(request.agreed(request))


def _disagreement(ranks: Ranks, reduction: Reduction, request: Request) -> str:
    asked = _agreed(request)
    everyones = ranks.objects(asked)
    for name in asked:
        found = [theirs.get(name) for theirs in everyones]
        if any(one != found[0] for one in found):
            listed = "; ".join(f"rank {rank}: {one}" for rank, one in enumerate(found))
            return (
                f"the ranks are not at the same step, or ask for different ones: they differ in {name} ({listed}). "
                "Call detente.backward equally often on every rank, with the same options; where a batch fails on one "
                "rank, let all of them leave the step."
            )
    told = ranks.objects(f"{len(reduction.shared)} shared and {len(reduction.own)} own parameters")
    counts = "; ".join(f"rank {rank}: {count}" for rank, count in enumerate(told))
    return (
        f"the ranks disagree on which parameters are shared, or on their shapes ({counts}). All ranks need the same "
        "model. Where a task is absent from some rank's first step, name shared= and task_specific=."
    )
