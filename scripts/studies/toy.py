"""The toy figures of CAGrad, Nash-MTL and Aligned-MTL: paths, landscapes, fronts, and the rank tolerance.

    python scripts/studies/toy.py --out runs/toy --page docs/results/toy.md

Every run is `detente run toy` with the options told in the table; finished runs are not repeated. With --steps 3500 a
look takes a tenth of the time.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detente.experiments import find
from detente.experiments.toy import ToyConfig, read_paths
from detente.geometry.spectrum import spectrum
from detente.problems import Toy
from detente.records import read_run, write_text
from detente.sweeps.sweep import flags_of

PREFERENCES = (0.1, 0.3, 0.5, 0.7, 0.9)
STEPS = 35_000
PUBLISHED = "rank_tol=published"


@dataclass(frozen=True)
class Entry:
    """One run: its folder, its title in the pictures, and how it is made."""

    folder: str
    title: str
    method: str
    option: tuple[str, ...] = ()


METHODS = (
    Entry("uniform", "uniform", "uniform"),
    Entry("pcgrad", "PCGrad", "pcgrad"),
    Entry("cagrad", "CAGrad, c = 0.4", "cagrad", ("c=0.4",)),
    Entry("imtl-g", "IMTL-G", "imtl-g"),
    Entry("nash-mtl", "Nash-MTL", "nash-mtl"),
    Entry("mgda", "MGDA", "mgda"),
    Entry("aligned-published", "Aligned-MTL, tolerance of float32", "aligned-mtl", (PUBLISHED,)),
    Entry("aligned", "Aligned-MTL, tolerance of float64", "aligned-mtl"),
)


def _weights(first: float) -> str:
    return repr({"first": first, "second": round(1 - first, 1)})


def preferred(first: float) -> list[Entry]:
    """The runs with a preference: fixed weights, and Aligned-MTL with both tolerances."""
    name = f"{first:g}"
    return [
        Entry(f"static-{name}", f"fixed weights {name}", "static", (f"weights={_weights(first)}",)),
        Entry(f"aligned-published-{name}", name, "aligned-mtl", (PUBLISHED, f"preference={_weights(first)}")),
        Entry(f"aligned-{name}", name, "aligned-mtl", (f"preference={_weights(first)}",)),
    ]


def every_entry() -> list[Entry]:
    """All runs of the page."""
    return [*METHODS, *(entry for first in PREFERENCES for entry in preferred(first))]


def carry_out(entry: Entry, out: Path, steps: int) -> float:
    """The run, if it is not there; its seconds."""
    config = ToyConfig(method=entry.method, option=entry.option, max_steps=steps, scales="aligned-mtl")
    folder = out / entry.folder
    command = shlex.join(["detente", "run", "toy", *flags_of(config), "--out", str(folder)])
    result = find("toy").run(config, folder, command=command, label=entry.title, quiet=True)
    return float(result["seconds"])


def main() -> None:
    """Run what is missing, draw, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--page", type=Path, help="write this page, and its pictures into images/ beside it")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    entries = every_entry()
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    with ProcessPoolExecutor(asked.workers) as pool:
        waiting = {entry.folder: pool.submit(carry_out, entry, asked.out, asked.steps) for entry in entries}
        for number, (folder, future) in enumerate(waiting.items(), 1):
            print(f"[{number}/{len(entries)}] {folder}: {future.result():.0f} s", file=sys.stderr)
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    if asked.page is not None:
        write(asked.page, asked.out, asked.steps)


# ---- pictures


def write(page: Path, out: Path, steps: int) -> None:
    """Pictures and page from the stored runs."""
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    toy = Toy("aligned-mtl")
    found = {entry.title: read_paths(out / entry.folder) for entry in METHODS}
    _paths(toy, found, images / "toy-paths.png")
    _objectives(toy, found, images / "toy-losses.png")
    fronts = {
        kind: {first: read_paths(out / preferred(first)[place].folder) for first in PREFERENCES}
        for place, kind in enumerate(("fixed weights", "Aligned-MTL, float32", "Aligned-MTL, float64"))
    }
    _preferences(toy, fronts, images / "toy-preferences.png")
    aligned = {entry.title: found[entry.title] for entry in METHODS[-2:]}
    _tolerance(toy, aligned, images / "toy-tolerance.png")
    write_text(page, _page(toy, out, fronts, steps))


def _landscape(toy: Toy, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    axis = torch.linspace(-10, 10, 241, dtype=torch.float64)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    losses = toy.losses(torch.stack((x, y), dim=-1)) @ torch.tensor(weights, dtype=torch.float64)
    return x.numpy(), y.numpy(), losses.numpy()


def _grid(count: int, columns: int, size: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    canvas = Figure(figsize=(size * columns, size * rows * 1.06), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False).ravel().tolist()
    for empty in axes[count:]:
        empty.remove()
    return canvas, axes[:count]


def _along(axes: Any, x: np.ndarray, y: np.ndarray) -> None:
    """Paths that grow lighter from start to end."""
    for path_x, path_y in zip(x, y, strict=True):
        axes.scatter(
            path_x,
            path_y,
            c=np.linspace(0, 1, len(path_x)),
            cmap="plasma",
            s=2.5,
            linewidths=0,
            zorder=3,
            rasterized=True,
        )
        axes.plot(path_x[0], path_y[0], "o", color="black", markersize=4, zorder=4)
        axes.plot(
            path_x[-1], path_y[-1], "*", color="#d62728", markeredgecolor="white", markersize=9, zorder=5
        )


def _paths(toy: Toy, found: Mapping[str, Mapping[str, np.ndarray]], file: Path) -> None:
    """The plane of parameters with the mean loss, one panel for each method."""
    canvas, panels = _grid(len(found), 4, 2.9)
    x, y, mean = _landscape(toy, (0.5, 0.5))
    pareto = toy.pareto_set(200).numpy()
    for axes, (title, stored) in zip(panels, found.items(), strict=True):
        axes.contour(x, y, mean, levels=26, colors="#b5b5b5", linestyles="solid", linewidths=0.5)
        axes.plot(*pareto.T, color="#7f7f7f", linewidth=4, alpha=0.6, solid_capstyle="round", zorder=2)
        _along(axes, stored["paths"][..., 0], stored["paths"][..., 1])
        axes.set(xlim=(-10.4, 10.4), ylim=(-10.4, 10.4), xticks=(-10, 0, 10), yticks=(-10, 0, 10))
        axes.set_title(title, fontsize=9)
        axes.set_aspect("equal")
    _label_outside(panels, 4, "θ₁", "θ₂")
    canvas.savefig(file, dpi=130)


def _objectives(toy: Toy, found: Mapping[str, Mapping[str, np.ndarray]], file: Path) -> None:
    """The plane of the two losses with the Pareto front."""
    canvas, panels = _grid(len(found), 4, 2.9)
    front = toy.losses(toy.pareto_set(200)).numpy()
    for axes, (title, stored) in zip(panels, found.items(), strict=True):
        axes.plot(*front.T, color="#7f7f7f", linewidth=3.5, alpha=0.7, solid_capstyle="round")
        _along(axes, stored["losses"][..., 0], stored["losses"][..., 1])
        axes.set_title(title, fontsize=9)
    _label_outside(panels, 4, "first loss", "second loss")
    canvas.savefig(file, dpi=130)


def _preferences(
    toy: Toy, fronts: Mapping[str, Mapping[float, Mapping[str, np.ndarray]]], file: Path
) -> None:
    """Where the paths end for every preference, on the front."""
    import matplotlib as mpl

    canvas, panels = _grid(len(fronts), 3, 3.6)
    front = toy.losses(toy.pareto_set(200)).numpy()
    colours = mpl.colormaps["viridis"](np.linspace(0.05, 0.9, len(PREFERENCES)))
    for axes, (title, runs) in zip(panels, fronts.items(), strict=True):
        axes.plot(*front.T, color="#7f7f7f", linewidth=4, alpha=0.5, solid_capstyle="round")
        for (first, stored), colour in zip(runs.items(), colours, strict=True):
            asked = toy.losses(toy.optimum((first, 1 - first))).numpy()
            axes.plot(*asked, "s", color="none", markeredgecolor=colour, markersize=11, markeredgewidth=1.5)
            ends = stored["losses"][:, -1]
            axes.plot(*ends.T, "o", color=colour, markersize=5, label=f"{first:g}", alpha=0.85)
        axes.set_title(title, fontsize=9)
    _label_outside(panels, 3, "first loss", "second loss")
    canvas.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right center",
        title="weight of\nthe first loss",
        fontsize=8,
        title_fontsize=8,
        frameon=False,
    )
    canvas.savefig(file, dpi=130)


def _tolerance(toy: Toy, found: Mapping[str, Mapping[str, np.ndarray]], file: Path) -> None:
    """What the rank tolerance decides: the ratio of the eigenvalues along the paths, and how far the optimum is."""
    canvas, (ratios, distances) = _grid(2, 2, 4.4)
    for (title, stored), colour in zip(found.items(), ("#0072b2", "#d55e00"), strict=True):
        steps = stored["steps"]
        for number, path in enumerate(stored["paths"]):
            values = np.array([spectrum(gramian).values for gramian in _gramians(toy, path)])
            label = title if number == 0 else None
            ratios.plot(
                steps,
                np.maximum(values[:, 1] / values[:, 0], 1e-17),
                color=colour,
                linewidth=0.8,
                label=label,
            )
            distances.plot(
                steps, np.maximum(_from_optimum(toy, path), 1e-6), color=colour, linewidth=0.9, label=label
            )
    for name, epsilon in (("float32", np.finfo(np.float32).eps), ("float64", np.finfo(np.float64).eps)):
        ratios.axhline(2 * float(epsilon), color="#555555", linestyle="--", linewidth=0.9)
        ratios.annotate(
            f"tolerance of {name}",
            (1, 2 * float(epsilon)),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    ratios.set(yscale="log", xlabel="step", title="smaller over larger eigenvalue of the Gramian")
    distances.set(yscale="log", xlabel="step", title="distance from the least mean loss")
    for axes in (ratios, distances):
        axes.title.set_fontsize(9)
    distances.legend(fontsize=8, frameon=False)
    canvas.savefig(file, dpi=130)


def _from_optimum(toy: Toy, points: np.ndarray, first: float = 0.5) -> np.ndarray:
    """[K] distances of points [K, 2] from where the weighted sum of the losses is least."""
    return np.linalg.norm(points - toy.optimum((first, 1 - first)).numpy(), axis=1)


def _gramians(toy: Toy, points: np.ndarray) -> np.ndarray:
    """[K, 2, 2] at points [K, 2]."""
    theta = torch.from_numpy(points).requires_grad_()
    losses = toy.losses(theta).sum(dim=0)
    rows = torch.stack([torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses], dim=1)
    return (rows @ rows.mT).numpy()


def _label_outside(panels: Sequence[Any], columns: int, x: str, y: str) -> None:
    """Names of the axes at the left and at the bottom of a grid."""
    for number, axes in enumerate(panels):
        if number % columns == 0:
            axes.set_ylabel(y)
        if number + columns >= len(panels):
            axes.set_xlabel(x)


# ---- the page


def _row(toy: Toy, out: Path, entry: Entry) -> tuple[str, ...]:
    run = read_run(out / entry.folder)
    assert run.result is not None
    distance = run.result["distance"]
    near = sum(value < 0.1 for value in distance)
    reached = int((_from_optimum(toy, np.array(run.result["ends"])) < 0.1).sum())
    stopped = sum(value is not None for value in run.result["stopped"])
    return (
        entry.title,
        f"{near} of {len(distance)}",
        f"{reached} of {len(distance)}",
        ", ".join(f"{value:.2g}" for value in distance),
        f"{max(run.result['refused'])}" + (f", {stopped} stopped" if stopped else ""),
        f"{run.result['seconds']:.0f}",
    )


def _page(
    toy: Toy, out: Path, fronts: Mapping[str, Mapping[float, Mapping[str, np.ndarray]]], steps: int
) -> str:
    rows = [_row(toy, out, entry) for entry in METHODS]
    results = [read_run(out / entry.folder).result for entry in every_entry()]
    count, minutes = len(results), sum(float(result["seconds"]) for result in results if result) / 60
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    reached = []
    for kind, runs in fronts.items():
        for first, stored in runs.items():
            distance = _from_optimum(toy, stored["paths"][:, -1], first)
            reached.append(
                (
                    kind,
                    f"{first:g}",
                    f"{int((distance < 0.1).sum())} of {len(distance)}",
                    f"{np.median(distance):.2g}",
                )
            )
    float32, float64 = (
        ", ".join(f"{value:.2g}" for value in _from_optimum(toy, fronts[kind][0.5]["paths"][:, -1]))
        for kind in ("Aligned-MTL, float32", "Aligned-MTL, float64")
    )
    preferences = "\n".join("| " + " | ".join(row) + " |" for row in reached)
    return f"""# The toy problem

Two losses on a plane, two narrow valleys above the axis and two bowls in conflict below it (Liu et al. 2021; Navon et
al. 2022; Senushkin et al. 2023, Figures 1, 2 and 6; both losses times 0.5 as in the last paper's code). Every method goes
{steps:,} steps of Adam at 1e-3 from the five published starts. Made by

```text
python scripts/studies/toy.py --out runs/toy --page docs/results/toy.md{"" if steps == STEPS else f" --steps {steps}"}
```

![Paths of eight methods in the plane of parameters](images/toy-paths.png)

Dots are starts, stars are ends, dark is early; the grey band is the Pareto set.

![The same paths in the plane of the losses](images/toy-losses.png)

| method | ends within 0.1 of the Pareto set | within 0.1 of the least mean loss | distances from the Pareto set, by start | steps refused (most) | seconds |
| --- | --- | --- | --- | --- | --- |
{table}

IMTL is its gradient half, IMTL-G: the whole method also learns a scale for each loss, and where a loss is below zero, as
here in most of the plane, that scale grows without end (the method says so and stops). A step is refused where a
method's equations have no solution: for Nash-MTL on the Pareto set, where the gradients are antiparallel.

All {count} runs of this page, those with preferences below included, took {minutes:.0f} minutes added up.

## Preferences

![Ends for five preferences on the front](images/toy-preferences.png)

Squares are the optima of the weighted sums that a preference asks for, dots are where the five paths end.

| method | weight of the first task | ends within 0.1 of what was asked | median distance |
| --- | --- | --- | --- |
{preferences}

## The rank tolerance

![Eigenvalues and distance from the optimum along the paths of Aligned-MTL with two tolerances](images/toy-tolerance.png)

On the Pareto set the two gradients are antiparallel and the Gramian has rank 1. Aligned-MTL divides by the square roots
of the eigenvalues that it keeps, and scales by the least of them. Near the Pareto set the smaller eigenvalue falls below
a tolerance at the level of float32, is dropped, and the least of those kept becomes the larger one: the step, which had
been of the size of the small eigenvalue, grows by orders of magnitude and runs along the front to the point that the
preference asks for. It hovers where the ratio of the eigenvalues is the tolerance, a little off the optimum. With a
tolerance at the level of float64 the same formula keeps both directions and creeps along the front, but where it
arrives it is closer. Distances of the five ends from the optimum: {float32} with the first;
{float64} with the second.

The papers' pictures are those of the first; `rank_tol` is therefore an option that a record names, not a constant.
"""


if __name__ == "__main__":
    main()
