"""The pages about the methods, made while the docs are built, say what docstrings and declarations say."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import detente

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PICTURES = DOCS / "images" / "methods"


class Sample:
    """Sample: one sentence of it,
    over two lines.

    With G = ``V Λ Vᵀ``, <g_i, g_j> >= 0 and w_i*g_i*2, see ``mgda`` and :func:`detente.create`.

    - first |x|
    - second [a](b)

    When to use it: on Sundays. Cost: twice
    the usual.

    The end.

    Args:
        alpha, beta: numbers > 0 that go over
            two lines.
        mode: ``a|b``.

    Raises:
        ValueError: always; the *task* is named.

    Example:
        >>> torch.ones(1)
        tensor([1.])

        >>> 1
        1
    """


@pytest.fixture(scope="module")
def markdown_of() -> ModuleType:
    """The modules below scripts/, as the docs hook imports them."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import docstring_markdown
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return docstring_markdown


@pytest.fixture(scope="module")
def method_pages() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import method_pages
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return method_pages


@pytest.fixture(scope="module")
def pages(method_pages: ModuleType) -> dict[str, str]:
    found: dict[str, str] = method_pages.pages(DOCS)
    return found


def own_methods() -> list[str]:
    """What the package brings, not what another test registered."""
    return [
        name for name in detente.methods() if type(detente.create(name)).__module__.startswith("detente.")
    ]


def rendered(text: str) -> str:
    import markdown

    return markdown.markdown(text, extensions=["tables", "pymdownx.superfences"])


def words(text: str) -> str:
    """What a reader of the page sees, white space evened out."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def test_docstring_is_taken_apart(markdown_of: ModuleType) -> None:
    read = markdown_of.read_docstring(Sample, {"mgda"})
    assert read.summary == "Sample: one sentence of it, over two lines."
    assert read.when == "On Sundays."
    assert read.cost == "Twice the usual."
    assert set(read.options) == {"alpha", "beta", "mode"}
    assert words(rendered(read.options["beta"])) == "numbers > 0 that go over two lines."
    assert [kind for kind, _ in read.errors] == ["ValueError"]
    assert words(rendered(read.errors[0][1])) == "always; the *task* is named."
    assert read.example == ">>> import torch\n>>> torch.ones(1)\ntensor([1.])\n\n>>> 1\n1"
    page = rendered(read.text)
    assert "With G = V Λ Vᵀ, <g_i, g_j> ≥ 0 and w_i*g_i*2, see mgda and detente.create." in words(page)
    assert '<a href="mgda.md"><code>mgda</code></a>' in page
    assert page.count("<li>") == 2
    assert words(page).endswith("first |x| second [a](b) The end.")


@pytest.mark.parametrize("order", ["When to use it: now. Cost: much.", "Cost: much. When to use it: now."])
def test_cost_and_use_in_either_order(markdown_of: ModuleType, order: str) -> None:
    text = f"Idea.\n\n{order}\n\nMore."
    text, when = markdown_of.taken_out(text, "When to use it", "Cost")
    text, cost = markdown_of.taken_out(text, "Cost", "When to use it")
    assert (when, cost) == ("Now.", "Much.")
    assert text.split() == ["Idea.", "More."]


@pytest.mark.parametrize(
    "formula",
    ["‖Σ α_t g_t‖² < 1e-8", "a * b * c", "x_i_j", "<b>", "A[i](j)", "p & q", "\\alpha", "# no head", "|w|"],
)
def test_formulas_are_no_markup(markdown_of: ModuleType, formula: str) -> None:
    page = rendered(markdown_of.prose(f"so {formula} holds"))
    assert words(page) == f"so {formula} holds"
    assert set(re.findall(r"<(\w+)", page)) == {"p"}


def test_a_bar_stays_in_its_cell(markdown_of: ModuleType) -> None:
    page = rendered(markdown_of.table([("a", "b"), (markdown_of.prose("|w| ``x|y``"), "2")]))
    assert page.count("<td>") == 2


def test_every_method_has_a_page(pages: dict[str, str]) -> None:
    assert {f"methods/{name}.md" for name in own_methods()} == set(pages) - {
        "methods/index.md",
        "methods/wrappers.md",
    }


@pytest.mark.parametrize("name", own_methods())
def test_page_says_what_is_declared(pages: dict[str, str], name: str) -> None:
    info, page = detente.methods()[name], words(rendered(pages[f"methods/{name}.md"]))
    plain = re.sub(r"\s+", " ", info.summary.replace("``", "").replace(">=", "≥"))
    assert plain in page
    assert f"Source: {info.source}" in page
    for option in info.options:
        assert re.search(rf"\| {option}|{option} ", page), f"the option {option} is missing"
    assert ("never points against a task (inner product ≥ 0) yes" in page) == info.nonconflict
    assert ("remembers something from step to step yes" in page) == info.stateful
    assert page.count(">>>") >= 1, "the docstring has no example, or it was lost"
    assert f"images/methods/{name}.png" in pages[f"methods/{name}.md"] or "Not drawn yet" in page


@pytest.mark.parametrize("name", own_methods())
def test_every_option_is_explained(method_pages: ModuleType, name: str) -> None:
    read = method_pages.read_docstring(detente.methods()[name].factory)
    unexplained = set(detente.methods()[name].options) - set(read.options)
    assert not unexplained, f"the docstring of {name} says nothing of {sorted(unexplained)}"


@pytest.mark.parametrize("name", own_methods())
def test_every_method_says_when_to_use_it_and_what_it_costs(method_pages: ModuleType, name: str) -> None:
    read = method_pages.read_docstring(detente.methods()[name].factory)
    assert read.when, f'the docstring of {name} has no sentence "When to use it: ..."'
    assert read.cost, f'the docstring of {name} has no sentence "Cost: ..."'


def test_table_holds_every_method(pages: dict[str, str]) -> None:
    page = pages["methods/index.md"]
    for name in own_methods():
        assert page.count(f"| [`{name}`]({name}.md) |") == 2


def test_measured_times_are_shown(method_pages: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "method-times.csv").write_text(
        "method,T,seconds,torchjd\nmgda,2,0.00002345,\nmgda,40,0.00123,\n", "utf-8"
    )
    made = method_pages.pages(tmp_path)
    assert "| 23 µs | 1,200 µs |" in made["methods/index.md"]
    assert "T = 2: 23 µs, T = 40: 1,200 µs" in made["methods/mgda.md"]
    assert "Not drawn yet" in made["methods/mgda.md"]


def test_pictures_are_small_and_belong_to_a_method() -> None:
    drawn = {picture.stem: picture.stat().st_size for picture in PICTURES.glob("*.png")}
    told = json.loads((PICTURES / "paths.json").read_text("utf-8"))["methods"]
    assert drawn
    assert set(drawn) == set(told)
    assert set(drawn) <= set(own_methods())
    assert max(drawn.values()) <= 60_000


def test_the_decision_page_names_methods_that_exist() -> None:
    text = (DOCS / "which-method.md").read_text("utf-8")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`([a-z-]+)`", tables)) - {"features", "preference"}
    assert len(named) > 15
    assert named <= set(own_methods())


@pytest.mark.slow
def test_the_docs_build_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "methods" / "mgda" / "index.html").exists()
    reference = (tmp_path / "site" / "reference" / "index.html").read_text("utf-8")
    assert "<blockquote>" not in reference, (
        "an example is shown as a quotation: see scripts/griffe_examples.py"
    )
