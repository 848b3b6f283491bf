"""Inexact and adaptive MGDA on MultiMNIST: sweeps of ε and λ, ε̂² and α over the epochs, batch size, micro-batches.

`python scripts/studies/inexact_mgda.py --out runs/inexact` trains what is missing (resumable), then writes
docs/results/inexact-mgda.md and its figures. Without `--data-dir` the packaged digits are used.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _runs import arguments, run_all

from detente.experiments.multimnist import MultiMNISTConfig
from detente.records import Run, write_text

EPSILONS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)
SCALES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
BATCHES = (32, 64, 128, 256, 512)
PARTS = (2, 4, 8)
# Below this accuracy in percent a run has not been trained, and is named instead of drawn.
TRAINED = 50.0
PAGE = Path("docs/results/inexact-mgda.md")
IMAGES = Path("docs/images/results")


def configs(epochs: int, seeds: int, data_dir: Path | None) -> dict[str, MultiMNISTConfig]:
    """Every run of the study by the name of its folder."""

    def config(method: str, seed: int, *options: str, **changes: Any) -> MultiMNISTConfig:
        return MultiMNISTConfig(
            method=method,
            option=options,
            seed=seed,
            epochs=epochs,
            data_dir=data_dir,
            nesterov=True,
            **changes,
        )

    found = {}
    for seed in range(seeds):
        for value in EPSILONS:
            found[f"epsilon-{value}-seed{seed}"] = config("inexact-mgda", seed, f"epsilon={value}")
        for value in SCALES:
            found[f"lambda-{value}-seed{seed}"] = config("adaptive-mgda", seed, f"scale={value}")
    for size in BATCHES:
        found[f"batch-{size}"] = config("adaptive-mgda", 0, "scale=0", batch_size=size)
    found["parts-1"] = config("uniform", 0, tasks="left")
    for parts in PARTS:
        found[f"parts-{parts}"] = config("mgda", 0, tasks="left", micro_batches=parts)
        found[f"parts-{parts}-guarded"] = config(
            "adaptive-mgda", 0, "scale=0.1", tasks="left", micro_batches=parts
        )
    return found


def accuracy(runs: Sequence[Run], task: str, where: str = "metrics") -> float:
    """Mean over seeds, in percent."""
    return 100 * statistics.mean(run.result[where][task]["accuracy"] for run in runs if run.result)


def deviation(runs: Sequence[Run], task: str) -> float:
    """Standard deviation over seeds, in percent; 0 for a single one."""
    values = [100 * run.result["metrics"][task]["accuracy"] for run in runs if run.result]
    return statistics.stdev(values) if len(values) > 1 else 0.0


def refused(runs: Sequence[Run]) -> float:
    """Share of refused steps over whole runs, in percent."""
    steps = sum(run.result["steps"] for run in runs if run.result)
    return 100 * sum(row["refused"] for run in runs for row in run.epochs) / steps


def sweep(
    runs: Mapping[str, Run], prefix: str, values: Sequence[float], seeds: int
) -> dict[float, list[Run]]:
    """Value to its runs, one for each seed."""
    return {value: [runs[f"{prefix}-{value}-seed{seed}"] for seed in range(seeds)] for value in values}


def figures(runs: Mapping[str, Run], seeds: int) -> None:
    """Figures 3.3 to 3.6 of the thesis, and the refused share."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    IMAGES.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharex=True, sharey=True, layout="constrained")
    for axis, prefix, values, title in (
        (axes[0], "epsilon", EPSILONS, "constant ε (Figure 3.3)"),
        (axes[1], "lambda", SCALES, "adaptive, ε = λ ε̂ (Figure 3.4)"),
    ):
        points = sweep(runs, prefix, values, seeds)
        reference = sweep(runs, "epsilon", (0.0,), seeds)[0.0]
        axis.plot(
            accuracy(reference, "left"),
            accuracy(reference, "right"),
            "k*",
            markersize=12,
            label="MGDA (ε = 0)",
        )
        places: dict[tuple[float, float], list[float]] = {}
        for value, chosen in points.items():
            places.setdefault((accuracy(chosen, "left"), accuracy(chosen, "right")), []).append(value)
        ended = [value for place, values in places.items() if min(place) < TRAINED for value in values]
        for (left, right), values in places.items():
            if min(left, right) >= TRAINED:
                spreads = [deviation(points[values[0]], task) for task in ("left", "right")]
                axis.errorbar(left, right, xerr=spreads[0], yerr=spreads[1], fmt="o", capsize=2, alpha=0.8)
                text = ", ".join(f"{value:g}" for value in values)
                axis.annotate(text, (left, right), textcoords="offset points", xytext=(0, 9), ha="center")
        if ended:
            title += "\nnot shown, ended early: " + ", ".join(f"{value:g}" for value in ended)
        axis.margins(0.15)
        axis.locator_params(nbins=5)
        axis.set(title=title, xlabel="left digit, accuracy (%)", ylabel="right digit, accuracy (%)")
        axis.legend(frameon=False)
    figure.savefig(IMAGES / "inexact-sweeps.png", dpi=130)
    plt.close(figure)

    run = runs["lambda-0.1-seed0"]
    epochs = [row["epoch"] for row in run.epochs]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    weights: dict[int, list[float]] = {}
    for row in run.steps:
        if row["weights"] is not None:
            weights.setdefault(row["epoch"], []).append(row["weights"][0])
    for task, style in (("left", "-"), ("right", "--")):
        estimates = [row["method"]["epsilon_squared"].get(task) for row in run.epochs]
        axes[0].plot(epochs, estimates, style, label=f"ε̂², {task}")
        axes[0].plot(
            epochs, [row["train_loss"][task] for row in run.epochs], style, alpha=0.5, label=f"loss, {task}"
        )
    axes[0].set(title="ε̂² and training loss (Figure 3.5)", xlabel="epoch", yscale="log")
    means = {epoch: statistics.mean(values) for epoch, values in weights.items()}
    axes[1].plot(list(means), list(means.values()))
    axes[1].axhline(0.5, color="gray", linewidth=0.8)
    axes[1].set(title="α of the left digit (Figure 3.6)", xlabel="epoch", ylim=(0, 1))
    for prefix, values in (("epsilon", (0.1, 0.2, 0.5)), ("lambda", (0.1, 0.2, 0.5, 1.0))):
        for value in values:
            chosen = runs[f"{prefix}-{value}-seed0"]
            done = [0, *(row["step"] for row in chosen.epochs)]
            shares = [
                100 * row["refused"] / (after - before)
                for row, before, after in zip(chosen.epochs, done[:-1], done[1:], strict=True)
            ]
            axes[2].plot(epochs, shares, label=f"{'ε' if prefix == 'epsilon' else 'λ'} = {value:g}")
    axes[2].set(title="refused steps (%)", xlabel="epoch")
    for axis in (axes[0], axes[2]):
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(IMAGES / "inexact-epochs.png", dpi=130)
    plt.close(figure)


def page(runs: Mapping[str, Run], epochs: int, seeds: int, command: str) -> str:
    """The results in Markdown."""
    averaged = "one seed" if seeds == 1 else f"mean ± standard deviation of {seeds} seeds"
    lines = [
        "# Inexact and adaptive MGDA on MultiMNIST",
        "",
        f"Made by `{command}`: LeNet, SGD 0.01 with Nesterov momentum 0.9, batch 256 unless said otherwise, {epochs} "
        f"epochs, {averaged}, test accuracy of the epoch with the best validation mean. "
        f"Data: {next(iter(runs.values())).config['problem']['data']['source']}. Thesis: Aygar 2019, section 3.1 "
        "(learning rate 0.001, 100 epochs; its figures give no numbers to compare with).",
        "",
        "![Accuracies](../images/results/inexact-sweeps.png)",
        "![Epochs](../images/results/inexact-epochs.png)",
        "",
        "| setting | left (%) | right (%) | mean (%) | refused (%) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for prefix, values, name in (("epsilon", EPSILONS, "ε"), ("lambda", SCALES, "λ")):
        for value, chosen in sweep(runs, prefix, values, seeds).items():
            left, right = accuracy(chosen, "left"), accuracy(chosen, "right")
            spreads = [f" ± {deviation(chosen, task):.2f}" for task in ("left", "right")]
            lines.append(
                f"| {name} = {value:g} | {left:.2f}{spreads[0]} | {right:.2f}{spreads[1]} | "
                f"{(left + right) / 2:.2f} | {refused(chosen):.1f} |"
            )
    lines += [
        "",
        "## Batch size against the estimated error",
        "",
        "MGDA without a guard (λ = 0) for the same number of epochs; ε̂ as estimated in the last epoch.",
        "",
        "| batch | ε̂ left | ε̂ right | left (%) | right (%) |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for size in BATCHES:
        run = runs[f"batch-{size}"]
        left, right = (run.epochs[-1]["method"]["epsilon_squared"][task] ** 0.5 for task in ("left", "right"))
        lines.append(
            f"| {size} | {left:.3f} | {right:.3f} | {accuracy([run], 'left'):.2f} | {accuracy([run], 'right'):.2f} |"
        )
    lines += [
        "",
        "## A single task whose micro-batches play the tasks",
        "",
        "The left digit alone; every batch of 256 is split into equal parts, and MGDA combines their gradients, "
        "without and with the adaptive guard (λ = 0.1). One seed.",
        "",
        "| parts | accuracy (%) | guarded (%) | refused (%) |",
        "| ---: | ---: | ---: | ---: |",
        f"| 1 (plain) | {accuracy([runs['parts-1']], 'left'):.2f} | | |",
    ]
    for parts in PARTS:
        guarded = runs[f"parts-{parts}-guarded"]
        lines.append(
            f"| {parts} | {accuracy([runs[f'parts-{parts}']], 'left'):.2f} | {accuracy([guarded], 'left'):.2f} | "
            f"{refused([guarded]):.1f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Train what is missing, then write the page and the figures."""
    parser = arguments(__doc__, epochs=30)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    runs = run_all(
        configs(options.epochs, options.seeds, options.data_dir),
        options.out,
        experiment="multimnist",
        workers=options.workers,
        seconds=options.seconds,
    )
    figures(runs, options.seeds)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    command = f"python scripts/studies/inexact_mgda.py --epochs {options.epochs} --seeds {options.seeds}"
    write_text(PAGE, page(runs, options.epochs, options.seeds, command))
    print(PAGE)


if __name__ == "__main__":
    main()
