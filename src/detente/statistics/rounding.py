"""Published numbers are rounded: the range of a metric, and of Δm, that their digits allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import product
from typing import Literal

from detente.metrics import delta_m, relative_changes

__all__ = ["Printed", "Range", "delta_m_range"]


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, both included.

    Attributes:
        low: smallest.
        high: largest.

    Example:
        >>> 5.46 in Range(5.0, 6.0), Range(5.0, 6.0).overlaps(Range(6.0, 7.0))
        (True, True)
    """

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return self.low <= value <= self.high

    def overlaps(self, other: Range) -> bool:
        """Whether some number lies in both."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Printed:
    """A number as a table prints it: rounded to so many decimals.

    Attributes:
        value: the printed number.
        decimals: digits after the point that were printed, zeros included; negative for numbers rounded to
            tens or hundreds.

    Example:
        >>> Printed.read("0.680")
        Printed(value=0.68, decimals=3)
        >>> Printed.read("0.680").range
        Range(low=0.6795, high=0.6805)
        >>> 0.6801 in Printed.read("0.680").range
        True
    """

    value: float
    decimals: int

    @classmethod
    def read(cls, text: str) -> Printed:
        """The number in a cell of a table, with its decimals counted.

        Raises:
            ValueError: the text is no finite number.
        """
        try:
            digits = Decimal(text.strip())
        except InvalidOperation as error:
            raise ValueError(f"{text!r} is no number") from error
        exponent = digits.as_tuple().exponent
        if not isinstance(exponent, int):
            raise ValueError(f"{text!r} is no finite number")
        return cls(float(digits), -exponent)

    @property
    def range(self) -> Range:
        """What may have been rounded to it: half a unit of the last digit to both sides, ends included.

        Holds whichever way halves are rounded, and not for numbers that were cut off.
        """
        # In decimal arithmetic: 0.54 is not 0.54 in binary, and the ends would move by a rounding error.
        half, value = Decimal(5).scaleb(-self.decimals - 1), Decimal(repr(float(self.value)))
        return Range(float(value - half), float(value + half))


def delta_m_range(
    results: Mapping[str, Mapping[str, Printed | float]],
    baselines: Mapping[str, Mapping[str, Printed | float]],
    higher_is_better: Mapping[str, bool] | Mapping[str, Mapping[str, bool]],
    per: Literal["task", "metric"] = "task",
) -> Range:
    """All values of Δm that the rounding of a published row and of its baselines allows.

    Δm is a mean of M / B - 1 with signs, monotone in every M and B by itself, so its extremes lie at ends of
    the cells' ranges. Two questions it answers: does a published Δm follow from the published cells
    (``delta_m_range(...).overlaps(Printed.read("5.46").range)``), and is a Δm of one's own what the table shows
    (``ours in delta_m_range(...)``).

    Args:
        results: task to metric to :class:`Printed`, or to a plain number, which is taken as exact.
        baselines: the same for the single-task networks.
        higher_is_better: as in :func:`detente.metrics.delta_m`.
        per: as in :func:`detente.metrics.delta_m`.

    Raises:
        ValueError: what :func:`detente.metrics.delta_m` refuses, or a baseline that may have been rounded from
            zero or less.

    Example:
        >>> results = {"depth": {"error": Printed.read("0.55")}}
        >>> found = delta_m_range(results, {"depth": {"error": Printed.read("0.68")}}, {"error": False})
        >>> round(found.low, 2), round(found.high, 2)
        (-20.44, -17.78)
    """
    for task, metrics in baselines.items():
        for metric, cell in metrics.items():
            if isinstance(cell, Printed) and cell.range.low <= 0:
                raise ValueError(
                    f"the baseline of task {task!r}, metric {metric!r}, printed as {cell.value} with {cell.decimals} "
                    "decimals, may be zero or less: its digits put no bound on Δm"
                )
    corners = [
        (_ends(results, result_end), _ends(baselines, baseline_end))
        for result_end, baseline_end in product(("low", "high"), repeat=2)
    ]
    changes = [relative_changes(*corner, higher_is_better) for corner in corners]
    ends = []
    for pick in (min, max):
        # The four corners are the same for every cell, but which of them is extreme differs.
        sides: list[dict[str, dict[str, float]]] = [{task: {} for task in results} for _ in range(2)]
        for task, metrics in results.items():
            for metric in metrics:
                extreme = pick(change[task][metric] for change in changes)
                corner = next(
                    c for c, change in zip(corners, changes, strict=True) if change[task][metric] == extreme
                )
                for side, values in zip(sides, corner, strict=True):
                    side[task][metric] = values[task][metric]
        ends.append(delta_m(sides[0], sides[1], higher_is_better, per=per))
    return Range(*ends)


def _ends(cells: Mapping[str, Mapping[str, Printed | float]], end: str) -> dict[str, dict[str, float]]:
    return {
        task: {
            metric: getattr(cell.range, end) if isinstance(cell, Printed) else cell
            for metric, cell in metrics.items()
        }
        for task, metrics in cells.items()
    }
