"""Published rows beside the runs: as printed, with the Δm that rounding allows, apart from ours."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from detente.experiments import find
from detente.records import find_runs
from detente.reports import build_report
from detente.reports.groups import collect
from detente.reports.plane import plane_section
from detente.reports.published import delta_m_of, departures
from detente.reports.tables import table_of

SETTINGS = {"epochs": 100, "size": 28, "loss": "softmax"}
FULL = {"settings": SETTINGS, "problem": {"data": {"counts": {"train": 55_000}}}}


@dataclass(frozen=True)
class Row:
    """A published row that is not of an experiment."""

    method: str
    metrics: dict[str, dict[str, float]]
    source: str = "A paper, Table 1"
    protocol: str = ""
    single: bool = False
    decimals: dict[str, dict[str, int]] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)


def demo(demo_maker, tmp_path, **more):
    (study,) = collect(find_runs(demo_maker(tmp_path, epochs=1, steps=False, samples=False, **more)))
    return replace(study, published=tuple(find("multimnist").published))


def test_the_table_has_them_as_printed_and_not_among_ours(tmp_path, demo_maker):
    study = demo(demo_maker, tmp_path, **FULL)
    table = table_of(study)
    place = {column.key: number for number, column in enumerate(table.columns)}
    texts = {line.name: [cell.text for cell in line.cells] for line in table.published}
    assert list(texts) == ["single task", "uniform", "uncertainty", "GradNorm", "MGDA-UB"]
    shown = {name: (row[place["left accuracy"]], row[place["right accuracy"]]) for name, row in texts.items()}
    # The facts of the paper: accuracy of the left and of the right digit in percent.
    assert shown == {
        "single task": ("97.23", "95.90"),
        "uniform": ("96.46", "94.99"),
        "uncertainty": ("96.47", "95.29"),
        "GradNorm": ("96.27", "94.84"),
        "MGDA-UB": ("97.26", "95.90"),
    }
    assert texts["single task"][place["delta_m"]] == ""
    assert len(table.rows) == 7 and len(table.records()) == 7
    assert table.published[0].heading == (
        "Published: Sener & Koltun 2018, table of section 4.1 (60 000 composites, 100 epochs)"
    )
    assert departures(study) == []


@pytest.mark.parametrize(("method", "left", "right"), [("uniform", 96.46, 94.99), ("MGDA-UB", 97.26, 95.90)])
def test_the_interval_holds_every_unrounded_value(tmp_path, demo_maker, method, left, right):
    study = demo(demo_maker, tmp_path)
    row = next(row for row in study.published if row.method == method)
    found = delta_m_of(study, row)
    ends = []
    for d_left in (-0.005, 0.005):
        for d_right in (-0.005, 0.005):
            for b_left in (-0.005, 0.005):
                for b_right in (-0.005, 0.005):
                    changes = (
                        (97.23 + b_left - left - d_left) / (97.23 + b_left),
                        (95.90 + b_right - right - d_right) / (95.90 + b_right),
                    )
                    ends.append(100 * sum(changes) / 2)
    assert (found.low, found.high) == (pytest.approx(min(ends), abs=1e-9), pytest.approx(max(ends), abs=1e-9))


def test_other_conditions_are_told(tmp_path, demo_maker):
    study = demo(demo_maker, tmp_path, settings={"size": 28, "loss": "sigmoid"})
    assert departures(study) == [
        "epochs 1 (published: 100)",
        "loss sigmoid (published: softmax)",
        "train not recorded (published: 55000)",
    ]
    table = table_of(study)
    assert table.published[0].heading.startswith("Published, full protocol: Sener & Koltun 2018")
    assert any("do not compare: epochs 1 (published: 100)" in note for note in table.notes)


def test_the_plane_has_hollow_marks_within_its_axes(tmp_path, demo_maker):
    section = plane_section(demo(demo_maker, tmp_path, **FULL))
    ((figure,),) = section.rows
    marks = {t["name"]: (t["x"][0], t["y"][0]) for t in figure.data if "(published)" in t.get("name", "")}
    assert marks["uniform (published)"] == (96.46, 94.99) and marks["MGDA-UB (published)"] == (97.26, 95.9)
    for name, values in (
        ("xaxis", [x for x, _ in marks.values()]),
        ("yaxis", [y for _, y in marks.values()]),
    ):
        low, high = figure.layout[name]["range"]
        assert low < min(values) and max(values) < high
    symbols = {t["marker"]["symbol"] for t in figure.data if "(published)" in t.get("name", "")}
    assert symbols == {"diamond-open"}
    assert "Hollow grey diamonds: Published: Sener & Koltun 2018, table of section 4.1" in section.text


def test_results_far_away_do_not_squeeze_the_plane(tmp_path, run_maker):
    for number, method in enumerate(("uniform", "mgda")):
        final = {"left": 0.30 + 0.01 * number, "right": 0.30}
        run_maker(tmp_path / method, method, epochs=1, final=final)
    (study,) = collect(find_runs(tmp_path))
    section = plane_section(replace(study, published=tuple(find("multimnist").published)))
    ((figure,),) = section.rows
    assert not any("(published)" in t.get("name", "") for t in figure.data)
    assert figure.layout["xaxis"]["range"][1] < 35
    assert "published results lie far outside this plane; they stand in the table" in section.text


def test_without_a_single_task_row_there_is_no_interval(tmp_path, demo_maker):
    study = demo(demo_maker, tmp_path)
    row = Row("theirs", {"left": {"accuracy": 0.5}})
    study = replace(study, published=(row, Row("another", {"left": {"error": 1.0}})))
    table = table_of(study)
    assert [line.name for line in table.published] == ["theirs"], "the other one has no metric of ours"
    assert delta_m_of(study, row) is None
    assert [cell.text for cell in table.published[0].cells if cell.text] == ["theirs", "50"]


def test_each_source_is_held_against_its_own_single_tasks(tmp_path, demo_maker):
    def row(method, value, source, single=False):
        return Row(method, {t: {"accuracy": value} for t in ("left", "right")}, source, single=single)

    rows = (
        row("a", 0.9, "A"),
        row("alone", 0.8, "B", True),
        row("b", 0.9, "B"),
        row("alone", 0.5, "A", True),
    )
    study = replace(demo(demo_maker, tmp_path), published=rows)
    found = [delta_m_of(study, one) for one in rows]
    assert found[1] is None and found[3] is None
    assert (found[0].low, found[0].high) == (pytest.approx(-80.0), pytest.approx(-80.0))
    assert (found[2].low, found[2].high) == (pytest.approx(-12.5), pytest.approx(-12.5))
    assert [(line.heading, line.name) for line in table_of(study).published] == [
        ("Published: B", "alone"),
        ("Published: B", "b"),
        ("Published: A", "alone"),
        ("Published: A", "a"),
    ]


def test_the_page_shows_them_escaped(tmp_path, demo_maker):
    folder = demo_maker(tmp_path / "runs", epochs=1, steps=False)
    rows = [
        Row("<i>theirs</i>", {"left": {"accuracy": 0.5}, "right": {"accuracy": 0.5}}, source="<u>paper</u>")
    ]
    page = build_report([folder], tmp_path / "report.html", published={"multimnist": rows}).read_text()
    body = page.split("<script")[0]
    assert "<tbody class='published'>" in body and "&lt;i&gt;theirs&lt;/i&gt;" in body
    assert "<i>theirs" not in body and "<u>paper" not in body
    without = build_report([folder], tmp_path / "report.html", published={"toy": rows}).read_text()
    assert "class='published'" not in without
