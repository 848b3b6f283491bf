"""The shape of a run folder, the errors it can raise, and the checks that both sides share.

A run folder holds one training run::

    config.json     what was asked for: written once, before the first step
    epochs.jsonl    one object per epoch
    steps.jsonl     one object per recorded step
    samples.npz     a few test images with labels and predictions
    result.json     written last: its presence marks a finished run

A row of ``epochs.jsonl`` holds, beside epoch, step, seconds and learning rate:

    train_loss      task to its mean loss over the examples of the batches it was present in; a task that was absent
                    from every batch is left out
    validation      task to metric to value on validation data
    search          of a line search: steps, trials, first lengths taken, capped steps, checks and failures of the epoch
    refused         how many steps were refused and moved nothing
    method          what the method has to say, if anything. A guard tells ``refused_share``, the share of the steps it
                    refused, those included in which only the shared part stayed where it was (``refuse="shared"``);
                    ``refused`` does not count those, since the heads moved

Reading is tolerant towards keys it does not know (a later version may add some) and strict about
those it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SCHEMA = 1
CONFIG = "config.json"
EPOCHS = "epochs.jsonl"
STEPS = "steps.jsonl"
SAMPLES = "samples.npz"
RESULT = "result.json"
# Of a sweep, beside the folder of its runs.
OUTCOME = "outcome.json"
OUTCOME_SCHEMA = 1

# Facts about one start of a program, not about the run: a run resumed by another command, on another
# day or with another library version is still the same run.
VOLATILE = frozenset({"command", "started", "versions"})

_ABSENT = "(absent)"


class RecordError(ValueError):
    """A stored record cannot be read or does not have the shape it must have; names file and line."""


class SchemaError(RecordError):
    """A record was written with a schema version that this version of detente does not read."""


class ConfigMismatch(RecordError):
    """A run folder already holds a run with another configuration.

    ``differences`` lists ``(key, stored value, requested value)``; nested keys are joined by dots.
    """

    def __init__(self, folder: Path, differences: Iterable[tuple[str, Any, Any]]) -> None:
        self.folder = folder
        self.differences = tuple(differences)
        shown = [f"{key} is {there!r} there and {here!r} here" for key, there, here in self.differences[:8]]
        if len(self.differences) > len(shown):
            shown.append(f"and {len(self.differences) - len(shown)} more")
        super().__init__(
            f"{folder} holds a run with another configuration: {'; '.join(shown)}. "
            "Choose another output folder, repeat the stored configuration, or delete the folder."
        )


class UnwritableFolder(OSError):
    """A run folder cannot be created or written to."""

    def __init__(self, path: Path, reason: OSError) -> None:
        self.path = path
        detail = reason.strerror or str(reason) or type(reason).__name__
        super().__init__(
            f"cannot write to {path}: {detail}. Choose another output folder, or make this one writable."
        )
        self.errno = reason.errno


def check_schema(record: Mapping[str, Any], where: Path | str) -> None:
    """Raise `SchemaError` unless `record` has the schema version that this version reads."""
    found = record.get("schema")
    if isinstance(found, bool) or not isinstance(found, int):
        raise SchemaError(f"{where} has no schema number (found {found!r}): it was not written by detente.")
    if found > SCHEMA:
        raise SchemaError(
            f"{where} has schema {found}, newer than the schema {SCHEMA} that this version of detente reads: "
            "install a newer detente to read it."
        )
    if found < SCHEMA:
        raise SchemaError(
            f"{where} has schema {found}, older than the schema {SCHEMA} that this version of detente reads: "
            "run it again, or read it with the version named in it."
        )


def check_config(config: Mapping[str, Any], where: Path | str) -> None:
    """Raise `RecordError` naming the first key of a run's configuration that is missing or mis-shaped."""
    check_schema(config, where)
    for key in ("experiment", "label", "method", "gradients", "command", "started"):
        _need(config, key, str, where)
    for key in ("options", "main_metric", "config", "versions"):
        _need(config, key, dict, where)
    _need(config, "seed", int, where)
    tasks = _need(config, "tasks", list, where)
    if not tasks or not all(isinstance(task, str) for task in tasks) or len(set(tasks)) != len(tasks):
        raise RecordError(f"{where}: 'tasks' must be a list of one or more different names; found {tasks!r}.")
    known = set()
    for metric in _need(config, "metrics", list, where):
        if not isinstance(metric, dict):
            raise RecordError(f"{where}: every entry of 'metrics' must be an object; found {metric!r}.")
        for key, kind in (("task", str), ("name", str), ("higher_is_better", bool), ("percent", bool)):
            _need(metric, key, kind, f"{where}, metrics")
        known.add((metric["task"], metric["name"]))
    for task in tasks:
        main = config["main_metric"].get(task)
        if (task, main) not in known:
            raise RecordError(f"{where}: the main metric {main!r} of task {task!r} is not among 'metrics'.")


def check_result(result: Mapping[str, Any], where: Path | str) -> None:
    """Raise `RecordError` naming the first key of a result that is missing or mis-shaped."""
    check_schema(result, where)
    _need(result, "epochs", int, where)
    for task, values in _need(result, "metrics", dict, where).items():
        if not isinstance(values, dict) or not all(_is_number(value) for value in values.values()):
            raise RecordError(
                f"{where}: the metrics of task {task!r} must be numbers or null; found {values!r}."
            )
    for key in ("seconds", "seconds_per_epoch", "peak_memory_bytes", "parameters"):
        if not _is_number(result.get(key)):
            raise RecordError(f"{where}: {key!r} must be a number or null; found {result[key]!r}.")


def check_epoch(row: Mapping[str, Any], where: Path | str) -> None:
    """Raise `RecordError` unless `row` is a row of ``epochs.jsonl``."""
    _need(row, "epoch", int, where)
    _need(row, "step", int, where)
    for key in ("train_loss", "validation"):
        if not isinstance(row.get(key, {}), dict):
            raise RecordError(f"{where}: {key!r} must be an object by task; found {row[key]!r}.")


def check_step(row: Mapping[str, Any], where: Path | str) -> None:
    """Raise `RecordError` unless `row` is a row of ``steps.jsonl``."""
    _need(row, "step", int, where)
    _need(row, "epoch", int, where)
    names = _need(row, "names", list, where)
    for key in ("losses", "weights"):
        values = row.get(key)
        if values is not None and (not isinstance(values, list) or len(values) != len(names)):
            raise RecordError(f"{where}: {key!r} must have one entry for each of {names!r}, or be null.")


def differences(
    stored: Mapping[str, Any],
    asked: Mapping[str, Any],
    ignore: Iterable[str] = VOLATILE,
    defaults: Mapping[str, Any] | None = None,
) -> list[tuple[str, Any, Any]]:
    """The keys in which two configurations differ, nested keys joined by dots.

    ``ignore`` names keys, dotted or not, whose whole content is left out. ``defaults`` gives by dotted key what an
    option stands for where ``stored`` lacks it: an earlier version did not know it.

    >>> differences({"seed": 0, "config": {"epochs": 3}}, {"seed": 0, "config": {"epochs": 5}})
    [('config.epochs', 3, 5)]
    >>> differences({"config": {}}, {"config": {"nesterov": False}}, defaults={"config.nesterov": False})
    []
    """
    known = {} if defaults is None else defaults
    ignored = frozenset(ignore)
    found: list[tuple[str, Any, Any]] = []

    def walk(prefix: str, left: Any, right: Any) -> None:
        if prefix in ignored:
            return
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            for key in dict.fromkeys([*left, *right]):
                name = f"{prefix}.{key}" if prefix else key
                walk(name, left.get(key, known.get(name, _ABSENT)), right.get(key, _ABSENT))
        # JSON tells true from 1, Python's == does not.
        elif left != right or isinstance(left, bool) != isinstance(right, bool):
            found.append((prefix, left, right))

    walk("", stored, asked)
    return found


def _need(record: Mapping[str, Any], key: str, kind: type, where: Path | str) -> Any:
    value = record.get(key, _ABSENT)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)) or value is _ABSENT:
        raise RecordError(f"{where}: {key!r} must be {_KINDS[kind]}; found {value!r}.")
    return value


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


_KINDS: dict[type, str] = {
    str: "a text",
    dict: "an object",
    list: "a list",
    int: "a whole number",
    bool: "true or false",
}
