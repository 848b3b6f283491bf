"""The losses of the whole batch after every forward pass of a search; each process may hold a part of it.

On several processes every pass ends with one small message: each rank tells its share of the losses, all ranks add the
same numbers in the same order and so decide alike, and what fails on one rank is raised on all.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from detente.autograd.host import to_host
from detente.autograd.reduce import Prepared
from detente.linesearch.armijo import Array
from detente.linesearch.closure import Losses, in_order
from detente.linesearch.plan import Plan, epsilons


class Batch:
    """The tasks of one step, and this process's share in their losses.

    Args:
        step: the tasks, from the first pass.
        losses: what the closure gave in the first pass; every later one must give the same tasks.

    Attributes:
        ranks: None on a single process.
        epsilon: [T] machine epsilons of the losses' dtypes, 0 where this rank has no loss.
    """

    def __init__(self, step: Prepared, losses: Losses) -> None:
        self._names = step.names
        self._given = tuple(map(str, losses if isinstance(losses, Mapping) else range(len(losses))))
        self._first = step.losses
        self.ranks = None if step.reduction is None else step.reduction.ranks
        self._shares = dict(zip(step.names, step.shares, strict=True)) if self.ranks else {}
        self.epsilon = epsilons(step.losses)
        if self.ranks is not None:
            self.epsilon = self.epsilon * (np.array(step.shares) > 0)

    def losses(self, run: Callable[[], Losses], unread: Sequence[torch.Tensor] = ()) -> tuple[Array, Array]:
        """[T] the losses of the whole batch where ``run`` gives this rank's.

        With them, on a single process, numbers that are still on a device; on several, these were read before.
        """
        if self.ranks is None:
            values, numbers = to_host([self._parts(run()), unread])
            return values, numbers
        told = self._told(lambda: to_host([self._parts(run())])[0], len(self._names))
        return told.sum(axis=0), np.zeros(0)

    def settle(self, plan: Plan, check: Callable[[], None], settings: Mapping[str, object]) -> None:
        """Before the first trial, on several processes: see that all ranks can go on, and alike.

        The plan's slopes, its losses and epsilons become those of the whole batch.

        Args:
            plan: this rank's.
            check: what else must hold here.
            settings: what must be the same on all ranks.

        Raises:
            ValueError: a setting differs; it is named.
            RankFailed: another rank's check failed.
        """
        if self.ranks is None:
            check()
            return
        mark = zlib.crc32(repr(settings).encode())
        tasks, along, own = len(self._names), plan.along_shared.unread, plan.own_slopes

        def mine() -> Array:
            check()
            losses, slopes = to_host([self._first, [*along, *own]])
            if self.ranks is not None and self.ranks.rank and not plan.in_parts:
                slopes[: len(along)] = 0.0  # complete on every rank: those of the first
            return np.concatenate([[mark], self.epsilon, losses, slopes])

        table = self._told(mine, 1 + 2 * tasks + len(along) + len(own))
        if (table[:, 0] != mark).any():
            raise ValueError(self._disagreement(settings))
        plan.epsilon = table[:, 1 : 1 + tasks].max(axis=0)
        plan.before = table[:, 1 + tasks : 1 + 2 * tasks].sum(axis=0)
        plan.read(table[:, 1 + 2 * tasks :].sum(axis=0))

    def _parts(self, losses: Losses) -> list[torch.Tensor]:
        """This rank's share of the loss of every task."""
        found = dict(zip(self._given, in_order(losses, self._given), strict=True))
        if self.ranks is None:
            return [found[name] for name in self._names]
        return [
            found[name] * share if (share := self._shares[name]) else first.detach()
            for name, first in zip(self._names, self._first, strict=True)
        ]

    def _told(self, what: Callable[[], Array], count: int) -> Array:
        """[R, count] what every rank has to say; an error of one is raised on all."""
        assert self.ranks is not None
        error: Exception | None = None
        numbers = np.zeros(count)
        try:
            numbers = what()
        except Exception as caught:
            error = caught
        table = self.ranks.numbers([float(error is not None), *numbers.tolist()], self._first[0].device)
        if table[:, 0].any():
            self.ranks.agree(error)
        return np.asarray(table[:, 1:])

    def _disagreement(self, settings: Mapping[str, object]) -> str:
        assert self.ranks is not None
        everyones = self.ranks.objects(dict(settings))
        name = next(
            name for name in settings if any(theirs[name] != everyones[0][name] for theirs in everyones)
        )
        told = "; ".join(f"rank {rank}: {theirs[name]!r}" for rank, theirs in enumerate(everyones))
        return (
            f"the searches of the ranks differ in {name} ({told}), so that their steps would. Set it alike on all "
            "ranks, schedules and loaded states included. Nothing was changed."
        )
