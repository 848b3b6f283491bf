"""How long the report of many runs takes to make and to open, and how large it is.

Promised: 1 000 runs are reported in under 20 s; the page of 500 runs is smaller than 10 MB and is open in headless
Chromium in under 3 s without an error on its console, whatever the 500 runs are: several seeds of fewer methods, or no
two alike.

The runs are made up and written by the product itself: two tasks, 100 epochs, 200 recorded steps with weights and
conflict, samples, results. "Open" counts from the order to a fresh browser to visit the page until its own script says
that what is in view has been drawn: verdict and table. Figures further down are drawn when the reader comes near them.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

import detente
from detente.experiments import find
from detente.records import RunFolder, plain, versions
from detente.reports import build_report

BUILT = 20.0
OPENED = 3.0
SIZE = 10e6
EPOCHS, STEPS = 100, 200
TASKS = ("left", "right")
ROUNDS = 5

_METRICS = [
    {"task": task, "name": name, "higher_is_better": name == "accuracy", "percent": name == "accuracy"}
    for task in TASKS
    for name in ("accuracy", "loss")
]


def conditions(count: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Methods, spaces and learning rates, each with so many seeds, until there are ``count`` runs."""
    for task in TASKS:
        for seed in range(seeds):
            yield {
                "method": "uniform",
                "gradients": "none",
                "tasks": task,
                "seed": seed,
                "learning_rate": 0.01,
            }
    number = 0
    names = sorted(detente.methods())
    while True:
        round_, place = divmod(number, 2 * len(names))
        name, space = names[place // 2], ("exact", "features")[place % 2]
        for seed in range(seeds):
            rate = float(f"{0.01 * 1.2**round_:.3g}")
            yield {"method": name, "gradients": space, "tasks": "both", "seed": seed, "learning_rate": rate}
        number += 1
        if number * seeds > count:
            return


def make_runs(folder: Path, count: int, seeds: int) -> None:
    """So many finished runs with made-up numbers; they differ by method, space, learning rate and seed."""
    for number, condition in enumerate(conditions(count, seeds)):
        if number == count:
            return
        make_run(folder / f"run{number:04}", **condition)


def make_run(
    folder: Path, *, method: str, gradients: str, tasks: str, seed: int, learning_rate: float
) -> None:
    """One finished run of MultiMNIST."""
    random = np.random.default_rng([seed, *f"{method}{gradients}{tasks}{learning_rate}".encode()])
    names = TASKS if tasks == "both" else (tasks,)
    metrics = [metric for metric in _METRICS if metric["task"] in names]
    config = replace(
        find("multimnist").config(),
        method=method,
        gradients="exact" if gradients == "none" else gradients,
        seed=seed,
        learning_rate=learning_rate,
        tasks=tasks,
    )
    stored = {
        **{"schema": 1, "experiment": "multimnist", "method": method, "options": {}, "gradients": gradients},
        "label": f"{method} ({gradients})" if tasks == "both" else f"single task: {tasks}",
        **{"tasks": list(names), "metrics": metrics, "main_metric": dict.fromkeys(names, "accuracy")},
        **{"seed": seed, "config": plain(asdict(config)), "versions": versions()},
        "command": f"detente run multimnist --method {method} --gradients {gradients} --seed {seed}",
        "started": f"2025-03-0{1 + seed % 9}T10:00:00+00:00",
    }
    with RunFolder.create(folder, stored) as records:
        for epoch in range(1, EPOCHS + 1):
            for step in range((epoch - 1) * STEPS // EPOCHS, epoch * STEPS // EPOCHS):
                records.append_step(
                    {"step": 20 * step + 1, "epoch": epoch, **_step(random, names, gradients, step / STEPS)}
                )
            losses = {
                name: 2.2 * float(np.exp(-4 * epoch / EPOCHS)) + 0.1 * random.random() for name in names
            }
            validation = {name: {"accuracy": 1 - loss / 2.4, "loss": loss} for name, loss in losses.items()}
            records.append_epoch(
                {
                    **{"epoch": epoch, "step": epoch * STEPS // EPOCHS * 20, "train_loss": losses},
                    **{"validation": validation, "seconds": 8 + random.random()},
                    **{"learning_rate": learning_rate, "refused": 0},
                }
            )
        pictures = np.random.default_rng(1).integers(0, 256, (12, 28, 28), dtype=np.uint8)
        labels = {name: np.random.default_rng(2).integers(0, 10, 12) for name in names}
        records.write_samples(pictures, labels, {name: random.integers(0, 10, 12) for name in names})
        found = {
            name: {"accuracy": 0.95 + 0.02 * random.random(), "loss": 0.1 + 0.1 * random.random()}
            for name in names
        }
        records.write_result(
            {
                **{"schema": 1, "status": "done", "epochs": EPOCHS, "steps": 20 * STEPS, "selection": "mean"},
                **{"selected_epochs": [90], "metrics": found, "validation": found, "seconds": 850.0},
                **{"seconds_per_epoch": 8 + random.random(), "peak_memory_bytes": 6e8, "parameters": 27450},
            }
        )


def _step(
    random: np.random.Generator, names: Sequence[str], gradients: str, progress: float
) -> dict[str, Any]:
    share, cosine = float(0.3 + 0.4 * random.random()), float(0.8 - progress + 0.2 * random.random())
    norms = (0.1 * (1 + random.random(len(names)))).tolist()
    raw = None
    if gradients != "none":
        raw = {
            **{"norms": norms, "cosines": [[1.0, cosine], [cosine, 1.0]]},
            **{"condition_number": 1 + 20 * random.random() ** 4, "magnitude_similarity": random.random()},
            **{"minimal_cosine": cosine, "norm_ratio": max(norms) / min(norms)},
        }
    return {
        **{"names": list(names), "losses": random.random(len(names)).tolist()},
        "weights": [share, 1 - share] if len(names) > 1 else [1.0],
        **{"status": "ok", "space": gradients, "raw": raw, "altered": raw, "kept_rank": None, "dropped": []},
        **{"notes": [], "seconds": float(0.04 + 0.01 * random.random())},
    }


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A headless Chromium; RuntimeError where there is none."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if found is None or driver is None:
        raise RuntimeError("opening the page needs a browser: install Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
        *("--disable-dev-shm-usage", "--no-first-run", "--window-size=1400,1000"),
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


def opened(page: Path, rounds: int = ROUNDS) -> tuple[list[float], list[str]]:
    """Seconds until the page says it is ready, in as many new browsers, and what it wrote to the console."""
    seconds, told = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as place, chromium(Path(place)) as browser:
            browser.get("about:blank")
            started = time.perf_counter()
            browser.get(page.resolve().as_uri())
            while not browser.execute_script("return document.documentElement.dataset.ready === 'yes'"):
                if time.perf_counter() - started > 120:
                    raise RuntimeError(f"{page} was not ready after two minutes")
                time.sleep(0.02)
            seconds.append(time.perf_counter() - started)
            told += [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]
    return seconds, told


def reported(
    count: int, seeds: int, what: str, rounds: int = ROUNDS
) -> tuple[float, float, float, list[str]]:
    """Seconds to build, bytes, seconds to open (0 rounds: not opened), and complaints of the console."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "runs"
        make_runs(folder, count, seeds)
        started = time.perf_counter()
        page = build_report([folder], Path(place) / "report.html")
        built, size = time.perf_counter() - started, page.stat().st_size
        seconds, told = opened(page, rounds) if rounds else ([0.0], [])
    name = f"{count} runs, {what}"
    print(f"{name:36} built in {built:6.2f} s   {size / 1e6:6.2f} MB", end="")
    if rounds:
        middle, low, high = statistics.median(seconds), min(seconds), max(seconds)
        print(f"   open in {middle:5.2f} s ({low:.2f} to {high:.2f})   {len(told)} errors", end="")
    print()
    for message in told:
        print(f"    {message[:200]}")
    return built, size, statistics.median(seconds), told


def main() -> None:
    """Print all of it, and what is promised."""
    many = reported(1000, 10, "10 seeds each", rounds=0)
    found = [reported(500, 5, "5 seeds each"), reported(500, 1, "all different")]
    kept = many[0] < BUILT and all(size < SIZE and seconds < OPENED for _, size, seconds, _ in found)
    print(
        f"promised: 1000 runs under {BUILT:.0f} s; 500 runs under {SIZE / 1e6:.0f} MB, open in under {OPENED:.0f} s, "
        f"no errors: {'kept' if kept and not any(told for *_, told in found) else 'NOT KEPT'}"
    )
