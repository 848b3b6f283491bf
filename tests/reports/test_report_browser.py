"""The page in headless Chromium: no errors, everything drawn, both colour schemes, phone width."""

from __future__ import annotations

import time

import pytest

from detente.reports import build_report

pytestmark = pytest.mark.browser


def emulate(browser, *, scheme="light", width=1280):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait(browser, condition, what):
    end = time.monotonic() + 60
    while not browser.execute_script(f"return {condition}"):
        assert time.monotonic() < end, what
        time.sleep(0.05)


def visit(browser, page):
    browser.get(page.resolve().as_uri())
    wait(browser, "document.documentElement.dataset.ready === 'yes'", "the figures were not drawn")


def serious(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_page(browser, tmp_path, demo_maker):
    page = build_report([demo_maker(tmp_path / "runs", seeds=(0, 1), epochs=4)], tmp_path / "report.html")
    emulate(browser)
    visit(browser, page)

    drawn = browser.execute_script(
        "return Array.from(document.querySelectorAll('.drawing'))"
        ".map((d) => d.querySelectorAll('.scatterlayer .trace').length)"
    )
    assert len(drawn) == 13
    assert all(count > 0 for count in drawn)
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []

    # Hiding a method hides it in every figure, and brings it back.
    count = "document.querySelectorAll('.scatterlayer .trace').length"
    before = browser.execute_script(f"return {count}")
    button = browser.find_elements("css selector", ".legend button")[2]
    assert button.text == "uniform"
    button.click()
    wait(browser, f"{count} < {before}", "nothing was hidden")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    wait(browser, f"{count} === {before}", "it did not come back")

    # The same page follows the reader when the scheme changes under it.
    axis = "getComputedStyle(document.querySelector('.drawing .xtick text')).fill"
    background = "getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(f"return [{axis}, {background}]")
    emulate(browser, scheme="dark")
    wait(browser, f"{axis} !== '{light[0]}'", "the figures stayed light")
    assert browser.execute_script(f"return {background}") != light[1]

    browser.execute_script("document.querySelector('details').open = true")
    assert "learning_rate" in browser.find_element("css selector", "details pre:last-child").text
    assert serious(browser) == []


def test_a_press_on_a_heading_sorts_our_rows_alone(browser, tmp_path, demo_maker):
    from detente.experiments import find

    published = {"multimnist": find("multimnist").published}
    folder = demo_maker(tmp_path / "runs", epochs=1)
    emulate(browser)
    visit(browser, build_report([folder], tmp_path / "report.html", published=published))

    def column(body, place):
        cells = f"document.querySelectorAll('table.results tbody:nth-of-type({body}) tr')"
        return browser.execute_script(
            f"return Array.from({cells}, (row) => row.cells.length > 1 ? row.cells[{place}].textContent : '')"
        )

    headings = browser.find_elements("css selector", "table.results thead button")
    theirs, ours = column(2, 2), column(1, 2)
    headings[2].click()
    assert column(1, 2) == sorted(ours, key=lambda text: -float(text or "-inf")), (
        "the best above, blanks last"
    )
    assert headings[2].find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    headings[2].click()
    assert column(1, 2) == sorted(ours, key=lambda text: float(text or "inf"))
    headings[4].click()
    changes = [float(text.replace("−", "-")) for text in column(1, 4) if text]
    assert changes == sorted(changes) and len(changes) == 5
    assert headings[2].find_element("xpath", "..").get_attribute("aria-sort") is None
    assert column(2, 2) == theirs and len(theirs) == 6
    assert serious(browser) == []


@pytest.mark.parametrize("width", [1280, 360])
def test_the_radar_shows_few_and_its_buttons_the_others(browser, tmp_path, run_maker, width):
    tasks = ("a", "b", "c", "d")
    for number in range(15):
        final = {task: 0.5 + 0.01 * ((number * (place + 3)) % 15) for place, task in enumerate(tasks)}
        run_maker(
            tmp_path / "runs" / str(number), f"m{number}", tasks=tasks, final=final, epochs=1, steps=False
        )
    emulate(browser, width=width)
    visit(browser, build_report([tmp_path / "runs"], tmp_path / "report.html"))
    count = "document.querySelectorAll('.drawing.polar .polarlayer .scatterlayer .trace').length"
    dots = "document.querySelectorAll('.drawing:not(.polar) .scatterlayer .trace').length"
    assert browser.execute_script(f"return {count}") == 5
    before = browser.execute_script(f"return {dots}")
    buttons = browser.find_elements("css selector", ".own-legend button")
    assert len(buttons) == 15
    pressed = [button.get_attribute("aria-pressed") for button in buttons]
    assert pressed.count("true") == 5
    click = "document.querySelectorAll('.own-legend button')[arguments[0]].click()"
    browser.execute_script(click, pressed.index("false"))
    wait(browser, f"{count} === 6", "it was not added")
    browser.execute_script(click, pressed.index("true"))
    wait(browser, f"{count} === 5", "it was not taken away")
    assert browser.execute_script(f"return {dots}") == before, "the other figures stay as they are"
    # The legend of the page rules this figure as well.
    browser.execute_script(
        "document.querySelectorAll('.legend button')[arguments[0]].click()", pressed.index("false")
    )
    wait(browser, f"{count} === 4", "the page's legend does not reach the radar")
    # No axes of a plane behind the radar.
    assert (
        browser.execute_script(
            "return document.querySelectorAll('.drawing.polar .xaxislayer-above *').length"
        )
        == 0
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert serious(browser) == []


@pytest.mark.parametrize("width", [360, 390, 768])
def test_nothing_is_wider_than_the_screen(browser, tmp_path, demo_maker, width):
    page = build_report([demo_maker(tmp_path / "runs", epochs=3)], tmp_path / "report.html")
    emulate(browser, width=width)
    visit(browser, page)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    edges = browser.execute_script(
        "return Array.from(document.querySelectorAll('.drawing svg'), (s) => s.getBoundingClientRect().right)"
    )
    assert max(edges) <= width
    assert serious(browser) == []


def test_names_from_outside_do_not_run(browser, tmp_path, run_maker):
    evil = "</script><script>window.evil=1</script><img src=x onerror='window.evil=1'>"
    for method in ("mgda", "aligned-mtl"):
        run_maker(
            tmp_path / "runs" / method,
            method,
            tasks=(f"<b>{evil}", "@m1"),
            label=f"{method} {evil}",
            experiment=evil,
            command=evil,
            epochs=3,
        )
    emulate(browser)
    visit(browser, build_report([tmp_path / "runs"], tmp_path / "report.html", title=evil))
    assert browser.execute_script("return window.evil === undefined")
    titles = browser.execute_script(
        "return Array.from(document.querySelectorAll('.drawing .ytitle'), (t) => t.textContent)"
    )
    assert titles[0] == "@m1: accuracy (%)", "a name that looks like a colour stays a name"
    assert browser.execute_script("return document.querySelector('.drawing .xtitle').textContent").startswith(
        "<b></script><script>"
    )
    assert serious(browser) == []


def test_odd_runs_are_drawn_without_errors(browser, tmp_path, run_maker):
    run_maker(tmp_path / "runs" / "a", "mgda", epochs=1, finished=False, steps=False)
    tasks = [f"task {i}" for i in range(9)]
    run_maker(tmp_path / "runs" / "b", "cagrad", "layer", tasks=tasks, epochs=1, experiment="many")
    run_maker(tmp_path / "runs" / "c", tasks=("alone",), epochs=1, experiment="one")
    emulate(browser)
    visit(browser, build_report([tmp_path / "runs"], tmp_path / "report.html"))
    assert serious(browser) == []
