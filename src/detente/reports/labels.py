"""Names beside points, moved apart so that all can be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from detente.reports.figures import safe, short

_LINE = 14  # pixels that a line of text needs
_SIZE = 11
_GAP = 2 * "\N{NO-BREAK SPACE}"  # to the point's marker
_WIDTH = 0.3  # the share of the plot's width that a name may need: not much on a screen, enough on a phone


_TEXT = {
    "type": "scatter",
    "mode": "text",
    "textposition": "middle left",
    "hoverinfo": "skip",
    "showlegend": False,
    "cliponaxis": False,
}


def labels(
    points: Sequence[tuple[float, float, str, str | None]],
    ranges: tuple[Sequence[float], Sequence[float]],
    colour: str,
    height: int,
    log: bool = False,
) -> list[dict[str, Any]]:
    """A name to the upper left of every point; where points lie close, the upper name moves up.

    Args:
        points: x, y, the name and the key of the group (or None) of each.
        ranges: the axes from left to right and from bottom to top; of a logarithmic x axis the exponents.
        colour: a token.
        height: of the plot in pixels, without its margins.
        log: whether the x axis is logarithmic.

    Example:
        >>> found = labels([(1.0, 0.0, "a", None), (2.0, 0.0, "b", None)], ((0, 9), (0, 100)), "@ink", 100)
        >>> [trace["y"] for trace in found]
        [[9.0], [23.0]]
    """
    (left, right), (bottom, top) = ranges
    unit = (top - bottom) / height  # of the axis for a pixel, negative where it points down
    places: list[dict[str, Any]] = []
    taken: list[tuple[float, float]] = []
    # From the lowest on the screen to the highest.
    for x, y, name, key in sorted(points, key=lambda point: (point[1] - bottom) / unit):
        across, up = ((math.log10(x) if log else x) - left) / (right - left), (y - bottom) / unit + 9
        for other, height_there in taken:
            if abs(across - other) < _WIDTH:
                up = max(up, height_there + _LINE)
        taken.append((across, up))
        place = {"x": [short(x)], "y": [short(bottom + unit * up)], "text": [f"{safe(name)}{_GAP}"]}
        places.append({**_TEXT, **place, "textfont": {"color": colour, "size": _SIZE}, "meta": key})
    return places


__all__ = ["labels"]
