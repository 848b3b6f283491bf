"""The repository as a whole: what its files may say, how long they are, whether locks and metadata agree."""

from __future__ import annotations

import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements-light.txt", "requirements-dev.txt")
LONGEST_FILE = 500

# Put together from pieces, so that this file does not hold what it looks for.
FORBIDDEN = {
    "a path of one machine": r"(^|[^A-Za-z0-9._])/(?:{})/".format(
        "|".join(("wo" + "rk", "fa" + "rm", "ro" + "ot", "ho" + "me"))
    ),
    "a folder beside the project": r"\.\./sha" + r"red\b",
    "a package registry's host": "|".join(
        (r"py" + r"pi\.org", r"python" + r"hosted\.org", r"registry\.np" + "mjs", r"deb\.deb" + "ian")
    ),
}


@cache
def text_files() -> dict[str, str]:
    """The files that are, or would be, in the repository; empty outside a git checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout.decode()
    found = {}
    for name in filter(None, listed.split("\0")):
        try:
            found[name] = (ROOT / name).read_text("utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # pictures and archives; files deleted but not yet committed
    return found


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what], re.IGNORECASE)
    hits = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in text_files().items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not hits, f"{what} is named in\n" + "\n".join(hits)


@pytest.mark.parametrize(
    "line",
    [
        "see /wo" + "rk/main",
        "(/ho" + "me/me/data)",
        "from ../sha" + "red/facts",
        "https://py" + "pi.org/simple",
    ],
)
def test_the_words_would_be_found(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in FORBIDDEN.values())


@pytest.mark.parametrize(
    "line", ["from detente/work/ to x", "networks/home/x.py", "a shared network", "the root of /proc"]
)
def test_harmless_words_are_left_alone(line: str) -> None:
    assert not any(re.search(pattern, line) for pattern in FORBIDDEN.values())


def test_no_long_file_without_a_reason() -> None:
    """A file over 500 lines says so near its top: "Longer than 500 lines because ..."."""
    long = [
        f"{name}: {len(text.splitlines())} lines"
        for name, text in text_files().items()
        if name.endswith(".py")
        and len(text.splitlines()) > LONGEST_FILE
        and "Longer than 500 lines because" not in "\n".join(text.splitlines()[:30])
    ]
    assert not long, long


def requirements(lock: str) -> list[str]:
    lines = (line.strip() for line in (ROOT / lock).read_text("utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_are_plain(lock: str) -> None:
    lines = requirements(lock)
    assert lines
    odd = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+", line)]
    assert not odd, f"{lock} holds lines that are not `name==version` without local suffix: {odd}"
    names = [canonicalize_name(Requirement(line).name) for line in lines]
    assert len(set(names)) == len(names)
    assert "detente" not in names
    assert "pip" not in names


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("requirements-light.txt", ("train", "report")),
        (
            "requirements-dev.txt",
            ("train", "report", "vision", "sweep", "rl", "codec", "lightning", "transformers", "docs", "dev"),
        ),
    ],
)
def test_locks_hold_what_the_metadata_asks(lock: str, extras: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    pinned = {
        canonicalize_name(Requirement(line).name): line.partition("==")[2] for line in requirements(lock)
    }
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in extras:
        asked += project["project"]["optional-dependencies"][extra]
    for requirement in map(Requirement, asked):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{lock} lacks {requirement.name}: run `make locks`"
        assert requirement.specifier.contains(version), (
            f"{lock} pins {requirement.name} {version}, not {requirement}"
        )


def test_version_is_said_once() -> None:
    import detente

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert detente.__version__ == project["project"]["version"]
    assert f"[{detente.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
