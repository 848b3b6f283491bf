"""Statistics over runs: spreads, paired tests, intervals, ranks, hypervolume, rounding. Numbers in, numbers out.

:func:`compare` makes of all runs of a sweep what its tables show; the others are its parts.
"""

from detente.statistics.bootstrap import Interval, bootstrap_difference, bootstrap_mean
from detente.statistics.comparison import Against, Compared, Comparison, Score, Verdict, compare
from detente.statistics.hypervolume import Hypervolume, hypervolume, non_dominated
from detente.statistics.ranks import mean_ranks
from detente.statistics.rounding import Printed, Range, delta_m_range
from detente.statistics.summary import Spread, delta_m_spread, spread
from detente.statistics.tests import (
    BestAgainstEach,
    PairedTest,
    best_against_each,
    holm,
    paired_t_test,
    stars,
)

__all__ = [
    "Spread",
    "spread",
    "delta_m_spread",
    "PairedTest",
    "paired_t_test",
    "stars",
    "BestAgainstEach",
    "best_against_each",
    "holm",
    "Interval",
    "bootstrap_mean",
    "bootstrap_difference",
    "mean_ranks",
    "Printed",
    "Range",
    "delta_m_range",
    "Hypervolume",
    "hypervolume",
    "non_dominated",
    "Against",
    "Compared",
    "Comparison",
    "Score",
    "Verdict",
    "compare",
]
