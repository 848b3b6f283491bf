"""The page as a file: self-contained, escaped, and never at a loss when something is missing."""

from __future__ import annotations

import html.parser
import json
import re
import time

import pytest

from detente.records import UnwritableFolder
from detente.reports import NoRuns, build_report


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.inside = [], "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data


def data_of(path):
    """The stored figures of a page."""
    found = re.search(r'id="report-data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)
    return json.loads(found.group(1))


def test_one_file_without_the_network(tmp_path, demo_maker):
    page = build_report(
        [demo_maker(tmp_path / "runs", epochs=2)], tmp_path / "deep" / "report.html", title="A & B"
    )
    assert page == tmp_path / "deep" / "report.html"
    assert page.stat().st_size < 10e6
    assert [path.name for path in page.parent.iterdir()] == ["report.html"], "nothing half-written is left"
    found = Page(page)
    for tag, attributes in found.elements:
        for name in ("src", "href", "action", "data", "poster"):
            assert str(attributes.get(name, "data:")).startswith("data:"), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "base")
    assert "@import" not in page.read_text(encoding="utf-8").split("</style>")[0]
    policy = next(
        a["content"] for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "A & B" in found.text
    assert page.read_text(encoding="utf-8").count("plotly.js v") == 1


def test_what_a_reader_finds(tmp_path, demo_maker):
    text = Page(build_report([demo_maker(tmp_path / "runs", epochs=2)], tmp_path / "report.html")).text
    for part in (
        "mgda (features) and mgda (exact) come closest to one network per task",
        "One seed proves little",
        "Results on test data",
        "The two tasks against each other",
        "left: validation loss",
        "share of the weights",
        "condition number, altered",
        "Sample images",
        "detente run multimnist --method mgda --gradients features --seed 0",
        "learning_rate",
        "python 3.",
        "folder mgda-features-0",
    ):
        assert part in text.replace("\N{NO-BREAK SPACE}", " "), part


def test_the_same_runs_make_the_same_file(tmp_path, demo_maker):
    runs = demo_maker(tmp_path / "runs", epochs=1)
    first = build_report([runs], tmp_path / "a.html").read_bytes()
    assert build_report([runs, runs / "uniform-none-0"], tmp_path / "b.html").read_bytes() == first, (
        "a run named twice counts once"
    )


def test_names_from_outside_are_only_names(tmp_path, run_maker):
    evil = "</script><script>window.evil=1</script><img src=x onerror='window.evil=1'>"
    for method in ("mgda", "uniform"):
        run_maker(
            tmp_path / "runs" / method,
            method,
            tasks=(evil, "right"),
            label=f"{method} {evil}",
            experiment=evil,
            command=evil,
            settings={evil: evil},
            epochs=1,
        )
    page = build_report([tmp_path / "runs"], tmp_path / "report.html", title=evil)
    found = Page(page)
    assert evil in found.text
    assert sum(tag == "script" for tag, _ in found.elements) == 3
    assert not any("onerror" in attributes for _, attributes in found.elements)
    stored = data_of(page)
    assert "<script" not in json.dumps(stored["figures"]), "plotly reads simple HTML in its texts"


def test_no_folder_and_no_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        build_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(NoRuns, match=r"there is no run to report on.*`detente run` makes one"):
        build_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(NoRuns):
        build_report([], tmp_path / "report.html")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(NoRuns, match=r"config\.json is not valid JSON"):
        build_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_unwritable_output(tmp_path, run_maker):
    run_maker(tmp_path / "run", epochs=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableFolder, match=r"cannot write to .*file.report\.html"):
        build_report([tmp_path], tmp_path / "file" / "report.html")
    with pytest.raises(UnwritableFolder, match="irectory"):
        build_report([tmp_path], tmp_path / "run")


@pytest.mark.parametrize(
    "missing",
    [
        {"finished": False},
        {"steps": False},
        {"samples": False},
        {"epochs": 0},
        {"epochs": 0, "finished": False, "samples": False},
        {"final": {"left": None}},
        {"gradients": "none"},
        {"tasks": ("only",)},
        {"tasks": ("a", "b", "c")},
    ],
)
def test_missing_things_are_shown_by_words(tmp_path, run_maker, missing):
    run_maker(tmp_path / "runs" / "a", **({"method": "mgda", "epochs": 2} | missing))
    text = Page(build_report([tmp_path / "runs"], tmp_path / "report.html")).text
    assert "None" not in text.split("Every run")[0].replace("None reaches it", "")
    assert "nan" not in text.split("Every run")[0]
    expected = {
        "finished": "not finished",
        "steps": "No conflict measures were recorded",
        "samples": "No sample images were stored",
    }
    for key, words in expected.items():
        if missing.get(key) is False:
            assert words in text


def test_damaged_records_are_named_and_the_rest_is_shown(tmp_path, demo_maker):
    runs = demo_maker(tmp_path / "runs", epochs=2)
    path = runs / "uniform-none-0" / "steps.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    (runs / "mgda-exact-0" / "samples.npz").write_bytes(b"PK")
    (runs / "mgda-features-0" / "config.json").write_text("[")
    text = Page(build_report([runs], tmp_path / "report.html")).text
    assert "Not everything could be read" in text
    assert "steps.jsonl, line 1 is not valid JSON" in text
    assert "samples.npz cannot be read" in text
    assert "mgda-features-0/config.json is not valid JSON" in text
    assert "96.46" in text, "the run with damaged steps keeps its result"


def test_missing_keys_of_other_versions_do_not_crash(tmp_path, demo_maker):
    runs = demo_maker(tmp_path / "runs", epochs=1)
    for path in runs.glob("*/result.json"):
        result = json.loads(path.read_text())
        path.write_text(json.dumps({key: result[key] for key in ("schema", "epochs", "metrics")}))
    for path in runs.glob("*/epochs.jsonl"):
        path.write_text('{"epoch":1,"step":1}\n')
    for path in runs.glob("*/steps.jsonl"):
        path.write_text('{"step":1,"epoch":1,"names":["left"]}\n')
    assert "–" in Page(build_report([runs], tmp_path / "report.html")).text


def test_what_a_guard_refused_is_told_also_where_the_heads_moved(tmp_path, run_maker):
    rows = [
        {"epoch": 1, "step": 20, "refused": 0, "method": {"refused_share": 0.5}},
        {"epoch": 2, "step": 30, "refused": 0, "method": {"refused_share": 0.2}},
        {"epoch": 3, "step": 40, "refused": 0, "method": {"refused_share": None}},
    ]
    for name, told in (("guarded", rows), ("not", [{**row, "method": {"other": 1.0}} for row in rows])):
        folder = run_maker(tmp_path / name, "inexact-mgda", epochs=3)
        (folder / "epochs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
        text = Page(build_report([folder], tmp_path / "report.html")).text
        # 10 of 20 steps and 2 of 10
        words = "refused by the guard: 40 % of the steps, or of their shared parts"
        assert (words in text) == (name == "guarded")
        assert ("refused" in text.split("Every run")[1]) == (name == "guarded")


def test_experiments_are_kept_apart(tmp_path, run_maker):
    run_maker(tmp_path / "runs" / "a", epochs=1)
    run_maker(tmp_path / "runs" / "b", epochs=1, experiment="another")
    found = Page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    headings = [tag for tag, attributes in found.elements if attributes.get("class") == "experiment"]
    assert len(headings) == 2
    keys = [a["data-group"] for tag, a in found.elements if tag == "button" and "data-group" in a]
    assert len(keys) == len(set(keys)) == 2


def test_coloured_sample_images(tmp_path, run_maker):
    import numpy as np

    run_maker(tmp_path / "run", epochs=1, samples=False)
    images = np.zeros((2, 6, 5, 3), np.uint8)
    np.savez(tmp_path / "run" / "samples.npz", images=images, target_left=[1, 2], prediction_left=[1, 3])
    found = Page(build_report([tmp_path / "run"], tmp_path / "report.html"))
    pictures = [attributes for tag, attributes in found.elements if tag == "img"]
    assert len(pictures) == 2
    assert all(a["src"].startswith("data:image/png;base64,") for a in pictures)
    wrong = [a for _, a in found.elements if "wrong" in a.get("class", "")]
    assert [a["title"] for a in wrong] == ["left: predicted 3, is 2"]
    assert "✗" in found.text, "not by colour alone"


def test_hundred_runs_are_reported_quickly(tmp_path, run_maker):
    # The aim for 1 000 runs is 20 s; this is a tenth of them, with room for a loaded machine.
    for number in range(100):
        run_maker(tmp_path / "runs" / str(number), "mgda", seed=number, epochs=5, steps_per_epoch=40)
    start = time.perf_counter()
    page = build_report([tmp_path / "runs"], tmp_path / "report.html")
    assert time.perf_counter() - start < 10
    assert page.stat().st_size < 10e6
