"""Draw the README's picture from stored runs: `make demo`, then `python scripts/make_readme_picture.py runs/demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from detente.records import find_runs
from detente.reports import accuracy_plane_png


def main() -> None:
    """Write the accuracy plane of the runs in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of finished runs")
    parser.add_argument("--out", type=Path, default=Path("docs/images/accuracy-plane.png"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    accuracy_plane_png(find_runs(arguments.runs), arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
