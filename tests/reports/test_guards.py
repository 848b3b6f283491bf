"""Estimated errors, refused steps, kept ranks and searches over the epochs: drawn as recorded."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects
import pytest

from detente.records import find_runs
from detente.reports.figures import conflict_curves
from detente.reports.groups import collect
from detente.reports.guards import guards_section

from .conftest import painted


def only_study(folder):
    (study,) = collect(find_runs(folder))
    return study


def figures_of(section):
    found = {figure.title: figure for row in section.rows for figure in row}
    for figure in found.values():
        plotly.graph_objects.Figure(painted({"data": figure.data, "layout": figure.layout}))
    return found


def adaptive(epoch):
    errors = {"left": 0.1 / epoch, "right": 4.0 / epoch} if epoch > 1 else {}
    return {"method": {"refused_share": 0.25 * epoch, "epsilon_squared": errors}, "refused": 3}


def test_estimated_errors_and_refused_shares_are_those_of_the_record(tmp_path, run_maker):
    run_maker(tmp_path / "a", "adaptive-mgda", epochs=4, epoch_more=adaptive)
    run_maker(tmp_path / "u", epochs=4)
    section = guards_section(only_study(tmp_path))
    found = figures_of(section)
    assert list(found) == ["left: estimated ε̂²", "right: estimated ε̂²", "Refused steps: share of the epoch's"]
    (left,) = found["left: estimated ε̂²"].data
    assert left["x"] == [2, 3, 4], "nothing before the first estimate"
    assert left["y"] == pytest.approx([0.05, 0.1 / 3, 0.025], rel=1e-4)
    (refused,) = found["Refused steps: share of the epoch's"].data
    # What the guard tells counts, not the 3 of 20 steps of the loop's own count.
    assert refused["y"] == [0.25, 0.5, 0.75, 1.0]
    assert refused["name"] == "adaptive-mgda (exact)"
    assert "Line search" not in section.text


def test_seeds_have_a_mean_and_a_band(tmp_path, run_maker):
    for seed, factor in enumerate((1.0, 3.0)):

        def told(epoch, factor=factor):
            return {"method": {"epsilon_squared": {"left": factor * epoch, "right": 1.0}}}

        run_maker(tmp_path / str(seed), "adaptive-mgda", seed=seed, epochs=3, epoch_more=told)
    band, line = figures_of(guards_section(only_study(tmp_path)))["left: estimated ε̂²"].data
    assert line["y"] == [2.0, 4.0, 6.0]
    assert band["y"] == [1.0, 2.0, 3.0, 9.0, 6.0, 3.0]


def test_steps_refused_without_a_guard_are_counted_by_epoch(tmp_path, run_maker):
    run_maker(
        tmp_path, "nash-mtl", epochs=3, steps_per_epoch=10, epoch_more=lambda epoch: {"refused": epoch - 1}
    )
    (figure,) = figures_of(guards_section(only_study(tmp_path))).values()
    assert figure.data[0]["y"] == [0.0, 0.1, 0.2]


def test_the_mean_over_blocks(tmp_path, run_maker):
    blocks = [{"epsilon_squared": {"left": 1.0}}, {"epsilon_squared": {"left": 4.0, "right": 2.0}}]
    run_maker(tmp_path, "adaptive-mgda", epochs=1, epoch_more=lambda epoch: {"method": {"blocks": blocks}})
    found = figures_of(guards_section(only_study(tmp_path)))
    assert [found[f"{task}: estimated ε̂²"].data[0]["y"] for task in ("left", "right")] == [[2.5], [2.0]]


def test_kept_rank_and_zero_directions_from_the_steps(tmp_path, run_maker):
    run_maker(
        tmp_path / "a",
        "aligned-mtl",
        epochs=2,
        steps_per_epoch=4,
        step_more=lambda step: {"kept_rank": 1 if step in (2, 5, 6) else 2},
    )
    run_maker(
        tmp_path / "m",
        "mgda",
        epochs=2,
        steps_per_epoch=4,
        step_more=lambda step: {"status": "stationary" if step == 8 else "ok"},
    )
    found = figures_of(guards_section(only_study(tmp_path)))
    assert found["Kept rank of the gradients: mean of the recorded steps"].data[0]["y"] == [1.75, 1.5]
    assert found["Steps with a zero direction: share of the recorded"].data[0]["y"] == [0.0, 0.25]
    assert len(found) == 2


def test_searches(tmp_path, run_maker):
    told = {"steps": 20, "trials": 30, "first": 15, "capped": 1, "checks": 0, "failures": 0}
    run_maker(tmp_path, "mgda", epochs=2, epoch_more=lambda epoch: {"search": told})
    found = figures_of(guards_section(only_study(tmp_path)))
    assert {title: figure.data[0]["y"] for title, figure in found.items()} == {
        "Line search: trials per step": [1.5, 1.5],
        "Line search: steps that took the first length": [0.75, 0.75],
        "Line search: steps without a length": [0.05, 0.05],
    }


def test_nothing_told_is_no_section(tmp_path, run_maker):
    run_maker(tmp_path, "mgda", epochs=2)
    assert guards_section(only_study(tmp_path)) is None


def test_ratios_of_lengths_of_three_tasks(tmp_path, run_maker):
    run_maker(tmp_path, "mgda", tasks=("a", "b", "c"), epochs=1, steps_per_epoch=10)
    (run,) = find_runs(tmp_path)
    figures = conflict_curves(only_study(tmp_path)).rows[0]
    assert figures[3].title == "longest over shortest gradient, as given"
    norms = [np.array(row["raw"]["norms"]) for row in run.steps]
    assert figures[3].data[-1]["y"] == pytest.approx([n.max() / n.min() for n in norms], rel=1e-4)
