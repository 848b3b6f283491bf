"""Mean ranks against scipy and a printed table."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from detente.statistics import mean_ranks

# Demšar (2006), JMLR 7, table 6: AUC of C4.5, with tuned m, with tuned cf, with both. In the row "voting" the printed
# digits of the last two are equal and the printed ranks, 2 and 3, are not: the second has a digit added here.
DEMSAR = """
0.763 0.768 0.771 0.798
0.599 0.591 0.590 0.569
0.954 0.971 0.968 0.967
0.628 0.661 0.654 0.657
0.882 0.888 0.886 0.898
0.936 0.931 0.916 0.931
0.661 0.668 0.609 0.685
0.583 0.583 0.563 0.625
0.775 0.838 0.866 0.875
1.000 1.000 1.000 1.000
0.940 0.962 0.965 0.962
0.619 0.666 0.614 0.669
0.972 0.981 0.9751 0.975
0.957 0.978 0.946 0.970
"""


def test_demsars_table():
    rows = [[float(cell) for cell in line.split()] for line in DEMSAR.split("\n") if line]
    results = {
        name: {f"set {place}": {"auc": row[column]} for place, row in enumerate(rows)}
        for column, name in enumerate(("C4.5", "m", "cf", "m+cf"))
    }
    found = mean_ranks(results, {"auc": True})
    assert {name: round(rank, 3) for name, rank in found.items()} == {
        "C4.5": 3.143,
        "m": 2.0,
        "cf": 2.893,
        "m+cf": 1.964,
    }


@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 4), min_size=4, max_size=4)), min_size=1, max_size=8
    ),
    st.permutations(range(4)),
)
def test_it_equals_scipy_in_any_order(columns, order):
    """Few distinct values, so that ties are common; every second metric goes to another task."""
    expected = np.mean(
        [rankdata([-v if higher else v for v in column]) for higher, column in columns], axis=0
    )
    results = {}
    for method in order:
        results[f"m{method}"] = tasks = {"even": {}, "odd": {}}
        for place, (_, column) in enumerate(columns):
            tasks["odd" if place % 2 else "even"][f"k{place}"] = float(column[method])
    directions = {f"k{place}": higher for place, (higher, _) in enumerate(columns)}
    found = mean_ranks(results, directions)
    assert list(found) == [f"m{method}" for method in order]
    assert found == pytest.approx({f"m{method}": expected[method] for method in range(4)})
    nested = {"even": directions, "odd": directions}
    assert mean_ranks(results, nested) == found
    # Ranks of a metric add up to the same whatever the ties.
    assert math.fsum(found.values()) == pytest.approx(10.0)


def test_bad_input_is_named():
    good = {"a": {"t": {"x": 1.0}}, "b": {"t": {"x": 2.0}}}
    assert mean_ranks(good, {"x": False}) == {"a": 1.0, "b": 2.0}
    for results, directions, message in [
        ({}, {"x": True}, "at least one method"),
        ({"a": {"t": {}}}, {"x": True}, "at least one method with one metric"),
        (good | {"b": {"t": {}}}, {"x": True}, "method 'b' lacks metric 'x' of task 't'"),
        (good | {"b": {"u": {"x": 1.0}}}, {"x": True}, "method 'a' lacks metric 'x' of task 'u'"),
        (good | {"c": {"t": {"x": 1.0, "y": 1.0}}}, {"x": True}, "method 'a' lacks metric 'y'"),
        (good | {"b": {"t": {"x": math.nan}}}, {"x": True}, "method 'b', task 't', metric 'x': nan"),
        (good, {"y": True}, "task 't', metric 'x' is None"),
        (good, {"x": 1}, "task 't', metric 'x' is 1"),
        (good, {"u": {"x": True}}, "task 't', metric 'x' is None"),
    ]:
        with pytest.raises(ValueError, match=message):
            mean_ranks(results, directions)
