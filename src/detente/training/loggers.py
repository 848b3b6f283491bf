"""The numbers of a run for TensorBoard, CSV, Weights & Biases or MLflow, beside its records.

The records in the run folder are the truth; a logger is given the same rows. What a run computes does not depend on
its loggers, and a run may be resumed with others.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detente.records import Run, write_json

BOOKS = "loggers.json"
"""In the run folder: what was sent to services that keep what they have."""


class LoggerMissing(ImportError):
    """A logger was asked for whose packages are not installed."""


class LoggerFailed(RuntimeError):
    """A logger did not start."""


@dataclass(frozen=True)
class _Kind:
    """One kind of logger.

    ``local``: its files lie in the run folder, and are written anew from the records when a run is resumed. Others
    keep what was sent once, so that a row is only sent if none as late was.
    """

    packages: tuple[str, ...]
    install: str
    local: bool
    make: Callable[[Path, Mapping[str, Any], dict[str, Any]], Any]


def check_loggers(names: Sequence[str]) -> None:
    """See that all these loggers can be used, before any training starts.

    Raises:
        ValueError: there is no logger of this name.
        LoggerMissing: its packages are not installed; the message has the command that installs them.

    Example:
        >>> check_loggers(["csv"])
        >>> check_loggers(["papyrus"])
        Traceback (most recent call last):
        ...
        ValueError: there is no logger 'papyrus'; there are csv, mlflow, tensorboard, wandb.
    """
    for name in names:
        if name not in _KINDS:
            raise ValueError(f"there is no logger {name!r}; there are {', '.join(sorted(_KINDS))}.")
        kind = _KINDS[name]
        missing = [package for package in kind.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise LoggerMissing(
                f"logger {name} needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}: "
                f"pip install {kind.install}"
            )


class Loggers:
    """All loggers of one run: they are given what the records are given, in the same order.

    A logger that fails while a run trains is left out from then on, with a warning: the records have everything.
    Random generators are left as they are found.

    Args:
        names: ``tensorboard``, ``csv``, ``wandb``, ``mlflow``; each once. In all processes but the first: none.
        folder: the run folder, which exists.
        config: the run's configuration as its record stores it.

    Raises:
        ValueError: an unknown name.
        LoggerMissing: a package is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     loggers = Loggers(["csv"], Path(place), {"experiment": "mine", "label": "mgda", "config": {}})
        ...     loggers.begin()
        ...     loggers.epoch({"epoch": 1, "step": 10, "train_loss": {"left": 0.5}, "validation": {}})
        ...     loggers.close()
        ...     print((Path(place) / "csv" / "metrics.csv").read_text().replace("\\r", ""))
        epoch,step,train_loss/left
        1.0,10,0.5
        <BLANKLINE>
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        check_loggers(names)
        self._names, self._folder, self._config = tuple(dict.fromkeys(names)), Path(folder), config
        self._open: dict[str, Any] = {}
        self._books: dict[str, dict[str, Any]] = {}
        self._tags: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._names)

    def begin(self, recorded: Run | None = None) -> None:
        """Open the loggers, and tell them what was recorded before this start of a resumed run.

        Args:
            recorded: the run as its folder holds it, without what comes after the checkpoint it goes on from.

        Raises:
            LoggerFailed: a logger cannot be opened: a service that is not reached, a wrong key.
        """
        if not self._names:
            return
        books = self._folder / BOOKS
        if books.exists():
            self._books = json.loads(books.read_bytes())
        with _same_random_numbers():
            for name in self._names:
                book = self._books.setdefault(name, {"step": -1, "epoch": -1, "result": -1})
                try:
                    self._open[name] = _KINDS[name].make(self._folder, self._config, book)
                    if not _KINDS[name].local:
                        write_json(books, self._books)
                        if book["step"] < 0:  # they cannot be told twice
                            self._open[name].log_hyperparams(_flat(self._config))
                except Exception as error:
                    self.close()
                    raise LoggerFailed(
                        f"logger {name} did not start ({type(error).__name__}: {error}). Mend that, or train without "
                        f"--logger {name}: the records of the run have everything."
                    ) from error
        if recorded is not None:
            for row in recorded.steps:
                self.step(row)
            for row in recorded.epochs:
                self.epoch(row)

    def step(self, row: Mapping[str, Any]) -> None:
        """One recorded step."""
        self._log(_step_scalars(row), row["step"], "step")

    def epoch(self, row: Mapping[str, Any]) -> None:
        """One epoch; what was logged up to it is brought to the disk."""
        self._log(_epoch_scalars(row), row["step"], "epoch")
        for name, logger in list(self._open.items()):
            self._attempt(name, logger.save)

    def finish(self, result: Mapping[str, Any]) -> None:
        """The result of a run that has ended, and the end of the logs."""
        found = _result_scalars(result)
        self._log(found, int(result.get("steps") or 0), "result")
        if "tensorboard" in self._open:
            # Its table of configurations wants the results beside them.
            self._attempt(
                "tensorboard",
                lambda: self._open["tensorboard"].log_hyperparams(_flat(self._config), self._tagged(found)),
            )
        self.close("success")

    def close(self, status: str = "failed") -> None:
        """End the logs, ``success`` or ``failed``; a run that goes on later opens them again."""
        for name in list(self._open):
            self._attempt(name, partial(_end, name, self._open[name], status))
        self._open = {}

    def _log(self, scalars: Mapping[str, Any], step: int, what: str) -> None:
        tagged = self._tagged(scalars)
        for name, logger in list(self._open.items()):
            if not _KINDS[name].local:
                book = self._books[name]
                if step <= book[what]:
                    continue
                # Told before it is sent: what is lost by a kill in between is in the records, twice is for ever.
                book[what] = step
                write_json(self._folder / BOOKS, self._books)
            self._attempt(name, partial(logger.log_metrics, tagged, step=step))

    def _attempt(self, name: str, act: Callable[[], Any]) -> None:
        try:
            with _same_random_numbers():
                act()
        except Exception as error:
            self._open.pop(name, None)
            warnings.warn(
                f"{self._folder}: logger {name} failed and is left out from now on ({error}); the records go on.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _tagged(self, scalars: Mapping[str, Any]) -> dict[str, float]:
        """Finite numbers under names that every service accepts, each name for one quantity."""
        return {
            self._tag(name): float(value)
            for name, value in scalars.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }

    def _tag(self, name: str) -> str:
        if name not in self._tags:
            plain, number = re.sub(r"[^\w .\-/]", "_", name, flags=re.ASCII), 1
            found = plain
            while found in self._tags.values():
                number += 1
                found = f"{plain}-{number}"
            self._tags[name] = found
        return self._tags[name]


# ---- rows to scalars


def _step_scalars(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"refused_step": 1.0 if row.get("status") == "refused" else 0.0}
    for title, key in (("loss", "losses"), ("weight", "weights")):
        if row.get(key) is not None:
            pairs = zip(row["names"], row[key], strict=True)
            found |= {f"{title}/{name}": value for name, value in pairs if value is not None}
    for title, key in (("gradients", "raw"), ("altered_gradients", "altered")):
        measured = row.get(key) or {}
        found |= {f"{title}/{name}": v for name, v in measured.items() if isinstance(v, int | float)}
        norms = measured.get("norms", ())
        found |= {f"{title}/norm/{name}": v for name, v in zip(row["names"], norms, strict=False)}
    return found


def _epoch_scalars(row: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: row.get(name) for name in ("epoch", "learning_rate", "refused", "seconds")}
    for name in ("train_loss", "validation", "search", "method"):
        found |= _flat({name: row.get(name) or {}})
    return found


def _result_scalars(result: Mapping[str, Any]) -> dict[str, Any]:
    return _flat({"test": result.get("metrics") or {}})


def _flat(nested: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{start}{key}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}/")
        else:
            found[name] = value if isinstance(value, int | float | str | None) else str(value)
    return found


# ---- the kinds


def _tensorboard(folder: Path, config: Mapping[str, Any], book: dict[str, Any]) -> Any:
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
        old.unlink()
    return TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)


def _csv(folder: Path, config: Mapping[str, Any], book: dict[str, Any]) -> Any:
    from lightning_fabric.loggers.csv_logs import CSVLogger

    (folder / "csv" / "metrics.csv").unlink(missing_ok=True)
    return CSVLogger(folder, name="", version="csv", flush_logs_every_n_steps=10**9)


def _wandb(folder: Path, config: Mapping[str, Any], book: dict[str, Any]) -> Any:
    from lightning.pytorch.loggers import WandbLogger

    book.setdefault("run", f"{random.SystemRandom().getrandbits(64):016x}")
    return WandbLogger(
        project=config["experiment"],
        name=config["label"],
        id=book["run"],
        resume="allow",
        save_dir=str(folder),
    )


def _mlflow(folder: Path, config: Mapping[str, Any], book: dict[str, Any]) -> Any:
    from lightning.pytorch.loggers import MLFlowLogger

    own = Path(folder).resolve()
    server = os.environ.get("MLFLOW_TRACKING_URI")
    logger = MLFlowLogger(
        experiment_name=config["experiment"],
        run_name=config["label"],
        run_id=book.get("run"),
        # A folder of files, Lightning's choice without an address, MLflow refuses by now (3.17 does).
        tracking_uri=server or f"sqlite:///{own / 'mlflow.db'}",
        artifact_location=None if server else (own / "mlflow").as_uri(),
    )
    book["run"] = logger.run_id
    return logger


_KINDS = {
    "tensorboard": _Kind(("lightning_fabric", "tensorboard"), "'detente[train]'", True, _tensorboard),
    "csv": _Kind(("lightning_fabric",), "'detente[train]'", True, _csv),
    "wandb": _Kind(("wandb", "lightning"), "wandb lightning", False, _wandb),
    "mlflow": _Kind(("mlflow", "lightning"), "mlflow lightning", False, _mlflow),
}


def _end(name: str, logger: Any, status: str) -> None:
    logger.finalize(status)
    if name == "wandb":  # it would go on with the next run of this process
        logger.experiment.finish()


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Whatever a logger draws, the run draws what it would have drawn without."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - the shared generator
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        torch.set_rng_state(state[2])
