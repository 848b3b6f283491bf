"""Every example in README, CONTRIBUTING and docs/ runs as written.

The ```python blocks of a page run from top to bottom in one namespace, in an empty folder, in a process of
their own (so that a page that registers a method leaves nothing behind). What an example needs but a reader
does not want to see (losses, a model) stands in a comment just before it:

    <!-- python
    losses = ...
    -->

The ```console blocks are held against the command line's own help: the command and each of its flags exist.
"""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

BLOCK = re.compile(
    r"^(?P<indent>[ \t]*)(?:```python[^\n]*|<!-- python)\n(?P<code>.*?)^(?P=indent)(?:```|-->)[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
CONSOLE = re.compile(r"^[ \t]*```console[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def script(text: str) -> str:
    """The page's code, each line where it stands on the page, so that a traceback names the page's line."""
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start("code"))
        for offset, line in enumerate(block["code"].splitlines()):
            lines[first + offset] = line.removeprefix(block["indent"])
    return "\n".join(lines) + "\n"


def commands(text: str) -> list[list[str]]:
    """The page's `detente ...` command lines, continued lines joined, as words."""
    found = []
    for block in CONSOLE.finditer(text):
        for line in block[1].replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            if words and Path(words[0]).name == "detente":
                found.append(words[1:])
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


WITH_CODE = [page for page in PAGES if script(page.read_text("utf-8")).strip()]
COMMANDS = [
    pytest.param(words, id=f"{relative(page)}: {' '.join(words[:2])}")
    for page in PAGES
    for words in commands(page.read_text("utf-8"))
]


@pytest.mark.parametrize("page", WITH_CODE, ids=relative)
def test_examples_run(page: Path, tmp_path: Path) -> None:
    code = script(page.read_text("utf-8"))
    launcher = (
        "import sys, warnings; warnings.simplefilter('error'); import torch; torch.set_num_threads(1); "
        f"exec(compile(sys.stdin.read(), {relative(page)!r}, 'exec'), {{'__name__': '__main__'}})"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", launcher],
        input=code,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{relative(page)}:\n{done.stderr}"


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_exist(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from detente.cli import main

    # `run multimnist`: what follows the command decides on its flags.
    command = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code in (0, None)
    shown = capsys.readouterr().out
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"{re.escape(flag)}(?![\w-])", shown), (
            f"`detente {' '.join(command)}` has no {flag}"
        )


def test_there_are_examples() -> None:
    """Were the pattern broken, nothing would run and everything would pass."""
    assert {"README.md", "CONTRIBUTING.md", "docs/getting-started.md"} <= {
        relative(page) for page in WITH_CODE
    }
    assert COMMANDS


def test_blocks_keep_their_lines() -> None:
    page = "text\n```python\na = 1\n```\n\n<!-- python\nb = 2\n-->\n- item\n\n"
    page += "    ```python\n    if b:\n        c = 3\n    ```\n"
    expected = {3: "a = 1", 7: "b = 2", 12: "if b:", 13: "    c = 3"}
    assert {number: line for number, line in enumerate(script(page).splitlines(), 1) if line} == expected


def test_commands_are_read() -> None:
    page = "```console\n$ detente run toy \\\n    --seed 1  # quick\nsaved\n$ make demo\n```\n"
    assert commands(page) == [["run", "toy", "--seed", "1"]]
