"""The table: numbers by hand, what is missing in words."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest

from detente.records import find_runs
from detente.reports import print_table, results_table, rich_table
from detente.reports.groups import collect
from detente.reports.tables import show_signed, table_of


def only_table(folder):
    (table,) = results_table(find_runs(folder))
    return table


def cells(table, name):
    (row,) = [row for row in table.rows if row.group.name == name]
    return dict(zip([column.key for column in table.columns], row.cells, strict=True))


def test_numbers_by_hand(tmp_path, demo_maker):
    table = only_table(demo_maker(tmp_path, epochs=2))
    assert [row.group.name for row in table.rows] == [
        "single task: left",
        "single task: right",
        "uniform",
        "mgda (exact)",
        "mgda (features)",
        "aligned-mtl (exact)",
        "aligned-mtl (features)",
    ]
    uniform = cells(table, "uniform")
    assert uniform["left accuracy"].text == "96.46"
    assert uniform["right accuracy"].text == "94.99"
    by_hand = 100 * ((0.9723 - 0.9646) / 0.9723 + (0.9590 - 0.9499) / 0.9590) / 2
    assert uniform["delta_m"].value == pytest.approx(by_hand)
    assert uniform["delta_m"].text == "+0.87"
    exact = cells(table, "mgda (exact)")
    assert exact["method"].text == "mgda"
    assert exact["gradients"].text == "exact"
    assert exact["relative_seconds"].text == "1.80"
    assert exact["seconds_per_epoch"].text == "3.6"
    assert exact["peak_memory_bytes"].text == "600 MiB"
    single = cells(table, "single task: left")
    assert single["right accuracy"].text == ""
    assert single["delta_m"].text == ""
    assert "seeds" not in [column.key for column in table.columns], "one of each needs no column"


def test_leading_numbers_are_those_of_several_tasks(tmp_path, demo_maker):
    table = only_table(demo_maker(tmp_path, epochs=1))
    leading = {
        column.key: [row.group.name for row in table.rows if row.cells[index].best]
        for index, column in enumerate(table.columns)
    }
    assert leading["left accuracy"] == ["mgda (exact)"], "the single task has more, but is no competitor"
    assert leading["right accuracy"] == ["aligned-mtl (exact)"]
    assert leading["delta_m"] == ["mgda (exact)", "mgda (features)"], "equal as shown"
    assert leading["peak_memory_bytes"] == []


def test_means_over_seeds(tmp_path, demo_maker):
    table = only_table(demo_maker(tmp_path, seeds=(0, 1, 2), epochs=1))
    assert len(table.rows) == 7
    uniform = cells(table, "uniform")
    assert uniform["left accuracy"].text == "96.46 ± 0.06"
    assert uniform["seeds"].text == "3"
    assert "± 0.0" in uniform["delta_m"].text
    assert any("standard deviation" in note for note in table.notes)


def test_lower_is_better_without_percent(tmp_path, run_maker):
    errors = ("error", False, False)
    for task, value in (("left", 2.0), ("right", 4.0)):
        run_maker(tmp_path / task, tasks=(task,), single=True, metric=errors, final={task: value}, epochs=1)
    run_maker(tmp_path / "a", metric=errors, final={"left": 1.8, "right": 4.4}, epochs=1)
    run_maker(tmp_path / "b", "mgda", metric=errors, final={"left": 1.8, "right": 4.0}, epochs=1)
    table = only_table(tmp_path)
    assert cells(table, "uniform (exact)")["delta_m"].text == "0.00"
    assert cells(table, "mgda (exact)")["delta_m"].text == "−5.00"
    assert cells(table, "mgda (exact)")["right error"].text == "4"
    assert cells(table, "mgda (exact)")["right error"].best


def test_missing_things_are_said(tmp_path, run_maker):
    run_maker(tmp_path / "done", "mgda", epochs=1, final={"left": None})
    run_maker(tmp_path / "open", "cagrad", epochs=3, finished=False)
    table = only_table(tmp_path)
    assert cells(table, "mgda (exact)")["left accuracy"].text == "–"
    assert cells(table, "mgda (exact)")["delta_m"].text == "–"
    assert cells(table, "cagrad (exact)")["seeds"].text == "0 + 1 unfinished"
    assert any("no finished single-task run" in note for note in table.notes)
    assert any("No finished run with uniform weights" in note for note in table.notes)


def test_a_baseline_that_is_zero_is_said_not_divided_by(tmp_path, run_maker):
    for task in ("left", "right"):
        run_maker(tmp_path / task, tasks=(task,), single=True, final={task: 0.0}, epochs=1)
    run_maker(tmp_path / "a", epochs=1)
    table = only_table(tmp_path)
    assert cells(table, "uniform (exact)")["delta_m"].text == "–"
    assert any("baseline" in note for note in table.notes)


def test_runs_under_other_settings_are_not_averaged(tmp_path, run_maker):
    run_maker(tmp_path / "a", "mgda", epochs=1, settings={"learning_rate": 0.1}, final={"left": 0.9})
    run_maker(tmp_path / "b", "mgda", epochs=1, settings={"learning_rate": 0.2}, final={"left": 0.8}, seed=1)
    run_maker(
        tmp_path / "c", "mgda", epochs=1, settings={"learning_rate": 0.2, "out": "x"}, final={"left": 0.7}
    )
    table = only_table(tmp_path)
    assert cells(table, "mgda (exact), learning_rate 0.1")["left accuracy"].text == "90.00"
    assert cells(table, "mgda (exact), learning_rate 0.2")["left accuracy"].value == pytest.approx(0.75)
    styles = {row.group.style for row in table.rows}
    assert len(styles) == 2, "the same colour, another shape"
    assert len({style.colour for style in styles}) == 1


def test_other_data_are_other_settings(tmp_path, run_maker):
    run_maker(tmp_path / "a", "mgda", epochs=1)
    run_maker(tmp_path / "b", "mgda", epochs=1, seed=1)
    for name, checksum in (("a", "x"), ("b", "y")):
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"problem": {"data": checksum}}))
    assert len(only_table(tmp_path).rows) == 2


def with_data(folder, **data):
    """Runs that say what they learned from."""
    for path in folder.glob("*/config.json"):
        described = {"data": {"name": "digits", **data}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"problem": described}))


def test_a_checksum_names_only_what_nothing_else_tells_apart(tmp_path, run_maker):
    kinds = {"a": (10, "0123456789abcdef"), "b": (20, "fedcba9876543210"), "c": (20, "aaaaaaaaaaaaaaaa")}
    for name, (count, checksum) in kinds.items():
        run_maker(tmp_path / name / "run", "mgda", epochs=1)
        with_data(tmp_path / name, train=count, sha256=checksum)
    assert sorted(row.group.name for row in only_table(tmp_path).rows) == [
        "mgda (exact), train 10",
        "mgda (exact), train 20, sha256 aaaaaaaa",
        "mgda (exact), train 20, sha256 fedcba98",
    ]


def test_baselines_learned_from_the_same_data(tmp_path, run_maker):
    for name, value in (("small", 0.5), ("large", 0.8), ("alone", None)):
        for task in ("left", "right") if value else ():
            run_maker(tmp_path / name / task, tasks=(task,), single=True, final={task: value}, epochs=1)
        final = {"left": 0.4, "right": 0.4}
        run_maker(tmp_path / name / "m", "mgda", epochs=1, settings={"learning_rate": 0.3}, final=final)
        with_data(tmp_path / name, source=name)
    table = only_table(tmp_path)
    found = {row.group.name: row.cells[4].text for row in table.rows if not row.group.single}
    assert [column.key for column in table.columns][4] == "delta_m"
    assert found == {
        "mgda (exact), source small": "+20.00",
        "mgda (exact), source large": "+50.00",
        "mgda (exact), source alone": "–",
    }
    assert any("learned from other data" in note for note in table.notes)


def test_labels_tell_contenders_apart_that_agree_in_all_else(tmp_path, run_maker):
    # A sweep whose best fixed weights are equal ones runs them twice: as the method, and as the reference.
    for label in ("static", "tuned scalarisation"):
        for seed, value in enumerate((0.8, 0.9)):
            run_maker(
                tmp_path / f"{label}{seed}", "static", label=label, seed=seed, epochs=1, final={"left": value}
            )
    table = only_table(tmp_path)
    assert [row.group.name for row in table.rows] == ["static", "tuned scalarisation"]
    assert cells(table, "static")["left accuracy"].text == "85.00 ± 7.07"
    assert not any("same seed" in note for note in table.notes)


def test_options_tell_runs_apart(tmp_path, run_maker):
    run_maker(tmp_path / "a", "cagrad", epochs=1, options={"c": 0.2})
    run_maker(tmp_path / "b", "cagrad", epochs=1, options={"c": 0.4})
    assert [row.group.name for row in only_table(tmp_path).rows] == [
        "cagrad (exact), c 0.2",
        "cagrad (exact), c 0.4",
    ]


def test_baselines_are_those_of_the_same_settings(tmp_path, run_maker):
    for rate, value in ((0.1, 0.5), (0.2, 1.0)):
        for task in ("left", "right"):
            run_maker(
                tmp_path / f"{task}{rate}",
                tasks=(task,),
                single=True,
                final={task: value},
                epochs=1,
                settings={"learning_rate": rate},
            )
    run_maker(tmp_path / "a", epochs=1, settings={"learning_rate": 0.1}, final={"left": 0.5, "right": 0.5})
    run_maker(tmp_path / "b", "mgda", epochs=1, settings={"learning_rate": 0.3})
    table = only_table(tmp_path)
    assert cells(table, "uniform (exact)")["delta_m"].text == "0.00"
    assert cells(table, "mgda (exact)")["delta_m"].text == "–"
    assert any("none with the same settings" in note for note in table.notes)


def test_the_same_seed_twice_is_said(tmp_path, run_maker):
    run_maker(tmp_path / "a", epochs=1)
    run_maker(tmp_path / "b", epochs=1)
    assert any("same seed" in note for note in only_table(tmp_path).notes)


def test_many_tasks_show_their_mean(tmp_path, run_maker):
    tasks = [f"task {i}" for i in range(8)]
    final = {task: 0.5 + 0.05 * i for i, task in enumerate(tasks)}
    run_maker(tmp_path / "a", tasks=tasks, epochs=1, final=final)
    table = only_table(tmp_path)
    assert cells(table, "uniform (exact)")["mean"].value == pytest.approx(0.675)


def test_experiments_have_tables_of_their_own(tmp_path, run_maker):
    run_maker(tmp_path / "a", epochs=1)
    run_maker(tmp_path / "b", epochs=1, experiment="another")
    assert [table.experiment for table in results_table(find_runs(tmp_path))] == ["another", "multimnist"]
    assert results_table([]) == []


def test_only_single_tasks_is_a_study_too(tmp_path, run_maker):
    run_maker(tmp_path / "left", tasks=("left",), single=True, epochs=1)
    (study,) = collect(find_runs(tmp_path))
    assert cells(table_of(study), "single task: left")["left accuracy"].text == "96.50"


def test_records_make_a_data_frame(tmp_path, demo_maker):
    import pandas as pd

    frame = pd.DataFrame(only_table(demo_maker(tmp_path, epochs=1)).records())
    assert frame["left accuracy"].max() == pytest.approx(0.9723)
    assert list(frame["gradients"])[:3] == ["not needed", "not needed", "not needed"]


def test_terminal_table_never_cuts_a_number(tmp_path, demo_maker):
    from rich.console import Console

    table = only_table(demo_maker(tmp_path, seeds=(0, 1, 2), epochs=1))
    for width in (60, 80, 140):
        console = Console(width=width, file=io.StringIO())
        console.print(rich_table(table, width))
        text = console.file.getvalue()
        assert "+0.87" in text
        assert "96.46" in text
        assert "…" not in text
    assert "600 MiB" in text


def test_print_table(tmp_path, demo_maker, capsys):
    print_table([demo_maker(tmp_path, epochs=1)])
    shown = capsys.readouterr().out
    assert "aligned-mtl" in shown
    assert "negative better" in shown


def test_signs():
    assert [show_signed(value) for value in (0.004, -0.004, 1.0, -2.345)] == [
        "0.00",
        "0.00",
        "+1.00",
        "−2.35",
    ]


def test_costs_measured_after_a_sweep_take_the_place_of_the_runs_times(tmp_path, demo_maker):
    demo_maker(tmp_path)
    (study,) = collect(find_runs(tmp_path))
    name = study.compared[-1].name
    cost = {name: {"seconds_per_step": 0.0123, "relative": 1.456, "peak_memory_bytes": 3 * 2**20}}
    table = table_of(replace(study, outcome={"cost": cost, "comparison": None, "front": None}))
    keys = [column.key for column in table.columns]
    assert "seconds_per_epoch" not in keys
    places = [keys.index(key) for key in ("relative_seconds", "seconds_per_step", "peak_memory_bytes")]
    rows = {row.group.name: [row.cells[place].text for place in places] for row in table.rows}
    assert rows.pop(name) == ["1.46", "12.3", "3 MiB"]
    assert set(map(tuple, rows.values())) == {("–",) * 3}, (
        "what was not measured is missing, not taken from runs"
    )
    assert any("measured when the sweep was done" in note for note in table.notes)
    assert not any("whole process" in note for note in table.notes)
