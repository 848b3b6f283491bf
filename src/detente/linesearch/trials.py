"""Choose the lengths that a search tries, and the first length of the next one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from detente.linesearch.options import SearchOptions
from detente.linesearch.record import SearchStatus


@dataclass(frozen=True)
class Trials:
    """List the lengths of one search: lr_ub / γᵏ, the first lowered as earlier searches demanded.

    Attributes:
        lr_ub: the first length as the caller or a schedule sets it, > 0.
        gamma: divisor of the length after a rejection, > 1.
        cap: trials of one search, >= 1.
        lowered: how often the first length was divided by γ.
        in_a_row: searches in a row, until now, that demanded a lower first length.

    Example:
        >>> Trials(lr_ub=8.0, gamma=2.0, cap=3, lowered=1, in_a_row=0).lengths()
        [4.0, 2.0, 1.0]
    """

    lr_ub: float
    gamma: float
    cap: int
    lowered: int
    in_a_row: int

    @property
    def first(self) -> float:
        """The first length.

        Raises:
            ValueError: it is too small for a number.
        """
        length = self._divided()
        if not length > 0:
            raise ValueError(
                f"lr_ub is {self.lr_ub:g} and was divided by gamma {self.lowered} times, which leaves nothing: set "
                "search.lowered = 0 to start again from lr_ub, or lr_ub higher."
            )
        return length

    def lengths(self) -> list[float]:
        """List them; where they become too small for a number there are fewer than the cap."""
        lengths = [self.first]
        while len(lengths) < self.cap and lengths[-1] / self.gamma > 0:
            lengths.append(lengths[-1] / self.gamma)
        return lengths

    def after(
        self, status: SearchStatus, trials: int, options: SearchOptions
    ) -> tuple[Trials, tuple[str, ...]]:
        """Lower the first length where enough searches in a row demanded it; say so in a note.

        Args:
            status, trials: of the search that ended.
            options: ``lower_ub`` and ``patience``.
        """
        if options.lower_ub is None or status not in ("accepted", "capped"):
            return self, ()
        demanded = status == "capped" or (options.lower_ub == "divided" and trials > 1)
        in_a_row = self.in_a_row + 1 if demanded else 0
        if in_a_row < options.patience:
            return replace(self, in_a_row=in_a_row), ()
        lower = replace(self, lowered=self.lowered + 1, in_a_row=0)
        if not lower._divided() > 0:
            return replace(self, in_a_row=0), (
                f"the first length, {self.first:.6g}, cannot be lowered any further",
            )
        return lower, (
            f"first length lowered to {lower.first:.6g} after {options.patience} searches in a row",
        )

    def _divided(self) -> float:
        try:
            return self.lr_ub / self.gamma**self.lowered
        except OverflowError:
            return 0.0
