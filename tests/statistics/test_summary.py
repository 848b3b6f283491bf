"""Means, spreads and Δm over seeds, against the standard library and by hand."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detente.statistics import Spread, delta_m_spread, spread


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_spread_agrees_with_the_standard_library(values):
    found = spread(values)
    assert found is not None
    assert found.count == len(values)
    assert math.isclose(found.mean, statistics.fmean(values), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(found.deviation, statistics.stdev(values), rel_tol=1e-6, abs_tol=1e-6)


def test_spread_leaves_out_what_is_not_there():
    assert spread([None, math.nan, math.inf, 3.0]) == Spread(3.0, None, 1)
    assert spread([None]) is None


def test_delta_m_by_hand():
    baselines = {"left": [0.90, 0.80], "error": [2.0]}
    results = [{"left": 0.765, "error": 2.2}, {"left": 0.85, "error": 1.8}]
    # First run: left 10 % worse, error 10 % worse; second: 0 and 10 % better.
    found = delta_m_spread(results, baselines, {"left": True, "error": False})
    assert found.mean == pytest.approx((10 - 5) / 2)
    assert found.deviation == pytest.approx(statistics.stdev([10, -5]))
    assert found.count == 2


def test_delta_m_names_what_is_missing():
    with pytest.raises(ValueError, match="at least one run"):
        delta_m_spread([], {}, {})
    with pytest.raises(ValueError, match="task 'b' has no single-task run"):
        delta_m_spread([{"a": 1.0, "b": 1.0}], {"a": [1.0], "b": []}, {"a": True, "b": True})
