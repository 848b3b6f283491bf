"""The figures of the page for print: our own plotly values drawn by matplotlib, as PNG or PDF.

Only what our figures use is understood. A kind of trace, mode or shape that is not raises `Undrawable` with its name,
so that nothing is missing from a picture in silence.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from math import radians
from typing import Any

from detente.reports.figures import Figure
from detente.reports.printing import paper_fonts, plain_math
from detente.reports.style import PALETTE, SHAPES

_COLOURS = {**PALETTE["light"], "card": "#ffffff"}
_DASHES: Mapping[str, Any] = {
    **{"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3))},
}
_STEPS = {"linear": "default", "hv": "steps-post", "vh": "steps-pre"}
_PER_COLUMN = 18  # names of a legend beside the figure
_INCH = 96  # pixels of the page


class Undrawable(ValueError):
    """A figure of the page has something in it that cannot be drawn for print."""


def drawn(figure: Figure, kind: str, dpi: int = 200) -> bytes:
    """The picture as the bytes of a file.

    Args:
        figure: a figure of the page.
        kind: ``png`` or ``pdf``, or another suffix that matplotlib knows.
        dpi: pixels per inch, where the kind has pixels.

    Raises:
        Undrawable: it has a kind of trace or shape that is not known here.

    Example:
        >>> line = {"type": "scatter", "x": [1, 2], "y": [3, 4], "mode": "lines", "line": {"color": "@m1"}}
        >>> drawn(Figure("loss", [line], {"xaxis": {"title": {"text": "epoch"}}}), "pdf")[:5]
        b'%PDF-'
    """
    # Figure instead of pyplot: no window, no state shared with the caller's own figures.
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    told = figure.layout
    kinds = {trace.get("type", "scatter") for trace in figure.data}
    polar = "scatterpolar" in kinds
    if unknown := kinds - set(_TRACES):
        raise Undrawable(
            f"figure {figure.title!r}: no export for a trace of type {', '.join(sorted(unknown))}."
        )
    if polar and len(kinds) > 1:
        raise Undrawable(
            f"figure {figure.title!r}: no export for scatterpolar beside {', '.join(sorted(kinds))}."
        )
    with paper_fonts(), mpl.rc_context({"pdf.fonttype": 42, "axes.titlesize": 10, "hatch.linewidth": 0.6}):
        canvas = Canvas(figsize=(6.4, max(2.8, figure.height / _INCH)), layout="constrained")
        axes = canvas.add_subplot(projection="polar" if polar else None)
        try:
            (_begin_polar if polar else _begin)(axes, told)
            for number, trace in enumerate(figure.data):
                if figure.shown is not None and trace.get("meta") not in (None, *figure.shown):
                    continue
                _TRACES[trace.get("type", "scatter")](axes, trace, figure, number)
            if polar:
                _end_polar(axes, told)
            else:
                _end(axes, told)
            for shape in told.get("shapes", ()):
                _shape(axes, shape)
            for note in told.get("annotations", ()):
                _note(axes, note)
        except Undrawable as error:
            raise Undrawable(f"figure {figure.title!r}: {error}") from None
        if figure.title:
            axes.set_title(_text(figure.title, False), loc="left" if not polar else "center")
        _legend(canvas, axes)
        buffer = io.BytesIO()
        # Without a date the same runs give the same file.
        more: dict[str, Any] = {"metadata": {"CreationDate": None}} if kind == "pdf" else {}
        canvas.savefig(buffer, format=kind, dpi=dpi, facecolor="white", **more)
    return buffer.getvalue()


# ---- axes


def _begin(axes: Any, told: Mapping[str, Any]) -> None:
    if other := sorted(key for key in told if re.fullmatch(r"[xy]axis\d+", key)):
        raise Undrawable(f"no export for a second axis ({', '.join(other)}).")
    axes.grid(color=_COLOURS["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for name, own in (("x", axes.xaxis), ("y", axes.yaxis)):
        options = told.get(f"{name}axis", {})
        if options.get("type") == "log":
            (axes.set_xscale if name == "x" else axes.set_yscale)("log")
        if order := options.get("categoryarray"):
            own.update_units([_text(entry) for entry in order])


def _end(axes: Any, told: Mapping[str, Any]) -> None:
    from matplotlib.ticker import NullLocator

    for name, own, limit in (("x", axes.xaxis, axes.set_xlim), ("y", axes.yaxis, axes.set_ylim)):
        options = told.get(f"{name}axis", {})
        own.set_label_text(_text(_title(options)))
        if options.get("tickvals") is not None:
            labels = options.get("ticktext") or [f"{tick:g}" for tick in options["tickvals"]]
            # An axis's limits come from its data: a tick outside of them must not widen it.
            kept = limit()
            own.set_ticks(options["tickvals"], [_text(str(label)) for label in labels])
            own.set_minor_locator(NullLocator())
            limit(kept)
        if options.get("range") is not None:
            ends = [10.0**end if options.get("type") == "log" else end for end in options["range"]]
            limit(*ends)
        elif options.get("autorange") == "reversed":
            own.set_inverted(True)
        if options.get("showticklabels") is False or options.get("visible") is False:
            own.set_ticks([])
    labels = [label.get_text() for label in axes.get_xticklabels()]
    if len(labels) > 4 and max(map(len, labels)) > 8:
        axes.tick_params(axis="x", rotation=60, labelsize=7)


def _begin_polar(axes: Any, told: Mapping[str, Any]) -> None:
    angular = told.get("polar", {}).get("angularaxis", {})
    axes.set_theta_direction(-1 if angular.get("direction") == "clockwise" else 1)
    axes.set_theta_offset(radians(angular.get("rotation", 0)))
    axes.grid(color=_COLOURS["grid"], linewidth=0.8)


def _end_polar(axes: Any, told: Mapping[str, Any]) -> None:
    radial = told.get("polar", {}).get("radialaxis", {})
    if radial.get("type") == "log":
        raise Undrawable("no export for a logarithmic radial axis.")
    if radial.get("range") is not None:
        axes.set_rlim(*radial["range"])
    if radial.get("tickvals") is not None:
        labels = radial.get("ticktext") or [f"{tick:g}" for tick in radial["tickvals"]]
        axes.set_rticks(radial["tickvals"], [_text(str(label)) for label in labels])
    axes.tick_params(axis="y", labelsize=7, labelcolor=_COLOURS["muted"])
    axes.spines["polar"].set_edgecolor(_COLOURS["grid"])


def _title(options: Mapping[str, Any]) -> str:
    title = options.get("title", "")
    return str(title.get("text", "") if isinstance(title, Mapping) else title)


# ---- traces


def _scatter(axes: Any, trace: Mapping[str, Any], figure: Figure, number: int) -> None:
    mode = trace.get("mode", "lines")
    if unknown := set(mode.split("+")) - {"lines", "markers", "text", "none"}:
        raise Undrawable(f"no export for a scatter trace of mode {', '.join(sorted(unknown))}.")
    x, y = _values(trace["x"]), _values(trace["y"])
    _fill(axes, trace, x, y, figure, number)
    for name in ("error_x", "error_y"):
        if (error := trace.get(name)) and error.get("visible", True):
            _whiskers(axes, error, x, y, "xerr" if name == "error_x" else "yerr")
    _line(axes, trace, x, y, mode)
    if "text" in mode:
        for place in zip(x, y, trace["text"], strict=True):
            axes.annotate(
                _text(place[2]), place[:2], (0, 5), textcoords="offset points", ha="center", fontsize=8
            )


def _line(axes: Any, trace: Mapping[str, Any], x: Sequence[Any], y: Sequence[Any], mode: str) -> None:
    line, marker = trace.get("line", {}), trace.get("marker", {})
    if line.get("shape", "linear") not in _STEPS:
        raise Undrawable(f"no export for a line of shape {line['shape']}.")
    look: dict[str, Any] = {"linestyle": "none", "label": _label(trace), "zorder": 3}
    look["drawstyle"] = _STEPS[line.get("shape", "linear")]
    if "lines" in mode and line.get("width", 2) > 0:
        look["linestyle"] = _DASHES[line.get("dash", "solid")]
        look["linewidth"] = 0.75 * line.get("width", 2)
        look["color"] = _colour(line.get("color", marker.get("color")))
    if "markers" in mode:
        if isinstance(marker.get("color"), list) or isinstance(marker.get("size"), list):
            _many_markers(axes, marker, x, y, look["label"])
            return
        look |= _marker(marker)
        if marker.get("maxdisplayed") and len(x) > marker["maxdisplayed"]:
            look["markevery"] = -(-len(x) // marker["maxdisplayed"])
    if look["linestyle"] != "none" or "markers" in mode:
        axes.plot(x, y, alpha=trace.get("opacity"), **look)


def _marker(marker: Mapping[str, Any]) -> dict[str, Any]:
    symbol = str(marker.get("symbol", "circle"))
    shape = next((name for name in sorted(SHAPES, key=len, reverse=True) if symbol.startswith(name)), None)
    if shape is None or symbol.removeprefix(shape) not in ("", "-open", "-dot", "-open-dot"):
        raise Undrawable(f"no export for the marker {symbol!r}.")
    colour = _colour(marker.get("color"), marker.get("opacity"))
    edge = marker.get("line", {})
    is_open = "-open" in symbol
    return {
        "marker": SHAPES[shape],
        "markersize": 0.68 * marker.get("size", 6) * (1.3 if shape == "star" else 1),
        "markerfacecolor": "white" if is_open else colour,
        "markeredgecolor": colour if is_open else _colour(edge.get("color"), missing=colour),
        "markeredgewidth": 0.75 * edge.get("width", 1.5 if is_open else 0),
    }


def _many_markers(
    axes: Any, marker: Mapping[str, Any], x: Sequence[Any], y: Sequence[Any], label: str
) -> None:
    """Markers that differ in colour or size."""
    import numpy as np

    shape = SHAPES.get(str(marker.get("symbol", "circle")))
    if shape is None:
        raise Undrawable(f"no export for the marker {marker['symbol']!r} in several colours or sizes.")
    colours = marker.get("color")
    look: dict[str, Any] = {"color": _colour(colours)}
    if isinstance(colours, list):
        numbers = all(isinstance(entry, int | float) for entry in colours)
        look = {"c": colours, "cmap": _scale(marker)} if numbers else {"color": [_colour(c) for c in colours]}
    sizes = np.square(0.68 * np.asarray(marker.get("size", 6), dtype=float))
    axes.scatter(x, y, s=sizes, marker=shape, label=label, zorder=3, **look)


def _fill(
    axes: Any, trace: Mapping[str, Any], x: Sequence[Any], y: Sequence[Any], figure: Figure, number: int
) -> None:
    kind = trace.get("fill", "none")
    look = {"color": _colour(trace.get("fillcolor")), "linewidth": 0, "zorder": 1}
    if kind == "none":
        return
    if kind == "toself":
        axes.fill(x, y, **look)
    elif kind == "tozeroy":
        axes.fill_between(x, y, 0, **look)
    elif kind == "tonexty":
        below = figure.data[number - 1] if number else None
        if below is None or list(below["x"]) != list(trace["x"]):
            raise Undrawable("no export for a band (tonexty) whose edges have different x.")
        axes.fill_between(x, _values(below["y"]), y, **look)
    else:
        raise Undrawable(f"no export for the fill {kind!r}.")


def _whiskers(axes: Any, error: Mapping[str, Any], x: Any, y: Any, name: str) -> None:
    if error.get("type", "data") != "data" or "arrayminus" in error:
        raise Undrawable("no export for whiskers other than symmetric ones with a length each.")
    lengths = [0.0 if length is None else length for length in error["array"]]
    colour, width = _colour(error.get("color")), error.get("thickness", 1.2)
    axes.errorbar(x, y, **{name: lengths}, fmt="none", ecolor=colour, elinewidth=width, capsize=2.5, zorder=2)


def _polar(axes: Any, trace: Mapping[str, Any], figure: Figure, number: int) -> None:
    if trace.get("fill", "none") not in ("none", "toself"):
        raise Undrawable(f"no export for the fill {trace['fill']!r} of a scatterpolar trace.")
    theta = trace["theta"]
    if any(isinstance(angle, str) for angle in theta):
        # Categories stand at equal angles, in the order in which the traces name them.
        names = list(dict.fromkeys(name for other in figure.data for name in other["theta"]))
        angles = [radians(360 * names.index(name) / len(names)) for name in theta]
        axes.set_xticks([radians(360 * place / len(names)) for place in range(len(names))])
        axes.set_xticklabels([_text(name) for name in names], fontsize=8)
    else:
        angles = [radians(angle) for angle in theta]
    r = _values(trace["r"])
    if trace.get("fill") == "toself":
        axes.fill(angles, r, color=_colour(trace.get("fillcolor")), linewidth=0, zorder=1)
    _line(axes, trace, angles, r, trace.get("mode", "lines"))


def _bar(axes: Any, trace: Mapping[str, Any], figure: Figure, number: int) -> None:
    import numpy as np

    across = trace.get("orientation", "v") == "h"
    places, lengths = (trace["y"], trace["x"]) if across else (trace["x"], trace["y"])
    bars = [other for other in figure.data if other.get("type") == "bar"]
    mine = next(place for place, other in enumerate(bars) if other is trace)
    mode = figure.layout.get("barmode", "group")
    if mode not in ("group", "overlay") and len(bars) > 1:
        raise Undrawable(f"no export for bars of barmode {mode!r}.")
    key = "y" if across else "x"
    numbers, width, start = np.arange(len(places), dtype=float), 0.8, 0.0
    if any(isinstance(place, str) for place in places):
        names = list(dict.fromkeys(place for bar in bars for place in bar[key]))
        numbers = np.array([names.index(place) for place in places], dtype=float)
        (axes.set_yticks if across else axes.set_xticks)(range(len(names)), [_text(name) for name in names])
    else:
        numbers = np.asarray(places, dtype=float)
        width *= float(np.diff(np.unique(numbers)).min()) if len(np.unique(numbers)) > 1 else 1.0
    if mode == "group":
        start, width = (mine - (len(bars) - 1) / 2) * width / len(bars), width / len(bars)
    marker = trace.get("marker", {})
    colours = marker.get("color")
    colour = [_colour(one) for one in colours] if isinstance(colours, list) else _colour(colours)
    values = _values(lengths)
    draw = axes.barh if across else axes.bar
    draw(numbers + start, values, width, color=colour, label=_label(trace), zorder=3)
    error = trace.get("error_x" if across else "error_y")
    if error:
        x, y = (values, numbers + start) if across else (numbers + start, values)
        _whiskers(axes, {"color": "@ink", **error}, x, y, "xerr" if across else "yerr")


def _heatmap(axes: Any, trace: Mapping[str, Any], figure: Figure, number: int) -> None:
    import numpy as np

    z = np.array([_values(row) for row in trace["z"]], dtype=float)
    x, y = trace.get("x", list(range(z.shape[1]))), trace.get("y", list(range(z.shape[0])))
    low, high = trace.get("zmin"), trace.get("zmax")
    if trace.get("zmid") is not None and low is None:
        reach = float(np.nanmax(np.abs(z - trace["zmid"])))
        low, high = trace["zmid"] - reach, trace["zmid"] + reach
    # Cells are drawn by number and named at their middles, so that names and unequal steps are no trouble.
    mesh = axes.pcolormesh(np.ma.masked_invalid(z), cmap=_scale(trace), vmin=low, vmax=high, zorder=2)
    axes.grid(False)
    for names, ticks in ((x, axes.set_xticks), (y, axes.set_yticks)):
        every = max(1, -(-len(names) // 40))
        shown = [_text(name) if isinstance(name, str) else f"{name:g}" for name in names]
        ticks([place + 0.5 for place in range(0, len(names), every)], shown[::every], fontsize=7)
    if trace.get("texttemplate") or trace.get("text"):
        _cell_texts(axes, trace, z)
    if trace.get("showscale", True):
        bar = axes.figure.colorbar(mesh, ax=axes)
        options = trace.get("colorbar", {})
        bar.set_label(_text(_title(options)))
        if options.get("tickvals") is not None:
            labels = options.get("ticktext") or [f"{tick:g}" for tick in options["tickvals"]]
            bar.set_ticks(options["tickvals"], labels=[_text(str(label)) for label in labels])
            bar.ax.minorticks_off()


def _cell_texts(axes: Any, trace: Mapping[str, Any], z: Any) -> None:
    template = trace.get("texttemplate", "%{text}")
    found = re.fullmatch(r"%\{(text|z)(?::(\.\d+[efg]))?\}", template)
    if found is None:
        raise Undrawable(f"no export for the text template {template!r}.")
    for row, column in ((r, c) for r in range(z.shape[0]) for c in range(z.shape[1])):
        told = trace["text"][row][column] if found[1] == "text" else format(z[row, column], found[2] or "")
        axes.text(column + 0.5, row + 0.5, _text(str(told)), ha="center", va="center", fontsize=6, zorder=4)


_TRACES: dict[str, Callable[[Any, Mapping[str, Any], Figure, int], None]] = {
    **{"scatter": _scatter, "scattergl": _scatter, "scatterpolar": _polar, "bar": _bar, "heatmap": _heatmap},
}


# ---- around them


def _shape(axes: Any, shape: Mapping[str, Any]) -> None:
    if shape.get("type") != "line":
        raise Undrawable(f"no export for a shape of type {shape.get('type')!r}.")
    line = shape.get("line", {})
    look = {
        "color": _colour(line.get("color")),
        "linestyle": _DASHES[line.get("dash", "solid")],
        "linewidth": 0.75 * line.get("width", 2),
        "zorder": 1.5,
    }
    x, y = [shape["x0"], shape["x1"]], [shape["y0"], shape["y1"]]
    kept = axes.get_xlim(), axes.get_ylim()
    transform = _place(axes, shape)
    axes.plot(x, y, transform=transform, **look)
    # The page draws shapes without making room for them, except those that cross all of it.
    axes.set_xlim(kept[0] if shape.get("xref") == "paper" else _wider(kept[0], x))
    axes.set_ylim(kept[1] if shape.get("yref") == "paper" else _wider(kept[1], y))


def _wider(limits: tuple[float, float], found: Sequence[Any]) -> tuple[float, float]:
    numbers = [value for value in found if isinstance(value, int | float)]
    low, high = sorted(limits)
    low, high = min([low, *numbers]), max([high, *numbers])
    return (low, high) if limits[0] <= limits[1] else (high, low)


def _note(axes: Any, note: Mapping[str, Any]) -> None:
    font = note.get("font", {})
    align = {"left": "left", "right": "right", "center": "center"}[note.get("xanchor", "center")]
    upright = {"bottom": "bottom", "top": "top", "middle": "center"}[note.get("yanchor", "middle")]
    axes.text(
        note["x"],
        note["y"],
        _text(note["text"]),
        transform=_place(axes, note),
        color=_colour(font.get("color", "@ink")),
        fontsize=0.68 * font.get("size", 12),
        rotation=-note.get("textangle", 0),
        ha=align,
        va=upright,
        zorder=4,
    )


def _place(axes: Any, item: Mapping[str, Any]) -> Any:
    from matplotlib.transforms import blended_transform_factory

    known = {"x", "y", "paper", "x domain", "y domain"}
    refs = [item.get("xref", "x"), item.get("yref", "y")]
    if unknown := set(refs) - known:
        raise Undrawable(f"no export for what is placed by {', '.join(sorted(unknown))}.")
    parts = [axes.transData if ref in ("x", "y") else axes.transAxes for ref in refs]
    return blended_transform_factory(*parts)


def _legend(canvas: Any, axes: Any) -> None:
    """Every name once, beside the figure; the page has its legend above all figures."""
    found: dict[str, Any] = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        # Of a line and the ring around one of its points the line, of small and large points the large one.
        if label not in found or _weight(handle) > _weight(found[label]):
            found[label] = handle
    if found:
        columns = -(-len(found) // _PER_COLUMN)
        canvas.legend(
            found.values(), found.keys(), loc="outside right upper", frameon=False, fontsize=8, ncols=columns
        )


def _weight(handle: Any) -> tuple[bool, float]:
    from matplotlib.lines import Line2D

    if not isinstance(handle, Line2D):
        return False, 0.0
    return handle.get_linestyle() != "None", handle.get_markersize()


def _label(trace: Mapping[str, Any]) -> str:
    hidden = not trace.get("name") or trace.get("showlegend") is False
    return "_" if hidden else _text(str(trace["name"])).lstrip("_") or "_"


def _text(text: str, escaped: bool = True) -> str:
    """A text of the page as matplotlib takes it: no simple HTML, no formulas."""
    lines = re.sub(r"<br\s*/?>", "\n", text) if escaped else text
    return plain_math(html.unescape(lines) if escaped else lines)


def _values(found: Sequence[Any]) -> list[Any]:
    return [
        float("nan") if value is None else _text(value) if isinstance(value, str) else value
        for value in found
    ]


def _colour(token: Any, opacity: float | None = None, missing: Any = None) -> Any:
    """A token of the palette, or a colour as plotly writes it, for matplotlib."""
    from matplotlib.colors import to_rgba

    if token is None:
        return to_rgba(_COLOURS["ink"]) if missing is None else missing
    text = str(token)
    name, _, share = text[1:].partition("/") if text.startswith("@") else (text, "", "")
    if found := re.fullmatch(r"rgba?\(([^)]*)\)", text):
        red, green, blue, *alpha = (float(part) for part in found[1].split(","))
        name, share = f"#{int(red):02x}{int(green):02x}{int(blue):02x}", str(alpha[0]) if alpha else ""
    try:
        part = float(share) if share else opacity
        return to_rgba(_COLOURS[name] if text.startswith("@") else name, part)
    except (KeyError, ValueError):
        raise Undrawable(f"no export for the colour {token!r}.") from None


def _scale(trace: Mapping[str, Any]) -> Any:
    """The colour scale of numbers."""
    import matplotlib as mpl
    from matplotlib.colors import LinearSegmentedColormap

    given = trace.get("colorscale", "Viridis")
    if isinstance(given, str):
        known = {name.lower(): name for name in mpl.colormaps}
        if given.lower() not in known:
            raise Undrawable(f"no export for the colour scale {given!r}.")
        return mpl.colormaps[known[given.lower()] + ("_r" if trace.get("reversescale") else "")]
    stops = [(float(place), _colour(colour)) for place, colour in given]
    found = LinearSegmentedColormap.from_list("page", stops)
    return found.reversed() if trace.get("reversescale") else found
