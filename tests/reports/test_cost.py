"""Cost against Δm: the points, who is efficient, and where the costs come from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plotly.graph_objects
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detente.records import find_runs
from detente.reports.cost import cost_section, efficient
from detente.reports.groups import collect
from detente.reports.labels import labels

from .conftest import painted


def only_study(folder):
    (study,) = collect(find_runs(folder))
    return study


def points_of(section):
    """The main point of each group by name: x and y."""
    ((figure,),) = section.rows
    plotly.graph_objects.Figure(painted({"data": figure.data, "layout": figure.layout}))
    main = [t for t in figure.data if t["mode"] == "markers" and t.get("hoverinfo") != "skip"]
    return figure, {t["name"]: (t["x"][0], t["y"][0]) for t in main}


def test_points_are_relative_seconds_and_delta_m(tmp_path, demo_maker):
    study = only_study(demo_maker(tmp_path, epochs=1))
    section = cost_section(study)
    figure, points = points_of(section)
    for name, seconds, left, right in (
        ("uniform", 2.0, 0.9646, 0.9499),
        ("mgda (exact)", 3.6, 0.9690, 0.9551),
        ("aligned-mtl (features)", 2.06, 0.9664, 0.9541),
    ):
        expected = 100 * ((0.9723 - left) / 0.9723 + (0.9590 - right) / 0.9590) / 2
        assert points[name] == (pytest.approx(seconds / 2, rel=1e-4), pytest.approx(expected, rel=1e-4))
    low, high = figure.layout["yaxis"]["range"]
    assert low > high, "top is better"
    assert "measured in the runs, which may have shared the machine" in section.text
    # MGDA on features has the least Δm (0.367), and only uniform weights are cheaper.
    assert "(uniform, mgda (features))" in section.text
    names = [t["text"][0].strip() for t in figure.data if t["mode"] == "text"]
    assert sorted(names) == ["mgda (features)", "uniform"]
    keys = {group.key for group in study.compared}
    assert all(t["meta"] in keys for t in figure.data if t["mode"] == "text"), "hidden with their points"


def test_seeds_have_their_spread(tmp_path, run_maker):
    for task in ("left", "right"):
        run_maker(tmp_path / task, tasks=(task,), single=True, final={task: 0.5}, epochs=1)
    seconds, finals = (3.0, 5.0, 4.0), (0.40, 0.45, 0.50)
    for seed in range(3):
        run_maker(tmp_path / f"u{seed}", seed=seed, epochs=1, seconds=2.0)
        final = {"left": finals[seed], "right": 0.5}
        run_maker(tmp_path / f"m{seed}", "mgda", seed=seed, final=final, epochs=1, seconds=seconds[seed])
    ((figure,),) = cost_section(only_study(tmp_path)).rows
    small, main = (t for t in figure.data if t.get("name") == "mgda (exact)")
    assert small["x"] == [1.5, 2.5, 2.0] and small["y"] == pytest.approx([10.0, 5.0, 0.0], abs=1e-9)
    assert main["error_x"]["array"] == [pytest.approx(np.std([1.5, 2.5, 2.0], ddof=1), rel=1e-4)]
    assert main["error_y"]["array"] == [pytest.approx(np.std([10.0, 5.0, 0.0], ddof=1), rel=1e-4)]


def test_a_quiet_bench_takes_the_place_of_the_runs_times(tmp_path, demo_maker):
    study = only_study(demo_maker(tmp_path, epochs=1))
    bench = {
        "uniform": {"seconds_per_step": 0.1, "relative": 1.0, "peak_memory_bytes": None},
        "mgda (exact)": {"seconds_per_step": 0.9, "relative": 9.0, "peak_memory_bytes": 3 * 2**20},
    }
    section = cost_section(replace(study, outcome={"cost": bench, "comparison": None}))
    figure, points = points_of(section)
    assert {name: x for name, (x, _) in points.items()} == {"uniform": 1.0, "mgda (exact)": 9.0}
    assert "measured apart from the training" in section.text and "shared the machine" not in section.text
    assert "for want of a cost or a result: mgda (features), aligned-mtl (exact)" in section.text
    assert figure.layout["xaxis"]["type"] == "log"
    low, high = figure.layout["xaxis"]["range"]
    assert 10**low < 1 < 9 < 10**high
    assert any("3 MiB" in t.get("hovertemplate", "") for t in figure.data)


def test_without_single_tasks_the_mean_metric(tmp_path, run_maker):
    run_maker(tmp_path / "u", final={"left": 0.9, "right": 0.8}, epochs=1, seconds=2.0)
    run_maker(tmp_path / "m", "mgda", final={"left": 0.8, "right": 0.6}, epochs=1, seconds=3.0)
    section = cost_section(only_study(tmp_path))
    figure, points = points_of(section)
    assert points == {"uniform (exact)": (1.0, 85.0), "mgda (exact)": (1.5, 70.0)}
    low, high = figure.layout["yaxis"]["range"]
    assert low < high
    assert "mean accuracy over the tasks, for want of single-task runs" in section.text


def test_without_uniform_weights_plain_seconds(tmp_path, run_maker):
    run_maker(tmp_path / "m", "mgda", final={"left": 0.8, "right": 0.6}, epochs=1, seconds=3.0)
    section = cost_section(only_study(tmp_path))
    figure, points = points_of(section)
    assert points["mgda (exact)"][0] == 0.15 and "shapes" not in figure.layout
    assert "no finished run with uniform weights" in section.text


def test_no_result_is_said(tmp_path, run_maker):
    run_maker(tmp_path / "a", finished=False, epochs=1)
    assert cost_section(only_study(tmp_path)).text.startswith("No run has finished")


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12),
    st.booleans(),
)
def test_efficient_points_by_brute_force(points, higher):
    sign = 1 if higher else -1
    kept = {points[place] for place in efficient(points, higher)}
    for cost, result in points:
        beaten = any(
            (c <= cost and sign * r >= sign * result) and (c < cost or sign * r > sign * result)
            for c, r in points
        )
        assert ((cost, result) in kept) == (not beaten)
    assert [points[place][0] for place in efficient(points, higher)] == sorted(
        points[place][0] for place in efficient(points, higher)
    )


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(-5, 5)), min_size=1, max_size=12),
    st.booleans(),
)
def test_names_that_lie_close_are_a_line_apart(points, down):
    y_range = (6.0, -6.0) if down else (-6.0, 6.0)
    given_points = [(x, y, str(number), None) for number, (x, y) in enumerate(points)]
    found = labels(given_points, ((0.0, 10.0), y_range), "@ink", 400)
    pixels = 400 / (y_range[1] - y_range[0])
    placed = [(trace["x"][0], trace["y"][0] * pixels) for trace in found]
    for number, (x, y) in enumerate(placed):
        for other_x, other_y in placed[:number]:
            assert abs(x - other_x) >= 2.99 or abs(y - other_y) >= 13.9
