"""The wheel holds everything the package needs at run time, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by hatchling from this environment: nothing is downloaded."""
    target = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_every_file_of_the_package_is_in_it(wheel: Path, repository: Path) -> None:
    package = repository / "src" / "detente"
    expected = {
        f"detente/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"detente/__init__.py", "detente/py.typed"} <= expected
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("detente-")}
    assert held == expected


def test_the_digits_and_their_licence_are_in_it(wheel: Path) -> None:
    sample = [
        info for info in zipfile.ZipFile(wheel).infolist() if info.filename.startswith("detente/data/sample/")
    ]
    assert any("licen" in info.filename.lower() for info in sample), "the sample's licence is missing"
    assert 1_000_000 < sum(info.file_size for info in sample) < 5_000_000


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert "License-Expression: MIT" in text
    assert "Requires-Python: >=3.11" in text
    core = [
        line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert sorted(core) == [
        "Requires-Dist: numpy>=2",
        "Requires-Dist: scipy",
        "Requires-Dist: threadpoolctl>=3",
        "Requires-Dist: torch>=2.6",
    ]
    (scripts,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "detente = detente.cli:main" in archive.read(scripts).decode()
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_the_package_imports_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """From inside the archive, with the checkout off the path."""
    script = f"import sys; sys.path.insert(0, {str(wheel)!r}); import detente; print(detente.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(wheel) in done.stdout
