"""Small files that are either there in full or not at all, and numbers that JSON can carry."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically: a reader, or a killed program, never sees half of it.

    The bytes go to a temporary name in the same folder, reach the disk, and take the final name last.
    Raises OSError as the file system does; the temporary file is then removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a killed writer left; only who holds the folder may do so.

    >>> Path(".checkpoint.pt.123.tmp").touch()
    >>> remove_unfinished(Path("."))
    >>> Path(".checkpoint.pt.123.tmp").exists()
    False
    """
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically, in UTF-8 with newlines as given.

    Whoever reads ``path`` meanwhile sees the old text or the new one, never a part.

    Raises:
        OSError: the folder is missing or may not be written to.

    >>> write_text(Path("note.txt"), "λ = 0.1")
    >>> Path("note.txt").read_text("utf-8")
    'λ = 0.1'
    """
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically; numbers that are not finite become null.

    Raises:
        TypeError: a value is none that JSON can hold.
        OSError: the folder is missing or may not be written to.

    >>> write_json(Path("result.json"), {"loss": float("inf"), "epochs": 3})
    >>> json.loads(Path("result.json").read_text("utf-8"))
    {'loss': None, 'epochs': 3}
    """
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def json_line(value: Mapping[str, Any]) -> str:
    """One line of a JSON-lines file, with its newline; `value` as `plain` returns it.

    >>> json_line(plain({"step": 1, "losses": (0.5, float("nan"))}))
    '{"step":1,"losses":[0.5,null]}\\n'
    """
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any, where: str = "") -> Any:
    """What JSON will give back: lists, objects, texts, numbers; null for numbers that are not finite.

    Accepts numpy scalars and arrays, tuples and paths. Raises TypeError naming the key of anything else.

    >>> plain({"a": (1, float("inf")), "b": np.float32(0.5)})
    {'a': [1, None], 'b': 0.5}
    """
    if value is None or isinstance(value, bool | str):
        # A str subclass (an enum's value) is stored as the text that it is.
        return str.__str__(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"cannot store {where or 'a record'}: its key {key!r} is not a text.")
        return {str(key): plain(item, f"{where}.{key}" if where else key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist(), where)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    kind = type(value).__name__
    raise TypeError(f"cannot store {where or 'a record'}: {kind} is not a number, text, list or object.")


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut, where the system allows folders to be synchronised."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
