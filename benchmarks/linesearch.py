"""Line searches beside a constant step: LeNet on MultiMNIST (the digits in the package), batch 256, MGDA's direction.

First seconds of a step, taken in turns. The constant step is `detente.backward` on the features followed by torch's
SGD, as the fast search solves on the features; the classical search solves on the parameters, and is held beside a
constant step with exact gradients too. Then what the searches accept: 100 steps from the same start at three first
lengths, with the losses' sum over the last 20 steps (4.6 is guessing), and how often the condition that the fast search
accepted in the representation fails for the network itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

import detente
from benchmarks._timing import interleaved, ratios
from detente.data import load_multimnist
from detente.linesearch import Backtracking, FastBacktracking, SearchOptions
from detente.models import LeNet

FAST_LIMIT = 1.15
LENGTH = 0.1
TASKS = ("left", "right")


class _Steps:
    """One network and its batches."""

    def __init__(self, examples: Any, dropout: float = 0.5) -> None:
        torch.manual_seed(1)
        self.model = LeNet(28, dict.fromkeys(TASKS, 10), dropout=dropout)
        self.examples, self.generator = examples, torch.Generator().manual_seed(2)
        self.own = {task: self.model.task_parameters(task) for task in TASKS}

    def closure(self) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Of the next batch."""
        images, labels = self.examples.batch(
            torch.randint(len(self.examples), (256,), generator=self.generator)
        )

        def closure(features: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            z = self.model.encode(images) if features is None else features
            predictions = self.model.predict(z)
            return z, {task: F.cross_entropy(predictions[task], labels[task]) for task in TASKS}

        return closure

    def constant(self, length: float, on_features: bool) -> Callable[[], float]:
        """A step of constant length; it returns the sum of the losses before."""
        method = detente.create("mgda")
        optimizer = torch.optim.SGD(self.model.parameters(), lr=length)

        def step() -> float:
            z, losses = self.closure()()
            record = detente.backward(losses, method, features=z if on_features else None)
            if record.accepted:
                optimizer.step()
            optimizer.zero_grad()
            return sum(record.losses)

        return step

    def search(self, kind: Any, length: float, **options: Any) -> Any:
        """A search from this length."""
        return kind(
            detente.create("mgda"),
            self.model.shared_parameters(),
            self.own,
            length,
            options=SearchOptions(**options),
        )


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Seconds of a constant step, medians (and ranges) of the ratios of steps taken in turns, and trials per step."""
    examples, rounds = load_multimnist().train, 15 if quick else 75
    for dropout in (0.5, 0.0):
        fast, classical = _Steps(examples, dropout), _Steps(examples, dropout)
        quick_search, search = fast.search(FastBacktracking, LENGTH), classical.search(Backtracking, LENGTH)
        trials: dict[str, list[int]] = {"fast": [], "classical": []}
        runs: dict[str, Callable[[], object]] = {
            "constant": _Steps(examples, dropout).constant(LENGTH, True),
            "fast": lambda s=quick_search, f=fast, t=trials["fast"]: t.append(s.step(f.closure()).trials),
            "constant, exact": _Steps(examples, dropout).constant(LENGTH, False),
            "classical": lambda s=search, c=classical, t=trials["classical"]: t.append(
                s.step(c.closure()).trials
            ),
        }
        seconds = interleaved(runs, rounds)
        yield {
            "dropout": dropout,
            "constant s": statistics.median(seconds["constant"]),
            "fast / constant": ratios(seconds, "fast", "constant"),
            "classical / constant": ratios(seconds, "classical", "constant"),
            "classical / constant, exact": ratios(seconds, "classical", "constant, exact"),
            "fast trials": statistics.mean(trials["fast"]),
            "classical trials": statistics.mean(trials["classical"]),
        }


def accepted(steps: int = 100) -> Iterator[dict[str, object]]:
    """For each first length and kind of step: loss at the end, trials, median length, failures of the condition."""
    examples = load_multimnist().train
    for length in (0.1, 0.5, 2.0):
        constant = _Steps(examples).constant(length, True)
        losses = [constant() for _ in range(steps)]
        yield {"lr_ub": length, "step": "constant", "loss": statistics.mean(losses[-20:])}
        for kind, options in ((FastBacktracking, {"check_true": True}), (Backtracking, {})):
            case = _Steps(examples)
            search = case.search(kind, length, **options)
            found = [search.step(case.closure()) for _ in range(steps)]
            yield {
                "lr_ub": length,
                "step": "fast" if kind is FastBacktracking else "classical",
                "loss": statistics.mean(sum(record.losses_before) for record in found[-20:]),
                "trials": statistics.mean(record.trials for record in found),
                "length": statistics.median(record.eta for record in found),
                "failures": getattr(search, "true_condition_rate", None),
            }


def main() -> None:
    """Print both tables and whether the promised ratio holds."""
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
    print("\nlr_ub  step       loss  trials  median length  condition fails")
    for row in accepted():
        line = f"{row['lr_ub']:5}  {row['step']:9} {row['loss']:5.2f}"
        if "trials" in row:
            line += f"  {row['trials']:6.2f}  {row['length']:13.4g}"
        print(line + (f"  {row['failures']:15.0%}" if row.get("failures") is not None else ""), flush=True)
