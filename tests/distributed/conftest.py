"""Processes are started anew and import what they run from this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
