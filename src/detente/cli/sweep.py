"""`detente sweep`: many runs of a protocol under equal conditions."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detente.cli.console import file_name, print_columns, print_experiments


@dataclass(frozen=True)
class SweepCommand:
    """Where a sweep is stored, and how it is told."""

    out: Path | None = None
    """Folder of the sweep. Default: runs/EXPERIMENT-sweep."""
    plan: bool = False
    """Print what would be run, and run nothing."""
    json: bool = False
    """Print one JSON object."""


def run_sweep(arguments: list[str]) -> int:
    """Parse sweep and protocol, see that all is in order, carry out the sweep, print what came out."""
    import tyro

    from detente.experiments import find
    from detente.sweeps import SweepConfig, plan_of, sweep
    from detente.sweeps.outcome import tables

    if not arguments or arguments[0] in ("-h", "--help"):
        print_experiments("sweep")
        return 0 if arguments else 2
    experiment = find(arguments[0])

    def parse(asked: Any, command: Any) -> Any:
        return asked, command

    def explain(asked: Any, command: Any, config: Any) -> Any:
        return asked, command, config

    unprefixed: Any = tyro.conf.OmitArgPrefixes
    kinds = {"asked": unprefixed[SweepConfig], "command": unprefixed[SweepCommand]}
    parse.__annotations__.update(kinds)
    explain.__annotations__.update({**kinds, "config": unprefixed[experiment.config]})
    prog = f"detente sweep {experiment.name}"
    description = (
        f"Compare methods on {experiment.name} under equal conditions. Flags of `detente run` hold for all."
    )
    if {"-h", "--help"} & set(arguments[1:]):  # of all flags, although they are read in two goes
        tyro.cli(explain, args=["--help"], prog=prog, description=description)
    (asked, command), others = tyro.cli(
        parse, args=arguments[1:], prog=prog, description=description, return_unknown_args=True
    )

    def config_of(flags: Sequence[str]) -> Any:
        told = io.StringIO()
        try:
            with redirect_stderr(told):
                return tyro.cli(experiment.config, args=flags, prog=prog, config=(tyro.conf.UseAppendAction,))
        except SystemExit as error:
            raise ValueError(_first_words(told.getvalue())) from error

    folder = command.out or Path("runs") / f"{file_name(experiment.name)}-sweep"
    with redirect_stdout(sys.stderr):
        plan = plan_of(experiment, asked, config_of, others)
    if command.plan:
        return _print_plan(plan, command.json)
    with redirect_stdout(sys.stderr):
        found = sweep(
            experiment,
            plan,
            folder,
            command=shlex.join(["detente", "sweep", *arguments]),
            quiet=command.json and not sys.stderr.isatty(),
        )
    if command.json:
        print(json.dumps({**found, "folder": str(folder)}))
    else:
        for header, rows in tables(found, shutil.get_terminal_size().columns):
            print_columns(header, rows)
            print()
        for sentence in found["conditions"]:
            print(sentence)
        print(f"Everything is in {folder}.")
    for name, reason in found["failures"].items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if found["failures"] else 0


def _first_words(told: str) -> str:
    """What was wrong with some flags, without title, frame and hint."""
    # Between the title and the first rule; a frame of lines or of blanks is drawn around it all.
    lines = [line.strip(" │|+╭╮╰╯") for line in told.splitlines()]
    parts = "\n".join(line if line.strip("-─") else "\0" for line in lines[1:]).split("\0")
    return next((" ".join(part.split()) for part in parts if part.strip()), "the flags are not understood.")


def _print_plan(plan: Any, as_json: bool) -> int:
    """What would be run: every contender with its tuning runs."""
    rows = [
        (
            one.name,
            str(len(plan.points[one.name])),
            ", ".join(f"{point.learning_rate:g}" for point in plan.points[one.name] if not point.options),
            str(sum(bool(point.options) for point in plan.points[one.name])),
        )
        for one in plan.contenders
    ]
    if as_json:
        contenders = [
            {"name": row[0], "tuning_runs": int(row[1]), "with_options": int(row[3])} for row in rows
        ]
        print(json.dumps({"experiment": plan.experiment, "runs": plan.size(), "contenders": contenders}))
        return 0
    print_columns(
        ("contender", "tuning runs", "learning rates by default options", "with other options"), rows
    )
    print(
        f"\n{plan.size()} runs, and up to {plan.asked.extend} more for each contender whose best is at an edge."
    )
    return 0
