"""One writer for each folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FILE = ".lock"


class FolderInUse(RuntimeError):
    """Another process writes to this folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder while this lasts; the system lets go of it when the process ends, however it ends.

    Args:
        folder: made if it does not exist.

    Raises:
        FolderInUse: another process holds it; it is named.
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place, locked(Path(place)):
        ...     pass
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _FILE, "a+", encoding="utf-8") as file:
        if not _taken(file.fileno()):
            file.seek(0)
            raise FolderInUse(
                f"{folder} is written to by another process ({_told(file.read())}). Wait until it ends, end it, or "
                "choose another folder."
            )
        file.truncate(0)
        file.write(json.dumps({"process": os.getpid(), "machine": socket.gethostname()}))
        file.flush()
        yield


def _taken(file: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: its file systems refuse a second writer themselves
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _told(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['process']} on {found['machine']}"
    except (ValueError, KeyError, TypeError):
        return "which did not leave its name"
