"""Tables and figures as files: every figure of the page, every number, names from outside harmless."""

from __future__ import annotations

import csv
import io
import json
import statistics
import struct

import numpy as np
import pytest

from detente.cli import main
from detente.records import UnwritableFolder
from detente.reports import export_report, exports, read_studies
from detente.reports.exports import latex, markdown, results_csv, slug
from detente.reports.figures import Figure
from detente.reports.html import sections_of
from detente.reports.paper import Undrawable, drawn
from detente.reports.tables import table_of


@pytest.fixture
def studies(tmp_path, demo_maker):
    found, problems = read_studies([demo_maker(tmp_path / "runs", seeds=(0, 1, 2), epochs=2)])
    assert problems == []
    return found


def pixels(path):
    """Width and height of a PNG, from its first chunk."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_every_figure_and_table_is_written(tmp_path, studies):
    folder = tmp_path / "deep" / "exports"
    written = list(export_report(studies, folder))
    assert set(written) == set(folder.iterdir()), "nothing else, no temporary file"
    assert len(written) == len(set(written))
    figures = [figure for section in sections_of(studies[0]) for row in section.rows for figure in row]
    for suffix in ("png", "pdf"):
        assert len([path for path in written if path.suffix == f".{suffix}"]) == len(figures)
    assert {path.name for path in written if path.suffix not in (".png", ".pdf")} == {
        f"multimnist-results.{suffix}" for suffix in ("md", "tex", "csv")
    }
    for path in written:
        if path.suffix == ".png":
            assert pixels(path)[0] == 1280, "6.4 inches at 200 dpi"
        if path.suffix == ".pdf":
            data = path.read_bytes()
            assert data.startswith(b"%PDF-") and data.rstrip().endswith(b"%%EOF")
            assert b"/Subtype /Image" not in data, "a vector drawing"


def test_odd_studies_are_exported(tmp_path, run_maker, monkeypatch):
    monkeypatch.setattr(exports, "PICTURES", ("png",))  # the quicker half
    tasks = [f"task {i}" for i in range(7)]
    run_maker(tmp_path / "runs" / "a", "mgda", epochs=1, finished=False, steps=False)
    for method in ("cagrad", "uniform"):
        run_maker(tmp_path / "runs" / method, method, "layer", tasks=tasks, epochs=1, experiment="many/../x")
    run_maker(tmp_path / "runs" / "c", tasks=("alone",), epochs=1, experiment="$x^2$ & <y>", balance=True)
    found, _ = read_studies([tmp_path / "runs"])
    written = list(export_report(found, tmp_path / "out"))
    assert all(path.parent == tmp_path / "out" and path.stat().st_size > 0 for path in written)
    assert {path.name for path in written if path.suffix == ".tex"} == {
        *("multimnist-results.tex", "many-x-results.tex", "x-2-y-results.tex"),
    }


def test_csv_has_the_unrounded_numbers(studies):
    rows = list(csv.DictReader(io.StringIO(results_csv(studies[0]))))
    assert [row["name"] for row in rows] == [group.name for group in studies[0].groups]
    for row, group in zip(rows, studies[0].groups, strict=True):
        for task in studies[0].tasks:
            values = [
                run.result["metrics"][task]["accuracy"] for run in group.runs if task in run.result["metrics"]
            ]
            assert int(row[f"{task} accuracy n"]) == len(values)
            if values:
                assert float(row[f"{task} accuracy mean"]) == pytest.approx(
                    statistics.mean(values), rel=1e-15
                )
                assert float(row[f"{task} accuracy std"]) == pytest.approx(statistics.stdev(values), rel=1e-9)
            else:
                assert row[f"{task} accuracy mean"] == ""
    assert len(rows[2]["left accuracy mean"]) >= 6
    assert float(rows[3]["relative_seconds"]) == 1.8


def test_latex_of_the_demo(studies):
    text = latex(table_of(studies[0]))
    lines = [line.strip() for line in text.splitlines()]
    body = lines[lines.index("\\toprule") : lines.index("\\bottomrule")]
    cells = [line.removesuffix(" \\\\").split(" & ") for line in body if line.endswith("\\\\")]
    columns = len(table_of(studies[0]).columns)
    assert [len(row) for row in cells] == [columns] * 8
    assert "\\begin{tabular}{ll" + "r" * (columns - 2) + "}" in text
    assert cells[4][:3] == ["mgda", "exact", "\\textbf{96.90} $\\pm$ 0.06"]
    assert body.index("\\midrule", 3) == 5, "the two single tasks are divided from the others"
    assert text.isascii()


NASTY = "=a|b & c_d $e$ #1 {x} ~ ^ \\ %<i>*[z]`q"


def test_names_from_outside_are_escaped(tmp_path, run_maker, monkeypatch):
    monkeypatch.setattr(exports, "PICTURES", ("png",))
    for method in ("mgda", "uniform"):
        run_maker(tmp_path / method, method, label=f"{NASTY} {method}", tasks=(NASTY, "@b"), epochs=1)
    (study,), _ = read_studies([tmp_path])
    tex = latex(table_of(study))
    told = (
        "=a\\textbar{}b \\& c\\_d \\$e\\$ \\#1 \\{x\\} \\textasciitilde{} \\textasciicircum{} \\textbackslash{} "
        "\\%\\textless{}i\\textgreater{}$^{*}${[}z{]}\\textasciigrave{}q"
    )
    assert f"\n    {told} mgda & " in tex
    assert tex.count("{") == tex.count("}")

    lines = markdown(table_of(study)).split("\n\n")[0].splitlines()
    bars = {line.replace("\\\\", "").replace("\\|", "").count("|") for line in lines}
    assert bars == {len(table_of(study).columns) + 1}, "no name makes a cell"
    assert "<i>" not in markdown(table_of(study))

    rows = list(csv.reader(io.StringIO(results_csv(study))))
    assert rows[1][1].startswith("'=a|b & c_d") and f"'{NASTY} accuracy mean" in rows[0]
    assert "'@b accuracy n" in rows[0]
    list(export_report([study], tmp_path / "out"))


def test_slugs_are_safe_file_names():
    assert slug("../../Δm: ε̂² / naïve") == "delta-m-epsilon-squared-naive"
    assert slug("Ж") == "figure"
    assert len(slug("long " * 100)) <= 80


def canvas_of(monkeypatch, figure):
    """The axes that a figure was drawn on."""
    import matplotlib.figure

    kept = []
    original = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *a, **k: (kept.append(self), original(self, *a, **k)),
    )
    drawn(figure, "png", dpi=30)
    return kept[0].axes


def test_lines_bands_and_axes_are_those_of_the_page(monkeypatch):
    line = {"type": "scatter", "name": "a &amp; b", "x": [1, 2, 3], "y": [1.0, None, 100.0], "mode": "lines"}
    lower = {"type": "scatter", "x": [1, 2], "y": [1, 2], "mode": "lines", "line": {"width": 0}}
    upper = {**lower, "y": [3, 5], "fill": "tonexty", "fillcolor": "@m3/0.2"}
    layout = {
        "xaxis": {"title": {"text": "1 &lt; 2"}, "tickvals": [1, 3, 50], "ticktext": ["one", "three", "far"]},
        "yaxis": {"type": "log", "range": [-1, 2]},
        "shapes": [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": 10,
                "y1": 10,
                "line": {"color": "@muted"},
            }
        ],
    }
    (axes,) = canvas_of(monkeypatch, Figure("t", [{**line, "line": {"color": "@m1"}}, lower, upper], layout))
    curve = axes.get_lines()[0]
    assert curve.get_xdata().tolist() == [1, 2, 3]
    np.testing.assert_array_equal(curve.get_ydata(), [1.0, np.nan, 100.0])
    assert curve.get_label() == "a & b" and curve.get_color() == pytest.approx(
        (47 / 255, 95 / 255, 196 / 255, 1)
    )
    assert axes.get_yscale() == "log" and axes.get_ylim() == pytest.approx((0.1, 100.0))
    assert axes.get_xlabel() == "1 < 2" and axes.get_xlim()[1] < 10, "a tick does not widen the axis"
    (band,) = axes.collections
    edges = band.get_paths()[0].vertices
    assert {(1, 1), (1, 3), (2, 2), (2, 5)} <= {tuple(edge) for edge in edges.tolist()}
    assert list(axes.get_lines()[-1].get_ydata()) == [10, 10]


def test_heat_maps_bars_and_radars(monkeypatch):
    cells = {"type": "heatmap", "z": [[1, 2, None], [4, 5, 6]], "x": ["a", "b", "c"], "y": ["u", "v"]}
    heat, _ = canvas_of(
        monkeypatch, Figure("heat", [{**cells, "colorscale": [[0, "@card"], [1, "@m1"]]}], {})
    )
    assert heat.collections[0].get_array().filled(-1).tolist() == [[1, 2, -1], [4, 5, 6]]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["u", "v"]

    bars = [
        {"type": "bar", "x": ["p", "q"], "y": [1, 2], "name": "one"},
        {"type": "bar", "x": ["q", "r"], "y": [3, 4], "name": "two"},
    ]
    (axes,) = canvas_of(monkeypatch, Figure("bars", bars, {}))
    assert [round(bar.get_x() + bar.get_width() / 2, 6) for bar in axes.patches] == [-0.2, 0.8, 1.2, 2.2]
    assert [bar.get_height() for bar in axes.patches] == [1, 2, 3, 4]

    radar = {"type": "scatterpolar", "theta": ["a", "b", "c", "a"], "r": [1, 2, 3, 1], "fill": "toself"}
    layout = {"polar": {"radialaxis": {"range": [0, 4]}, "angularaxis": {"direction": "clockwise"}}}
    (polar,) = canvas_of(monkeypatch, Figure("radar", [{**radar, "fillcolor": "@m1/0.1"}], layout))
    assert polar.get_lines()[0].get_xdata() == pytest.approx([0, 2 * np.pi / 3, 4 * np.pi / 3, 0])
    assert polar.get_theta_direction() == -1 and polar.get_ylim() == (0, 4)


@pytest.mark.parametrize(
    ("trace", "layout", "told"),
    [
        ({"type": "violin", "y": [1]}, {}, "type violin"),
        ({"x": [1], "y": [1], "mode": "lines+hops"}, {}, "mode hops"),
        ({"x": [1], "y": [1], "fill": "tonextx"}, {}, "fill 'tonextx'"),
        (
            {"x": [1], "y": [1], "mode": "markers", "marker": {"symbol": "hourglass"}},
            {},
            "marker 'hourglass'",
        ),
        ({"x": [1], "y": [1], "line": {"color": "@m77"}}, {}, "colour '@m77'"),
        ({"x": [1], "y": [1]}, {"shapes": [{"type": "circle"}]}, "shape of type 'circle'"),
        ({"x": [1], "y": [1]}, {"xaxis2": {}}, "second axis .xaxis2."),
    ],
)
def test_what_cannot_be_drawn_is_named(trace, layout, told):
    with pytest.raises(Undrawable, match=f"figure 'weights'.*{told}"):
        drawn(Figure("weights", [trace], layout), "png")


def test_the_others_are_written_when_one_cannot_be_drawn(tmp_path, studies, monkeypatch):
    original = exports.drawn

    def picky(figure, kind):
        if figure.title == "left: training loss":
            raise Undrawable("figure 'left: training loss': no export for hops.")
        return original(figure, kind)

    monkeypatch.setattr(exports, "drawn", picky)
    monkeypatch.setattr(exports, "PICTURES", ("png",))
    told = r"everything but 1 figure .*Loss curves, figure 'left: training loss'"
    with pytest.raises(Undrawable, match=told):
        list(export_report(studies, tmp_path / "out"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "multimnist-left-validation-loss.png" in written
    assert "multimnist-left-training-loss.png" not in written


def test_a_folder_that_cannot_be_made(tmp_path, studies):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableFolder, match="file"):
        list(export_report(studies, tmp_path / "file" / "out"))


def test_the_command_lists_what_it_wrote(tmp_path, run_maker, capsys, monkeypatch):
    monkeypatch.setattr(exports, "PICTURES", ("png",))
    run_maker(tmp_path / "runs" / "a", "mgda", epochs=1)
    page, folder = tmp_path / "r.html", tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "runs"), "--output", str(page), "--export", str(folder), "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(page) and page.exists()
    assert sorted(told["exports"]) == sorted(map(str, folder.iterdir()))
