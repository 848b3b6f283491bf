"""The other commands: evaluate, report, demo, and the lists of methods and protocols."""

from __future__ import annotations

import json
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detente.cli.console import UsageError, print_columns
from detente.cli.export import check_export, export


@dataclass(frozen=True)
class MethodsCommand:
    """List the methods, what they need and where they can be solved."""

    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class ExperimentsCommand:
    """List the published protocols."""

    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Evaluate the selected weights of a finished run."""

    run: Path
    """Folder of the run."""
    split: Literal["test", "validation", "train"] = "test"
    """The data to evaluate on."""
    data_dir: Path | None = None
    """Folder of the data, if it has moved since the run."""
    export: Path | None = None
    """Write the weights of the selected epoch (the best one on validation data, where several were selected) to this
    file, FILE.safetensors: a plain state_dict."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class ReportCommand:
    """Make one self-contained HTML page from stored runs."""

    runs: tuple[Path, ...]
    """Folders of runs, or folders that hold them."""
    output: Path = Path("report.html")
    """The page to write."""
    title: str = "Détente report"
    """Title of the page."""
    export: Path | None = None
    """Also write every table (Markdown, LaTeX, CSV) and every figure (PNG, PDF) to this folder."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class DemoCommand:
    """Train on the packaged digits with several methods and look at the result (about four minutes)."""

    out: Path = Path("runs/demo")
    """Folder for the runs and the report; finished runs in it are not repeated."""
    epochs: int = 12
    """Passes over the 10 000 training images for every run."""
    seed: int = 0
    """Seed of every run."""
    json: bool = False
    """Print one JSON object."""


def evaluate(command: EvaluateCommand) -> int:
    """Measure the selected weights of a finished run."""
    from detente.experiments import find
    from detente.records import read_run
    from detente.training.evaluation import measured

    run = read_run(command.run)
    if run.result is None:
        raise UsageError(f"{command.run} holds an unfinished run; finish it first: {run.config['command']}")
    experiment = find(run.experiment)
    if experiment.trainer is not None:
        raise UsageError(f"{command.run}: {run.experiment} keeps no weights; its metrics are in result.json.")
    check_export(command.export, experiment)
    stored: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in run.config["config"].items()
    }
    stored["data_dir"] = command.data_dir or (Path(stored["data_dir"]) if stored["data_dir"] else None)
    problem = experiment.build(experiment.config(**stored))
    model = problem.model()
    metrics = measured(problem, model, run.path, run.result["selected_epochs"], command.split)
    if command.export is not None:
        export(run, command.export)
    if command.json:
        keys = ("experiment", "method", "options", "gradients", "seed")
        about = {key: run.config[key] for key in keys}
        print(
            json.dumps(
                {**about, "split": command.split, "epochs": run.result["selected_epochs"], "metrics": metrics}
            )
        )
        return 0
    for task, values in metrics.items():
        print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    return 0


def report(command: ReportCommand) -> int:
    """Write the page, and its tables and figures as files if they are asked for."""
    from detente.records import no_collections
    from detente.reports import export_report, read_studies, write_report

    with no_collections():
        studies, problems = read_studies(command.runs, _published())
        page = write_report(studies, problems, command.output, command.title)
    if not command.json:
        print(f"report: {page}")
    exports: list[str] = []
    for path in export_report(studies, command.export) if command.export is not None else ():
        exports.append(str(path))
        if not command.json:
            print(f"export: {path}", flush=True)
    if command.json:
        print(json.dumps({"report": str(page), "exports": exports}))
    return 0


def _published() -> dict[str, Any]:
    """Experiment to the rows of the papers' tables."""
    from detente.experiments import experiments

    return {name: experiment.published for name, experiment in experiments().items()}


def demo(command: DemoCommand) -> int:
    """Train, report, print the table."""
    from detente.experiments.demo import demo
    from detente.reports import build_report, print_table

    started = time.perf_counter()
    with redirect_stdout(sys.stderr):
        results = demo(command.out, epochs=command.epochs, seed=command.seed, quiet=command.json)
        page = build_report(
            [command.out],
            command.out / "report.html",
            title="Two digits, one network",
            published=_published(),
        )
    seconds = time.perf_counter() - started
    if command.json:
        print(json.dumps({"runs": results, "report": str(page), "seconds": seconds}))
        return 0
    print_table([command.out])
    print(f"\n{seconds:.0f} s. Open the report: {page}")
    return 0


def methods(command: MethodsCommand) -> int:
    """Print what the methods declare."""
    from detente.methods import methods as registered

    found = registered()
    if command.json:
        print(json.dumps({name: _info(info) for name, info in found.items()}))
        return 0
    rows = [
        (
            name,
            ", ".join(sorted(info.needs)) or "-",
            ", ".join(sorted(info.spaces)),
            ", ".join(f"{key}={option.default}" for key, option in info.options.items()) or "-",
            info.summary,
        )
        for name, info in found.items()
    ]
    print_columns(("method", "needs", "solved on", "options", "summary"), rows)
    return 0


def _info(info: Any) -> dict[str, Any]:
    return {
        "summary": info.summary,
        "source": info.source,
        "needs": sorted(info.needs),
        "spaces": sorted(info.spaces),
        "stateful": info.stateful,
        "native_scale": info.native_scale,
        "homogeneity": info.homogeneity,
        "nonconflict": info.nonconflict,
        "stationary": info.stationary,
        "simplex": info.simplex,
        "permutation": info.permutation,
        "options": {
            name: {"default": option.default, "choices": list(option.choices), "search": list(option.search)}
            for name, option in info.options.items()
        },
    }


def experiments(command: ExperimentsCommand) -> int:
    """Print the protocols."""
    from detente.experiments import experiments as protocols

    found = protocols()
    if command.json:
        print(json.dumps({name: {"summary": e.summary, "source": e.source} for name, e in found.items()}))
        return 0
    print_columns(
        ("experiment", "summary", "source"), [(e.name, e.summary, e.source) for e in found.values()]
    )
    return 0
