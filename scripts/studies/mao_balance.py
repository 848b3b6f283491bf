"""Balance of the tasks on MultiMNIST when one loss is multiplied by 100: MAO, and uniform weights with Adam.

`python scripts/studies/mao_balance.py` trains LeNet four times (each loss as it is, and the left one times 100, under
both optimizers, from one seed and on the same batches) and writes docs/results/mao-balance.md, a table in CSV and the
figures: gradients and contributions layer by layer and over the steps (Figures 4 and 5 of Hervella et al. 2024).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import detente
from detente.experiments.multimnist import MultiMNIST, MultiMNISTConfig, build
from detente.optim import MAO, Contributions, TaskBalance
from detente.records import write_text
from detente.training.loop import epoch_order

FACTOR = 100.0
PAGE = Path("docs/results/mao-balance.md")
TABLE = Path("docs/results/mao-balance.csv")
IMAGES = Path("docs/images/results")
KINDS = ("MAO", "uniform, Adam")


def train(
    problem: MultiMNIST, kind: str, factor: float, epochs: int, batch: int, rate: float
) -> tuple[list[TaskBalance], dict[str, float]]:
    """The balance of every step, and the validation accuracies."""
    torch.manual_seed(0)
    model = problem.model()
    named = dict(model.named_parameters())
    known = set(model.shared_parameters())
    shared = [(name, p) for name, p in named.items() if p in known]
    own = [(name, p) for name, p in named.items() if p not in known]
    mao = MAO(shared, own, tasks=tuple(problem.tasks), lr=rate)
    adam = torch.optim.Adam(model.parameters(), lr=rate)
    watch = Contributions(adam, shared)
    uniform, examples = detente.create("uniform"), problem.split("train")
    found = []
    for epoch in range(epochs):
        for indices in torch.split(epoch_order(len(examples), 0, epoch), batch):
            inputs, labels = examples.batch(indices)
            losses = problem.losses(model(inputs), labels)
            losses["left"] = factor * losses["left"]
            if kind == "MAO":
                mao.step(losses, measure=True)
                assert mao.balance is not None
                found.append(mao.balance)
                continue
            taken = detente.task_gradients(losses, shared=[p for _, p in shared])
            assert taken is not None
            detente.apply(taken, uniform.combine(taken.gradients))
            adam.step()
            adam.zero_grad()
            found.append(watch.measure(taken))
    model.eval()
    meter, held = problem.meter(), problem.split("validation")
    with torch.no_grad():
        for indices in torch.split(torch.arange(len(held)), 1000):
            inputs, labels = held.batch(indices)
            meter.update(model(inputs), labels)
    return found, {task: values["accuracy"] for task, values in meter.compute().items()}


def layerwise(steps: Sequence[TaskBalance], what: str) -> np.ndarray:
    """[L, T] means over the steps."""
    return np.mean([getattr(step, what) for step in steps], axis=0)


def changes(
    runs: Mapping[tuple[str, float], Sequence[TaskBalance]], kind: str
) -> list[tuple[str, float, float]]:
    """For each layer the ratio left : right of the contributions, before and after the loss was multiplied."""
    before, after = (layerwise(runs[kind, factor], "contributions") for factor in (1.0, FACTOR))
    layers = runs[kind, 1.0][0].layers
    return [
        (layer, float(one[0] / one[1]), float(other[0] / other[1]))
        for layer, one, other in zip(layers, before, after, strict=True)
    ]


def figures(runs: Mapping[tuple[str, float], Sequence[TaskBalance]]) -> None:
    """Layer by layer (Figure 4) and over the steps (Figure 5)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, over_steps in (("mao-layers", False), ("mao-steps", True)):
        drawn, axes = plt.subplots(2, 4, figsize=(16, 7), sharey="row", layout="constrained")
        for column, (kind, factor) in enumerate(runs):
            steps = runs[kind, factor]
            for row, what in enumerate(("gradients", "contributions")):
                axis = axes[row, column]
                if over_steps:
                    values = np.array([getattr(step, f"mean_{what}") for step in steps])
                    smooth = max(1, len(steps) // 100)
                    values = values[: len(values) // smooth * smooth].reshape(-1, smooth, 2).mean(axis=1)
                    at = np.arange(1, len(values) + 1) * smooth
                    for task, line in zip(steps[0].tasks, values.T, strict=True):
                        axis.plot(at, line, label=task)
                    axis.set(xlabel="step")
                else:
                    values = layerwise(steps, what)
                    at = np.arange(len(values))
                    for number, task in enumerate(steps[0].tasks):
                        axis.bar(at + (number - 0.5) * 0.4, values[:, number], 0.4, label=task)
                    axis.set_xticks(at, steps[0].layers, rotation=35, ha="right", fontsize=8)
                axis.set_yscale("log")
                times = "" if factor == 1 else f", left loss × {factor:g}"
                axis.set(title=f"{kind}{times}" if row == 0 else "", ylabel=f"mean |{what[:-1]}|")
        axes[0, 0].legend(frameon=False)
        drawn.savefig(IMAGES / f"{name}.png", dpi=110)
        plt.close(drawn)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="folder of the four MNIST files")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    config = MultiMNISTConfig(data_dir=options.data_dir)
    problem = build(config)
    runs: dict[tuple[str, float], list[TaskBalance]] = {}
    accuracy: dict[tuple[str, float], dict[str, float]] = {}
    for kind in KINDS:
        for factor in (1.0, FACTOR):
            runs[kind, factor], accuracy[kind, factor] = train(
                problem, kind, factor, options.epochs, config.batch_size, 1e-3
            )
            print(kind, factor, accuracy[kind, factor], flush=True)
    figures(runs)
    steps = len(runs["MAO", 1.0])
    lines = [
        "# Balance of the tasks under MAO",
        "",
        f"Made by `python scripts/studies/mao_balance.py --epochs {options.epochs}`: MultiMNIST "
        f"({problem.describe()['data']['source']} digits), LeNet, learning rate 0.001, batch {config.batch_size}, "
        f"{steps} steps, one seed. The left digit's loss is multiplied by {FACTOR:g}. Contributions are the mean "
        "magnitudes of what each task adds to the update of a layer, averaged over the steps; shown is left : right.",
        "",
        "| layer | " + " | ".join(f"{kind} | × {FACTOR:g} | changed by" for kind in KINDS) + " |",
        "| --- |" + " ---: |" * 6,
    ]
    table = {kind: changes(runs, kind) for kind in KINDS}
    for row in zip(*table.values(), strict=True):
        cells = []
        for kind, (_, before, after) in zip(KINDS, row, strict=True):
            change = after / before
            told = f"{100 * abs(change - 1):.2f} %" if kind == "MAO" else f"{change:.1f} times"
            cells += [f"{before:.3f}", f"{after:.3f}", told]
        lines.append(f"| {row[0][0]} | " + " | ".join(cells) + " |")
    largest = max(abs(after / before - 1) for _, before, after in table["MAO"])
    least = min(after / before for _, before, after in table["uniform, Adam"])
    lines += [
        "",
        f"Promised: under MAO less than 5 %: {'kept' if largest < 0.05 else 'NOT KEPT'} ({100 * largest:.2f} % at "
        f"most). Under uniform weights with Adam more than 10 times: {'kept' if least > 10 else 'NOT KEPT'} "
        f"({least:.1f} times at least).",
        "",
        "| validation accuracy (%) | left | right |",
        "| --- | ---: | ---: |",
        *(
            f"| {kind}{'' if factor == 1 else f', left loss × {factor:g}'} | {100 * found['left']:.2f} | "
            f"{100 * found['right']:.2f} |"
            for (kind, factor), found in accuracy.items()
        ),
        "",
        "![Layer by layer](../images/results/mao-layers.png)",
        "![Over the steps](../images/results/mao-steps.png)",
        "",
    ]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    write_text(PAGE, "\n".join(lines))
    temporary = TABLE.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "factor", "step", "balance"])
        for (kind, factor), found in runs.items():
            for number, step in enumerate(found, 1):
                if number % max(1, steps // 20) == 0:
                    writer.writerow([kind, factor, number, json.dumps(step.to_dict())])
    os.replace(temporary, TABLE)
    print(PAGE)


if __name__ == "__main__":
    main()
