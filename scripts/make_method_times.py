"""Measure one `detente.combine` of every method and write the table that the docs show.

`python scripts/make_method_times.py` on a quiet machine; the numbers go to docs/results/method-times.csv.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.methods import rows
from detente.training.processes import threads

TARGET = Path("docs/results/method-times.csv")


def main() -> None:
    """Write method, T, our seconds and TorchJD's (empty where it has no such method)."""
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    temporary = TARGET.with_suffix(".tmp")
    with threads(1), open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["method", "T", "seconds", "torchjd"])
        writer.writeheader()
        for row in rows():
            writer.writerow(
                {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}
            )
    os.replace(temporary, TARGET)
    print(TARGET)


if __name__ == "__main__":
    main()
