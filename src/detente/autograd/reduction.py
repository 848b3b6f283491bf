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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from detente.autograd.entries import sum_of
from detente.autograd.layout import Gradients, Layout, finite, probes
from detente.autograd.losses import Losses, values_of
from detente.autograd.numbers import check_gradients, to_host
from detente.autograd.ranks import ProcessGroup, Ranks, ranks_of

Samples = int | Mapping[str, int] | None
"""Examples behind this rank's losses: one number, or one for each task; None counts every rank once."""


@dataclass(frozen=True)
class Reduction:
    """Hold what turns this rank's part of one step into the whole.

    Attributes:
        ranks: the processes.
        shared, own: parameters by their role, in the same order on every rank.
        anywhere: whether some loss on some rank reaches a shared parameter.
    """

    ranks: Ranks
    shared: tuple[torch.Tensor, ...]
    own: tuple[torch.Tensor, ...]
    anywhere: bool = False

    def flags(self, reached: frozenset[torch.Tensor] | set[torch.Tensor]) -> torch.Tensor:
        """Return [shared + own] float64 on the host: which parameters are reached here."""
        return torch.tensor([float(t in reached) for t in (*self.shared, *self.own)], dtype=torch.float64)

    def read_flags(self, summed: np.ndarray) -> frozenset[torch.Tensor]:
        """Return the parameters that are reached on some rank, from the sum of :meth:`flags`."""
        everything = (*self.shared, *self.own)
        return frozenset(tensor for tensor, count in zip(everything, summed, strict=True) if count > 0)

    def gradients(
        self, tensors: Sequence[torch.Tensor], found: Gradients, touched: frozenset[torch.Tensor]
    ) -> Gradients:
        """Return gradients of ``tensors`` added over the ranks; those nothing reaches anywhere are left out."""
        wanted = tuple(tensor for tensor in tensors if tensor in touched)
        if not wanted:
            return []
        by_tensor: dict[torch.Tensor, torch.Tensor] = {}
        for tensor, gradient in found:
            by_tensor[tensor] = sum_of(by_tensor[tensor], gradient) if tensor in by_tensor else gradient
        layout = Layout(wanted)
        like = layout.like
        flat = torch.empty(layout.columns, dtype=like.dtype, device=like.device)
        layout.write(flat, [by_tensor.get(tensor) for tensor in wanted])
        self.ranks.sum(flat)
        return list(zip(wanted, layout.split(flat), strict=True))


def count_samples(samples: Samples, names: Sequence[str]) -> dict[str, float]:
    """Return the examples behind each task's loss.

    Raises:
        ValueError: a task has none told, or a number that is none.
    """
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


def average_losses(
    losses: Losses, *, process_group: ProcessGroup = None, samples: Samples = None
) -> dict[str, torch.Tensor]:
    """Average losses over the whole batch, from those of each process: for a method's ``after_step``.

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
    counts = count_samples(samples, names)
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


def losses_of_all(losses: Sequence[torch.Tensor], reduction: Reduction | None) -> np.ndarray:
    """Return [T] float64 on the host: the losses of the whole batch, from this rank's share of each."""
    if reduction is None:
        return to_host([losses])[0]
    numbers = torch.stack([loss.detach().reshape(()).to(losses[0].device, torch.float64) for loss in losses])
    return to_host([reduction.ranks.sum(numbers)])[0]


def losses_and_reached(
    losses: Sequence[torch.Tensor],
    reduction: Reduction,
    reached: frozenset[torch.Tensor] | set[torch.Tensor],
) -> tuple[np.ndarray, frozenset[torch.Tensor]]:
    """Return the losses [T] of the whole batch, and the parameters that some rank has a gradient for.

    Args:
        losses: this rank's share of each of T losses.
        reduction: the processes.
        reached: parameters with a gradient here.
    """
    device = losses[0].device
    numbers = torch.stack([loss.detach().reshape(()).to(device, torch.float64) for loss in losses])
    numbers = torch.cat([numbers, reduction.flags(reached).to(device)])
    (summed,) = to_host([reduction.ranks.sum(numbers)])
    return summed[: len(losses)], reduction.read_flags(summed[len(losses) :])


def doubtful(own: Sequence[Gradients], device: torch.device) -> torch.Tensor:
    """Return [T] float64: for each task how many of its own parameters' gradients have a probe that is not finite."""
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
    """Check that own gradients are finite on every rank, by the sum [T] of :func:`doubtful` over the ranks.

    Raises:
        GradientNotFinite: one is not; the task is named on every rank.
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
