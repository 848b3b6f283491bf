"""From the gradients of each process's part of a batch to those of the whole batch.

A rank's losses are multiplied by its share of the examples before anything else, so that everything that follows is a
plain sum over the ranks: losses, task gradients, Gramians of the parts, gradients of own parameters.

- On the parameters (exact) the ranks' gradients are added row by row. Where weights are all a method gives, each rank
  keeps 1/R of every row (reduce-scatter) and the Gramians of the parts are added; a method that looks at the gradients
  themselves gets the whole rows.
- On the representation each rank holds the part of its own examples: the Gramians are added, and after one backward
  the encoder's gradients.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from detente.autograd.flat import Gradients, Layout, finite, probes
from detente.autograd.host import to_host
from detente.autograd.losses import Losses, check_gradients, named_losses, values_of
from detente.autograd.partition import Memory, Partition, check_reached, trainable, walk
from detente.autograd.ranks import ProcessGroup, Ranks, ranks_of
from detente.autograd.reduction import Reduction
from detente.autograd.representation import FeaturesPass, Roles
from detente.autograd.sharded import check_whole
from detente.autograd.where import Where

Samples = int | Mapping[str, int] | None
"""Examples behind this rank's losses: one number, or one for each task; None counts every rank once."""


@dataclass(frozen=True)
class Prepared:
    """A step before its first backward.

    Attributes:
        names: T tasks; on several ranks those that some rank has a loss for.
        losses: T scalars; on several ranks this rank's share of each, without a graph where it has none.
        parts: who owns what.
        reduction: None on a single process.
        shares: this rank's part of each task's examples, T numbers that add up to 1 over the ranks.
        totals: examples behind each loss, on all ranks together.
    """

    names: tuple[str, ...]
    losses: list[torch.Tensor]
    parts: Partition | Roles
    reduction: Reduction | None = None
    shares: tuple[float, ...] = ()
    totals: tuple[float, ...] = ()


def prepare(
    losses: Losses,
    where: Where,
    memory: Memory,
    ranks: Ranks | None,
    *,
    samples: Samples = None,
    known: Sequence[str] | None = None,
    check: Callable[[], None] = lambda: None,
    asked: Callable[[], Mapping[str, object]] = dict,
) -> Prepared:
    """Read the losses and find out who owns what; on several ranks, see that they agree.

    Args:
        losses: of this rank; a task may be absent here.
        where: what the caller named.
        memory: of the method.
        ranks: None on a single process.
        samples: examples behind the losses of this rank.
        known: all tasks, where the method knows them.
        check: what else must hold before the step.
        asked: called after it: what decides which messages follow, and must be the same on all ranks.

    Raises:
        ValueError: as :func:`~detente.autograd.losses.named_losses` and :meth:`~detente.autograd.where.Where.plan`, or
            ``samples`` fits the losses badly, a parameter is sharded, or the ranks disagree on parameters, tasks or
            what is asked.
        RankFailed: another rank raised one of these.
    """
    if ranks is None:
        check()
        names, scalars = named_losses(losses)
        examples = _counts(samples, names)
        here = [place for place, name in enumerate(names) if examples[name] > 0]
        if not here:
            raise ValueError("samples= is 0 for every task; leave such a batch out.")
        names, scalars = tuple(names[place] for place in here), [scalars[place] for place in here]
        totals = tuple(examples[name] for name in names)
        return Prepared(names, scalars, _planned(where, names, scalars, memory, part=False), totals=totals)

    if memory.ranks is not None and memory.ranks.handle is ranks.handle:
        ranks = memory.ranks  # its counts go on
    memory.ranks = ranks
    known_before, tasks = memory.tasks, memory.tasks
    if tasks is None:
        tasks = memory.tasks = tuple(known) if known is not None else _everyones_names(ranks, losses)
    error: Exception | None = None
    counts = [0.0] * len(tasks)
    mark, reaches = 0, False
    wanted: Mapping[str, object] = {}
    scalars = []
    reduction = Reduction(ranks, (), ())
    parts: Partition | Roles | None = None
    try:
        check()
        wanted = asked()
        scalars, counts = _aligned(losses, samples, tasks)
        parts = _planned(where, tasks, scalars, memory, part=True)
        reduction = Reduction(ranks, *_roles(where, parts, memory))
        mark, reaches = _fingerprint(reduction, where, wanted), parts.shared_reached
    except Exception as caught:
        error = caught
    device = scalars[0].device if scalars else torch.device("cpu")
    table = ranks.numbers([float(error is not None), float(mark), float(reaches), *counts], device)
    if table[:, 0].any():
        memory.tasks = known_before  # a rank that failed may have told fewer
        ranks.agree(error)
    if (table[:, 1] != table[0, 1]).any():
        raise ValueError(_disagreement(ranks, reduction, wanted))
    assert parts is not None
    reduction.anywhere = bool(table[:, 2].any())
    sums = table[:, 3:].sum(axis=0)
    present = [place for place, total in enumerate(sums) if total > 0]
    if not present:
        raise ValueError("losses is empty on every rank; give at least one loss.")
    if where.shared is not None and not reduction.anywhere:
        check_reached(reduction.shared)
    shares = table[ranks.rank, 3:] / np.where(sums > 0, sums, 1.0)
    with torch.enable_grad():  # a share of a loss keeps its graph, whatever surrounds the step
        parted = [s * float(shares[k]) if counts[k] else s for k, s in enumerate(scalars)]
    return Prepared(
        tuple(tasks[place] for place in present),
        [parted[place] for place in present],
        parts.of_tasks(present),
        reduction,
        tuple(float(shares[place]) for place in present),
        tuple(float(sums[place]) for place in present),
    )


def average_losses(
    losses: Losses, *, process_group: ProcessGroup = None, samples: Samples = None
) -> dict[str, torch.Tensor]:
    """The losses of the whole batch, from those of each process: what a method's ``after_step`` wants to be told.

    Args:
        losses: of this rank, with or without a graph; a task may be absent here.
        process_group, samples: as for :func:`detente.backward`.

    Returns:
        Task to loss, a float64 scalar on the host without a graph; the same on every rank. A task that has no
        examples anywhere is left out.

    Raises:
        ValueError: ``samples`` does not fit the losses.
        TypeError: a loss is neither a tensor nor a number.

    Example:
        >>> average_losses({"a": torch.tensor(2.0), "b": 3.0})
        {'a': tensor(2., dtype=torch.float64), 'b': tensor(3., dtype=torch.float64)}
    """
    names = [str(name) for name in (losses if isinstance(losses, Mapping) else range(len(losses)))]
    counts = _counts(samples, names)
    told = {name: (float(loss), counts[name]) for name, loss in zip(names, values_of(losses), strict=True)}
    ranks = ranks_of(process_group)
    everyones = [told] if ranks is None else ranks.objects(told)
    found = {}
    for name in dict.fromkeys(name for theirs in everyones for name in theirs):
        here = [theirs[name] for theirs in everyones if name in theirs and theirs[name][1] > 0]
        total = sum(count for _, count in here)
        if total:
            mean = sum(loss * (count / total) for loss, count in here)
            found[name] = torch.tensor(mean, dtype=torch.float64)
    return found


def reached_by(parts: Partition | Roles, losses: Sequence[torch.Tensor]) -> set[torch.Tensor]:
    """Parameters that this rank's losses reach."""
    if not any(loss.requires_grad for loss in losses):
        return set()
    partition = parts.partition() if isinstance(parts, Roles) else parts
    reached = {tensor for tensor, mask in zip(partition.shared, partition.reached, strict=True) if mask}
    return reached | {tensor for task in partition.own for tensor in task}


def gather_columns(found: FeaturesPass, reduction: Reduction) -> None:
    """Replace this rank's columns of the Jacobian by those of the whole batch, for every tensor in rank order."""
    assert found.jacobian is not None
    ranks, jacobian = reduction.ranks, found.jacobian
    widths = [Layout((feature,)).columns for feature in found.features]
    table = ranks.numbers([float(width) for width in widths], jacobian.device).astype(int)
    held = [jacobian] if found.activations is None else [jacobian, found.activations[None]]
    mine: list[torch.Tensor] = []
    wholes: list[list[torch.Tensor]] = [[] for _ in held]
    start = first = 0
    for place, width in enumerate(widths):
        longest = int(table[:, place].max())
        for kept, whole in zip(held, wholes, strict=True):
            sent = kept.new_zeros(len(kept), longest)
            sent[:, :width] = kept[:, start : start + width]
            received = ranks.gather(sent.reshape(-1)).view(ranks.size, len(kept), longest)
            whole += [part[:, : int(table[rank, place])] for rank, part in enumerate(received)]
        before = int(table[: ranks.rank, place].sum())
        mine.append(torch.arange(first + before, first + before + width, device=jacobian.device))
        start, first = start + width, first + int(table[:, place].sum())
    found.jacobian = torch.cat(wholes[0], dim=1)
    found.activations = None if found.activations is None else torch.cat(wholes[1], dim=1)[0]
    found.mine, found.partial = torch.cat(mine), False


def losses_of_all(
    losses: Sequence[torch.Tensor], reduction: Reduction | None, reached: set[torch.Tensor] | None = None
) -> np.ndarray:
    """[T] float64 on the host: the losses of the whole batch.

    Args:
        losses: T scalars; on several ranks this rank's share of each.
        reduction: None on a single process.
        reached: parameters with a gradient here; the reduction then knows those with one on some rank.
    """
    if reduction is None:
        return to_host([losses])[0]
    device = losses[0].device
    numbers = torch.stack([loss.detach().reshape(()).to(device, torch.float64) for loss in losses])
    if reached is not None:
        numbers = torch.cat([numbers, reduction.flags(reached).to(device)])
    (summed,) = to_host([reduction.ranks.sum(numbers)])
    if reached is not None:
        reduction.read_flags(summed[len(losses) :])
    return summed[: len(losses)]


def doubtful(own: Sequence[Gradients], device: torch.device) -> torch.Tensor:
    """[T] float64: for each task how many of its own parameters' gradients have a probe that is not finite."""
    counts = []
    for task in own:
        probed = [p.to(device) for p in probes(gradient for _, gradient in task)]
        counts.append(
            (~torch.stack(probed).isfinite()).sum(dtype=torch.float64)
            if probed
            else torch.zeros((), dtype=torch.float64, device=device)
        )
    return torch.stack(counts)


def check_own_of_all(
    reduction: Reduction, names: Sequence[str], own: Sequence[Gradients], counts: np.ndarray
) -> None:
    """See that own gradients are finite on every rank, by the sum [T] of :func:`doubtful` over the ranks.

    Raises:
        ValueError: one is not; the task is named on every rank.
    """
    if not counts.any():
        return
    # A probe may overflow where every entry is finite: all ranks look again, because all know of the doubt.
    here = [
        float(not finite([gradient for _, gradient in task], np.full(len(task), np.nan)).all())
        for task in own
    ]
    device = next((gradient.device for task in own for _, gradient in task), torch.device("cpu"))
    anywhere = np.asarray(reduction.ranks.numbers(here, device).any(axis=0))
    check_gradients(names, ~anywhere, what="the gradient of its own parameters")


def _planned(
    where: Where, names: Sequence[str], losses: Sequence[torch.Tensor], memory: Memory, *, part: bool
) -> Partition | Roles:
    """Who owns what, of parameters that are whole."""
    for given in (where.shared, where.task_specific, where.solve_on):
        check_whole(given or ())
    parts: Partition | Roles | None = None
    try:
        parts = where.plan(names, losses, memory, part=part)
    finally:
        if (
            parts is None or not parts.shared_reached
        ):  # shards may be why: what is named is then not in the graph
            check_whole(walk(losses, named=True).leaves)
    partition = parts.partition() if isinstance(parts, Roles) else parts
    check_whole([*partition.shared, *(tensor for task in partition.own for tensor in task)])
    return parts


def _everyones_names(ranks: Ranks, losses: Losses) -> tuple[str, ...]:
    """The tasks of all ranks, in the order of the first rank that has them."""
    count = len(losses) if isinstance(losses, (Mapping, Sequence)) else 0
    mine = [str(name) for name in (losses if isinstance(losses, Mapping) else range(count))]
    return tuple(dict.fromkeys(name for theirs in ranks.objects(mine) for name in theirs))


def _aligned(
    losses: Losses, samples: Samples, tasks: Sequence[str]
) -> tuple[list[torch.Tensor], list[float]]:
    """The losses in the order of all tasks, without a graph where one is absent, and the examples behind each."""
    names, scalars = named_losses(losses) if len(losses) else ((), [])
    strangers = [name for name in names if name not in tasks]
    if strangers:
        raise ValueError(
            f"task {strangers[0]!r} is new in this step, and on several processes all tasks must be known from the "
            f"first step on (they are {', '.join(tasks)}). Pass tasks= to detente.create()."
        )
    found = dict(zip(names, scalars, strict=True))
    counted = _counts(samples, names)
    for name in [name for name in names if counted[name] == 0]:
        del found[name]
    like = scalars[0] if scalars else torch.zeros(())
    absent = torch.zeros((), dtype=like.dtype, device=like.device)
    return [found.get(name, absent) for name in tasks], [counted.get(name, 0.0) for name in tasks]


def _counts(samples: Samples, names: Sequence[str]) -> dict[str, float]:
    if samples is None:
        return dict.fromkeys(names, 1.0)
    given: dict[str, Any] = (
        {str(name): count for name, count in samples.items()}
        if isinstance(samples, Mapping)
        else dict.fromkeys(names, samples)
    )
    for name in names:
        count = given.get(name)
        if isinstance(count, bool) or not isinstance(count, (int, float)) or not 0 <= count < float("inf"):
            raise ValueError(
                f"samples= has {count!r} for task {name!r}; give the number of examples behind its loss, >= 0."
            )
    return {name: float(given[name]) for name in names}


def _roles(
    where: Where, parts: Partition | Roles, memory: Memory
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Shared and own parameters in an order that does not depend on which tasks this rank has in this step."""
    partition = parts.partition() if isinstance(parts, Roles) else parts
    shared = partition.shared if where.shared is None else tuple(trainable(where.shared))
    known = set(shared)
    if where.task_specific is not None:
        own = trainable(where.task_specific)
    else:
        memory.remember_own(tensor for task in partition.own for tensor in task)
        own = memory.own()
    return shared, tuple(tensor for tensor in own if tensor not in known)


def _fingerprint(reduction: Reduction, where: Where, asked: Mapping[str, object]) -> int:
    """A number that differs, with near certainty, where two ranks hold different parameters or ask for other things."""
    spaces = (where.features is None, where.solve_on is None)
    told = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in (*reduction.shared, *reduction.own)]
    return zlib.crc32(repr((spaces, len(reduction.shared), told, dict(asked))).encode())


def _disagreement(ranks: Ranks, reduction: Reduction, asked: Mapping[str, object]) -> str:
    everyones = ranks.objects(dict(asked))
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
