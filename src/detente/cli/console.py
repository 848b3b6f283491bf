"""What the commands share: how a mistake of the user is told, and how a table is printed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


class UsageError(Exception):
    """What was asked for cannot be done as asked."""


def rank() -> int:
    """Of this process among several that run one command, 0 where it is the only one."""
    return int(os.environ.get("RANK", "0"))


def file_name(name: str) -> str:
    """What names a folder of runs: an experiment's name, or that of the user's own class or method.

    Example:
        >>> file_name("problems/mine.py:Prices")
        'Prices'
    """
    return Path(name.rpartition(":")[2] or name).name


def print_experiments(command: str) -> None:
    """How a command that trains is called, and the protocols there are."""
    from detente.experiments import experiments

    print(
        f"usage: detente {command} EXPERIMENT [options]     (detente {command} EXPERIMENT --help lists them)\n"
    )
    for experiment in experiments().values():
        print(f"  {experiment.name:14} {experiment.summary}")


def print_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
