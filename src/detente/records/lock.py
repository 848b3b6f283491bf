"""One writer for each folder."""

from __future__ import annotations

import json
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FILE = ".lock"


class FolderInUse(RuntimeError):
    """Another process writes to this folder."""


class Lock:
    """A folder held for writing until :meth:`release`; the system lets go of it when the process ends, however it ends.

    The file ``.lock`` stays: removing it would let a third process lock another file of the same name.

    Args:
        folder: must exist.

    Raises:
        FolderInUse: somebody else holds it, who is named.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        file = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        # Also when nobody releases it: what is garbage holds nothing.
        self._close = weakref.finalize(self, os.close, file)
        if not _taken(file):
            holder = _told(os.pread(file, 1000, 0))
            self.release()
            raise FolderInUse(
                f"{folder} is written to by another process ({holder}). Wait until it ends, end it, or choose "
                "another folder."
            )
        try:
            os.ftruncate(file, 0)
            os.write(file, json.dumps({"process": os.getpid(), "machine": socket.gethostname()}).encode())
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Let go; doing so again is no mistake."""
        self._close()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder while this lasts.

    Args:
        folder: made if it does not exist.

    Raises:
        FolderInUse: somebody else holds it, who is named.
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place, locked(Path(place)):
        ...     pass
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder)
    try:
        yield
    finally:
        lock.release()


def _taken(file: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows has no such lock; there is one process then by agreement only
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _told(text: bytes) -> str:
    try:
        found = json.loads(text)
        return f"process {found['process']} on {found['machine']}"
    except (ValueError, KeyError, TypeError):
        return "which did not leave its name"
