"""Another commit of this repository beside the working tree: its files in a temporary folder."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The commit before autograd, steps and searches became one pipeline.
BASE = "43186dd"


class NoBase(RuntimeError):
    """The commit is not here."""


@contextlib.contextmanager
def tree(revision: str) -> Iterator[Path]:
    """Extract a commit for as long as this lasts, and give its folder.

    Raises:
        NoBase: this is no clone, or git does not know the commit.
    """
    command = ["git", "-C", str(ROOT), "archive", revision]
    try:
        archive = subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError as error:
        raise NoBase("git is not installed") from error
    except subprocess.CalledProcessError as error:
        raise NoBase(error.stderr.decode(errors="replace").strip()) from error
    with tempfile.TemporaryDirectory(prefix="detente-base-") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            packed.extractall(folder, filter="data")
        yield Path(folder)


def environment(folder: Path) -> dict[str, str]:
    """Variables for a process that imports the package of this tree, and computes on one thread."""
    path = os.pathsep.join((str(folder / "src"), str(ROOT)))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
