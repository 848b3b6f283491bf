"""A process that has imported everything and forks a child for each command, so that kills come in quick succession.

``python -m benchmarks._nursery`` reads a JSON object from each line, ``arguments`` of `detente` and ``seconds`` after
which the child is killed (null: never), and answers with what the child ended with, negative for a signal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[1]


class Nursery:
    """Runs `detente` in children that start at once, and kills them when asked to."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._nursery"],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._line() != "ready":
            raise RuntimeError("the process that forks the others did not start")
        return self

    def run(self, arguments: Sequence[str], seconds: float | None) -> int:
        """What the command ended with; -9 if it was killed after so many seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"arguments": list(arguments), "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _child(arguments: list[str]) -> None:
    """Run the command and end with its exit code, without the parent's clean-up."""
    from detente.cli import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        main(arguments)
    except SystemExit as stopped:
        sys.stderr.flush()
        os._exit(int(stopped.code or 0))
    os._exit(99)


def _serve() -> None:
    import lightning_fabric  # noqa: F401 - so that the children need not
    import torch

    import detente.sweeps.sweep  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        process = os.fork()
        if process == 0:
            _child(asked["arguments"])
        end = time.monotonic() + (asked["seconds"] or 3600)
        while True:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                break
            if time.monotonic() > end:
                os.kill(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
                break
            time.sleep(0.001)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
