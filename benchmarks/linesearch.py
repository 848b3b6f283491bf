"""Seconds of one training step: constant step, fast backtracking and classical backtracking, on LeNet with two tasks.

All three take MGDA's direction. The constant step is `detente.backward` on the features followed by torch's SGD. The
fast search solves on the features too; the classical one solves on the parameters, so it also pays for one backward
per task, and is held beside a constant step with exact gradients as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

import detente
from benchmarks._timing import interleaved, ratios
from detente.linesearch import Backtracking, FastBacktracking
from detente.models import LeNet

FAST_LIMIT = 1.15
LEARNING_RATE = 0.05


def _runs(batch: int, dropout: float) -> tuple[dict[str, Callable[[], object]], dict[str, list[int]]]:
    """The steps, each with a network of its own that trains on one batch, and the trials of every search."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (2, batch))
    tasks = ("left", "right")
    trials: dict[str, list[int]] = {"fast": [], "classical": []}

    def network() -> tuple[LeNet, Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]]:
        torch.manual_seed(1)
        model = LeNet(28, dict.fromkeys(tasks, 10), dropout=dropout)

        def closure(features: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            z = model.encode(images) if features is None else features
            predictions = model.predict(z)
            return z, {
                task: F.cross_entropy(predictions[task], y) for task, y in zip(tasks, labels, strict=True)
            }

        return model, closure

    def constant(on_features: bool) -> Callable[[], object]:
        model, closure = network()
        method = detente.create("mgda")
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

        def step() -> None:
            z, losses = closure()
            record = detente.backward(losses, method, features=z if on_features else None)
            if record.accepted:
                optimizer.step()
            optimizer.zero_grad()

        return step

    def searched(name: str, kind: type[Backtracking] | type[FastBacktracking]) -> Callable[[], object]:
        model, closure = network()
        own = {task: model.task_parameters(task) for task in tasks}
        search = kind(detente.create("mgda"), model.shared_parameters(), own, LEARNING_RATE)
        return lambda: trials[name].append(search.step(closure).trials)

    return {
        "constant": constant(True),
        "fast": searched("fast", FastBacktracking),
        "constant, exact": constant(False),
        "classical": searched("classical", Backtracking),
    }, trials


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Seconds of a constant step, medians (and ranges) of the ratios of steps taken in turns, and trials per step."""
    rounds = 15 if quick else 75
    for dropout in (0.5, 0.0):
        runs, trials = _runs(256, dropout)
        seconds = interleaved(runs, rounds)
        yield {
            "dropout": dropout,
            "constant s": sorted(seconds["constant"])[rounds // 2],
            "fast / constant": ratios(seconds, "fast", "constant"),
            "classical / constant": ratios(seconds, "classical", "constant"),
            "classical / constant, exact": ratios(seconds, "classical", "constant, exact"),
            "fast trials": sum(trials["fast"]) / len(trials["fast"]),
            "classical trials": sum(trials["classical"]) / len(trials["classical"]),
        }


def main() -> None:
    """Print the table and whether the promised ratio holds."""
    for row in rows():
        print(
            f"LeNet, T = 2, batch 256, dropout {row['dropout']}: constant step {row['constant s']:.4f} s, "
            f"trials per step {row['fast trials']:.2f} (fast), {row['classical trials']:.2f} (classical)"
        )
        for name, value in row.items():
            if isinstance(value, tuple):
                median, low, high = value
                kept = "kept" if median <= FAST_LIMIT else "NOT KEPT"
                verdict = f"  promised <= {FAST_LIMIT}: {kept}" if name == "fast / constant" else ""
                print(f"  {name:28} {median:7.3f}  ({low:.3f} to {high:.3f}){verdict}")
