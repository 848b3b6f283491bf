"""Constant step, classical and fast backtracking on MultiMNIST: accuracy, loss over time and over epochs, trials.

`python scripts/studies/line_search.py --out runs/line-search` trains what is missing (resumable), then measures the
seconds of an epoch, one run at a time and in turns, and writes docs/results/line-search.md and its figure. Measure with
nothing else running; `--times` measures anew. Without `--data-dir` the packaged digits are used.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _runs import arguments, run_all

from detente.experiments.multimnist import MultiMNISTConfig, build
from detente.records import Run, read_run, write_text
from detente.training import train

RATES = (0.03, 0.1, 0.3, 1.0)
KINDS: dict[str, dict[str, Any]] = {
    "constant": {"gradients": "features"},
    "classical": {"gradients": "exact", "search": "backtracking"},
    "fast": {"gradients": "features", "search": "fast", "search_check": 10},
}
LIMIT = 1.15
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


def seconds_of_an_epoch(out: Path, data_dir: Path | None, rounds: int = 15) -> dict[str, list[float]]:
    """For each kind the seconds of its second epoch, in turns, one run at a time on one thread."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind, changes in KINDS.items():
            config = MultiMNISTConfig(
                method="mgda",
                learning_rate=0.1,
                momentum=0.0,
                halve_every=0,
                epochs=2,
                data_dir=data_dir,
                record_steps=1,
                **changes,
            )
            folder = out / "times" / f"{kind}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            train(build(config), config, folder, experiment="multimnist", command="timing", quiet=True)
            found[kind].append(read_run(folder).epochs[-1]["seconds"])
    return found


def figure(studied: Mapping[tuple[str, float], Sequence[Run]], times: Mapping[str, Sequence[float]]) -> None:
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
            seconds = statistics.median(times[kind]) * np.array(epochs)
            losses = np.mean([[loss(row) for row in run.epochs] for run in runs], axis=0)
            axes[0].plot(epochs, losses, style, color=color, label=f"{kind}, {rate:g}")
            axes[1].plot(seconds, losses, style, color=color)
            if kind != "constant":
                tried = [statistics.mean(trials(run, epoch) for run in runs) for epoch in epochs]
                axes[2].plot(epochs, tried, style, color=color)
    axes[0].set(xlabel="epoch", ylabel="training loss, both digits", ylim=(0, 6.5))
    axes[1].set(xlabel="seconds (epochs times the median of an epoch)", ylim=(0, 6.5))
    axes[2].set(xlabel="epoch", ylabel="trials per step")
    axes[1].legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=7, ncols=3)
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


def page(
    studied: Mapping[tuple[str, float], Sequence[Run]], times: Mapping[str, Sequence[float]], command: str
) -> str:
    """The results in Markdown."""
    runs = next(iter(studied.values()))
    fast = statistics.median(one / other for one, other in zip(times["fast"], times["constant"], strict=True))
    kept = "kept" if fast <= LIMIT else "NOT KEPT"
    ranges = "; ".join(
        f"{kind} {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        for kind, values in times.items()
    )
    seeds = "one seed" if len(runs) == 1 else f"mean ± standard deviation of {len(runs)} seeds"
    lines = [
        "# Line search on MultiMNIST",
        "",
        f"Made by `{command}`: LeNet, MGDA (on the representation; classical backtracking on the shared parameters), "
        f"plain steps without momentum, batch 256, {runs[0].config['config']['epochs']} epochs, {seeds}, test "
        f"accuracy of the epoch with the best validation mean. Data: {runs[0].config['problem']['data']['source']}. "
        "The first length is halved never.",
        "",
        f"Seconds of an epoch, measured apart, one run at a time and in turns on one thread with dropout, every tenth "
        f"step of the fast search checked against the network itself (median and range of {len(times['fast'])}): "
        f"{ranges}. Fast beside constant, median of the rounds: {fast:.2f}; promised {LIMIT:g}: {kept}.",
        "",
        "![Loss and trials](../images/results/line-search.png)",
        "",
        "| step | first length | left (%) | right (%) | loss of the last epoch | trials per step | "
        "condition fails in the network (%) | steps without an accepted length |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (kind, rate), runs in studied.items():
        accuracies = []
        for task in ("left", "right"):
            accuracies.append([100 * run.result["metrics"][task]["accuracy"] for run in runs if run.result])
        searched = kind != "constant"
        lines.append(
            f"| {kind} | {rate:g} | {spread(accuracies[0])} | {spread(accuracies[1])} | "
            f"{spread([loss(run.epochs[-1]) for run in runs])} | "
            f"{f'{statistics.mean(map(trials, runs)):.2f}' if searched else ''} | "
            f"{failures(runs) if kind == 'fast' else ''} | "
            f"{sum(row['refused'] for run in runs for row in run.epochs) if searched else ''} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Train what is missing, then write the page and the figure."""
    parser = arguments(__doc__, epochs=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--times", action="store_true", help="measure the seconds of an epoch anew")
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
    stored = options.out / "times.json"
    if options.times or not stored.exists():
        write_text(stored, json.dumps(seconds_of_an_epoch(options.out, options.data_dir)))
    times = json.loads(stored.read_text(encoding="utf-8"))
    figure(studied, times)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    command = f"python scripts/studies/line_search.py --epochs {options.epochs} --seeds {options.seeds}"
    write_text(PAGE, page(studied, times, command))
    print(PAGE)


if __name__ == "__main__":
    main()
