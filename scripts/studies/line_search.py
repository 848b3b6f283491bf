"""Constant step, classical and fast backtracking on MultiMNIST: accuracy, loss over time and over epochs, trials.

`python scripts/studies/line_search.py --out runs/line-search` trains what is missing (resumable), then writes
docs/results/line-search.md and its figure. Without `--data-dir` the packaged digits are used.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _runs import arguments, run_all

from detente.experiments.multimnist import MultiMNISTConfig
from detente.records import Run, write_text

RATES = (0.03, 0.1, 0.3)
KINDS: dict[str, dict[str, Any]] = {
    "constant": {"gradients": "features"},
    "classical": {"gradients": "exact", "search": "backtracking"},
    "fast": {"gradients": "features", "search": "fast", "search_check": 10},
}
PAGE = Path("docs/results/line-search.md")
IMAGES = Path("docs/images/results")


def configs(epochs: int, data_dir: Path | None) -> dict[str, MultiMNISTConfig]:
    """Every run of the study by the name of its folder."""
    return {
        f"{kind}-{rate}": MultiMNISTConfig(
            method="mgda",
            learning_rate=rate,
            momentum=0.0,
            halve_every=0,
            epochs=epochs,
            data_dir=data_dir,
            record_steps=100_000,
            **changes,
        )
        for kind, changes in KINDS.items()
        for rate in RATES
    }


def loss(row: Mapping[str, Any]) -> float:
    """Sum of the tasks' training losses in an epoch."""
    return sum(row["train_loss"].values())


def figure(runs: Mapping[str, Run]) -> None:
    """Training loss over epochs and over seconds, and trials of a search."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    IMAGES.mkdir(parents=True, exist_ok=True)
    drawn, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for kind, color in zip(KINDS, ("black", "tab:orange", "tab:blue"), strict=True):
        for rate, style in zip(RATES, ("-", "--", ":"), strict=True):
            run = runs[f"{kind}-{rate}"]
            epochs = [row["epoch"] for row in run.epochs]
            seconds = [sum(row["seconds"] for row in run.epochs[: n + 1]) for n in range(len(epochs))]
            losses = [loss(row) for row in run.epochs]
            axes[0].plot(epochs, losses, style, color=color, label=f"{kind}, {rate:g}")
            axes[1].plot(seconds, losses, style, color=color)
            if kind != "constant":
                by_epoch = [trials(run, epoch) for epoch in epochs]
                axes[2].plot(epochs, by_epoch, style, color=color)
    axes[0].set(xlabel="epoch", ylabel="training loss, both digits", ylim=(0, 6))
    axes[1].set(xlabel="seconds of training", ylim=(0, 6))
    axes[2].set(xlabel="epoch", ylabel="trials per step")
    axes[0].legend(frameon=False, fontsize=8, title="kind, first length")
    drawn.savefig(IMAGES / "line-search.png", dpi=130)
    plt.close(drawn)


def trials(run: Run, epoch: int | None = None) -> float:
    """Mean trials of a step."""
    return statistics.mean(
        row["search"]["trials"] for row in run.steps if epoch is None or row["epoch"] == epoch
    )


def failures(run: Run) -> str:
    """How often the condition did not hold for the network itself."""
    seen: Sequence[bool] = [
        row["search"]["true_condition"] for row in run.steps if row["search"]["true_condition"] is not None
    ]
    return f"{100 * (1 - statistics.mean(seen)):.0f} of {len(seen)} checks" if seen else ""


def page(runs: Mapping[str, Run], command: str) -> str:
    """The results in Markdown."""
    any_run = next(iter(runs.values()))
    lines = [
        "# Line search on MultiMNIST",
        "",
        f"Made by `{command}`: LeNet, MGDA (on the representation; classical backtracking on the shared parameters), "
        f"plain steps without momentum, batch 256, {any_run.config['config']['epochs']} epochs, one seed, test "
        f"accuracy of the epoch with the best validation mean. Data: {any_run.config['problem']['data']['source']}. "
        "Seconds per epoch are medians of these runs, each on one thread, several at a time; "
        "`python -m benchmarks linesearch` compares the cost of a step with nothing else running.",
        "",
        "![Loss and trials](../images/results/line-search.png)",
        "",
        "| step | first length | left (%) | right (%) | loss of the last epoch | seconds per epoch | trials per step | "
        "condition fails in the network (%) | steps without an accepted length |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in KINDS:
        for rate in RATES:
            run = runs[f"{kind}-{rate}"]
            assert run.result is not None
            metrics = run.result["metrics"]
            left, right = (100 * metrics[task]["accuracy"] for task in ("left", "right"))
            searched = kind != "constant"
            lines.append(
                f"| {kind} | {rate:g} | {left:.2f} | {right:.2f} | {loss(run.epochs[-1]):.3f} | "
                f"{run.result['seconds_per_epoch']:.2f} | {f'{trials(run):.2f}' if searched else ''} | "
                f"{failures(run) if kind == 'fast' else ''} | "
                f"{sum(row['refused'] for row in run.epochs) if searched else ''} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    """Train what is missing, then write the page and the figure."""
    options = arguments(__doc__, epochs=20).parse_args()
    runs = run_all(
        configs(options.epochs, options.data_dir),
        options.out,
        experiment="multimnist",
        workers=options.workers,
        seconds=options.seconds,
    )
    figure(runs)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    write_text(PAGE, page(runs, f"python scripts/studies/line_search.py --epochs {options.epochs}"))
    print(PAGE)


if __name__ == "__main__":
    main()
