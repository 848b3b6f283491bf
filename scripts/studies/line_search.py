"""Constant step, classical and fast backtracking on MultiMNIST: accuracy, loss over time and over epochs, trials.

`python scripts/studies/line_search.py --out runs/line-search` trains what is missing (resumable), then writes
docs/results/line-search.md and its figure. Without `--data-dir` the packaged digits are used.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _runs import arguments, run_all

from detente.experiments.multimnist import MultiMNISTConfig
from detente.records import Run, write_text

RATES = (0.03, 0.1, 0.3, 1.0)
KINDS: dict[str, dict[str, Any]] = {
    "constant": {"gradients": "features"},
    "classical": {"gradients": "exact", "search": "backtracking"},
    "fast": {"gradients": "features", "search": "fast", "search_check": 10},
}
PAGE = Path("docs/results/line-search.md")
IMAGES = Path("docs/images/results")


def configs(epochs: int, seeds: int, data_dir: Path | None) -> dict[str, MultiMNISTConfig]:
    """Every run of the study by the name of its folder."""
    return {
        f"{kind}-{rate}-seed{seed}": MultiMNISTConfig(
            method="mgda",
            seed=seed,
            learning_rate=rate,
            momentum=0.0,
            halve_every=0,
            epochs=epochs,
            data_dir=data_dir,
            record_steps=100_000,
            **changes,
        )
        for seed in range(seeds)
        for kind, changes in KINDS.items()
        for rate in RATES
    }


def loss(row: Mapping[str, Any]) -> float:
    """Sum of the tasks' training losses in an epoch."""
    return sum(row["train_loss"].values())


def figure(studied: Mapping[tuple[str, float], Sequence[Run]]) -> None:
    """Training loss over epochs and over seconds, and trials of a search: means over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    IMAGES.mkdir(parents=True, exist_ok=True)
    drawn, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for kind, color in zip(KINDS, ("black", "tab:orange", "tab:blue"), strict=True):
        for rate, style in zip(RATES, ("-", "--", "-.", ":"), strict=True):
            runs = studied[kind, rate]
            epochs = [row["epoch"] for row in runs[0].epochs]
            seconds = np.cumsum(np.mean([[row["seconds"] for row in run.epochs] for run in runs], axis=0))
            losses = np.mean([[loss(row) for row in run.epochs] for run in runs], axis=0)
            axes[0].plot(epochs, losses, style, color=color, label=f"{kind}, {rate:g}")
            axes[1].plot(seconds, losses, style, color=color)
            if kind != "constant":
                tried = [statistics.mean(trials(run, epoch) for run in runs) for epoch in epochs]
                axes[2].plot(epochs, tried, style, color=color)
    axes[0].set(xlabel="epoch", ylabel="training loss, both digits", ylim=(0, 6))
    axes[1].set(xlabel="seconds of training", ylim=(0, 6))
    axes[2].set(xlabel="epoch", ylabel="trials per step")
    axes[0].legend(frameon=False, fontsize=7, title="kind, first length", ncols=3)
    drawn.savefig(IMAGES / "line-search.png", dpi=130)
    plt.close(drawn)


def trials(run: Run, epoch: int | None = None) -> float:
    """Mean trials of a step."""
    return statistics.mean(
        row["search"]["trials"] for row in run.steps if epoch is None or row["epoch"] == epoch
    )


def failures(runs: Sequence[Run]) -> str:
    """How often the condition did not hold for the network itself."""
    seen: Sequence[bool] = [
        row["search"]["true_condition"]
        for run in runs
        for row in run.steps
        if row["search"]["true_condition"] is not None
    ]
    return f"{100 * (1 - statistics.mean(seen)):.0f} of {len(seen)} checks" if seen else ""


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation where there are several."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def page(studied: Mapping[tuple[str, float], Sequence[Run]], command: str) -> str:
    """The results in Markdown."""
    runs = next(iter(studied.values()))
    seeds = "one seed" if len(runs) == 1 else f"mean ± standard deviation of {len(runs)} seeds"
    lines = [
        "# Line search on MultiMNIST",
        "",
        f"Made by `{command}`: LeNet, MGDA (on the representation; classical backtracking on the shared parameters), "
        f"plain steps without momentum, batch 256, {runs[0].config['config']['epochs']} epochs, {seeds}, test "
        f"accuracy of the epoch with the best validation mean. Data: {runs[0].config['problem']['data']['source']}. "
        "Seconds per epoch are medians of these runs, each on one thread, several at a time; "
        "`python -m benchmarks linesearch` compares the cost of a step with nothing else running.",
        "",
        "![Loss and trials](../images/results/line-search.png)",
        "",
        "| step | first length | left (%) | right (%) | loss of the last epoch | seconds per epoch | trials per step | "
        "condition fails in the network (%) | steps without an accepted length |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (kind, rate), runs in studied.items():
        accuracies = []
        for task in ("left", "right"):
            accuracies.append([100 * run.result["metrics"][task]["accuracy"] for run in runs if run.result])
        seconds = statistics.median(run.result["seconds_per_epoch"] for run in runs if run.result)
        searched = kind != "constant"
        lines.append(
            f"| {kind} | {rate:g} | {spread(accuracies[0])} | {spread(accuracies[1])} | "
            f"{spread([loss(run.epochs[-1]) for run in runs])} | {seconds:.2f} | "
            f"{f'{statistics.mean(map(trials, runs)):.2f}' if searched else ''} | "
            f"{failures(runs) if kind == 'fast' else ''} | "
            f"{sum(row['refused'] for run in runs for row in run.epochs) if searched else ''} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Train what is missing, then write the page and the figure."""
    parser = arguments(__doc__, epochs=20)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    runs = run_all(
        configs(options.epochs, options.seeds, options.data_dir),
        options.out,
        experiment="multimnist",
        workers=options.workers,
        seconds=options.seconds,
    )
    studied = {
        (kind, rate): [runs[f"{kind}-{rate}-seed{seed}"] for seed in range(options.seeds)]
        for kind in KINDS
        for rate in RATES
    }
    figure(studied)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    command = f"python scripts/studies/line_search.py --epochs {options.epochs} --seeds {options.seeds}"
    write_text(PAGE, page(studied, command))
    print(PAGE)


if __name__ == "__main__":
    main()
