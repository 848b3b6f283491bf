"""Makes `tests/laws` importable (tests are no package) and keeps pytest's explanations of its assertions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = str(Path(__file__).resolve().parent.parent)
if TESTS not in sys.path:
    sys.path.append(TESTS)
for module in ("mathematics", "memory", "refusal", "learning"):
    pytest.register_assert_rewrite(f"laws.{module}")
