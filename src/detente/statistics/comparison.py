"""Methods compared over seeds: the one call behind the tables of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import numpy as np

from detente.metrics import relative_changes
from detente.statistics.bootstrap import Interval, bootstrap_difference, bootstrap_mean, check_resampling
from detente.statistics.checking import ROUNDING, check_baselines, check_results
from detente.statistics.ranks import mean_ranks
from detente.statistics.summary import Spread, spread
from detente.statistics.tests import (
    BestAgainstEach,
    PairedTest,
    best_against_each,
    holm,
    paired_t_test,
)

__all__ = ["Against", "Compared", "Comparison", "Score", "Verdict", "compare"]

Verdict = Literal["better", "worse", "no difference shown", "too few seeds"]
Score = Literal["delta_m", "change_from_reference", "change_from_mean"]

_BySeed = Mapping[int, float]

SCORES: Mapping[Score, str] = {
    "delta_m": "Δm: mean change of the tasks' main metrics from the mean single-task result, in percent",
    "change_from_reference": "mean change of the tasks' main metrics from the mean result of {reference}, in percent",
    "change_from_mean": "mean change of the tasks' main metrics from their mean over all methods, in percent",
}


@dataclass(frozen=True)
class Against:
    """One method against another, by their scores on the seeds that both have.

    Attributes:
        other: the other method.
        test: paired t-test of the scores, this method minus the other; negative favours this method.
        adjusted: the p value after Holm's correction over the family; None without a p value.
        interval: bootstrap interval of the mean difference. ``test.interval()`` is Student's, which is wider
            for few seeds and agrees with the test.

    Example:
        >>> results = {"m": {0: {"a": 0.9}, 1: {"a": 0.8}}, "fixed": {0: {"a": 0.7}, 1: {"a": 0.7}}}
        >>> rng = np.random.default_rng(0)
        >>> found = compare(results, higher_is_better={"a": True}, reference="fixed", generator=rng)
        >>> found.methods["m"].against_reference.test.pairs
        2
    """

    other: str
    test: PairedTest
    adjusted: float | None
    interval: Interval


@dataclass(frozen=True)
class Compared:
    """What the comparison says about one method.

    Attributes:
        seeds: its seeds, sorted.
        tasks: task to mean and standard deviation of its main metric over these seeds.
        scores: the score of every seed, in the order of ``seeds``.
        score: their mean and standard deviation; lower is better.
        interval: bootstrap interval of the mean score.
        mean_rank: mean over the tasks of its rank by mean metric; 1 is best.
        against_reference: against the reference; None for the reference itself or without one.
        against_best: against the method with the best mean score; None for that method itself.
        verdict: against the reference, by the adjusted p value; None where ``against_reference`` is.

    Example:
        >>> results = {"m": {0: {"a": 0.9}, 1: {"a": 0.8}}}
        >>> rng = np.random.default_rng(0)
        >>> found = compare(results, higher_is_better={"a": True}, generator=rng)
        >>> round(found.methods["m"].tasks["a"].mean, 3), found.methods["m"].mean_rank
        (0.85, 1.0)
    """

    seeds: tuple[int, ...]
    tasks: Mapping[str, Spread]
    scores: tuple[float, ...]
    score: Spread
    interval: Interval
    mean_rank: float
    against_reference: Against | None
    against_best: Against | None
    verdict: Verdict | None


@dataclass(frozen=True)
class Comparison:
    """Methods compared over seeds.

    Attributes:
        methods: name to what is said about it, in the order given.
        score: which score the methods are compared by; lower is better.
        score_meaning: that score in words.
        baseline: task to the value that changes are relative to.
        reference: the method that verdicts are against, or None.
        best: the best score tested against each other method, p values uncorrected, with the papers' stars.
        columns: the same for the main metric of every task, as the papers' tables do it.
        families: which tests were corrected together, in words.
        alpha: the level of verdicts and intervals.
        resamples: bootstrap resamples of every interval.

    Example:
        >>> results = {"m": {0: {"a": 0.9}, 1: {"a": 0.8}}}
        >>> compare(results, higher_is_better={"a": True}, generator=np.random.default_rng(0)).best.best
        'm'
    """

    methods: Mapping[str, Compared]
    score: Score
    score_meaning: str
    baseline: Mapping[str, float]
    reference: str | None
    best: BestAgainstEach
    columns: Mapping[str, BestAgainstEach]
    families: tuple[str, ...]
    alpha: float
    resamples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings, numbers and None: ready for JSON.

        Example:
            >>> import json
            >>> results = {"m": {0: {"a": 0.9}, 1: {"a": 0.8}}}
            >>> found = compare(results, higher_is_better={"a": True}, generator=np.random.default_rng(0))
            >>> json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
            True
        """
        plain: dict[str, Any] = _plain(self)
        return plain


def compare(
    results: Mapping[str, Mapping[int, Mapping[str, float]]],
    *,
    higher_is_better: Mapping[str, bool],
    reference: str | None = None,
    baselines: Mapping[str, Mapping[int, float]] | None = None,
    generator: np.random.Generator,
    resamples: int = 10_000,
    alpha: float = 0.05,
) -> Comparison:
    """Compare methods by the test results of their chosen configurations over several seeds.

    **Score.** Every run gets one number, the mean over the tasks of the relative change of the main metric, in
    percent, lower is better. With ``baselines`` the change is from the mean single-task result, which makes it
    Δm. Otherwise it is from the reference's mean, or without a reference from the mean of all methods' means:
    the scale of the tasks, and not what is tested.

    **Tests** are paired by seed: only seeds that both methods have count, and every test tells which they are.
    Every method is tested against the reference and against the best score. Holm's correction is made within
    each of these two families. The best was picked on the same numbers, so the tests against it flatter it; those
    against a reference named beforehand do not.

    **Verdict.** "better" or "worse" where the adjusted p value against the reference is below ``alpha``, "no
    difference shown" where it is not, which does not say that there is none, and "too few seeds" where fewer
    than two are in common.

    Args:
        results: method to seed to task to main metric, measured on test data.
        higher_is_better: task to the direction of its metric.
        reference: the method to beat, such as the tuned fixed weighting.
        baselines: task to seed to the main metric of a network trained for that task alone.
        generator: for the bootstrap. One number is drawn from it; every interval uses the same resampling, so
            that the order of the methods does not matter.
        resamples: bootstrap resamples.
        alpha: the level of verdicts and intervals.

    Raises:
        ValueError: what is missing or no finite number, by method, seed and task; a baseline that is not above
            zero, so that a relative change means nothing; an unknown reference.

    Example:
        >>> results = {
        ...     "static": {0: {"left": 0.90, "right": 0.80}, 1: {"left": 0.91, "right": 0.79}},
        ...     "cagrad": {0: {"left": 0.92, "right": 0.83}, 1: {"left": 0.93, "right": 0.81}},
        ... }
        >>> single = {"left": {0: 0.95, 1: 0.93}, "right": {0: 0.82, 1: 0.84}}
        >>> found = compare(
        ...     results,
        ...     higher_is_better={"left": True, "right": True},
        ...     reference="static",
        ...     baselines=single,
        ...     generator=np.random.default_rng(0),
        ... )
        >>> cagrad = found.methods["cagrad"]
        >>> round(cagrad.score.mean, 2), round(found.methods["static"].score.mean, 2)
        (1.4, 3.97)
        >>> round(cagrad.against_reference.test.p_value, 2), cagrad.verdict
        (0.07, 'no difference shown')
    """
    tasks = check_results(results, higher_is_better, reference)
    check_resampling(resamples, alpha)
    values = {
        name: {task: {seed: float(by_task[task]) for seed, by_task in sorted(runs.items())} for task in tasks}
        for name, runs in results.items()
    }
    means = {name: {task: _mean(by_seed) for task, by_seed in of.items()} for name, of in values.items()}
    score, baseline = _baseline(means, tasks, reference, baselines)
    scores, noise = _scores(results, baseline, {task: higher_is_better[task] for task in tasks})

    best = best_against_each(scores, higher_is_better=False, noise=noise)
    columns = {
        task: best_against_each(
            {name: of[task] for name, of in values.items()}, higher_is_better=higher_is_better[task]
        )
        for task in tasks
    }
    seed = int(generator.integers(2**63))

    def against(other: str | None) -> dict[str, Against]:
        return {} if other is None else _family(scores, other, noise, seed, resamples, alpha)

    ranks = mean_ranks(
        {name: {task: {"main": mean} for task, mean in of.items()} for name, of in means.items()},
        {task: {"main": higher_is_better[task]} for task in tasks},
    )
    against_reference, against_best = against(reference), against(best.best)
    methods = {}
    for name, by_seed in scores.items():
        theirs = against_reference.get(name)
        methods[name] = Compared(
            seeds=tuple(by_seed),
            tasks={task: _spread(of) for task, of in values[name].items()},
            scores=tuple(by_seed.values()),
            score=_spread(by_seed),
            interval=bootstrap_mean(
                list(by_seed.values()),
                generator=np.random.default_rng(seed),
                resamples=resamples,
                alpha=alpha,
            ),
            mean_rank=ranks[name],
            against_reference=theirs,
            against_best=against_best.get(name),
            verdict=_verdict(theirs, alpha) if theirs else None,
        )
    return Comparison(
        methods=methods,
        score=score,
        score_meaning=SCORES[score].format(reference=reference),
        baseline=baseline,
        reference=reference,
        best=best,
        columns=columns,
        families=_families(against_reference, against_best, reference, best.best),
        alpha=alpha,
        resamples=resamples,
    )


def _baseline(
    means: Mapping[str, Mapping[str, float]],
    tasks: tuple[str, ...],
    reference: str | None,
    baselines: Mapping[str, _BySeed] | None,
) -> tuple[Score, dict[str, float]]:
    """What changes are relative to, and the name of the score that this makes."""
    if baselines is not None:
        check_baselines(baselines, tasks)
        return "delta_m", {task: _mean(baselines[task]) for task in tasks}
    if reference is not None:
        return "change_from_reference", dict(means[reference])
    return "change_from_mean", {
        task: math.fsum(of[task] for of in means.values()) / len(means) for task in tasks
    }


def _scores(
    results: Mapping[str, Mapping[int, Mapping[str, float]]],
    baseline: Mapping[str, float],
    higher_is_better: Mapping[str, bool],
) -> tuple[dict[str, dict[int, float]], float]:
    """Method to seed to score, and what is only rounding of a score."""
    main = {task: {"main": value} for task, value in baseline.items()}
    directions = {task: {"main": higher} for task, higher in higher_is_better.items()}
    scores: dict[str, dict[int, float]] = {}
    largest = 0.0
    for name, runs in results.items():
        scores[name] = {}
        for seed in sorted(runs):
            given = {task: {"main": value} for task, value in runs[seed].items()}
            changes = [change["main"] for change in relative_changes(given, main, directions).values()]
            scores[name][seed] = math.fsum(changes) / len(changes)
            largest = max(largest, *(abs(change) for change in changes))
    # A change of c percent comes from a ratio of up to 1 + c / 100.
    return scores, ROUNDING * (100.0 + largest)


def _family(
    scores: Mapping[str, _BySeed], other: str, noise: float, seed: int, resamples: int, alpha: float
) -> dict[str, Against]:
    """Every method against one, corrected together."""
    tests = {
        name: paired_t_test(mine, scores[other], noise=noise)
        for name, mine in scores.items()
        if name != other
    }
    adjusted = holm({name: test.p_value for name, test in tests.items() if test.p_value is not None})
    return {
        name: Against(
            other=other,
            test=test,
            adjusted=adjusted.get(name),
            interval=bootstrap_difference(
                scores[name],
                scores[other],
                generator=np.random.default_rng(seed),
                resamples=resamples,
                alpha=alpha,
            ),
        )
        for name, test in tests.items()
    }


def _verdict(against: Against, alpha: float) -> Verdict:
    if against.adjusted is None or against.test.difference is None:
        return "too few seeds"
    if against.adjusted >= alpha:
        return "no difference shown"
    return "better" if against.test.difference < 0 else "worse"


def _families(
    by_reference: Mapping[str, Against], by_best: Mapping[str, Against], reference: str | None, best: str
) -> tuple[str, ...]:
    def sentence(family: Mapping[str, Against], opponent: str) -> str:
        made = [name for name, against in family.items() if against.adjusted is not None]
        tests = "t-test" if len(made) == 1 else "t-tests"
        return f"{len(made)} paired {tests} of the score against {opponent}: {', '.join(made)}"

    found = []
    if any(against.adjusted is not None for against in by_reference.values()):
        found.append(sentence(by_reference, f"the reference {reference}"))
    if any(against.adjusted is not None for against in by_best.values()):
        found.append(sentence(by_best, f"the best, {best}"))
    return tuple(found)


def _mean(by_seed: _BySeed) -> float:
    return math.fsum(map(float, by_seed.values())) / len(by_seed)


def _spread(by_seed: _BySeed) -> Spread:
    found = spread(by_seed.values())
    assert found is not None  # finite and not empty, as was checked
    return found


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value
