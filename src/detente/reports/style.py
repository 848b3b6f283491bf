"""One colour and shape for each method, the same in every figure of every report.

Colours are named by tokens (``"m3"``), not by value: the page looks the value up for the reader's light or
dark scheme. Every method also has a marker of its own shape, and the space of its gradients shows as filled
or open marker and as solid or broken line, so no difference rests on colour alone. Both palettes keep a
contrast of at least 3 to 1 against their background and stay apart under simulated colour blindness
(checked by the tests).
"""

from __future__ import annotations

import html
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

COLOURS = 8
BACKGROUND = {"light": "#ffffff", "dark": "#181b21"}
PALETTE = {
    "light": {
        **{"m0": "#3a3a3a", "m1": "#2f5fc4", "m2": "#ae4c08", "m3": "#2f9e83"},
        **{"m4": "#86107a", "m5": "#a98507", "m6": "#2482b4", "m7": "#8f4650"},
        **{"ink": "#1c2024", "muted": "#5d6670", "grid": "#e3e6ea", "single": "#5d6670"},
    },
    "dark": {
        **{"m0": "#b9b9b9", "m1": "#4b8ff7", "m2": "#f2602f", "m3": "#8ff0cb"},
        **{"m4": "#b46fb8", "m5": "#ecc528", "m6": "#55c2fc", "m7": "#c88f95"},
        **{"ink": "#e8eaed", "muted": "#a0a8b2", "grid": "#2e343c", "single": "#a0a8b2"},
    },
}
# Names as plotly knows them, and matplotlib's letter for the same shape.
SHAPES = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "star": "*",
    "pentagon": "p",
    "triangle-down": "v",
    "cross": "P",
}
_SHAPES = tuple(SHAPES)

# The order gives the most compared methods the colours that are furthest apart. A method that is not here
# gets a place from its name, so a new method needs no entry.
_ORDER = (
    *("uniform", "mgda", "aligned-mtl", "cagrad", "nash-mtl", "static", "pcgrad", "imtl-g"),
    *("uncertainty", "gradnorm", "upgrad", "fairgrad", "dwa", "rlw", "famo", "gradvac"),
    *("graddrop", "inexact-mgda", "adaptive-mgda", "imtl", "imtl-l", "edm", "dualproj", "config"),
    *("sdmgrad", "moco", "modo", "db-mtl", "excess-mtl", "gls", "stch"),
)

_SPACES = {
    "exact": ("", "solid", "solid"),
    "none": ("", "solid", "solid"),
    "features": ("-open", "dash", "dashed"),
    "layer": ("-open-dot", "dot", "dotted"),
}


@dataclass(frozen=True)
class Style:
    """How one group of runs is drawn: colour token, marker shape, and what shows the gradients' space."""

    colour: str
    shape: str
    fill: str
    dash: str
    matplotlib_dash: str

    @property
    def symbol(self) -> str:
        """The marker as plotly names it."""
        return self.shape + self.fill

    @property
    def filled(self) -> bool:
        """Whether the marker is filled."""
        return not self.fill


SINGLE = Style("single", "cross", "-open", "dot", "dotted")
PUBLISHED = Style("muted", "diamond", "-open", "dot", "dotted")


def places(methods: Iterable[str]) -> dict[str, int]:
    """A place for every method: its colour is the place modulo 8, its shape follows from the place.

    Listed methods always have the same place; others get one from their name, moved on only when another
    method of the same report holds it.

    >>> places(["mgda"])["mgda"] == places(["uniform", "mine", "mgda"])["mgda"]
    True
    """
    found: dict[str, int] = {}
    total = COLOURS * len(_SHAPES)
    names = sorted(set(methods))
    for name in names:
        if name in _ORDER:
            found[name] = _ORDER.index(name)
    for name in names:
        if name not in found:
            place = zlib.crc32(name.encode()) % total
            # The colour moves on first: it is what a reader sees first.
            taken = set(found.values())
            while place in taken and len(taken) < total:
                place = (place + 1) % total
            found[name] = place
    return found


def style_at(place: int, gradients: str, variant: int = 0) -> Style:
    """The style of a method at its place, for a space of gradients.

    ``variant`` counts groups that differ only in options or settings: they keep the colour and change shape.

    >>> style_at(1, "exact").symbol, style_at(1, "features").symbol
    ('square', 'square-open')
    """
    cycle, colour = divmod(place, COLOURS)
    shape = _SHAPES[(colour + cycle * 3 + variant) % len(_SHAPES)]
    fill, dash, matplotlib_dash = _SPACES.get(gradients, ("-dot", "dashdot", "dashdot"))
    return Style(f"m{colour}", shape, fill, dash, matplotlib_dash)


def svg_sample(style: Style) -> str:
    """A small SVG of the line and the marker, for the legend and the table."""
    broken = {"solid": "", "dash": "5 3", "dot": "1.5 2.5", "dashdot": "5 2 1 2"}[style.dash]
    line = f'<path d="M1 8H31" fill="none" stroke-width="2" stroke-dasharray="{broken}"/>'
    inside = "currentColor" if style.filled else "var(--card)"
    return (
        f'<svg class="sample" viewBox="0 0 32 16" width="32" height="16" style="color:var(--{style.colour})" '
        f'stroke="currentColor" aria-hidden="true">{line}'
        f'<path d="{_outline(style.shape)}" fill="{inside}" stroke-width="1.6" stroke-linejoin="round"/></svg>'
    )


def named(style: Style, name: str) -> str:
    """The sample and the escaped name beside it, as HTML."""
    return f"<span class='named'>{svg_sample(style)}<span>{html.escape(name)}</span></span>"


def _outline(shape: str) -> str:
    if shape == "circle":
        return "M11.5 8a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z"
    if shape == "square":
        return "M12 4h8v8h-8Z"
    if shape == "cross":
        return "M14.3 3h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3Z"
    corners, turn, inner = {
        "diamond": (4, 0.0, 1.0),
        "triangle-up": (3, 0.0, 1.0),
        "triangle-down": (3, 0.5, 1.0),
        "pentagon": (5, 0.0, 1.0),
        "star": (5, 0.0, 0.42),
    }[shape]
    points = []
    for corner in range(corners):
        for step, radius in ((0.0, 5.6), (0.5, 5.6 * inner)):
            if step and inner == 1.0:
                continue
            angle = 2 * math.pi * ((corner + step) / corners + (turn if corners == 3 else 0)) - math.pi / 2
            points.append(f"{16 + radius * math.cos(angle):.2f} {8 + radius * math.sin(angle):.2f}")
    return "M" + "L".join(points) + "Z"
