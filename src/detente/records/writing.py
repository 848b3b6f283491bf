"""Write one run's folder while it trains, and continue it after an interruption."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
from numpy.typing import ArrayLike

from detente.records.atomic import json_line, plain, remove_unfinished, write_bytes, write_json
from detente.records.lock import Lock
from detente.records.reading import Run, complete_lines, read_rows, read_run
from detente.records.schema import (
    CONFIG,
    EPOCHS,
    RESULT,
    SAMPLES,
    STEPS,
    VOLATILE,
    ConfigMismatch,
    RecordError,
    UnwritableFolder,
    check_config,
    check_epoch,
    check_result,
    check_step,
    differences,
)

# Room for some hundred rows, so that recording a step does not wait for the disk.
_BUFFER = 1 << 18


class RunFolder:
    """The folder of one run, open for writing. Make one with `create` or `open_or_create`.

    Rows of steps are buffered; `append_epoch` hands everything to the operating system, `flush` to the disk.
    Call `flush` before saving a checkpoint: then every row up to it is there when the run resumes.
    Use it as a context manager, or call `close`: until then no other process can write to the folder.

    >>> import tempfile
    >>> from detente.records import read_run, versions
    >>> config = {
    ...     "schema": 1, "experiment": "mine", "label": "mgda (exact)", "method": "mgda", "options": {},
    ...     "gradients": "exact", "tasks": ["seg"], "main_metric": {"seg": "loss"}, "seed": 0, "config": {},
    ...     "metrics": [{"task": "seg", "name": "loss", "higher_is_better": False, "percent": False}],
    ...     "command": "python train.py", "versions": versions(), "started": "2025-01-01T12:00:00+00:00",
    ... }
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with RunFolder.create(Path(place) / "run", config) as folder:
    ...         folder.append_epoch({"epoch": 1, "step": 10, "train_loss": {"seg": float("nan")}})
    ...     run = read_run(Path(place) / "run")
    ...     run.finished, run.epochs[0]["train_loss"]
    (False, {'seg': None})
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._files: dict[str, TextIO] = {}
        self._lock: Lock | None = None

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> Self:
        """Start a new run: make the folder and write its configuration.

        Raises `RecordError` when the configuration is mis-shaped (nothing is written), FileExistsError when
        the folder already holds records, `UnwritableFolder` when it cannot be written, `FolderInUse` when another
        process writes to it.
        """
        path = Path(path)
        stored = plain(config)
        check_config(stored, "the configuration of the run")
        folder = cls(path)
        with _naming(path):
            path.mkdir(parents=True, exist_ok=True)
            folder._hold()
            present = [name for name in (CONFIG, EPOCHS, STEPS, SAMPLES, RESULT) if (path / name).exists()]
        if present:
            folder.close()
            raise FileExistsError(
                f"{path} already holds {', '.join(present)}. Choose another output folder or delete this one."
            )
        with _naming(path):
            write_json(path / CONFIG, stored)
        return folder

    @classmethod
    def open_or_create(
        cls,
        path: Path,
        config: Mapping[str, Any],
        ignore: Iterable[str] = VOLATILE,
        defaults: Mapping[str, Any] | None = None,
    ) -> Self:
        """Continue the run in this folder if it has the same configuration; start it if there is none.

        ``ignore`` names keys (nested ones joined by dots, as ``"config.out"``) that may differ, and
        ``defaults`` what such a key stands for where an earlier version did not store it. An incomplete
        last line, as a killed process leaves it, is cut off. The stored configuration stays as it was.
        Raises `ConfigMismatch` listing the keys that differ, and what `create` raises.
        """
        path = Path(path)
        with _naming(path):
            exists = (path / CONFIG).exists()
        if not exists:
            return cls.create(path, config)
        asked = plain(config)
        check_config(asked, "the configuration of the run")
        found = differences(
            read_run(path).config, asked, ignore, None if defaults is None else plain(defaults)
        )
        if found:
            raise ConfigMismatch(path, found)
        folder = cls(path)
        if folder.finished:  # nothing is written to it, unless it is measured later
            return folder
        with _naming(path):
            folder._hold()
        for name in (EPOCHS, STEPS):
            folder._repair(name)
        return folder

    @property
    def finished(self) -> bool:
        """Whether the result has been written."""
        return (self.path / RESULT).exists()

    def read(self) -> Run:
        """What the folder holds now, buffered rows included."""
        with _naming(self.path):
            for file in self._files.values():
                file.flush()
        return read_run(self.path)

    def append_step(self, row: Mapping[str, Any]) -> None:
        """Add one step: ``step``, ``epoch``, ``names`` and whatever else was recorded. Cheap: buffered."""
        stored = plain(row)
        check_step(stored, "a row of steps")
        self._append(STEPS, stored)

    def append_epoch(self, row: Mapping[str, Any]) -> None:
        """Add one epoch: ``epoch``, ``step`` (the last one in it), ``train_loss``, ``validation``, …

        The epoch's steps are handed to the operating system before it, so an epoch that is there is complete.
        """
        stored = plain(row)
        check_epoch(stored, "a row of epochs")
        with _naming(self.path):
            if STEPS in self._files:
                self._files[STEPS].flush()
        self._append(EPOCHS, stored)
        with _naming(self.path):
            self._files[EPOCHS].flush()

    def flush(self) -> None:
        """Bring every row to the disk, steps before epochs."""
        with _naming(self.path):
            for name in (STEPS, EPOCHS):
                if name in self._files:
                    self._files[name].flush()
                    os.fsync(self._files[name].fileno())

    def truncate_after(self, step: int) -> None:
        """Drop the rows after this step, so that a run resumed from a checkpoint does not record them twice.

        Raises `RecordError` when the run is finished: there is nothing to resume.
        """
        if self.finished:
            raise RecordError(f"{self.path} holds a finished run: its records cannot be cut.")
        self._let_go_of_files()
        for name, check, order in ((EPOCHS, check_epoch, "epoch"), (STEPS, check_step, "step")):
            path = self.path / name
            rows = read_rows(path, check, order)
            lines = complete_lines(path)
            # The lines themselves are kept, not written anew: the records stay equal byte for byte.
            kept = [line for line, row in zip(lines, rows, strict=True) if row["step"] <= step]
            if len(kept) < len(lines):
                with _naming(self.path):
                    write_bytes(path, b"".join(kept))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write the result and so mark the run as finished; all rows are brought to the disk before."""
        stored = plain(result)
        check_result(stored, "the result of the run")
        self.flush()
        with _naming(self.path):
            self._hold()
            write_json(self.path / RESULT, stored)

    def write_samples(
        self, images: ArrayLike, targets: Mapping[str, ArrayLike], predictions: Mapping[str, ArrayLike]
    ) -> None:
        """Store a few test images, uint8 [N, H, W] or [N, H, W, 3], with whole-number labels [N] by task.

        Raises ValueError naming the array whose type or length does not fit.
        """
        pictures = np.asarray(images)
        if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4):
            found = f"{pictures.dtype} {list(pictures.shape)}"
            raise ValueError(f"sample images must be uint8 [N, H, W] or [N, H, W, 3]; found {found}.")
        arrays = {"images": pictures}
        for prefix, labels in (("target", targets), ("prediction", predictions)):
            for task, values in labels.items():
                array = np.asarray(values)
                if array.shape != (len(pictures),) or not np.issubdtype(array.dtype, np.integer):
                    raise ValueError(
                        f"the {prefix} of task {task!r} must be {len(pictures)} whole numbers, one for each "
                        f"image; found {array.dtype} {list(array.shape)}."
                    )
                arrays[f"{prefix}_{task}"] = array.astype(np.int64)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # it also has a flag by keyword
        with _naming(self.path):
            write_bytes(self.path / SAMPLES, buffer.getvalue())

    def close(self) -> None:
        """Write what is buffered and let go of the folder; appending takes hold of it again."""
        try:
            self._let_go_of_files()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hold(self) -> None:
        """See that nobody else writes here: two processes that resume one run would mix their rows."""
        if self._lock is None:
            self._lock = Lock(self.path)
            remove_unfinished(self.path)

    def _let_go_of_files(self) -> None:
        with _naming(self.path):
            while self._files:
                _, file = self._files.popitem()
                file.close()

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with _naming(self.path):
            self._hold()
            if name not in self._files:
                self._files[name] = open(  # noqa: SIM115 - stays open between rows, closed by close()
                    self.path / name, "a", buffering=_BUFFER, encoding="utf-8", newline="\n"
                )
            self._files[name].write(json_line(row))

    def _repair(self, name: str) -> None:
        path = self.path / name
        whole = b"".join(complete_lines(path))
        if path.exists() and path.stat().st_size != len(whole):
            with _naming(self.path):
                write_bytes(path, whole)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what the file system says into an error that names the folder and what to do."""
    try:
        yield
    except UnwritableFolder:
        raise
    except OSError as error:
        raise UnwritableFolder(path, error) from error
