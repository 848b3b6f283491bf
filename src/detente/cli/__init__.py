"""The command line: parse a typed configuration, call the room that does the work.

`run` and `sweep` have a file each, `show` the commands that only look; `console` is what they share.

Exit codes: 0 done, 2 bad usage, 1 failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from detente.cli import show
from detente.cli.console import UsageError, rank


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
    # Here, because an import of tyro at the top would make every import of this package wait for it.
    show.ReportCommand.__annotations__["output"] = Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    commands: dict[str, tuple[type, Callable[[Any], int]]] = {
        "methods": (show.MethodsCommand, show.methods),
        "experiments": (show.ExperimentsCommand, show.experiments),
        "evaluate": (show.EvaluateCommand, show.evaluate),
        "report": (show.ReportCommand, show.report),
        "demo": (show.DemoCommand, show.demo),
    }
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        _usage(sys.stdout)
        return 0
    if name == "--version":
        from detente import __version__

        print(f"detente {__version__}")
        return 0
    if name not in ("run", "sweep") and name not in commands:
        print(f"unknown command {name!r}.\n", file=sys.stderr)
        _usage(sys.stderr)
        return 2
    try:
        if name == "run":
            from detente.cli.run import run

            return run(arguments[1:])
        if name == "sweep":
            from detente.cli.sweep import run_sweep

            return run_sweep(arguments[1:])
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
    from detente.sweeps.contenders import BadSweep
    from detente.sweeps.sweep import AnotherSweep

    usage: tuple[type[Exception], ...] = (UsageError, UnknownMethod, UnknownOption, UnknownExperiment)
    usage += (ConfigMismatch, BadSweep, AnotherSweep)
    if not isinstance(error, (*usage, ValueError, OSError, ImportError, RuntimeError)):
        raise error
    here = rank()
    if here == 0 or not isinstance(error, RankFailed):
        print(f"detente: {f'process {here}: ' if here else ''}{error}", file=sys.stderr)
    return 2 if isinstance(error, usage) else 1


def _usage(stream: Any) -> None:
    print(
        "usage: detente COMMAND [options]\n\n"
        "  demo         train on the packaged digits with several methods and look at the result\n"
        "  run          run a published protocol:  detente run multimnist --method mgda --gradients features\n"
        "  sweep        compare methods fairly:    detente sweep multimnist --methods uniform mgda --seeds 3\n"
        "  evaluate     evaluate a finished run:   detente evaluate runs/multimnist/mgda-features-seed0\n"
        "  report       one HTML page from runs:   detente report runs/multimnist -o report.html\n"
        "  methods      list the methods\n"
        "  experiments  list the protocols\n\n"
        "detente COMMAND --help explains the options; every command takes --json.",
        file=stream,
    )
