"""Δm against the tables of a paper, by a slow twin, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from detente.metrics import delta_m, relative_changes

# Senushkin et al. (2023), Tables 1 to 4 as printed; the last column or columns are the published Δm: in
# Tables 2 and 3 the metric-weighted and the task-weighted one.
TABLE_1 = """
single 66.73 10.55 0.33
Uniform 52.98 10.89 0.39 14.30
RLW 51.26 10.25 0.41 15.58
DWA 53.15 10.22 0.40 13.20
Uncertainty 60.12 9.87 0.33 1.53
MGDA 66.72 17.02 0.33 20.62
MGDA-UB 66.37 18.63 0.32 25.05
GradNorm 57.24 10.29 0.35 6.55
GradDrop 52.98 10.09 0.40 12.50
PCGrad 54.06 9.91 0.38 10.00
GradVac 54.07 10.39 0.40 12.99
CAGrad 64.33 10.15 0.34 1.46
IMTL 65.13 11.58 0.32 3.10
Nash-MTL 64.84 11.90 0.37 9.38
Aligned-MTL 67.06 10.63 0.33 -0.02
Aligned-MTL-UB 66.07 10.54 0.32 -0.35
"""
TABLE_2 = """
single 38.30 63.76 0.68 0.28 25.01 19.21 30.14 57.20 69.15
Uniform 39.29 65.33 0.5493 0.2263 28.15 23.96 22.09 47.50 61.08 5.46 -1.07
RLW 37.17 63.77 0.58 0.24 28.27 24.18 22.26 47.05 60.62 7.67 2.00
DWA 39.11 65.31 0.55 0.23 27.61 23.18 24.17 50.18 62.39 3.49 -2.06
Uncertainty 36.87 63.17 0.54 0.23 27.04 22.61 23.54 49.05 63.65 4.01 -0.97
MGDA 30.47 59.90 0.61 0.26 24.88 19.45 29.18 56.88 69.36 1.47 1.79
GradNorm 20.09 52.06 0.72 0.28 24.83 18.86 30.81 57.94 69.73 7.22 11.51
GradDrop 39.39 65.12 0.55 0.23 27.48 22.96 23.38 49.44 62.87 3.61 -2.03
PCGrad 38.06 64.64 0.56 0.23 27.41 22.80 23.86 49.83 63.14 3.83 -1.33
GradVac 37.53 64.35 0.56 0.24 27.66 23.38 22.83 48.66 62.21 5.44 0.01
CAGrad 39.79 65.49 0.55 0.23 26.31 21.58 25.61 52.36 65.58 0.29 -4.18
IMTL 39.35 65.60 0.54 0.23 26.02 21.19 26.20 53.13 66.24 -0.59 -4.76
Nash-MTL 40.13 65.93 0.53 0.22 25.26 20.08 28.40 55.47 68.15 -4.04 -7.56
Aligned-MTL 40.82 66.33 0.53 0.22 25.19 19.71 28.88 56.23 68.54 -4.93 -8.40
Aligned-MTL-UB 43.11 67.22 0.55 0.22 25.67 20.57 27.58 54.37 67.12 -3.48 -7.83
"""
TABLE_3 = """
single 49.37 72.03 0.52 0.24 22.97 16.94 0.34 0.62 0.73
Uniform 45.21 69.70 0.49 0.21 26.10 21.08 0.26 0.52 0.66 8.97 4.72
RLW 46.19 69.71 0.46 0.19 26.09 21.09 0.27 0.53 0.66 6.67 1.73
DWA 45.83 69.65 0.50 0.22 26.10 21.27 0.26 0.52 0.66 9.64 5.61
MGDA 40.96 65.80 0.54 0.22 23.36 17.45 0.33 0.61 0.72 3.54 4.24
MGDA-UB 41.15 65.10 0.53 0.22 23.42 17.60 0.32 0.60 0.72 4.02 4.40
GradNorm 45.63 69.64 0.48 0.20 25.46 20.06 0.28 0.55 0.67 5.88 2.18
GradDrop 45.69 70.13 0.49 0.20 26.16 21.21 0.26 0.52 0.65 8.60 3.92
PCGrad 46.37 69.69 0.48 0.20 26.00 21.05 0.26 0.53 0.66 7.78 3.17
GradVac 46.65 69.97 0.49 0.21 25.95 20.88 0.27 0.53 0.66 7.89 3.75
CAGrad 45.46 69.35 0.47 0.20 24.28 18.73 0.30 0.58 0.70 2.66 0.13
IMTL 44.02 68.56 0.47 0.19 23.69 18.03 0.32 0.59 0.72 0.76 -1.02
Nash-MTL 47.25 70.38 0.46 0.20 23.95 18.83 0.31 0.59 0.71 1.13 -1.48
Aligned-MTL 46.70 69.97 0.46 0.19 24.19 18.77 0.30 0.58 0.71 1.44 -1.55
Aligned-MTL-UB 46.47 69.92 0.48 0.20 24.37 18.88 0.30 0.58 0.70 2.70 0.07
"""
TABLE_4 = """
single 74.01 93.16 0.0125 27.77
Uniform 75.18 93.49 0.0155 46.77 22.60
RLW 74.57 93.41 0.0158 47.79 24.37
DWA 75.24 93.52 0.0160 44.37 21.43
Uncertainty 72.02 92.85 0.0140 30.13 5.88
MGDA 68.84 91.54 0.0309 33.50 44.14
GradNorm 73.72 93.04 0.0124 34.11 5.63
GradDrop 75.27 93.53 0.0157 47.54 23.67
PCGrad 75.13 93.48 0.0154 42.07 18.21
CAGrad 75.16 93.48 0.0141 37.60 11.58
IMTL 75.33 93.49 0.0135 38.41 11.04
Nash-MTL 75.41 93.66 0.0129 35.02 6.72
Aligned-MTL 75.77 93.69 0.0133 32.66 5.27
Aligned-MTL-UB 74.89 93.46 0.0131 33.92 6.37
"""

HIGHER = {
    **dict.fromkeys(("miou", "pixel_accuracy", "within_11", "within_22", "within_30"), True),
    **dict.fromkeys(("l1", "mse", "absolute", "relative", "mean", "median"), False),
}
THREE_ROOMS = {
    "segmentation": ["miou", "pixel_accuracy"],
    "depth": ["absolute", "relative"],
    "normals": ["mean", "median", "within_11", "within_22", "within_30"],
}
PUBLISHED: dict[int, tuple[str, dict[str, list[str]], tuple[str, ...]]] = {
    1: (TABLE_1, {"segmentation": ["miou"], "instance": ["l1"], "disparity": ["mse"]}, ("task",)),
    2: (TABLE_2, THREE_ROOMS, ("metric", "task")),
    3: (TABLE_3, THREE_ROOMS, ("metric", "task")),
    4: (TABLE_4, {k: THREE_ROOMS[k] for k in ("segmentation", "depth")}, ("task",)),
}

Values = dict[str, dict[str, float]]


def published_rows() -> list[Any]:
    rows = []
    for table, (text, layout, forms) in PUBLISHED.items():
        lines = [line.split() for line in text.strip().splitlines()]
        for name, *cells in lines[1:]:
            rows.append(pytest.param(lines[0][1:], cells, layout, forms, id=f"table {table} {name}"))
    return rows


def spread(cells: list[str], layout: dict[str, list[str]], worse: int) -> Values:
    """Lay cells out by task and metric, each moved by half a unit of its last printed digit."""
    given_cells = iter(cells)
    values: Values = {}
    for task, metrics in layout.items():
        values[task] = {}
        for metric in metrics:
            cell = next(given_cells)
            half = 0.5 * 10.0 ** -len(cell.partition(".")[2])
            values[task][metric] = float(cell) + worse * half * (-1 if HIGHER[metric] else 1)
    return values


@pytest.mark.parametrize(("single", "cells", "layout", "forms"), published_rows())
def test_published_values_lie_within_the_rounding_of_their_cells(
    single: list[str], cells: list[str], layout: dict[str, list[str]], forms: tuple[str, ...]
) -> None:
    for form, published in zip(forms, cells[len(single) :], strict=True):
        # The better the row and the worse the baseline, the lower the result, in every cell by itself.
        low = delta_m(spread(cells, layout, -1), spread(single, layout, 1), HIGHER, per=form)
        high = delta_m(spread(cells, layout, 1), spread(single, layout, -1), HIGHER, per=form)
        assert low - 0.005 <= float(published) <= high + 0.005
        assert high - low < 3.0  # an interval that contained everything would prove nothing


def test_the_uniform_row_of_nyuv2_to_the_last_digit() -> None:
    """The baselines of both sources with the row in full precision: the printed digits come out."""
    lines = [line.split() for line in TABLE_2.strip().splitlines()]
    results = spread(lines[1][1:], THREE_ROOMS, 0)
    baselines = spread(lines[0][1:], THREE_ROOMS, 0)
    assert round(delta_m(results, baselines, HIGHER, per="metric"), 2) == 5.46
    assert round(delta_m(results, baselines, HIGHER, per="task"), 2) == -1.07
    assert delta_m(results, baselines, HIGHER) == delta_m(results, baselines, HIGHER, per="task")
    baselines["depth"] = {"absolute": 0.6754, "relative": 0.2780}
    assert round(delta_m(results, baselines, HIGHER, per="metric"), 2) == 5.59
    assert round(delta_m(results, baselines, HIGHER, per="task"), 2) == -0.88


# --- laws ---

TASKS = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]),
    st.dictionaries(
        st.sampled_from(["x", "y", "z"]), st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1
    ),
    min_size=1,
)
DIRECTIONS = st.fixed_dictionaries({metric: st.booleans() for metric in "xyz"})


def split(pairs: dict[str, dict[str, tuple[float, float]]]) -> tuple[Values, Values]:
    results = {t: {m: pair[0] for m, pair in metrics.items()} for t, metrics in pairs.items()}
    baselines = {t: {m: pair[1] for m, pair in metrics.items()} for t, metrics in pairs.items()}
    return results, baselines


@given(pairs=TASKS, directions=DIRECTIONS)
def test_it_equals_the_formula(
    pairs: dict[str, dict[str, tuple[float, float]]], directions: dict[str, bool]
) -> None:
    results, baselines = split(pairs)
    task_sum = metric_sum = 0.0
    count = 0
    for task, metrics in results.items():
        inner = 0.0
        for metric, value in metrics.items():
            base = baselines[task][metric]
            inner += (-1) ** int(directions[metric]) * (value - base) / base
            count += 1
        metric_sum += inner
        task_sum += inner / len(metrics)
    by_task = delta_m(results, baselines, directions, per="task")
    by_metric = delta_m(results, baselines, directions, per="metric")
    assert by_task == pytest.approx(100 * task_sum / len(results), rel=1e-9, abs=1e-7)
    assert by_metric == pytest.approx(100 * metric_sum / count, rel=1e-9, abs=1e-7)
    nested = {task: {metric: directions[metric] for metric in results[task]} for task in results}
    assert delta_m(results, baselines, nested) == by_task
    assert delta_m(baselines, baselines, directions) == 0.0


@given(pairs=TASKS, directions=DIRECTIONS, factor=st.floats(1.01, 3))
def test_a_better_value_lowers_it(
    pairs: dict[str, dict[str, tuple[float, float]]], directions: dict[str, bool], factor: float
) -> None:
    results, baselines = split(pairs)
    task = next(iter(results))
    metric = next(iter(results[task]))
    before = {per: delta_m(results, baselines, directions, per=per) for per in ("task", "metric")}
    assume(math.isfinite(before["task"]))
    results[task][metric] *= factor if directions[metric] else 1 / factor
    for per, value in before.items():
        assert delta_m(results, baselines, directions, per=per) < value


def test_changes_of_single_metrics() -> None:
    changes = relative_changes(
        {"a": {"x": 0.9}, "b": {"y": 3.0}}, {"a": {"x": 1.0}, "b": {"y": 2.0}}, {"x": True, "y": False}
    )
    assert changes["a"]["x"] == pytest.approx(10.0)
    assert changes["b"]["y"] == pytest.approx(50.0)


# --- bad input ---

GOOD: dict[str, Any] = {
    "results": {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0}},
    "baselines": {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0}},
    "higher_is_better": {"x": True, "y": False},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"results": {}}, "results is empty"),
        ({"results": {"a": {}, "b": {"x": 1.0}}}, "results of task 'a' are empty"),
        ({"baselines": {"a": {"x": 1.0, "y": 2.0}}}, "baselines lack task 'b'"),
        ({"results": {"a": {"x": 1.0, "y": 2.0}}}, "results lack task 'b'"),
        ({"baselines": {"a": {"x": 1.0}, "b": {"x": 3.0}}}, "baselines lack metric 'y' of task 'a'"),
        ({"results": {"a": {"x": 1.0}, "b": {"x": 3.0}}}, "results lack metric 'y' of task 'a'"),
        ({"higher_is_better": {"x": True}}, "higher_is_better lacks metric 'y' of task 'a'"),
        ({"higher_is_better": {"a": {"x": True, "y": True}}}, "lacks metric 'x' of task 'b'"),
        ({"higher_is_better": {"x": 1, "y": False}}, "metric 'x' is 1: expected True or False"),
        ({"baselines": {"a": {"x": 0.0, "y": 2.0}, "b": {"x": 3.0}}}, "task 'a', metric 'x' is 0.0"),
        ({"baselines": {"a": {"x": 1.0, "y": -2.0}, "b": {"x": 3.0}}}, "task 'a', metric 'y' is -2.0"),
        ({"results": {"a": {"x": math.nan, "y": 2.0}, "b": {"x": 3.0}}}, "result of task 'a'.*nan"),
        ({"baselines": {"a": {"x": math.inf, "y": 2.0}, "b": {"x": 3.0}}}, "baseline of task 'a'.*inf"),
        ({"results": {"a": {"x": None, "y": 2.0}, "b": {"x": 3.0}}}, "result of task 'a'.*no number"),
        ({"per": "epoch"}, "per is 'epoch'"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    assert delta_m(**GOOD) == 0.0
    with pytest.raises(ValueError, match=message):
        delta_m(**(GOOD | change))
