"""Draw every method's path on the toy problem for its docs page: `python scripts/make_method_pictures.py [NAME ...]`.

Writes docs/images/methods/NAME.png and, for the captions, what happened in numbers: docs/images/methods/paths.json.
Without names all registered methods are drawn, which takes a few minutes on one core; what is no longer registered is
removed.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import detente
from detente.experiments.toy_paths import Descent, descend
from detente.problems import Toy
from detente.problems.toy import Scales
from detente.records.atomic import write_bytes, write_json
from detente.reports.style import PALETTE

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "methods"
SCALES: Scales = "nash-mtl"  # the losses differ by a factor of ten: conflict and unequal size in one picture
STEPS, LR, STRIDE = 6000, 1e-2, 20
NEAR = 0.5  # an end this close to the Pareto set has arrived
LARGEST = 60_000  # bytes of one picture

COLOURS = [PALETTE["light"][token] for token in ("m1", "m2", "m3", "m4", "m5")]
INK, MUTED, GRID = (PALETTE["light"][token] for token in ("ink", "muted", "grid"))


def main() -> None:
    """Draw the named methods, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="methods to draw; all if none is named")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = detente.methods()
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; there are {', '.join(known)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    stored = arguments.out / "paths.json"
    before = json.loads(stored.read_text("utf-8"))["methods"] if stored.exists() else {}
    found = {name: entry for name, entry in before.items() if name in known}
    for number, name in enumerate(arguments.names or known, 1):
        started = time.perf_counter()
        raised = "losses" in known[name].needs
        descent = descend(Toy(SCALES), name, steps=STEPS, lr=LR, stride=STRIDE, positive=raised)
        found[name] = facts(descent, raised)
        picture = drawing(descent)
        if len(picture) > LARGEST:
            raise SystemExit(f"the picture of {name} has {len(picture)} bytes; the limit is {LARGEST}")
        write_bytes(arguments.out / f"{name}.png", picture)
        write_json(stored, {**settings(), "methods": dict(sorted(found.items()))})
        total = len(arguments.names or known)
        print(
            f"{number}/{total} {name}: {time.perf_counter() - started:.1f} s, {len(picture) / 1000:.0f} kB",
            flush=True,
        )
    for picture in arguments.out.glob("*.png"):
        if picture.stem not in known:
            picture.unlink()
            print(f"removed {picture.name}: no such method")


def settings() -> dict[str, Any]:
    """How the paths were made."""
    toy = Toy(SCALES)
    return {
        "problem": f"toy, scales {SCALES}",
        "factors": toy.factors,
        "steps": STEPS,
        "lr": LR,
        "near": NEAR,
        "raised_by": (-1.05 * toy.lower).tolist(),
    }


def facts(descent: Descent, raised: bool) -> dict[str, Any]:
    """What happened, in numbers: start, end, distance of the end to the Pareto set."""
    ends = descent.paths[:, -1]
    distance = torch.cdist(ends, Toy(SCALES).pareto_set(2001)).min(dim=1).values
    return {
        "raised": raised,
        "starts": descent.paths[:, 0].tolist(),
        "ends": [[round(value, 3) for value in end] for end in ends.tolist()],
        "distance_to_pareto_set": [round(value, 3) for value in distance.tolist()],
        "refused": descent.refused,
        "stationary": descent.stationary,
        "stopped": descent.stopped,
    }


def drawing(descent: Descent) -> bytes:
    """The picture as PNG: paths over the landscape on the left, the same paths among the losses on the right."""
    import matplotlib
    from matplotlib.figure import Figure

    toy = Toy(SCALES)
    factors = np.array(toy.factors)
    fonts: Any = {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8.5}
    with matplotlib.rc_context({**fonts, "axes.edgecolor": MUTED, "axes.linewidth": 0.8}):
        figure = Figure(figsize=(8.0, 3.9), dpi=110, layout="constrained")
        plane, values = figure.subplots(1, 2)
        landscape(plane, toy, factors)
        front = toy.front(200).numpy() / factors
        values.plot(*front.T, color=INK, linewidth=3.5, solid_capstyle="round", zorder=4)
        values.annotate(
            "front", front[100], xytext=(-10, -12), textcoords="offset points", ha="right", color=INK
        )
        values.grid(color=GRID, linewidth=0.7)
        values.set_axisbelow(True)
        for path, colour in zip(descent.paths, COLOURS, strict=True):
            losses = toy.losses(path).numpy() / factors
            for axes, points in ((plane, path.numpy()), (values, losses)):
                axes.plot(*points.T, color=colour, linewidth=1.6, zorder=5)
                axes.plot(
                    *points[0], "o", color="white", markeredgecolor=colour, markeredgewidth=1.6, zorder=6
                )
                axes.plot(*points[-1], "o", color=colour, markeredgecolor="white", markersize=8, zorder=7)
        plane.set(xlabel="θ₁", ylabel="θ₂", title="where it goes")
        plane.set_aspect("equal")
        values.set(
            xlim=(-21.5, 12), ylim=(-21.5, 12), title="what it costs: each loss in its own unit",
            xlabel=f"loss of task 1 / {factors[0]:g}", ylabel=f"loss of task 2 / {factors[1]:g}",
        )  # fmt: skip
        values.set_aspect("equal")
        for axes in (plane, values):
            axes.title.set(fontsize=9.5, color=INK)
            axes.tick_params(colors=MUTED, length=3)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return small(file)


def landscape(axes: Any, toy: Toy, factors: np.ndarray) -> None:
    """Contours of the sum of both losses, each in its own unit, and the Pareto set with its ends."""
    (left, right), (bottom, top) = toy.bounds
    x, y = np.meshgrid(np.linspace(left, right, 161), np.linspace(bottom, top, 161))
    losses = toy.losses(torch.from_numpy(np.stack((x, y), axis=-1))).numpy() / factors
    axes.contour(x, y, losses.sum(-1), levels=18, colors="#c3c9d0", linewidths=0.7, linestyles="solid")
    best = toy.pareto_set(200).numpy()
    axes.plot(*best.T, color=INK, linewidth=3.5, solid_capstyle="round", zorder=4)
    for place, text in ((0, "best for task 2"), (100, "Pareto set"), (199, "best for task 1")):
        below: dict[str, Any] = {"xytext": (0, -12), "textcoords": "offset points", "ha": "center"}
        axes.annotate(text, best[place], color=INK, fontsize=7.5, **below)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def small(file: io.BytesIO) -> bytes:
    """The same picture with a palette of 64 colours."""
    from PIL import Image

    file.seek(0)
    smaller = io.BytesIO()
    image = Image.open(file).convert("RGB")
    image.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        smaller, format="png", optimize=True
    )
    return smaller.getvalue()


if __name__ == "__main__":
    main()
