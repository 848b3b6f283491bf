"""What a page with very many methods leaves out of its figures, and says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from detente.reports.figures import Figure, Section

MOST_BANDS = 24
"""With more lines in a figure their bands cover each other, and none is drawn."""
MOST_POINTS = 6000
"""About so many points of lines are drawn in one figure."""
_FEWEST = 10  # points that a line keeps in any case


def thinned(section: Section) -> Section:
    """A section whose figures a browser draws quickly, however many lines they have; its text tells what is left out.

    Lines keep their first and last point and every k-th between them. Figures with few lines stay as they are.

    Example:
        >>> line = {"type": "scatter", "mode": "lines", "x": list(range(100)), "y": list(range(100))}
        >>> full = Section("Weights", "", ((Figure("share", [line] * 200, {}),),))
        >>> few = thinned(full)
        >>> few.text, len(few.rows[0][0].data[0]["x"])
        (' Of 200 lines in a figure only every 4th point is drawn, and no bands.', 26)
        >>> full = Section("Weights", "", ((Figure("share", [line] * 3, {}),),))
        >>> thinned(full) == full
        True
    """
    most = max((_lines(figure) for row in section.rows for figure in row), default=0)
    if most <= MOST_BANDS:
        return section
    points = max(_FEWEST, MOST_POINTS // most)
    longest = max(len(t["x"]) for row in section.rows for f in row for t in f.data if _is_line(t))
    stride = -(-longest // points)
    rows = tuple(tuple(_thin(figure, stride) for figure in row) for row in section.rows)
    left_out = (
        f"only every {_ordinal(stride)} point is drawn, and no bands" if stride > 1 else "no bands are drawn"
    )
    text = f"{section.text} Of {most} lines in a figure {left_out}."
    return replace(section, text=text, rows=rows)


def _lines(figure: Figure) -> int:
    return sum(map(_is_line, figure.data))


def _is_line(trace: Mapping[str, Any]) -> bool:
    return trace.get("type") == "scatter" and "lines" in trace.get("mode", "") and "fill" not in trace


def _thin(figure: Figure, stride: int) -> Figure:
    if _lines(figure) <= MOST_BANDS:
        return figure
    kept = [_sparse(trace, stride) for trace in figure.data if "fill" not in trace]
    return replace(figure, data=kept)


def _sparse(trace: dict[str, Any], stride: int) -> dict[str, Any]:
    if not _is_line(trace) or stride < 2:
        return trace
    last = len(trace["x"]) - 1
    places = sorted({*range(0, last + 1, stride), last})
    lists = {key: [value[i] for i in places] for key, value in trace.items() if key in ("x", "y", "text")}
    return {**trace, **lists}


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number % 100 not in (11, 12, 13) else 0, "th")
    return f"{number}{ending}"
