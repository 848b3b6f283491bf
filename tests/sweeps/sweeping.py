"""What the tests of this folder share: a problem that takes no time, and one command in a process of its own."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TINY = f"{HERE / 'tiny.py'}:Tiny"
QUICK = ["--trials", "3", "--seeds", "2", "--epochs", "2", "--batch-size", "16", "--extend", "1", "--no-cost"]
# Of the clusters that tests start, so that Ray neither reads nor leaves a token in the home folder.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def environment() -> dict[str, str]:
    here = {"PYTHONPATH": str(HERE.parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **here, **TOKEN}


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """`detente ARGUMENTS` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "detente", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
