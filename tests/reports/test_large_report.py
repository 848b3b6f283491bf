"""Reports of very many runs: what is left out is told, and the browser draws what the reader comes near."""

from __future__ import annotations

import json
import re

import pytest

from detente.reports import build_report
from detente.reports.figures import Figure, Section
from detente.reports.thinning import MOST_BANDS, MOST_POINTS, thinned


def line(number, points=100):
    return {
        **{"type": "scatter", "mode": "lines+markers", "name": f"m{number}", "meta": f"g{number}"},
        **{"x": list(range(points)), "y": [number + place for place in range(points)]},
    }


BAND = {"type": "scatter", "mode": "lines", "fill": "toself", "x": [0, 1, 1, 0], "y": [0, 0, 1, 1]}
POINT = {"type": "scatter", "mode": "markers", "x": list(range(100)), "y": list(range(100))}


def test_many_lines_lose_bands_and_points_between_and_the_text_says_so():
    few = Figure("few", [BAND, line(0)], {})
    many = Figure("many", [POINT, *(trace for n in range(300) for trace in (BAND, line(n)))], {})
    section = thinned(Section("Curves", "As told.", ((few, many),)))
    assert section.text == "As told. Of 300 lines in a figure only every 5th point is drawn, and no bands."
    first, second = section.rows[0]
    assert first == few, "the figure with one line keeps all of it"
    assert BAND not in second.data and second.data[0] == POINT
    lines = second.data[1:]
    assert [trace["name"] for trace in lines] == [f"m{n}" for n in range(300)]
    assert all(trace["x"] == [*range(0, 100, 5), 99] for trace in lines)
    assert all(y == n + x for n, t in enumerate(lines) for x, y in zip(t["x"], t["y"], strict=True))
    assert sum(len(trace["x"]) for trace in lines) <= 1.1 * MOST_POINTS


def test_as_many_lines_as_can_be_told_apart_keep_everything():
    figure = Figure("f", [trace for n in range(MOST_BANDS) for trace in (BAND, line(n))], {})
    section = Section("Curves", "text", ((figure,),))
    assert thinned(section) is section
    assert thinned(Section("Curves", "nothing")) == Section("Curves", "nothing")


@pytest.fixture
def page(tmp_path, run_maker):
    """Thirty methods, in figures with more than 600 traces in all."""
    for number in range(30):
        options = {"c": number}
        run_maker(
            tmp_path / "runs" / str(number), "mgda", options=options, seed=number, epochs=3, steps_per_epoch=4
        )
    found = build_report([tmp_path / "runs"], tmp_path / "report.html")
    text = found.read_text()
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', text, re.DOTALL)[1])
    assert sum(len(figure["data"]) for figure in data["figures"]) > 300
    assert "and no bands" in text or "no bands are drawn" in text
    return found


@pytest.mark.browser
def test_figures_are_drawn_when_the_reader_comes_near(browser, page):
    import time

    # The page of the fixture is small enough for a test; the rule counts it as a large one.
    text = page.read_text()
    assert text.count("> 600;") == 1
    page.write_text(text.replace("> 600;", "> 100;"))
    browser.get(page.resolve().as_uri())

    def wait(condition, what):
        end = time.monotonic() + 60
        while not browser.execute_script(f"return {condition}"):
            assert time.monotonic() < end, what
            time.sleep(0.05)

    drawn = "Array.from(document.querySelectorAll('.drawing'), (d) => d.querySelector('svg') !== null)"
    wait("document.documentElement.dataset.ready === 'yes'", "not ready")
    assert not all(browser.execute_script(f"return {drawn}")), "nothing waits"

    last = "document.querySelectorAll('.drawing')[document.querySelectorAll('.drawing').length - 1]"
    browser.execute_script(f"{last}.scrollIntoView()")
    wait(f"{last}.querySelectorAll('.scatterlayer .trace').length > 0", "the last figure was not drawn")

    # A method that was hidden before a figure is drawn is hidden in it.
    button = browser.find_elements("css selector", ".legend button")[0]
    browser.execute_script("arguments[0].click()", button)
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    wait(f"{drawn}.every((one) => one)", "printing draws the rest")
    wait(
        "Array.from(document.querySelectorAll('.drawing')).every((d) => d.data.filter("
        "(t) => t.meta === document.querySelector('.legend button').dataset.group).every((t) => t.visible === false))",
        "a hidden method came back",
    )
    assert [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
