"""Bootstrap intervals against scipy, by full enumeration, and what they say of two and three values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from detente.statistics import bootstrap_difference, bootstrap_mean

KINDS = ("percentile", "bca")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [4, 5, 10, 30])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_it_equals_scipy_on_the_same_resamples(kind, count, alpha):
    # Binary fractions, whose sums are exact: scipy lets rounding decide whether a resample in another order ties.
    values = np.round(rng(count).exponential(size=count) * 64) / 64
    found = bootstrap_mean(list(values), generator=rng(1), resamples=999, alpha=alpha, kind=kind)
    expected = stats.bootstrap(
        (values,),
        lambda sample, axis: sample.mean(axis=axis),
        n_resamples=999,
        batch=999,
        confidence_level=1 - alpha,
        method=kind,
        rng=rng(1),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert (found.count, found.resamples, found.kind) == (count, 999, kind)
    assert found.level == pytest.approx(1 - alpha)


@pytest.mark.parametrize("count", [3, 4, 5])
def test_percentiles_of_all_resamples(count):
    """With few values every resample can be listed; random ones agree up to chance."""
    values = list(rng(3).normal(size=count))
    means = [np.mean(chosen) for chosen in itertools.product(values, repeat=count)]
    low, high = np.percentile(means, [10, 90])
    found = bootstrap_mean(values, generator=rng(), resamples=200_000, alpha=0.2)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_with_two_or_three_values_it_is_their_range(count, kind):
    values = [0.91, 0.93, 0.92][:count]
    found = bootstrap_mean(values, generator=rng(), kind=kind)
    assert (found.low, found.high) == pytest.approx((min(values), max(values)))


@pytest.mark.parametrize(("count", "expected"), [(2, 0.5), (3, 0.75)])
def test_how_often_that_contains_the_mean(count, expected):
    """The share that the module's text states."""
    draws = rng(5)
    hits = 0
    for _ in range(400):
        found = bootstrap_mean(list(draws.normal(size=count)), generator=draws, resamples=1000)
        hits += found.low <= 0.0 <= found.high
    assert hits / 400 == pytest.approx(expected, abs=0.08)


def test_one_value_has_no_interval():
    found = bootstrap_mean([3.0], generator=rng())
    assert (found.low, found.high, found.count) == (None, None, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_values(kind):
    found = bootstrap_mean([0.5, 0.5, 0.5], generator=rng(), kind=kind)
    assert (found.low, found.high) == (0.5, 0.5)


def test_pairs_stay_together():
    """Two methods that rise and fall with the seed: the difference hardly varies, the values do."""
    noise = rng(4).normal(scale=10.0, size=8)
    first = {seed: value + 1.0 + 0.1 * (seed % 2) for seed, value in enumerate(noise)}
    second = dict(enumerate(noise))
    found = bootstrap_difference(first, second, generator=rng())
    assert 1.0 <= found.low < found.high <= 1.1
    differences = [first[seed] - second[seed] for seed in range(8)]
    assert found == bootstrap_mean(differences, generator=rng())


def test_only_common_seeds_count():
    found = bootstrap_difference({0: 1.0, 1: 2.0, 2: 5.0}, {2: 4.0, 0: 0.5, 9: 7.0}, generator=rng())
    assert (found.low, found.high, found.count) == (0.5, 1.0, 2)
    apart = bootstrap_difference({0: 1.0}, {1: 1.0}, generator=rng())
    assert (apart.low, apart.high, apart.count) == (None, None, 0)


@settings(max_examples=30)
@given(
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=9),
    st.integers(-1000, 1000),
    st.sampled_from(KINDS),
)
def test_shifting_and_mirroring(values, shift, kind):
    def ends(of: list[float]) -> tuple[float, float]:
        found = bootstrap_mean(of, generator=rng(2), resamples=400, kind=kind)
        return found.low, found.high

    low, high = ends(values)
    assert min(values) <= low <= high <= max(values)
    assert ends([value + shift for value in values]) == pytest.approx((low + shift, high + shift), abs=1e-9)
    mirrored = ends([-value for value in values])
    assert mirrored == pytest.approx((-high, -low), abs=1e-6 * (1 + max(map(abs, values))))


@pytest.mark.parametrize("count", [3, 4, 5])
@pytest.mark.parametrize("draw", range(5))
def test_bca_does_not_depend_on_rounding(count, draw):
    """Whole numbers add up exactly, their hundredths do not."""
    whole = rng(draw).integers(50, 100, size=count).astype(float)
    exact = bootstrap_mean(list(whole), generator=rng(1), alpha=0.3, kind="bca")
    found = bootstrap_mean(list(whole / 100), generator=rng(1), alpha=0.3, kind="bca")
    assert (found.low * 100, found.high * 100) == pytest.approx((exact.low, exact.high), rel=1e-12)


def test_the_generator_is_what_decides():
    values = list(rng(0).normal(size=10))
    one = bootstrap_mean(values, generator=rng(7))
    assert one == bootstrap_mean(values, generator=rng(7))
    assert one != bootstrap_mean(values, generator=rng(8))


def test_bad_input_is_named():
    for given_values, options, message in [
        ([], {}, "at least one value"),
        ([1.0, math.nan], {}, "value 1 is nan"),
        ([1.0, 2.0], {"alpha": 0.0}, "alpha is 0.0"),
        ([1.0, 2.0], {"alpha": 1.0}, "alpha is 1.0"),
        ([1.0, 2.0], {"resamples": 39}, "resamples is 39: alpha = 0.05 needs at least 40"),
        ([1.0, 2.0], {"kind": "t"}, "kind is 't'"),
    ]:
        with pytest.raises(ValueError, match=message):
            bootstrap_mean(given_values, generator=rng(), **options)
    with pytest.raises(ValueError, match="the second side, seed 1: nan"):
        bootstrap_difference({0: 1.0}, {1: math.nan}, generator=rng())
    assert bootstrap_mean([1.0, 2.0], generator=rng(), resamples=40).resamples == 40
