"""`detente run`: one run of a protocol, in one process or several."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from detente.cli.console import UsageError, file_name, print_experiments, rank
from detente.cli.export import check_export, export


def run(arguments: list[str]) -> int:
    """Parse the protocol's configuration, and train; in several processes if it asks for them."""
    import tyro

    from detente.experiments import find
    from detente.records import read_run
    from detente.training.launch import end_with_the_starter, launch, launched
    from detente.training.loggers import check_loggers

    if not arguments or arguments[0] in ("-h", "--help"):
        print_experiments("run")
        return 0 if arguments else 2
    experiment = find(arguments[0])

    def parse(config: Any, out: Path | None = None, export: Path | None = None, json: bool = False) -> Any:
        """Run a protocol.

        Args:
            config: the protocol.
            out: Folder of the run. Default: runs/EXPERIMENT/METHOD-GRADIENTS-seedS.
            export: Write the weights of the selected epoch (the best one on validation data, where several were
                selected) to this file, FILE.safetensors: a plain state_dict.
            json: Print one JSON object.
        """
        return config, out, export, json

    unprefixed: Any = tyro.conf.OmitArgPrefixes
    parse.__annotations__["config"] = unprefixed[experiment.config]
    parse.__annotations__["out"] = parse.__annotations__["export"] = Path | None
    parse.__annotations__["json"] = bool
    arguments_told = (parse.__doc__ or "").partition("Args:")[2]
    parse.__doc__ = (
        f"{experiment.name}: {experiment.summary}.\n\nSource: {experiment.source}\n\nArgs:{arguments_told}"
    )
    config, out, exported, as_json = tyro.cli(
        parse,
        args=arguments[1:],
        prog=f"detente run {experiment.name}",
        config=(tyro.conf.UseAppendAction,),
    )
    _check_method(config)
    check_loggers(config.logger)
    check_export(exported, experiment)
    if config.devices > 1 and not launched():
        return launch(config.devices, ["run", *arguments])
    end_with_the_starter()
    alone = experiment.task_of(config)
    label = None if alone is None else f"single task: {alone}"
    folder = out or Path("runs") / file_name(experiment.name) / run_name(config, label)
    with redirect_stdout(sys.stderr):
        result = experiment.run(
            config,
            folder,
            command=shlex.join(["detente", "run", *arguments]),
            label=label,
            quiet=as_json and not sys.stderr.isatty(),
        )
    if rank() == 0:
        if exported is not None:
            export(read_run(folder), exported)
        _print_result(result, folder, as_json)
    return 0


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
        print(json.dumps({**{key: result.get(key) for key in keys}, "folder": str(folder)}))
        return
    for task, values in result["metrics"].items():
        print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    print(f"{result['epochs']} epochs, {result['seconds']:.0f} s, records in {folder}")
