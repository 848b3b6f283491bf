"""Read the losses of the whole batch after every forward pass of a search; each process may hold a part of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from detente.linesearch.armijo import Array
from detente.linesearch.closure import in_order
from detente.linesearch.engine import Losses, Ranks, Solved, to_host


@dataclass(frozen=True)
class BatchLosses:
    """Read the losses of the whole batch after a forward pass; each process may hold a part of it.

    On several processes every pass ends with one small message: each rank sends its share of the losses, all ranks add
    the same numbers in the same order and so decide alike, and what fails on one rank is raised on all.

    Attributes:
        names: the T tasks.
        given: those of this rank, in the order in which the closure gives their losses.
        first: T losses of the first pass, this rank's shares of them.
        before: [T] losses where the step began, until :meth:`agree` those of this rank.
        epsilon: [T] machine epsilons of the losses' dtypes; until :meth:`agree` 0 where this rank lacks the loss.
        shares: T numbers, this rank's part of each task's examples; of no meaning on a single process.
        ranks: None on a single process.
    """

    names: tuple[str, ...]
    given: tuple[str, ...]
    first: Sequence[torch.Tensor]
    before: Array
    epsilon: Array
    shares: Sequence[float]
    ranks: Ranks | None

    @classmethod
    def of(cls, solved: Solved) -> BatchLosses:
        """Take the tasks from the first pass; every later one must give the same."""
        given, step = solved.given, solved.step
        tasks = tuple(map(str, given if isinstance(given, Mapping) else range(len(given))))
        epsilon = np.array([torch.finfo(loss.dtype).eps for loss in step.losses])
        if solved.ranks is not None:
            epsilon = epsilon * (np.array(step.shares) > 0)
        return cls(step.names, tasks, step.losses, solved.taken.losses, epsilon, step.shares, solved.ranks)

    def read(self, run: Callable[[], Losses], unread: Sequence[torch.Tensor] = ()) -> tuple[Array, Array]:
        """Bring the losses [T] of the whole batch to the host, where ``run`` gives this rank's.

        With them, in the same copy, numbers that are still on a device; on several processes there are none.

        Raises:
            ClosureChanged: the losses are of other tasks.
            RankFailed: another rank's pass failed.
        """
        if self.ranks is None:
            values, numbers = to_host([self._parts(run()), unread])
            return values, numbers
        table = self._gathered(lambda: to_host([self._parts(run())])[0], len(self.names))
        return table.sum(axis=0), np.zeros(0)

    def agree(
        self,
        check: Callable[[], None],
        unread: Sequence[torch.Tensor],
        once: int,
        settings: Mapping[str, object],
    ) -> tuple[BatchLosses, Array | None]:
        """Make sure, before the first trial, that all ranks can go on, and alike.

        Returns:
            The same with ``before`` and ``epsilon`` of the whole batch, and so the numbers that were unread; None for
            them on a single process, where they stay unread.

        Args:
            check: what else must hold here.
            unread: this rank's numbers that are still on a device.
            once: how many of them, from the first, every rank has alike.
            settings: what must be the same on all ranks.

        Raises:
            ValueError: a setting differs; it is named.
            RankFailed: another rank's check failed.
        """
        if self.ranks is None:
            check()
            return self, None
        mark, tasks, later = zlib.crc32(repr(settings).encode()), len(self.names), self.ranks.rank > 0

        def mine() -> Array:
            check()
            losses, numbers = to_host([self.first, unread])
            if later:
                numbers[:once] = 0.0
            return np.concatenate([[mark], self.epsilon, losses, numbers])

        table = self._gathered(mine, 1 + 2 * tasks + len(unread))
        if (table[:, 0] != mark).any():
            raise ValueError(self._disagreement(settings))
        _, epsilon, losses, numbers = np.split(table, [1, 1 + tasks, 1 + 2 * tasks], axis=1)
        whole = replace(self, before=losses.sum(axis=0), epsilon=epsilon.max(axis=0))
        return whole, numbers.sum(axis=0)

    def _parts(self, losses: Losses) -> list[torch.Tensor]:
        """This rank's share of the loss of every task."""
        losses_here = dict(zip(self.given, in_order(losses, self.given), strict=True))
        if self.ranks is None:
            return [losses_here[name] for name in self.names]
        return [
            losses_here[name] * share if share else first.detach()
            for name, share, first in zip(self.names, self.shares, self.first, strict=True)
        ]

    def _gathered(self, numbers: Callable[[], Array], count: int) -> Array:
        """[R, count] the numbers of every rank; an error of one is raised on all."""
        assert self.ranks is not None
        error: Exception | None = None
        mine = np.zeros(count)
        try:
            mine = numbers()
        except Exception as caught:
            error = caught
        table = self.ranks.numbers([float(error is not None), *mine.tolist()], self.first[0].device)
        if table[:, 0].any():
            self.ranks.agree(error)
        return np.asarray(table[:, 1:])

    def _disagreement(self, settings: Mapping[str, object]) -> str:
        assert self.ranks is not None
        everyones = self.ranks.objects(dict(settings))
        name = next(
            name for name in settings if any(theirs[name] != everyones[0][name] for theirs in everyones)
        )
        listed = "; ".join(f"rank {rank}: {theirs[name]!r}" for rank, theirs in enumerate(everyones))
        return (
            f"the searches of the ranks differ in {name} ({listed}), so that their steps would. Set it alike on all "
            "ranks, schedules and loaded states included. Nothing was changed."
        )
