"""Figures 4 and 5 of Hervella et al. 2024 from stored runs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import plotly.graph_objects
import pytest
from PIL import Image

from detente.records import find_runs, read_run
from detente.reports import balance_of, balance_png, build_report
from detente.reports.contributions import balance_section
from detente.reports.groups import collect

from .conftest import painted


def record(step, tasks, gradients, contributions, layers=("a", "b"), sizes=(3, 1)):
    return {
        "step": step,
        "balance": {
            "tasks": list(tasks),
            "layers": list(layers),
            "sizes": list(sizes),
            "gradients": gradients,
            "contributions": contributions,
        },
    }


def test_means_over_steps_layers_and_runs_by_hand():
    one = SimpleNamespace(
        path="one",
        steps=[
            record(1, ["x"], [[1.0], [5.0]], [[0.1], [0.5]]),
            {"step": 2, "balance": None},
            record(3, ["x", "y"], [[3.0, 2.0], [7.0, 2.0]], [[0.3, 0.2], [0.7, 0.2]]),
        ],
    )
    other = SimpleNamespace(
        path="other",
        steps=[
            record(1, ["x"], [[3.0], [5.0]], [[0.1], [0.5]]),
            record(3, ["y", "x"], [[4.0, 3.0], [2.0, 7.0]], [[0.2, 0.3], [0.2, 0.7]]),
            record(4, ["x", "y"], [[9.0, 9.0]] * 2, [[9.0, 9.0]] * 2),
        ],
    )
    found = balance_of([one, other])
    assert found.tasks == ("x", "y") and found.steps.tolist() == [1, 3]
    # Runs first: step 1 has x = (2, 5), step 3 has x = (3, 7) and y = (3, 2).
    np.testing.assert_allclose(found.by_layer("gradients"), [[2.5, 1.5], [6.0, 1.0]])
    # Three entries in layer a, one in layer b.
    np.testing.assert_allclose(found.by_step("gradients"), [[(3 * 2 + 5) / 4, 0], [(9 + 7) / 4, (9 + 2) / 4]])
    np.testing.assert_allclose(found.by_step("contributions")[0], [0.2, 0.0])


def test_runs_without_a_balance_and_runs_of_other_layers():
    assert balance_of([SimpleNamespace(path="p", steps=[{"step": 1}])]) is None
    one = SimpleNamespace(path="p", steps=[record(1, ["x"], [[1.0]] * 2, [[1.0]] * 2)])
    other = SimpleNamespace(path="q", steps=[record(1, ["x"], [[1.0]], [[1.0]], layers=("a",), sizes=(3,))])
    with pytest.raises(ValueError, match="q: step 1 recorded the balance of other tasks or layers"):
        balance_of([one, other])


def test_the_report_shows_them_where_they_were_recorded(tmp_path, run_maker):
    for seed in (0, 1):
        run_maker(tmp_path / f"seen-{seed}", seed=seed, balance=True, epochs=2)
    run_maker(tmp_path / "unseen", "mgda", epochs=2)
    (study,) = collect(find_runs(tmp_path))
    section = balance_section(study)
    figures = [figure for row in section.rows for figure in row]
    assert [len(figure.data) for figure in figures] == [2, 2, 2, 2, 1, 1]
    by_layer = figures[1].data[1]  # contributions of the second task
    mean = np.mean([1e-3 / step for step in range(1, 41)])
    np.testing.assert_allclose(by_layer["y"], [0.1 * mean, 0.2 * mean, 0.3 * mean], rtol=1e-4)
    assert by_layer["x"][2] == "&lt;scale&gt;"
    for figure in figures:
        plotly.graph_objects.Figure(painted({"data": figure.data, "layout": figure.layout}))
    page = build_report([tmp_path], tmp_path / "report.html").read_text()
    assert "Contributions of the tasks" in page
    other = build_report([tmp_path / "unseen"], tmp_path / "other.html").read_text()
    assert "Contributions of the tasks" not in other


def heat_maps(folder):
    (study,) = collect(find_runs(folder))
    return [f for row in balance_section(study).rows for f in row if f.data[0]["type"] == "heatmap"]


def test_the_heat_map_shows_shares_of_the_records(tmp_path, run_maker):
    run_maker(tmp_path, "mgda", balance=True, epochs=2, tasks=("x", "y", "z"))
    pulls, contributions = heat_maps(tmp_path)
    assert (pulls.title, contributions.title) == (
        "mgda (exact): share of each task, mean |gradient|",
        "mgda (exact): share of each task, mean |contribution|",
    )
    (run,) = find_runs(tmp_path)
    for figure, kind in ((pulls, "gradients"), (contributions, "contributions")):
        trace = figure.data[0]
        for layer in range(3):
            means = [np.mean([row["balance"][kind][layer][task] for row in run.steps]) for task in range(3)]
            expected = 100 * np.array(means) / sum(means)
            np.testing.assert_allclose(trace["z"][layer], expected, rtol=1e-4)
        assert (trace["zmin"], trace["zmax"], trace["texttemplate"]) == (0, 100.0, "%{z:.0f}")
        assert figure.layout["yaxis"]["ticktext"] == ["conv.weight", "conv.bias", "&lt;scale&gt;"]
        assert trace["customdata"][2][1] == "&lt;scale&gt;, y"


def test_many_tasks_have_heat_maps_and_no_lines(tmp_path, run_maker):
    tasks = [f"task {i}" for i in range(9)]
    run_maker(tmp_path, "mgda", balance=True, epochs=5, tasks=tasks)
    (study,) = collect(find_runs(tmp_path))
    found = [figure for row in balance_section(study).rows for figure in row]
    assert len(found) == len(heat_maps(tmp_path)) == 4
    over_steps, by_layer = found[0].data[0], found[2].data[0]
    assert found[0].layout["xaxis"]["title"]["text"] == "step"
    assert np.shape(over_steps["z"]) == (9, 60) and np.shape(by_layer["z"]) == (9, 3)
    # The tasks pull as 1, 1/10, 1/100 and so on in every layer.
    shares = 100 * 10.0 ** -np.arange(9) / (10.0 ** -np.arange(9)).sum()
    np.testing.assert_allclose(np.array(over_steps["z"])[:, 7], shares, rtol=1e-3)
    np.testing.assert_allclose(np.array(by_layer["z"])[:, 1], shares, rtol=1e-3)
    assert over_steps["zmax"] == pytest.approx(shares[0], rel=1e-3)


def test_a_damaged_balance_is_named_and_does_not_stop_the_report(tmp_path, run_maker, monkeypatch):
    run_maker(tmp_path / "run", balance=True, epochs=1)
    file = tmp_path / "run" / "steps.jsonl"
    file.write_text(file.read_text().replace('"sizes"', '"siz"'))
    (study,) = collect(find_runs(tmp_path))
    section = balance_section(study)
    assert not section.rows and "cannot be read" in section.text and "sizes" in section.text
    assert build_report([tmp_path], tmp_path / "report.html").exists()


def test_the_picture_for_paper_or_page(tmp_path, run_maker):
    run_maker(tmp_path / "runs" / "seen", balance=True, epochs=1)
    runs = list(find_runs(tmp_path / "runs"))
    for over in ("layers", "steps"):
        with Image.open(balance_png(runs, tmp_path / "new" / f"{over}.png", over=over)) as picture:
            assert picture.width > 300 and len(set(picture.convert("L").tobytes())) > 20
    with pytest.raises(ValueError, match="choose layers or steps"):
        balance_png(runs, tmp_path / "x.png", over="epochs")
    run_maker(tmp_path / "unseen", epochs=1)
    with pytest.raises(ValueError, match="--balance"):
        balance_png([read_run(tmp_path / "unseen")], tmp_path / "x.png")
