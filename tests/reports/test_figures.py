"""The figures' data: valid for plotly, right numbers, nothing from outside unescaped."""

from __future__ import annotations

import json
import math

import numpy as np
import plotly.graph_objects
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detente.records import find_runs
from detente.reports.figures import _quantile, conflict_curves, log_axis, loss_curves, weight_curves
from detente.reports.groups import collect
from detente.reports.html import sections_of
from detente.reports.plane import plane_section

from .conftest import painted


def only_study(folder):
    (study,) = collect(find_runs(folder))
    return study


def figures(study):
    return [figure for section in sections_of(study) for row in section.rows for figure in row]


def test_every_figure_is_valid_for_plotly(tmp_path, demo_maker, run_maker):
    studies = [only_study(demo_maker(tmp_path / "two", seeds=(0, 1), epochs=3))]
    for experiment, tasks in (("three", list("abc")), ("many", [f"task {i}" for i in range(9)])):
        for method, gradients in (("uniform", "none"), ("aligned-mtl", "layer")):
            folder = tmp_path / experiment / method
            run_maker(folder, method, gradients, tasks=tasks, epochs=2, experiment=experiment)
        studies.append(only_study(tmp_path / experiment))
    count = 0
    for study in studies:
        for figure in figures(study):
            # Raises on any property or value plotly does not know.
            plotly.graph_objects.Figure(painted({"data": figure.data, "layout": figure.layout}))
            json.dumps([figure.data, figure.layout], allow_nan=False)
            count += 1
    assert count == (1 + 1 + 4 + 1 + 6) + (2 + 1 + 6 + 3 + 8) + (2 + 1 + 12 + 2 + 8)


def test_plane_shows_each_result_and_the_single_tasks(tmp_path, demo_maker):
    (figure,) = plane_section(only_study(demo_maker(tmp_path, epochs=1))).rows[0]
    points = {trace["name"]: (trace["x"], trace["y"]) for trace in figure.data}
    assert points["uniform"] == ([96.46], [94.99])
    assert set(points) == {
        "uniform",
        "mgda (exact)",
        "mgda (features)",
        "aligned-mtl (exact)",
        "aligned-mtl (features)",
    }
    lines = {("x" if "xref" not in shape else "y"): shape for shape in figure.layout["shapes"]}
    assert lines["x"]["x0"] == lines["x"]["x1"] == 97.23
    assert lines["y"]["y0"] == lines["y"]["y1"] == 95.9
    assert all(shape["line"]["dash"] == "dash" for shape in lines.values())
    low, high = figure.layout["xaxis"]["range"]
    assert low < 96.46 < 97.23 < high


def test_plane_over_seeds(tmp_path, demo_maker):
    (figure,) = plane_section(only_study(demo_maker(tmp_path, seeds=(0, 1, 2), epochs=1))).rows[0]
    traces = [trace for trace in figure.data if trace["name"] == "uniform"]
    assert [len(trace["x"]) for trace in traces] == [3, 1]
    assert traces[1]["error_x"]["array"] == [pytest.approx(np.std(traces[0]["x"], ddof=1), rel=1e-3)]


def test_top_right_is_better_for_errors_too(tmp_path, run_maker):
    run_maker(tmp_path / "a", epochs=1, metric=("error", False, False), final={"left": 1.0, "right": 2.0})
    run_maker(
        tmp_path / "b", "mgda", epochs=1, metric=("error", False, False), final={"left": 2.0, "right": 1.0}
    )
    section = plane_section(only_study(tmp_path))
    low, high = section.rows[0][0].layout["xaxis"]["range"]
    assert low > high
    assert "no finished single-task runs" in section.text


def test_dots_relative_to_single_tasks(tmp_path, run_maker):
    tasks = ("a", "b", "c")
    for task in tasks:
        run_maker(tmp_path / task, tasks=(task,), single=True, final={task: 0.5}, epochs=1)
    run_maker(tmp_path / "u", tasks=tasks, final={"a": 0.55, "b": 0.5, "c": 0.4}, epochs=1)
    _, figure = plane_section(only_study(tmp_path)).rows[0]
    assert figure.data[0]["x"] == [10.0, 0.0, -20.0]
    assert figure.data[0]["y"] == ["a", "b", "c"]


def test_loss_curves_show_the_records(tmp_path, run_maker):
    run_maker(tmp_path, epochs=5)
    (run,) = find_runs(tmp_path)
    figure = loss_curves(only_study(tmp_path)).rows[0][1]
    assert figure.title == "left: validation loss"
    curve, ring = figure.data
    assert curve["x"] == [1, 2, 3, 4, 5]
    assert curve["y"] == [pytest.approx(row["validation"]["left"]["loss"], rel=1e-4) for row in run.epochs]
    assert ring["x"] == run.result["selected_epochs"] == [3]


def test_weights_are_shares(tmp_path, run_maker):
    run_maker(tmp_path, "mgda", epochs=1, steps_per_epoch=10)
    (run,) = find_runs(tmp_path)
    (figure,) = weight_curves(only_study(tmp_path)).rows[0]
    expected = [row["weights"][0] / sum(row["weights"]) for row in run.steps]
    assert figure.data[-1]["y"] == [pytest.approx(value, rel=1e-4) for value in expected]


def test_many_steps_are_thinned_to_medians(tmp_path, run_maker):
    run_maker(tmp_path, "mgda", epochs=3, steps_per_epoch=100)
    (run,) = find_runs(tmp_path)
    values = [row["raw"]["minimal_cosine"] for row in run.steps]
    band, curve = conflict_curves(only_study(tmp_path)).rows[0][0].data
    assert len(curve["y"]) == 60
    assert curve["y"][0] == pytest.approx(np.median(values[:5]), rel=1e-3)
    lower, upper = np.quantile(values[:5], [0.25, 0.75])
    assert band["y"][0] == pytest.approx(lower, rel=1e-3)
    assert band["y"][-1] == pytest.approx(upper, rel=1e-3)


def test_infinite_condition_numbers_are_a_gap_and_are_said(tmp_path, run_maker):
    run_maker(tmp_path, "mgda", epochs=1, steps_per_epoch=10)
    path = tmp_path / "steps.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["raw"]["condition_number"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = conflict_curves(only_study(tmp_path))
    assert section.rows[0][1].data[-1]["y"][3] is None
    assert "In 10 % of the steps the condition number was infinite" in section.text


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.sampled_from([0.25, 0.5, 0.75]))
def test_quantiles_agree_with_numpy(values, share):
    assert math.isclose(_quantile(sorted(values), share), np.quantile(values, share), abs_tol=1e-9)


@given(st.floats(1e-6, 1e6), st.floats(1.0, 1e8))
def test_log_axis_covers_its_values(low, factor):
    ticks = log_axis(low, low * factor)["tickvals"]
    assert ticks[0] <= low * 1.001
    assert ticks[-1] * 1.001 >= low * factor
    assert len(ticks) <= 20


def test_missing_records_are_said(tmp_path, run_maker):
    run_maker(tmp_path, "mgda", epochs=0, finished=False, steps=False)
    texts = [section.text for section in sections_of(only_study(tmp_path))]
    assert "No run has finished" in texts[0]
    assert texts[1:] == [
        "No run has finished, so there is no result to hold a cost against.",
        "No epochs were recorded.",
        "No weights of tasks were recorded.",
        "No conflict measures were recorded.",
    ]


def test_names_are_escaped_for_plotly(tmp_path, run_maker):
    run_maker(tmp_path, "mgda", tasks=("<b>x</b>", "y"), label="<a href='//evil'>", epochs=1)
    text = json.dumps([[figure.data, figure.layout] for figure in figures(only_study(tmp_path))])
    assert "<b>" not in text
    assert "<a href" not in text
    assert "&lt;b&gt;x" in text
