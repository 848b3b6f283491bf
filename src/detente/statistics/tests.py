"""Paired t-tests over seeds, the papers' stars, and Holm's correction for several tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from detente.statistics.checking import ROUNDING, check_finite, is_finite
from detente.statistics.summary import spread

__all__ = ["BestAgainstEach", "PairedTest", "best_against_each", "holm", "paired_t_test", "stars"]


@dataclass(frozen=True)
class PairedTest:
    """What a paired t-test says, or why there is none.

    Attributes:
        difference: mean over the pairs of first minus second; None without a pair.
        deviation: sample standard deviation of the differences; None with fewer than two pairs.
        pairs: the number of seeds that both sides have.
        statistic: Student's t with ``pairs - 1`` degrees of freedom; None where the differences do not vary.
        p_value: two-sided; None with fewer than two pairs.
        seeds: the seeds that were paired, sorted.
        unpaired: seeds that only one side has, sorted; they were left out.
        note: empty for an ordinary test, otherwise what is special about this one.

    Example:
        >>> test = paired_t_test({0: 3.0, 1: 5.0, 2: 7.5}, {0: 2.0, 1: 3.0, 2: 4.5})
        >>> test.difference, test.pairs, round(test.p_value, 4)
        (2.0, 3, 0.0742)
        >>> [round(end, 3) for end in test.interval(alpha=0.05)]
        [-0.484, 4.484]
    """

    difference: float | None
    deviation: float | None
    pairs: int
    statistic: float | None
    p_value: float | None
    seeds: tuple[int, ...]
    unpaired: tuple[int, ...]
    note: str = ""

    def interval(self, alpha: float = 0.05) -> tuple[float, float] | None:
        """Student's interval of the mean difference at level 1 - alpha; None where there is no t.

        It excludes zero exactly when the p value is below alpha, also for two or three pairs, where a
        bootstrap interval is too narrow.
        """
        from scipy.special import stdtrit

        if self.statistic is None or self.difference is None or self.deviation is None:
            return None
        reach = float(stdtrit(self.pairs - 1, 1 - alpha / 2)) * self.deviation / math.sqrt(self.pairs)
        return self.difference - reach, self.difference + reach


def paired_t_test(
    first: Mapping[int, float], second: Mapping[int, float], *, noise: float | None = None
) -> PairedTest:
    """Two-sided paired t-test of two methods over the seeds that both have.

    A t-test presupposes differences that vary. Where they do not (up to ``noise``), this is what is reported:

    * all differences zero: p = 1;
    * all differences equal and not zero: t would be infinite and p zero, which two runs of a metric that is
      counted in steps produce easily by chance. Instead, p is that of the exact sign-flip test, 2^(1 - n):
      the probability that n symmetric differences all have one sign. Where a seed changes nothing at all,
      more seeds are no evidence either.

    Args:
        first: seed to value.
        second: seed to value.
        noise: what counts as rounding of a difference; by default 16 float64 epsilons times the largest
            absolute value.

    Returns:
        The test; with fewer than two common seeds it has no p value and says so in ``note``.

    Raises:
        ValueError: a value is not finite.

    Example:
        >>> paired_t_test({0: 1.0, 1: 2.0}, {1: 2.5, 2: 3.0}).note
        'seeds in common: 1; a paired test needs at least 2'
        >>> paired_t_test({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}).p_value
        0.5
    """
    check_finite(first, "the first side")
    check_finite(second, "the second side")
    seeds = tuple(sorted(first.keys() & second.keys()))
    unpaired = tuple(sorted(first.keys() ^ second.keys()))
    differences = [float(first[seed]) - float(second[seed]) for seed in seeds]
    found = spread(differences)
    if found is None or found.deviation is None:
        note = f"seeds in common: {len(seeds)}; a paired test needs at least 2"
        mean = found.mean if found else None
        return PairedTest(mean, None, len(seeds), None, None, seeds, unpaired, note)
    if noise is None:
        noise = ROUNDING * max(abs(side[seed]) for side in (first, second) for seed in seeds)
    p_value, statistic = 1.0, None
    if max(map(abs, differences)) <= noise:
        note = "both sides are the same on every seed; p is set to 1"
    elif max(differences) - min(differences) <= noise:
        p_value = 2.0 ** (1 - len(seeds))
        note = "the difference is the same on every seed; p is that of the sign-flip test"
    else:
        from scipy.special import stdtr

        statistic = found.mean / (found.deviation / math.sqrt(len(seeds)))
        p_value, note = 2 * float(stdtr(len(seeds) - 1, -abs(statistic))), ""
    return PairedTest(found.mean, found.deviation, len(seeds), statistic, p_value, seeds, unpaired, note)


def stars(p_value: float | None) -> str:
    """The papers' mark of a p value: ``**`` below 0.01, ``*`` below 0.05, nothing otherwise or without one.

    Example:
        >>> [stars(p) for p in (0.009, 0.01, 0.049, 0.05, None)]
        ['**', '*', '*', '', '']
    """
    if p_value is None:
        return ""
    _check_p(p_value, "p_value")
    return "**" if p_value < 0.01 else "*" if p_value < 0.05 else ""


@dataclass(frozen=True)
class BestAgainstEach:
    """The best method of one column of a table, tested against each of the others.

    Attributes:
        best: the method with the best mean.
        tests: every other method to the test of best minus other, in the order given.
        p_value: the largest of the p values; None if there is no other method or a test has no p value.
        stars: what the table puts beside the best mean.

    Example:
        >>> values = {"a": {0: 1.0, 1: 2.1, 2: 2.9}, "b": {0: 2.0, 1: 3.0, 2: 4.0}}
        >>> best_against_each(values, higher_is_better=True).best
        'b'
    """

    best: str
    tests: Mapping[str, PairedTest]
    p_value: float | None
    stars: str


def best_against_each(
    values: Mapping[str, Mapping[int, float]], *, higher_is_better: bool, noise: float | None = None
) -> BestAgainstEach:
    """Paired t-tests of the best method against each other method, with the papers' stars.

    The best is the one with the best mean over its own seeds, of equals the first by name; a method with a
    single seed is chosen only if no method has two. Stars stand beside the best alone and follow the
    **largest** p value (Hervella et al. 2024, tables 2 to 5): they claim a difference from every other
    method. There are none where a test could not be made, or where the seeds in common speak against the
    best. The p values are not corrected, and the best was picked on the same numbers, so they flatter it.

    Args:
        values: method to seed to value.
        higher_is_better: direction of the metric.
        noise: as in :func:`paired_t_test`.

    Raises:
        ValueError: no methods, a method without seeds, or a value that is not finite, by name.

    Example:
        >>> values = {
        ...     "equal": {0: 25.2, 1: 25.4, 2: 25.3},
        ...     "mao": {0: 25.9, 1: 26.0, 2: 25.9},
        ...     "dwa": {0: 25.2, 1: 25.3, 2: 24.8},
        ... }
        >>> found = best_against_each(values, higher_is_better=True)
        >>> found.best, found.stars, {name: round(test.p_value, 3) for name, test in found.tests.items()}
        ('mao', '*', {'equal': 0.003, 'dwa': 0.025})
    """
    if not values:
        raise ValueError("best_against_each needs at least one method")
    means: dict[str, float] = {}
    for name, by_seed in values.items():
        check_finite(by_seed, f"method {name!r}")
        if not by_seed:
            raise ValueError(f"method {name!r} has no seeds")
        means[name] = math.fsum(map(float, by_seed.values())) / len(by_seed)
    sign = -1.0 if higher_is_better else 1.0
    candidates = [name for name in values if len(values[name]) > 1] or list(values)
    best = min(candidates, key=lambda name: (sign * means[name], name))
    tests = {
        name: paired_t_test(values[best], by_seed, noise=noise)
        for name, by_seed in values.items()
        if name != best
    }
    found = [test.p_value for test in tests.values() if test.p_value is not None]
    largest = max(found) if found and len(found) == len(tests) else None
    ahead = all(sign * (test.difference or 0.0) < 0 for test in tests.values())
    return BestAgainstEach(best, tests, largest, stars(largest) if ahead else "")


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P values adjusted for having made several tests (Holm 1979); the family is what is given.

    The i-th smallest of m is multiplied by m - i + 1, never falls below the ones before it, and ends at 1.
    Calling those below alpha significant keeps the probability of even one false claim below alpha, whatever
    the dependence between the tests.

    Args:
        p_values: name of a test to its p value.

    Returns:
        The same names in the same order.

    Raises:
        ValueError: a p value is no number between 0 and 1, by name.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
        {'a': 0.03, 'b': 0.06, 'c': 0.06, 'd': 0.02}
    """
    for name, p_value in p_values.items():
        _check_p(p_value, f"the p value of {name!r}")
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _check_p(p_value: float, name: str) -> None:
    if not is_finite(p_value) or not 0.0 <= p_value <= 1.0:
        raise ValueError(f"{name} is {p_value!r}: expected a number between 0 and 1")
