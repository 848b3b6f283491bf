"""Run folders that look like real ones, made quickly and the same every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detente.records import RunFolder, versions


def make_run(
    path: Path,
    method: str = "uniform",
    gradients: str = "exact",
    *,
    seed: int = 0,
    tasks: Sequence[str] = ("left", "right"),
    single: bool = False,
    final: Mapping[str, float | None] | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    label: str | None = None,
    experiment: str = "multimnist",
    epochs: int = 20,
    steps_per_epoch: int = 20,
    finished: bool = True,
    steps: bool = True,
    samples: bool = True,
    metric: tuple[str, bool, bool] = ("accuracy", True, True),
    seconds: float = 2.0,
    command: str | None = None,
    balance: bool = False,
    epoch_more: Callable[[int], Mapping[str, Any]] | None = None,
    step_more: Callable[[int], Mapping[str, Any]] | None = None,
    problem: Mapping[str, Any] | None = None,
) -> Path:
    """One run folder; ``final`` is the main metric by task on test data.

    ``epoch_more`` and ``step_more`` give from the number of an epoch or step what its row holds beside the usual.
    """
    # Not hash(): that differs between processes.
    random = np.random.default_rng([seed, *f"{method}{gradients}{tasks}".encode()])
    name, higher, percent = metric
    final = {task: 0.965 - 0.015 * i for i, task in enumerate(tasks)} | dict(final or {})
    metrics = []
    for task in tasks:
        metrics.append({"task": task, "name": name, "higher_is_better": higher, "percent": percent})
        metrics.append({"task": task, "name": "loss", "higher_is_better": False, "percent": False})
    if label is None:
        label = f"single task: {tasks[0]}" if single else f"{method} ({gradients})".replace(" (none)", "")
    config = {
        "schema": 1,
        "experiment": experiment,
        "label": label,
        "method": method,
        "options": dict(options or {}),
        "gradients": gradients,
        "tasks": list(tasks),
        "metrics": metrics,
        "main_metric": dict.fromkeys(tasks, name),
        "seed": seed,
        "config": {"epochs": epochs, "learning_rate": 0.01, "seed": seed, "method": method}
        | dict(settings or {}),
        "command": command
        or f"detente run {experiment} --method {method} --gradients {gradients} --seed {seed}",
        **({"problem": dict(problem)} if problem else {}),
        "versions": versions(),
        "started": f"2025-03-0{1 + seed % 9}T10:00:00+00:00",
    }
    with RunFolder.create(path, config) as folder:
        for epoch in range(1, epochs + 1):
            if steps:
                for step in range((epoch - 1) * steps_per_epoch + 1, epoch * steps_per_epoch + 1):
                    row = make_step(random, method, gradients, tasks, step / (epochs * steps_per_epoch))
                    if balance:
                        row["balance"] = make_balance(random, tasks, step)
                    if step_more is not None:
                        row |= step_more(step)
                    folder.append_step({"step": step, "epoch": epoch, **row})
            progress = epoch / epochs
            loss = {
                task: float((2.2 + 0.1 * i) * np.exp(-4.0 * progress) + 0.1 + 0.01 * random.random())
                for i, task in enumerate(tasks)
            }
            folder.append_epoch(
                {
                    "epoch": epoch,
                    "step": epoch * steps_per_epoch,
                    "train_loss": loss,
                    "validation": {
                        task: {
                            name: 0.97 * (1 - np.exp(-5 * progress)),
                            "loss": 0.9 * value + 0.06 * progress,
                        }
                        for task, value in loss.items()
                    },
                    "seconds": seconds,
                    "learning_rate": 0.01,
                    "refused": 0,
                    **(epoch_more(epoch) if epoch_more is not None else {}),
                }
            )
        if samples:
            # The images are the same for every run; the predictions are wrong now and then.
            pictures = np.random.default_rng(1).integers(0, 256, (12, 28, 28), dtype=np.uint8)
            targets = {task: np.random.default_rng(ord(task[0])).integers(0, 10, 12) for task in tasks}
            wrong = {task: random.random(12) < 0.15 for task in tasks}
            folder.write_samples(
                pictures,
                targets,
                {task: np.where(wrong[task], (targets[task] + 3) % 10, targets[task]) for task in tasks},
            )
        if finished:
            values = {task: {name: final[task], "loss": 0.2} for task in tasks}
            folder.write_result(
                {
                    "schema": 1,
                    "status": "done",
                    "epochs": epochs,
                    "selection": "mean",
                    "selected_epochs": [max(1, epochs - 2)],
                    "metrics": values,
                    "validation": values,
                    "seconds": seconds * epochs,
                    "seconds_per_step": seconds / steps_per_epoch,
                    "seconds_per_epoch": seconds,
                    "peak_memory_bytes": 600 * 2**20,
                    "parameters": 27450,
                }
            )
    return path


def make_step(
    random: np.random.Generator, method: str, gradients: str, tasks: Sequence[str], progress: float
) -> dict[str, Any]:
    """What a step recorder could have written: weights and conflict of made-up gradients."""
    vectors = random.normal(size=(len(tasks), 12)) + 0.9 * random.normal(size=12) * (1.2 - progress)
    vectors *= np.linspace(1.0, 1.0 + 3.0 * progress, len(tasks))[:, None]
    weights = np.ones(len(tasks))
    altered = None
    if method != "uniform":
        weights = 1 / np.linalg.norm(vectors, axis=1)
        weights /= weights.sum()
    if method == "aligned-mtl":
        altered = conflict(np.eye(len(tasks)))
    return {
        "names": list(tasks),
        "losses": list(np.exp(-progress) * np.ones(len(tasks))),
        "weights": weights,
        "status": "ok",
        "space": gradients,
        "kept_rank": None,
        "dropped": [],
        "seconds": 0.01,
        "raw": None if gradients == "none" else conflict(vectors),
        "altered": altered,
        "notes": [],
    }


def make_balance(random: np.random.Generator, tasks: Sequence[str], step: int) -> dict[str, Any]:
    """Three layers; the first task pulls ten times as much as the next."""
    sizes = np.array([100, 10, 1])
    pulls = 10.0 ** -np.arange(len(tasks)) * np.array([[1.0], [2.0], [3.0]])
    return {
        "tasks": list(tasks),
        "layers": ["conv.weight", "conv.bias", "<scale>"],
        "sizes": sizes.tolist(),
        "gradients": (pulls * random.uniform(0.9, 1.1)).tolist(),
        "contributions": (1e-3 * pulls / step).tolist(),
    }


def conflict(vectors: np.ndarray) -> dict[str, Any]:
    """The measures of the record, by their definitions."""
    norms = np.linalg.norm(vectors, axis=1)
    cosines = vectors @ vectors.T / np.outer(norms, norms)
    pairs = np.triu_indices(len(norms), 1)
    products = 2 * np.outer(norms, norms) / (norms[:, None] ** 2 + norms[None, :] ** 2)
    singular = np.linalg.svd(vectors, compute_uv=False)
    return {
        "norms": norms,
        "cosines": cosines,
        "condition_number": singular[0] / singular[-1],
        "magnitude_similarity": products[pairs].mean() if len(norms) > 1 else 1.0,
        "minimal_cosine": cosines[pairs].min() if len(norms) > 1 else 1.0,
        "norm_ratio": norms.max() / norms.min(),
    }


def make_demo(folder: Path, seeds: Sequence[int] = (0,), **more: Any) -> Path:
    """The runs of the main job, with numbers near the published ones."""
    results = {
        ("uniform", "none"): (0.9646, 0.9499, 2.0),
        ("mgda", "exact"): (0.9690, 0.9551, 3.6),
        ("mgda", "features"): (0.9682, 0.9560, 2.04),
        ("aligned-mtl", "exact"): (0.9672, 0.9566, 3.7),
        ("aligned-mtl", "features"): (0.9664, 0.9541, 2.06),
    }
    for seed in seeds:
        shift = 0.0006 * (seed % 3 - 1) if len(seeds) > 1 else 0.0
        for task, value in (("left", 0.9723), ("right", 0.9590)):
            make_run(
                folder / f"single-{task}-{seed}",
                gradients="none",
                tasks=(task,),
                single=True,
                seed=seed,
                final={task: value + shift},
                **more,
            )
        for (method, gradients), (left, right, seconds) in results.items():
            make_run(
                folder / f"{method}-{gradients}-{seed}",
                method,
                gradients,
                seed=seed,
                final={"left": left + shift, "right": right - 1.5 * shift},
                seconds=seconds,
                **more,
            )
    return folder


def painted(value: Any, key: str = "") -> Any:
    """Colour tokens replaced by any colour, as the page does."""
    if isinstance(value, dict):
        return {name: painted(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [painted(item, key) for item in value]
    token = isinstance(value, str) and value.startswith("@") and key.lower().endswith(("color", "colorscale"))
    return "#123456" if token else value


@pytest.fixture
def run_maker() -> Callable[..., Path]:
    """`make_run`: write one run folder."""
    return make_run


@pytest.fixture
def demo_maker() -> Callable[..., Path]:
    """`make_demo`: write the runs of the main job."""
    return make_demo
