"""Write the tables of docs/scaling.md between their markers.

`python scripts/make_scaling_tables.py` writes those that the cost model gives, in seconds. With `--measure` it also
measures with two, three and four processes, some minutes on a quiet machine, and writes the measured ones.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.__main__ import _processor as processor
from benchmarks._at_scale import Rows, kinds, tables
from benchmarks.ranks import RANKS, line_rows, measure, peak_rows, ratio_rows, step_rows, summary

ROOT = Path(__file__).resolve().parents[1]
PAGE, TIMES = ROOT / "docs/scaling.md", ROOT / "docs/results/method-times.csv"


def table(rows: Rows) -> str:
    """Rows as a table in Markdown, the first as its head; numbers to the right."""
    right = ["right" if any(c.isdigit() for c in cell[:1]) else "left" for cell in rows[-1]]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    rule = " | ".join("---:" if side == "right" else "---" for side in right)
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def solving_rows() -> Rows:
    """Seconds of a combination on the host by kind and tasks: median and slowest of the kind's methods."""
    with open(TIMES, encoding="utf-8") as file:
        told = {(row["method"], int(row["T"])): float(row["seconds"]) for row in csv.DictReader(file)}
    counts = sorted({tasks for _, tasks in told})
    found: Rows = [("kind", *(f"T = {tasks}" for tasks in counts))]
    for kind, names in kinds().items():
        row = [kind]
        for tasks in counts:
            seconds = [told[name, tasks] for name in names if (name, tasks) in told]
            cell = f"{statistics.median(seconds) * 1e3:.2f} ms"
            row.append(cell if len(seconds) == 1 else f"{cell} (slowest {max(seconds) * 1e3:.1f})")
        found.append(tuple(row))
    return found


def measured_tables() -> dict[str, str]:
    """What `python -m benchmarks ranks` measures, as Markdown."""
    busy = os.getloadavg()[0]
    measured = [measure(ranks) for ranks in RANKS]
    machine = f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, one thread for each process"
    found = {
        "measured lines": table(line_rows(measured)),
        "measured ratios": table(ratio_rows(measured)),
        "measured memory": table(peak_rows()),
        "machine": f"Measured with {machine}; before that the machine had a load of {busy:.1f} from other work.",
        "measured summary": summary((one.ranks, step) for one in measured for step in one.steps),
    }
    for one in measured:
        found[f"measured steps, {one.ranks} ranks"] = table(step_rows(one))
    return found


def filled(page: str, parts: Mapping[str, str]) -> str:
    """The page with these parts between their markers.

    Raises:
        ValueError: the page has no place for one of them.
    """
    for name, part in parts.items():
        marked = re.compile(rf"(<!-- made: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = marked.subn(lambda found, part=part: f"{found[1]}\n{part}\n\n{found[2]}", page)
        if count != 1:
            raise ValueError(f"the page has {count} places for {name!r}; it needs one.")
    return page


def main(arguments: Sequence[str]) -> None:
    """Fill the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="also measure with gloo processes")
    options = parser.parse_args(arguments)
    parts = {name: table(rows) for name, rows in tables().items()}
    parts["solving"] = table(solving_rows())
    if options.measure:
        parts |= measured_tables()
    text = filled(PAGE.read_text(encoding="utf-8"), parts)
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, PAGE)
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
