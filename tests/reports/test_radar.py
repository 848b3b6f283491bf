"""The radar of many tasks: what it draws, on which scale, and which methods it shows at first."""

from __future__ import annotations

import plotly.graph_objects
import pytest

from detente.records import find_runs
from detente.reports.groups import collect
from detente.reports.plane import plane_section

from .conftest import painted

TASKS = ("a", "b", "c")


def section_of(folder):
    (study,) = collect(find_runs(folder))
    return study, plane_section(study)


def singles(run_maker, folder, values, **more):
    for task, value in values.items():
        run_maker(folder / task, tasks=(task,), single=True, final={task: value}, epochs=1, **more)


def test_spokes_are_changes_against_the_single_tasks(tmp_path, run_maker):
    singles(run_maker, tmp_path, {"a": 0.5, "b": 0.4, "c": 0.8})
    for seed, values in enumerate(({"a": 0.55, "b": 0.4, "c": 0.6}, {"a": 0.57, "b": 0.4, "c": 0.6})):
        run_maker(tmp_path / f"u{seed}", tasks=TASKS, seed=seed, final=values, epochs=1)
    _, section = section_of(tmp_path)
    radar, dots = section.rows[0]
    polygon, ring = radar.data
    # (0.56 - 0.5) / 0.5, 0, (0.6 - 0.8) / 0.8; closed at the first spoke.
    assert polygon["r"] == [12.0, 0.0, -25.0, 12.0]
    assert polygon["theta"] == [0.0, 120.0, 240.0, 0.0]
    assert polygon["text"] == ["a", "b", "c", "a"]
    assert set(ring["r"]) == {0.0} and ring["line"]["color"] == "@single"
    assert dots.data[0]["x"] == polygon["r"][:3]
    assert "against the network trained for that task alone (the dashed ring)" in section.text
    assert radar.shown is None, "one method needs no buttons"


def test_outward_is_better_for_errors(tmp_path, run_maker):
    error = {"metric": ("error", False, False)}
    singles(run_maker, tmp_path, dict.fromkeys(TASKS, 2.0), **error)
    run_maker(tmp_path / "u", tasks=TASKS, final={"a": 1.0, "b": 3.0, "c": 2.0}, epochs=1, **error)
    _, section = section_of(tmp_path)
    assert section.rows[0][0].data[0]["r"] == [50.0, -50.0, 0.0, 50.0]


@pytest.mark.parametrize("higher", [True, False])
def test_without_single_tasks_from_the_worst_to_the_best(tmp_path, run_maker, higher):
    finals = {"uniform": (1.0, 5.0, 2.0), "mgda": (3.0, 1.0, 2.0), "cagrad": (2.0, 2.0, 2.0)}
    for method, values in finals.items():
        run_maker(
            tmp_path / method,
            method,
            tasks=TASKS,
            final=dict(zip(TASKS, values, strict=True)),
            epochs=1,
            metric=("score", higher, False),
        )
    study, section = section_of(tmp_path)
    radii = {trace["name"]: trace["r"][:3] for trace in section.rows[0][0].data}
    expected = {"uniform": [0.0, 1.0], "mgda": [1.0, 0.0], "cagrad": [0.5, 0.25]}
    for group in study.compared:
        flipped = [x if higher else 1 - x for x in expected[group.method]]
        assert radii[group.name] == [*flipped, 1.0], "all are equal in the third task"
    assert "scaled from the worst (0) to the best (1) method here" in section.text


def test_few_of_fifteen_are_shown_and_the_others_are_there(tmp_path, run_maker):
    names = [f"method-{number:02}" for number in range(14)]
    singles(run_maker, tmp_path, dict.fromkeys(TASKS, 0.5))
    for number, name in enumerate(names):
        final = dict.fromkeys(TASKS, 0.4 + 0.01 * number)
        run_maker(tmp_path / name, name, tasks=TASKS, final=final, epochs=1)
    run_maker(tmp_path / "u", tasks=TASKS, final=dict.fromkeys(TASKS, 0.3), epochs=1)
    study, section = section_of(tmp_path)
    radar = section.rows[0][0]
    by_key = {group.key: group.method for group in study.groups}
    assert {by_key[key] for key in radar.shown} == {"uniform", *names[-4:]}, "the best, and the opponent"
    assert sum("meta" in trace for trace in radar.data) == 15
    assert "show and hide all 15" in section.text
    assert "method-13 (exact)" in section.text and "method-09 (exact)" not in section.text


def test_a_task_without_a_result_is_a_gap(tmp_path, run_maker):
    run_maker(tmp_path / "u", tasks=TASKS, final={"a": 0.3, "b": None, "c": 0.5}, epochs=1)
    run_maker(tmp_path / "m", "mgda", tasks=TASKS, final={"a": 0.4, "b": 0.4, "c": 0.4}, epochs=1)
    _, section = section_of(tmp_path)
    radii = {trace["name"]: trace["r"] for trace in section.rows[0][0].data}
    assert radii["uniform (exact)"] == [0.0, None, 1.0, 0.0]


def test_long_and_wicked_names_stay_readable_and_escaped(tmp_path, run_maker):
    tasks = ("human parts and faces", "<b>x</b>", "abcdefghijklmnopqrstuvwxyzabcdef", "x_1")
    run_maker(tmp_path / "u", tasks=tasks, epochs=1)
    _, section = section_of(tmp_path)
    radar = section.rows[0][0]
    assert radar.layout["polar"]["angularaxis"]["ticktext"] == [
        "human parts<br>and faces",
        "&lt;b&gt;x&lt;/b&gt;",
        "abcdefghijkl<br>mnopqrstuvw…",
        "x_1",
    ]
    plotly.graph_objects.Figure(painted({"data": radar.data, "layout": radar.layout}))


def test_two_tasks_and_one_have_none(tmp_path, run_maker):
    run_maker(tmp_path / "two" / "u", epochs=1)
    run_maker(tmp_path / "one" / "u", tasks=("a",), epochs=1)
    for folder in ("two", "one"):
        _, section = section_of(tmp_path / folder)
        kinds = {trace["type"] for row in section.rows for figure in row for trace in figure.data}
        assert kinds == {"scatter"}
