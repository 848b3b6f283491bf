"""The command line: parse a typed configuration, call the room that does the work.

Exit codes: 0 done, 2 bad usage, 1 failed.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


class UsageError(Exception):
    """What was asked for cannot be done as asked."""


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command ``detente``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _dispatch(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where the last checkpoint stands.", file=sys.stderr)
        code = 1
    except BrokenPipeError:  # the reader of a pipe went away
        sys.stderr.close()
        code = 0
    sys.exit(code)


def _dispatch(arguments: list[str]) -> int:
    try:
        import tyro
    except ImportError:
        print("the command line needs the train extra: pip install 'detente[train]'", file=sys.stderr)
        return 1
    commands: dict[str, tuple[type, Callable[[Any], int]]] = {
        "methods": (MethodsCommand, _methods),
        "experiments": (ExperimentsCommand, _experiments),
        "evaluate": (EvaluateCommand, _evaluate),
        "report": (ReportCommand, _report),
        "demo": (DemoCommand, _demo),
    }
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        _usage(sys.stdout)
        return 0
    if name == "--version":
        from detente import __version__

        print(f"detente {__version__}")
        return 0
    if name != "run" and name not in commands:
        print(f"unknown command {name!r}.\n", file=sys.stderr)
        _usage(sys.stderr)
        return 2
    try:
        if name == "run":
            return _run(arguments[1:])
        parsed, action = commands[name]
        positional = (tyro.conf.PositionalRequiredArgs,)
        return action(tyro.cli(parsed, args=arguments[1:], prog=f"detente {name}", config=positional))
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    """A message for a person and the exit code, or the traceback if it is a defect of ours.

    Of several processes each tells what went wrong in it; what it heard from another one, only the first repeats.
    """
    from detente.autograd.ranks import RankFailed
    from detente.experiments import UnknownExperiment
    from detente.methods import UnknownMethod, UnknownOption
    from detente.records import ConfigMismatch

    usage = (UsageError, UnknownMethod, UnknownOption, UnknownExperiment, ConfigMismatch)
    if not isinstance(error, (*usage, ValueError, OSError, ImportError, RuntimeError)):
        raise error
    rank = _rank()
    if rank == 0 or not isinstance(error, RankFailed):
        print(f"detente: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr)
    return 2 if isinstance(error, usage) else 1


def _usage(stream: Any) -> None:
    print(
        "usage: detente COMMAND [options]\n\n"
        "  demo         train on the packaged digits with several methods and look at the result\n"
        "  run          run a published protocol:  detente run multimnist --method mgda --gradients features\n"
        "  evaluate     evaluate a finished run:   detente evaluate runs/multimnist/mgda-features-seed0\n"
        "  report       one HTML page from runs:   detente report runs/multimnist --output report.html\n"
        "  methods      list the methods\n"
        "  experiments  list the protocols\n\n"
        "detente COMMAND --help explains the options; every command takes --json.",
        file=stream,
    )


# ---- run


def _run(arguments: list[str]) -> int:
    import tyro

    from detente.experiments import experiments, find
    from detente.training import train
    from detente.training.launch import end_with_the_starter, launch, launched

    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: detente run EXPERIMENT [options]     (detente run EXPERIMENT --help lists them)\n")
        for experiment in experiments().values():
            print(f"  {experiment.name:14} {experiment.summary}")
        return 0 if arguments else 2
    experiment = find(arguments[0])

    def parse(config: Any, out: Path | None = None, json: bool = False) -> tuple[Any, Path | None, bool]:
        """Run a protocol.

        Args:
            config: the protocol.
            out: Folder of the run. Default: runs/EXPERIMENT/METHOD-GRADIENTS-seedS.
            json: Print one JSON object.
        """
        return config, out, json

    unprefixed: Any = tyro.conf.OmitArgPrefixes
    parse.__annotations__["config"] = unprefixed[experiment.config]
    parse.__annotations__["out"] = Path | None
    parse.__annotations__["json"] = bool
    parse.__doc__ = f"{experiment.name}: {experiment.summary}.\n\nSource: {experiment.source}"
    config, out, as_json = tyro.cli(
        parse,
        args=arguments[1:],
        prog=f"detente run {experiment.name}",
        config=(tyro.conf.UseAppendAction,),
    )
    _check_method(config)
    if config.devices > 1 and not launched():
        return launch(config.devices, ["run", *arguments])
    end_with_the_starter()
    label = _single_task_label(config)
    folder = out or Path("runs") / experiment.name / run_name(config, label)
    with redirect_stdout(sys.stderr):
        result = train(
            experiment.build(config),
            config,
            folder,
            experiment=experiment.name,
            command=shlex.join(["detente", "run", *arguments]),
            label=label,
            quiet=as_json and not sys.stderr.isatty(),
        )
    if _rank() == 0:
        _print_result(result, folder, as_json)
    return 0


def _rank() -> int:
    """Of this process among several that run one command, 0 where it is the only one."""
    return int(os.environ.get("RANK", "0"))


def _check_method(config: Any) -> None:
    """Find out about a wrong method or option before any data are read."""
    from detente.methods import create

    try:
        create(config.method, **config.method_options())
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def run_name(config: Any, label: str | None) -> str:
    """A folder name that tells runs of one experiment apart."""
    method = Path(config.method.rpartition(":")[2] if ".py:" in config.method else config.method).name
    parts = [label.replace(": ", "-").replace(" ", "-") if label else f"{method}-{config.gradients}"]
    parts += [option.replace("=", "-").replace("/", "-") for option in config.option]
    return "-".join([*parts, f"seed{config.seed}"])


def _single_task_label(config: Any) -> str | None:
    alone = getattr(config, "tasks", "both")
    return None if alone == "both" else f"single task: {alone}"


def _print_result(result: dict[str, Any], folder: Path, as_json: bool) -> None:
    if as_json:
        keys = (
            "experiment",
            "method",
            "options",
            "gradients",
            "seed",
            "epochs",
            "steps",
            "metrics",
            "seconds",
        )
        print(json.dumps({**{key: result[key] for key in keys}, "folder": str(folder)}))
        return
    for task, values in result["metrics"].items():
        print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    print(f"{result['epochs']} epochs, {result['seconds']:.0f} s, records in {folder}")


# ---- evaluate


def _evaluate(command: EvaluateCommand) -> int:
    from detente.experiments import find
    from detente.records import read_run
    from detente.training.evaluation import measured

    run = read_run(command.run)
    if run.result is None:
        raise UsageError(f"{command.run} holds an unfinished run; finish it first: {run.config['command']}")
    experiment = find(run.experiment)
    stored: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in run.config["config"].items()
    }
    stored["data_dir"] = command.data_dir or (Path(stored["data_dir"]) if stored["data_dir"] else None)
    problem = experiment.build(experiment.config(**stored))
    model = problem.model()
    metrics = measured(problem, model, run.path, run.result["selected_epochs"], command.split)
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


# ---- report and demo


def _report(command: ReportCommand) -> int:
    from detente.reports import build_report

    page = build_report(command.runs, command.output, title=command.title)
    print(json.dumps({"report": str(page)}) if command.json else f"report: {page}")
    return 0


def _demo(command: DemoCommand) -> int:
    from detente.experiments.demo import demo
    from detente.reports import build_report, print_table

    started = time.perf_counter()
    with redirect_stdout(sys.stderr):
        results = demo(command.out, epochs=command.epochs, seed=command.seed, quiet=command.json)
        page = build_report([command.out], command.out / "report.html", title="Two digits, one network")
    seconds = time.perf_counter() - started
    if command.json:
        print(json.dumps({"runs": results, "report": str(page), "seconds": seconds}))
        return 0
    print_table([command.out])
    print(f"\n{seconds:.0f} s. Open the report: {page}")
    return 0


# ---- lists


def _methods(command: MethodsCommand) -> int:
    from detente.methods import methods

    found = methods()
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
    _table(("method", "needs", "solved on", "options", "summary"), rows)
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


def _experiments(command: ExperimentsCommand) -> int:
    from detente.experiments import experiments

    found = experiments()
    if command.json:
        print(json.dumps({name: {"summary": e.summary, "source": e.source} for name, e in found.items()}))
        return 0
    _table(("experiment", "summary", "source"), [(e.name, e.summary, e.source) for e in found.values()])
    return 0


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
