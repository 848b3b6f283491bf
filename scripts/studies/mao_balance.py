"""Balance of the tasks on MultiMNIST when one loss is multiplied by 100: MAO, and weightings of losses with Adam.

`python scripts/studies/mao_balance.py --out runs/balance` trains what is missing (resumable; each loss as it is, and
the left one times 100, from the same seeds and on the same batches), then writes docs/results/mao-balance.md, a table
in CSV and the figures from the stored runs: gradients and contributions layer by layer and over the steps (Figures 4
and 5 of Hervella et al. 2024).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from _runs import arguments, run_all

from detente.experiments.multimnist import MultiMNISTConfig
from detente.records import Run, write_text
from detente.reports import balance_of, balance_png

FACTORS = (1.0, 100.0)
KINDS: dict[str, dict[str, Any]] = {
    "MAO": {"optimizer": "mao"},
    "uniform, Adam": {"method": "uniform", "optimizer": "adam"},
    "uncertainty, Adam": {"method": "uncertainty", "optimizer": "adam"},
    "dwa, Adam": {"method": "dwa", "optimizer": "adam"},
    "gradnorm, Adam": {"method": "gradnorm", "optimizer": "adam"},
}
PROMISED = ("MAO", "uniform, Adam")
PAGE = Path("docs/results/mao-balance.md")
TABLE = Path("docs/results/mao-balance.csv")
IMAGES = Path("docs/images/results")


def name_of(kind: str, factor: float, seed: int) -> str:
    """The folder of a run."""
    return f"{kind.replace(', ', '-')}-x{factor:g}-seed{seed}"


def configs(epochs: int, seeds: int, data_dir: Path | None) -> dict[str, MultiMNISTConfig]:
    """Every run of the study by the name of its folder."""
    return {
        name_of(kind, factor, seed): MultiMNISTConfig(
            learning_rate=1e-3,
            epochs=epochs,
            seed=seed,
            data_dir=data_dir,
            balance=True,
            record_steps=1_000_000,
            loss_factor=() if factor == 1 else (f"left={factor:g}",),
            **changes,
        )
        for seed in range(seeds)
        for kind, changes in KINDS.items()
        for factor in FACTORS
    }


def ratios(runs: Sequence[Run]) -> dict[str, float]:
    """Layer to the ratio left : right of the contributions, means over the steps and runs."""
    balance = balance_of(runs)
    assert balance is not None
    left, right = balance.by_layer("contributions")[:, [balance.tasks.index(t) for t in ("left", "right")]].T
    return dict(zip(balance.layers, (left / right).tolist(), strict=True))


def changes(one: Sequence[Run], other: Sequence[Run]) -> np.ndarray:
    """[runs, layers] by what factor the ratio differs, seed by seed."""
    return np.array(
        [
            [after / before for before, after in zip(ratios([a]).values(), ratios([b]).values(), strict=True)]
            for a, b in zip(one, other, strict=True)
        ]
    )


def told(change: np.ndarray) -> str:
    """The factors in words: their range over the seeds."""
    low, high = float(change.min()), float(change.max())
    if max(abs(low - 1), abs(high - 1)) < 0.5:
        low, high, unit, form = 100 * (low - 1), 100 * (high - 1), "%", "+.1f"
    else:
        unit, form = "times", ".1f"
    ends = dict.fromkeys(f"{value:{form}}" for value in (low, high))
    return f"{' to '.join(ends)} {unit}"


def accuracy(runs: Sequence[Run], task: str) -> str:
    """Mean over the seeds, in percent."""
    return f"{100 * mean(run.result['metrics'][task]['accuracy'] for run in runs if run.result):.2f}"


def page(runs: Mapping[tuple[str, float], Sequence[Run]], command: str) -> str:
    """The results in Markdown."""
    first = runs["MAO", 1.0][0]
    assert first.result is not None
    seeds = len(runs["MAO", 1.0])
    change = {kind: changes(*(runs[kind, factor] for factor in FACTORS)) for kind in KINDS}
    layers = list(ratios([first]))
    largest = float(np.abs(change["MAO"] - 1).max())
    least = float(change["uniform, Adam"].min())
    lines = [
        "# Balance of the tasks under MAO",
        "",
        f"Made by `{command}`: MultiMNIST ({first.config['problem']['data']['source']} digits), LeNet, learning rate "
        f"0.001, batch 256, {first.result['steps']} steps, {seeds} seed{'s' if seeds > 1 else ''}. The left digit's "
        f"loss is multiplied by {FACTORS[1]:g}. A contribution is the mean magnitude of what a task adds to the update "
        "of a layer, averaged over the steps. The table tells by how much the ratio of the contributions, left : "
        "right, changes with the factor: the range over the seeds.",
        "",
        "| layer | " + " | ".join(KINDS) + " |",
        "| --- |" + " ---: |" * len(KINDS),
    ]
    for number, layer in enumerate(layers):
        lines.append(f"| {layer} | " + " | ".join(told(change[kind][:, number]) for kind in KINDS) + " |")
    lines += [
        "",
        f"Promised: under MAO less than 5 %: {'kept' if largest < 0.05 else 'NOT KEPT'} ({100 * largest:.2f} % at "
        f"most). Under uniform weights with Adam more than 10 times: {'kept' if least > 10 else 'NOT KEPT'} "
        f"({least:.1f} times at least).",
        "",
        f"| test accuracy (%), mean of {seeds} | left | right | left, its loss × {FACTORS[1]:g} | right |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind in KINDS:
        cells = [accuracy(runs[kind, factor], task) for factor in FACTORS for task in ("left", "right")]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    for factor in FACTORS:
        lines += [
            "",
            "## The losses as they are" if factor == 1 else f"## The left digit's loss times {factor:g}",
            "",
            f"![Layer by layer](../images/results/balance-layers-x{factor:g}.png)",
            f"![Over the steps](../images/results/balance-steps-x{factor:g}.png)",
        ]
    return "\n".join([*lines, ""])


def table(runs: Mapping[tuple[str, float], Sequence[Run]]) -> None:
    """Means over steps and seeds as CSV."""
    temporary = TABLE.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "factor", "layer", "task", "mean gradient", "mean contribution"])
        for (kind, factor), chosen in runs.items():
            balance = balance_of(chosen)
            assert balance is not None
            pulled, moved = balance.by_layer("gradients"), balance.by_layer("contributions")
            for row, layer in enumerate(balance.layers):
                for column, task in enumerate(balance.tasks):
                    values = [f"{array[row, column]:.6g}" for array in (pulled, moved)]
                    writer.writerow([kind, f"{factor:g}", layer, task, *values])
    os.replace(temporary, TABLE)


def main() -> None:
    """Train what is missing, then write the page, the table and the figures."""
    parser = arguments(__doc__, epochs=5)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    stored = run_all(
        configs(options.epochs, options.seeds, options.data_dir),
        options.out,
        experiment="multimnist",
        workers=options.workers,
        seconds=options.seconds,
        label=lambda name: name.rsplit("-x", 1)[0].replace("-", ", "),
    )
    runs = {
        (kind, factor): [stored[name_of(kind, factor, seed)] for seed in range(options.seeds)]
        for kind in KINDS
        for factor in FACTORS
    }
    for factor in FACTORS:
        chosen = [run for (_, other), group in runs.items() if other == factor for run in group]
        for over in ("layers", "steps"):
            balance_png(chosen, IMAGES / f"balance-{over}-x{factor:g}.png", over=over)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    command = f"python scripts/studies/mao_balance.py --epochs {options.epochs} --seeds {options.seeds}"
    write_text(PAGE, page(runs, command))
    table(runs)
    print(PAGE)


if __name__ == "__main__":
    main()
