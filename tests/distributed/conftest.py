"""Processes are started anew and import what they run from this folder, and `tests/twins` from the one above."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
if str(HERE.parent) not in sys.path:
    sys.path.append(str(HERE.parent))
pytest.register_assert_rewrite("twins.engine")
