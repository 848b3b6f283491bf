"""Paired t-tests, stars and Holm's correction against scipy, statsmodels and printed examples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from detente.statistics import best_against_each, holm, paired_t_test, stars

# Student (1908), "The probable error of a mean", Biometrika 6: additional hours of sleep of ten patients under two
# drugs. R's documentation of `sleep` prints t = -4.0621, df = 9, p = 0.002833, interval (-2.4598858, -0.7001142).
DRUG_1 = dict(enumerate([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]))
DRUG_2 = dict(enumerate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]))

# Values in hundredths, as metrics are printed: differences vary visibly or not at all.
HUNDREDTHS = st.integers(-10_000, 10_000).map(lambda number: number / 100)
PAIRS = st.lists(st.tuples(HUNDREDTHS, HUNDREDTHS), min_size=2, max_size=12)


def test_students_sleep_data():
    found = paired_t_test(DRUG_1, DRUG_2)
    assert found.difference == pytest.approx(-1.58, abs=1e-12)
    assert found.statistic == pytest.approx(-4.0621, abs=5e-5)
    assert found.p_value == pytest.approx(0.002833, abs=5e-7)
    assert found.interval() == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)
    assert (found.pairs, found.note, stars(found.p_value)) == (10, "", "**")


@given(PAIRS)
def test_it_equals_scipy(pairs):
    first, second = (dict(enumerate(side)) for side in zip(*pairs, strict=True))
    differences = np.round([a - b for a, b in pairs], 2)
    assume(np.ptp(differences) > 0)
    found = paired_t_test(first, second)
    expected = stats.ttest_rel([a for a, _ in pairs], [b for _, b in pairs])
    assert found.statistic == pytest.approx(expected.statistic, rel=1e-6, abs=1e-9)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    ends = expected.confidence_interval(0.9)
    assert found.interval(alpha=0.1) == pytest.approx((ends.low, ends.high), rel=1e-6, abs=1e-9)
    # The interval and the test agree.
    low, high = found.interval(alpha=0.05)
    assert (low > 0 or high < 0) == (found.p_value < 0.05)


@given(PAIRS, HUNDREDTHS)
def test_swapping_sides_and_shifting_both(pairs, shift):
    first, second = (dict(enumerate(side)) for side in zip(*pairs, strict=True))
    found, swapped = paired_t_test(first, second), paired_t_test(second, first)
    assert swapped.p_value == found.p_value
    assert swapped.difference == -found.difference
    shifted = paired_t_test(
        {seed: value + shift for seed, value in first.items()},
        {seed: value + shift for seed, value in second.items()},
    )
    assert shifted.p_value == pytest.approx(found.p_value, rel=1e-5)
    assert shifted.note == found.note


def test_only_common_seeds_are_paired():
    found = paired_t_test({0: 1.0, 1: 2.0, 2: 9.0, 7: 5.5}, {7: 5.0, 1: 1.0, 0: 0.8, 9: 3.0})
    assert found.seeds == (0, 1, 7)
    assert found.unpaired == (2, 9)
    assert found.p_value == pytest.approx(stats.ttest_rel([1.0, 2.0, 5.5], [0.8, 1.0, 5.0]).pvalue)


@pytest.mark.parametrize(("second", "pairs"), [({5: 1.0}, 0), ({0: 1.0}, 1), ({}, 0)])
def test_too_few_pairs_have_no_p_value(second, pairs):
    found = paired_t_test({0: 3.0, 1: 4.0}, second)
    assert (found.p_value, found.statistic, found.deviation, found.interval()) == (None, None, None, None)
    assert found.difference == (2.0 if pairs else None)
    assert found.note == f"seeds in common: {pairs}; a paired test needs at least 2"


@pytest.mark.parametrize("count", [2, 3, 5])
def test_differences_that_do_not_vary(count):
    values = {seed: 0.1 + 0.2 * seed for seed in range(count)}
    same = paired_t_test(values, dict(values))
    assert (same.p_value, same.statistic, same.interval()) == (1.0, None, None)
    # 0.1 + 0.2 s - (0.1 s) and the like differ in the last bits: that is no variation.
    constant = paired_t_test({seed: value + 0.3 for seed, value in values.items()}, values)
    signs = list(itertools.product((1, -1), repeat=count))
    exact = sum(abs(sum(flips)) == count for flips in signs) / len(signs)
    assert constant.p_value == exact == 2.0 ** (1 - count)
    assert constant.statistic is None
    assert "sign-flip" in constant.note


def test_rounding_of_derived_values_can_be_named():
    first, second = {0: 1e-9, 1: 1e-9, 2: 1.1e-9}, {0: 0.0, 1: 0.0, 2: 0.0}
    assert paired_t_test(first, second).p_value < 0.01
    assert paired_t_test(first, second, noise=1e-8).p_value == 1.0


def test_values_that_are_no_numbers_are_named():
    with pytest.raises(ValueError, match=r"the second side, seed 3: nan is no finite number"):
        paired_t_test({3: 1.0, 4: 1.0}, {3: math.nan, 4: 2.0})
    with pytest.raises(ValueError, match=r"the first side, seed 3: None is no finite number"):
        paired_t_test({3: None, 4: 1.0}, {3: 1.0, 4: 2.0})


def test_stars_follow_the_papers_rule():
    assert [stars(p) for p in (0.0, 0.0099, 0.01, 0.0499, 0.05, 1.0, None)] == [
        "**",
        "**",
        "*",
        "*",
        "",
        "",
        "",
    ]
    with pytest.raises(ValueError, match=r"p_value is nan"):
        stars(math.nan)
    with pytest.raises(ValueError, match=r"p_value is 1.5"):
        stars(1.5)


# --- the best against each ---


def column(seed: int, methods: int = 4, seeds: int = 5) -> dict[str, dict[int, float]]:
    rng = np.random.default_rng(seed)
    return {
        f"m{method}": {s: float(rng.normal(0.4 * method, 0.5)) for s in range(seeds)}
        for method in range(methods)
    }


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_the_best_against_each_by_scipy(seed, higher):
    values = column(seed)
    means = {name: np.mean(list(by_seed.values())) for name, by_seed in values.items()}
    best = (max if higher else min)(means, key=means.get)
    expected = {
        name: stats.ttest_rel(list(values[best].values()), list(by_seed.values())).pvalue
        for name, by_seed in values.items()
        if name != best
    }
    found = best_against_each(values, higher_is_better=higher)
    assert found.best == best
    assert {name: test.p_value for name, test in found.tests.items()} == pytest.approx(expected)
    largest = max(expected.values())
    assert found.p_value == pytest.approx(largest)
    assert found.stars == ("**" if largest < 0.01 else "*" if largest < 0.05 else "")


@given(st.integers(0, 10_000), st.permutations(range(4)))
def test_order_and_direction_of_the_best(seed, order):
    values = column(seed)
    names = list(values)
    found = best_against_each(values, higher_is_better=True)
    assert (
        best_against_each({names[i]: values[names[i]] for i in order}, higher_is_better=True).stars
        == found.stars
    )
    turned = {name: {s: -value for s, value in by_seed.items()} for name, by_seed in values.items()}
    mirrored = best_against_each(turned, higher_is_better=False)
    assert (mirrored.best, mirrored.p_value, mirrored.stars) == (found.best, found.p_value, found.stars)


def test_a_missing_test_takes_the_stars():
    values = {"a": {0: 9.0, 1: 9.1, 2: 9.2}, "b": {0: 1.0, 1: 1.2, 2: 1.1}, "c": {5: 1.0}}
    found = best_against_each(values, higher_is_better=True)
    assert (found.best, found.p_value, found.stars) == ("a", None, "")
    assert (
        best_against_each({"a": values["a"], "b": values["b"]}, higher_is_better=True).stars == "**"
    )  # without it


def test_a_single_lucky_seed_is_not_the_best():
    values = {"lucky": {0: 9.0}, "a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 3.0}}
    assert best_against_each(values, higher_is_better=True).best == "b"
    assert best_against_each({"a": {0: 1.0}, "b": {0: 2.0}}, higher_is_better=True).best == "b"


def test_no_stars_where_the_common_seeds_speak_against_the_best():
    worse_where_both_ran = {0: 1.0, 1: 1.1, 2: 1.2, 3: 100.0}
    values = {"a": worse_where_both_ran, "b": {0: 2.0, 1: 2.2, 2: 2.3}}
    found = best_against_each(values, higher_is_better=True)
    assert found.best == "a" and found.p_value < 0.01 and found.stars == ""


def test_methods_alone_equal_and_empty():
    alone = best_against_each({"a": {0: 1.0}}, higher_is_better=True)
    assert (alone.best, alone.tests, alone.p_value, alone.stars) == ("a", {}, None, "")
    twins = {"b": {0: 1.0, 1: 2.0}, "a": {0: 1.0, 1: 2.0}}
    assert best_against_each(twins, higher_is_better=True).best == "a"
    with pytest.raises(ValueError, match="at least one method"):
        best_against_each({}, higher_is_better=True)
    with pytest.raises(ValueError, match="method 'a' has no seeds"):
        best_against_each({"a": {}}, higher_is_better=True)
    with pytest.raises(ValueError, match="method 'a', seed 2: inf"):
        best_against_each({"a": {2: math.inf}}, higher_is_better=True)


# --- Holm ---


def test_demsars_example_of_holm():
    """Demšar (2006), JMLR 7, section 3.2.2: C4.5 against three tuned variants over 14 data sets.

    With a standard error of 0.488 the mean ranks 3.143, 2.000, 2.893 and 1.964 give z = 2.416, 2.342 and 0.512.
    Holm rejects the first two at 0.05 (p = .016 < .017, .019 < .025) and not the third.
    """
    p_values = {
        name: 2 * stats.norm.sf((3.143 - rank) / 0.488)
        for name, rank in {"m": 2.000, "cf": 2.893, "m+cf": 1.964}.items()
    }
    assert round(p_values["m+cf"], 3) == 0.016 and round(p_values["m"], 3) == 0.019
    adjusted = holm(p_values)
    assert list(adjusted) == ["m", "cf", "m+cf"]
    assert {name for name, p in adjusted.items() if p < 0.05} == {"m", "m+cf"}
    # By Bonferroni, which multiplies each by three, the same two fall differently: only one is below 0.05.
    assert [name for name, p in p_values.items() if 3 * p < 0.05] == ["m+cf"]


def test_a_step_that_fails_keeps_the_later_ones():
    """The common textbook example: the last is .04 by itself, and stands behind one that is not rejected."""
    assert holm({"1": 0.01, "2": 0.04, "3": 0.03, "4": 0.005}) == pytest.approx(
        {"1": 0.03, "2": 0.06, "3": 0.06, "4": 0.02}
    )


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_holm_equals_statsmodels(count):
    p_values = list(np.random.default_rng(count).beta(0.3, 3.0, size=count))
    named = {f"h{place}": p for place, p in enumerate(p_values)}
    assert list(holm(named).values()) == pytest.approx(multipletests(p_values, method="holm")[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closure_of_bonferroni(p_values):
    """From what the method is for: a hypothesis falls when every set that contains it falls by Bonferroni."""
    named = {f"h{place}": p for place, p in enumerate(p_values)}
    places = range(len(p_values))
    sets = [set(of) for size in places for of in itertools.combinations(places, size + 1)]
    expected = [
        max(min(1.0, len(of) * min(p_values[j] for j in of)) for of in sets if place in of)
        for place in places
    ]
    assert list(holm(named).values()) == pytest.approx(expected)


def test_holm_by_name():
    assert holm({}) == {}
    with pytest.raises(ValueError, match="the p value of 'b' is nan"):
        holm({"a": 0.1, "b": math.nan})
    with pytest.raises(ValueError, match="the p value of 'a' is None"):
        holm({"a": None})
    with pytest.raises(ValueError, match=r"the p value of 'a' is -0\.1"):
        holm({"a": -0.1})
