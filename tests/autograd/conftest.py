"""Makes `tests/twins` importable (tests are no package)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = str(Path(__file__).resolve().parent.parent)
if TESTS not in sys.path:
    sys.path.append(TESTS)
pytest.register_assert_rewrite("twins.engine")
