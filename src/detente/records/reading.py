"""Read run folders: tolerant of a run that is going on or was killed, strict about everything else."""

from __future__ import annotations

import gc
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detente.records.schema import (
    CONFIG,
    EPOCHS,
    RESULT,
    SAMPLES,
    STEPS,
    RecordError,
    Row,
    check_config,
    check_epoch,
    check_result,
    check_step,
)


@dataclass(frozen=True)
class Metric:
    """One measured quantity of a task: its name, its direction, and whether it is shown in percent.

    Stored values are fractions in [0, 1] where ``percent`` is True; only reports multiply by 100.

    >>> Metric("left", "accuracy", higher_is_better=True, percent=True).name
    'accuracy'
    """

    task: str
    name: str
    higher_is_better: bool
    percent: bool


@dataclass(frozen=True)
class Samples:
    """A few test images, with what they show and what a network said.

    Attributes:
        images: uint8 [N, H, W], or [N, H, W, 3] for colour.
        targets: task to int64 [N] class indices.
        predictions: task to int64 [N], as the run's network predicted.
    """

    images: NDArray[np.uint8]
    targets: Mapping[str, NDArray[np.int64]]
    predictions: Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Run:
    """One stored run. Configuration and result are read at once; the long files when first asked for.

    ``result`` is None while the run is not finished, ``samples`` when none were stored. ``epochs`` and
    ``steps`` are tuples of rows in the order of training; a last line that a killed process left
    incomplete is not among them. Reading them raises `RecordError` naming file and line if they are damaged.
    """

    path: Path
    config: Mapping[str, Any]
    result: Mapping[str, Any] | None

    @cached_property
    def epochs(self) -> tuple[Row, ...]:
        """Rows of ``epochs.jsonl``."""
        return read_rows(self.path / EPOCHS, check_epoch, "epoch")

    @cached_property
    def steps(self) -> tuple[Row, ...]:
        """Rows of ``steps.jsonl``."""
        return read_rows(self.path / STEPS, check_step, "step")

    @cached_property
    def samples(self) -> Samples | None:
        """What ``samples.npz`` holds, or None."""
        return _read_samples(self.path / SAMPLES)

    @property
    def experiment(self) -> str:
        """The experiment's name."""
        return str(self.config["experiment"])

    @property
    def label(self) -> str:
        """How the run is called in tables and figures."""
        return str(self.config["label"])

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config["method"])

    @property
    def gradients(self) -> str:
        """Where the problem was solved: ``exact``, ``features``, ``layer`` or ``none``."""
        return str(self.config["gradients"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in order."""
        return tuple(self.config["tasks"])

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.config["seed"])

    @property
    def finished(self) -> bool:
        """Whether the run has a result."""
        return self.result is not None

    def main_metric(self, task: str) -> Metric:
        """The metric by which this task is judged."""
        name = self.config["main_metric"][task]
        for metric in self.config["metrics"]:
            if metric["task"] == task and metric["name"] == name:
                return Metric(task, name, metric["higher_is_better"], metric["percent"])
        raise RecordError(f"{self.path / CONFIG}: task {task!r} has no metric {name!r}.")

    def main_value(self, task: str) -> float | None:
        """The task's main metric on test data; None while unfinished, or when it was not finite."""
        if self.result is None:
            return None
        value = self.result["metrics"].get(task, {}).get(self.config["main_metric"][task])
        return None if value is None else float(value)


def read_run(path: Path) -> Run:
    """Read one run folder.

    Raises `RecordError` naming the file (FileNotFoundError when there is no ``config.json``).
    """
    path = Path(path)
    config = _read_object(path / CONFIG)
    check_config(config, path / CONFIG)
    result = None
    if (path / RESULT).exists():
        result = _read_object(path / RESULT)
        check_result(result, path / RESULT)
    return Run(path, config, result)


def find_runs(folder: Path, unreadable: list[RecordError] | None = None) -> list[Run]:
    """All runs in a folder and below it, in the order of their paths; the folder may be a run itself.

    A ``config.json`` that is no run's (no ``schema``, no ``experiment``) is passed over, and so are hidden
    folders. Damaged runs raise `RecordError`; with a list as ``unreadable`` they are collected there instead.
    Raises FileNotFoundError when the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    runs: list[Run] = []
    for place, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if CONFIG not in files:
            continue
        try:
            runs.append(read_run(Path(place)))
        except RecordError as error:
            if _is_foreign(Path(place) / CONFIG):
                continue
            if unreadable is None:
                raise
            unreadable.append(error)
    return runs


def read_rows(path: Path, check: Callable[[Mapping[str, Any], str], None], order: str) -> tuple[Row, ...]:
    """The rows of a JSON-lines file, checked one by one; an incomplete last line is left out.

    ``order`` names the key that must grow from row to row. A missing file has no rows.
    """
    rows: list[Row] = []
    with no_collections():
        for number, line in enumerate(complete_lines(path), start=1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RecordError(
                    f"{where} is not valid JSON ({error}); restore it, or run again."
                ) from error
            if not isinstance(row, dict):
                raise RecordError(f"{where} must be an object; found {row!r}.")
            check(row, where)
            if rows and row[order] <= rows[-1][order]:
                before = rows[-1][order]
                raise RecordError(
                    f"{where}: {order} {row[order]} follows {order} {before}; two runs are mixed."
                )
            rows.append(row)
    return tuple(rows)


@contextmanager
def no_collections() -> Iterator[None]:
    """Read many rows without the collector of cycles: rows have none, and looking through all of them again and again
    takes as long as reading them.

    >>> with no_collections():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def complete_lines(path: Path) -> list[bytes]:
    """The lines of a JSON-lines file, each with its newline, without an incomplete last one.

    No part of an object but the whole of it is valid JSON, so a last line without newline is complete
    exactly when it can be read.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    if lines and not lines[-1].endswith(b"\n"):
        last = lines.pop()
        try:
            json.loads(last)
        except ValueError:
            pass
        else:
            lines.append(last + b"\n")
    return lines


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} is not a run folder: it has no {path.name}.") from None
    except ValueError as error:
        raise RecordError(f"{path} is not valid JSON ({error}): restore the file, or run again.") from error
    if not isinstance(value, dict):
        raise RecordError(f"{path} must hold one object.")
    return value


def _is_foreign(path: Path) -> bool:
    try:
        value = _read_object(path)
    except RecordError:
        return False
    return "schema" not in value and "experiment" not in value


def _read_samples(path: Path) -> Samples | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        return None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise RecordError(f"{path} cannot be read ({error}).") from error
    images = arrays.pop("images", None)
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise RecordError(f"{path}: 'images' must be bytes of shape [N, H, W] or [N, H, W, 3].")
    for name, values in arrays.items():
        if values.shape != (len(images),) or not np.issubdtype(values.dtype, np.integer):
            raise RecordError(f"{path}: {name!r} must hold a whole number for each of {len(images)} images.")
    return Samples(images, _with_prefix(arrays, "target_"), _with_prefix(arrays, "prediction_"))


def _with_prefix(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[np.int64]]:
    chosen = {name: values for name, values in arrays.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): values.astype(np.int64) for name, values in chosen.items()}
